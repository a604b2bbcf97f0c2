"""Checking data against the JSON schemas, with the place of the offending key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from engine.errors import EngineError, Errors, Place, meant
from engine.language.documents import Document
from engine.language.keys import WORDS
from engine.language.search import bundled

_VERSIONS = {"mapping": 1, "layout": 1}
_TYPES = {**WORDS, "object": WORDS["mapping"], "array": WORDS["list"]}
_LIKE = 20  # unknown keys for which a similar known one is searched: that takes long
# Parts of a mapping whose entries have names, and what one is called.
_NAMED = {"rules": "rule", "options": "option", "variants": "variant"}
# What people write for types of `keys`.
_PYTHON = {"int": "integer", "float": "number", "str": "string", "bool": "boolean", "dict": "mapping", "array": "list",
           "object": "mapping", "tuple": "list"}  # fmt: skip


@lru_cache(maxsize=8)
def _schema(kind: str) -> Any:
    return json.loads((bundled("schemas") / f"{kind}.schema.json").read_text("utf-8"))


@lru_cache(maxsize=8)
def _checker(kind: str) -> Any:
    from jsonschema_rs import Draft7Validator

    return Draft7Validator(_schema(kind))


@lru_cache(maxsize=8)
def _validator(kind: str) -> Any:
    from jsonschema import Draft7Validator

    return Draft7Validator(_schema(kind))


def _as_json(data: Any) -> Any:
    """Data in which keys that are numbers, such as token ids, are texts, as in JSON.

    >>> _as_json({"renamed": {92538: "<|plugin|>"}})
    {'renamed': {'92538': '<|plugin|>'}}
    """
    if isinstance(data, dict):
        return {str(key) if type(key) is int else key: _as_json(value) for key, value in data.items()}
    return [_as_json(value) for value in data] if isinstance(data, list) else data


def violations(data: Any, kind: str) -> Iterator[Any]:
    """Where data breaks the schema of its kind, as errors of `jsonschema`, each found on demand.

    `jsonschema_rs` checks first: it is imported three times as fast, and checks a hundred times as fast. Only if it
    finds an error does `jsonschema` look for all of them and put them into words.
    """
    if _is_valid(data, kind) or _is_valid(_as_json(data), kind):  # most data has no numbers as keys
        return
    yield from _validator(kind).iter_errors(data)


def first_violation(data: Any, kind: str) -> str | None:
    """The first place where data breaks the schema of its kind, in words; None for data that does not."""
    found = next(violations(data, kind), None)
    return None if found is None else f"{'.'.join(map(str, found.absolute_path)) or 'the file'}: {found.message[:160]}"


def _is_valid(data: Any, kind: str) -> bool:
    try:
        return bool(_checker(kind).is_valid(data))
    except ValueError:  # what JSON cannot hold
        return False


def check_schema(document: Document, kind: str, *, merged: bool = False) -> None:
    """Raise every violation as E102; an unknown major version is refused plainly.

    A mapping that `extends` another need not repeat what its parent says; the merged data,
    which has no `extends`, must say everything.

    Args:
        merged: whether the rules have become a mapping of name → rule.
    """
    version = document.data.get(kind)
    if isinstance(version, int) and not isinstance(version, bool) and version != _VERSIONS[kind]:
        raise EngineError(
            "E102",
            f"version {version} of the {kind} language is not known",
            place=document.place(kind),
            got=f"{kind}: {version}",
            expected=f"{kind}: {_VERSIONS[kind]}",
            fix="Use an engine that knows it, or write the file in version 1.",
        )
    data, names = document.data, None
    if merged and "rules" in data:
        names = list(data["rules"])
        data = {**data, "rules": list(data["rules"].values())}
    found = Errors()
    missing: list[tuple[Sequence[str], EngineError]] = []
    near: set[str] = set()
    broken = list(violations(data, kind))
    told_already = [error.absolute_path for error in broken if error.validator in ("required", "type")]
    for error in broken:
        if error.validator == "oneOf" and error.absolute_path in told_already:
            continue  # another error says which key is missing, or that it is not a mapping
        path: list[str | int] = list(error.absolute_path)
        if names is not None and path[:1] == ["rules"] and len(path) > 1:
            path[1] = names[int(path[1])]
        for told in _explain(error, document, kind, path):
            if lacks := _missing(error):
                missing.append((lacks, told))
            else:
                found.found.append(told)
                near.add(str(told.fix))
    # A misspelt key is also a missing key; the former message tells more.
    found.found += [told for keys, told in missing if not any(f"`{key}`" in fix for key in keys for fix in near)]
    found.check()


def _missing(error: Any) -> list[str]:
    """The key that is missing, or the keys of which one must be there and none is."""
    if error.validator == "required":
        return [next(k for k in error.validator_value if k not in error.instance)]
    keys = _choices(error) if error.validator == "oneOf" else []
    return [] if any(key in error.instance for key in keys) else keys


def _choices(error: Any) -> list[str]:
    """The keys of which there must be one."""
    return [key for branch in error.validator_value for key in branch.get("required", [])]


def _explain(error: Any, document: Document, kind: str, path: list[str | int]) -> list[EngineError]:
    """A violation in words; several keys that do not exist are several errors."""
    where = _where(document, path)
    described = error.schema.get("description") if isinstance(error.schema, dict) else None
    got: str = short(error.instance)
    expected: str | None = None
    fix: str | None = described
    place: Place = document.place(*path)
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        extra = [key for key in error.instance if key not in known]
        return [
            _extra(key, known, where, document.place(*path, key), like=number < _LIKE)
            for number, key in enumerate(extra)
        ]
    if error.validator == "required":
        return [_lacking(error, document, kind, path, where)]
    if error.validator == "oneOf":
        return [_not_one(error, where, place)]
    if error.validator == "type":
        types = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        named = [_TYPES[t] for t in types if t != "integer" or "number" not in types]
        expected = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} or {named[-1]}"
        message = f"{where} is {_kind(error.instance)}, not {expected}"
        if "string" in types and isinstance(error.instance, int | float) and not isinstance(error.instance, bool):
            fix = "Put it in quotes."
    elif error.validator == "anyOf":
        allowed = [str(value) for b in error.validator_value for value in b.get("enum", ()) if value is not None]
        named = [_TYPES[b["type"]] for b in error.validator_value if "enum" not in b and isinstance(b.get("type"), str)]
        expected = ", ".join(allowed) + (" or " if allowed and named else "") + " or ".join(named)
        message = f"{where} has an unknown value" if allowed else f"{where} is {_kind(error.instance)}, not {expected}"
        fix = f"Did you mean `{_PYTHON[got]}`?" if got in _PYTHON else meant(got, allowed, described)
    elif error.validator == "pattern" and "propertyNames" in error.absolute_schema_path:
        message, expected, fix = f"`{got}` is not a key of {where}", described, "Correct the key."
    elif error.validator == "pattern":
        message = f"{where} cannot be `{got}`"
    elif error.validator == "enum":
        allowed = [str(v) for v in error.validator_value]
        message, expected = f"{where} has an unknown value", ", ".join(allowed)
        fix = meant(str(error.instance), allowed, described)
    else:
        message = f"{where} does not fit: {error.message[:160]}"
    return [EngineError("E102", message, place=place, got=got, expected=expected, fix=fix)]


def _lacking(error: Any, document: Document, kind: str, path: list[str | int], where: str) -> EngineError:
    """A key that is missing; in an entry that might be meant to change an inherited one, similar names too."""
    (missing,) = _missing(error)
    message, expected = f"the key `{missing}` is missing in {where}", f"{missing}: …"
    fix = _description(_schema(kind), path, missing)
    if kind == "mapping" and len(path) == 2 and path[0] in _NAMED and isinstance(path[1], str):
        one = _NAMED[path[0]]
        others = [name for name in document.data[path[0]] if name != path[1]]
        near = get_close_matches(path[1], others, 3, 0.5)
        message = f"{one} `{path[1]}` is new in this file, and has no `{missing}`"
        expected = f"`{missing}`, or the name of an inherited {one}"
        expected += f": {', '.join(near)}" if near else ""
        fix = f"Did you mean {one} `{near[0]}`?" if near else fix
    got = ", ".join(map(str, error.instance)) or "nothing"
    return EngineError("E102", message, place=document.place(*path), got=got, expected=expected, fix=fix)


def _not_one(error: Any, where: str, place: Place) -> EngineError:
    """None, or several, of keys of which there must be one."""
    keys = _choices(error)
    given, expected = [k for k in keys if k in error.instance], f"one of {', '.join(keys)}"
    if given:
        message, got, fix = f"{where} says more than one of {', '.join(keys)}", ", ".join(given), "Keep one of them."
    else:
        message = f"the key {' or '.join(f'`{key}`' for key in keys)} is missing in {where}"
        got, fix = ", ".join(map(str, error.instance)) or "nothing", "Add one of them."
    return EngineError("E102", message, place=place, got=got, expected=expected, fix=fix)


def _extra(key: Any, known: list[str], where: str, place: Place, *, like: bool) -> EngineError:
    return EngineError(
        "E102",
        f"there is no key `{key}` in {where}",
        place=place,
        got=str(key),
        expected="one of " + ", ".join(known),
        fix=meant(str(key), known if like else (), "Remove it, or correct its name."),
    )


def _where(document: Document, path: list[str | int]) -> str:
    """A place in a file by its keys; a rule goes by its name."""
    if not path:
        return "the file"
    if path[0] == "rules" and len(path) > 1:
        rules = document.data.get("rules")
        key: Any = path[1]
        rule = rules[key] if isinstance(rules, list | dict) else None
        source = rule.get("name") or rule.get("source") if isinstance(rule, dict) else None
        name = source[0] if isinstance(source, list) and source else source
        told = f"rule `{name if isinstance(name, str) else path[1]}`"
        return told if len(path) == 2 else f"`{'.'.join(map(str, path[2:]))}` of {told}"
    return f"`{'.'.join(map(str, path))}`"


def _kind(value: Any) -> str:
    kinds = ((bool, "true or false"), (int, "a whole number"), (float, "a number"), (str, "a text"), (list, "a list"),
             (dict, "keys and values"))  # fmt: skip
    return next((word for kind, word in kinds if isinstance(value, kind)), "nothing")


def _description(schema: Any, path: list[str | int], key: str) -> str | None:
    """What the schema says of a key, found by following a path of data through it."""
    for step in path:
        if not isinstance(schema, dict):
            return None
        below = schema.get("properties", {}).get(step)
        schema = below or schema.get("items") or schema.get("additionalProperties")
    found = schema.get("properties", {}).get(key) if isinstance(schema, dict) else None
    return None if found is None else found.get("description")


def short(value: Any, most: int = 120) -> str:
    """A value as a message can tell it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"
