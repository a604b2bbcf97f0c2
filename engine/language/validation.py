"""Checking data against the JSON schemas, with the place of the offending key."""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from engine.errors import EngineError
from engine.language.documents import Document
from engine.language.search import bundled

_VERSIONS = {"mapping": 1, "layout": 1}


@lru_cache(maxsize=8)
def _validator(kind: str) -> Any:
    from jsonschema import Draft7Validator

    return Draft7Validator(json.loads((bundled("schemas") / f"{kind}.schema.json").read_text("utf-8")))


def check_schema(document: Document, kind: str) -> None:
    """E102 for the most telling violation; an unknown major version is refused plainly."""
    version = document.data.get(kind) if isinstance(document.data, dict) else None
    if version is not None and version != _VERSIONS[kind]:
        raise EngineError("E102", f"{kind} language version {version} is not known", place=document.place(kind), got=str(version),
                          expected=str(_VERSIONS[kind]), fix="Use a newer engine, or a file of version 1.")  # fmt: skip
    data = document.data
    if kind == "mapping" and isinstance(data, dict) and isinstance(data.get("rules"), dict):
        data = {**data, "rules": list(data["rules"].values())}
    from jsonschema.exceptions import best_match

    error = best_match(_validator(kind).iter_errors(data))
    if error is None:
        return
    path: list[str | int] = list(error.absolute_path)
    if path[:1] == ["rules"] and len(path) > 1 and isinstance(document.data["rules"], dict):
        path[1] = list(document.data["rules"])[int(path[1])]
    fix = "See the schema's description of this key."
    got = json.dumps(error.instance, default=str)[:120]
    expected = None
    message = error.message[:200]
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        extra = next(k for k in error.instance if k not in known)
        near = get_close_matches(str(extra), known, 1)
        message, got, expected = f"there is no key `{extra}` here", str(extra), ", ".join(known)
        fix = f"Did you mean `{near[0]}`?" if near else "Remove it."
        path.append(extra)
    elif error.validator == "required":
        missing = next(k for k in error.validator_value if k not in error.instance)
        message, got, expected = f"the key `{missing}` is missing", ", ".join(map(str, error.instance)) or "nothing", missing
        fix = error.schema.get("properties", {}).get(missing, {}).get("description", fix)
    elif error.validator in ("type", "enum", "const", "pattern"):
        expected = json.dumps(error.validator_value)
        fix = error.schema.get("description", fix)
    raise EngineError("E102", message, place=document.place(*path), got=got, expected=expected, fix=fix)
