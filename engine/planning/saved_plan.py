"""Saved plans: the request, its sources and the result, in one small file.

Copies are computed again when a saved plan is run; the file holds what the result must be.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.checkpoint.identity import marks_of
from engine.errors import EngineError, Place, holds_secret
from engine.language.documents import changed
from engine.language.model import Layout, MappingFile
from engine.language.validation import first_violation
from engine.language.version import __version__
from engine.planning.model import Plan, digest_of_plan
from engine.planning.request import Request
from engine.planning.zeros import ZEROS
from engine.storage.json_text import compact_json, parse_json

VERSION = 3
MAX_BYTES = 64 << 20
AGAIN = "Plan again with `engine plan -o`, and look at what differs before running it."
_ALWAYS = ("mapping", "src", "settings", "dtype", "max_shard_size", "strict")


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A saved plan that was read: its request, and the whole file, as data and as bytes.

    A plan that reads with one mapping and writes with another contains the plan of the first.
    """

    path: str
    request: Request
    data: Mapping[str, Any]
    raw: bytes
    through: SavedPlan | None = None  # the plan whose output is read, if that is never written

    @property
    def digest(self) -> str:
        """The digest that identifies the work for its parts."""
        return digest_of(self.raw)


def request_data(asked: Request) -> dict[str, Any]:
    """A request as JSON data: values that differ from the default, and a few always.

    Raises:
        EngineError: E001 for a mapping or source that is not a file: another process could not load it.
    """
    if isinstance(asked.mapping, MappingFile):
        raise EngineError(
            "E001",
            "a plan can be saved only for a mapping given by name or path",
            got=f"the loaded mapping `{asked.mapping.name}`",
            expected="a path, or the name of a bundled mapping",
        )
    if not isinstance(asked.src, str | Path):
        raise EngineError(
            "E001",
            "a plan can be saved only for a checkpoint that exists",
            got=f"{asked.src!s:.80}",
            expected="a path or a URL",
            fix="Write the intermediate checkpoint first.",
        )
    if holds_secret(str(asked.src)):
        raise EngineError(
            "E001",
            "a plan with a password in it cannot be saved",
            place=Place(str(asked.src)),
            expected="a URL without user and password",
            fix="Give access in another way, such as the provider's environment variables.",
        )
    data: dict[str, Any] = {}
    plain = Request("")
    for one in fields(Request):
        value = getattr(asked, one.name)
        if one.name in _ALWAYS or value != getattr(plain, one.name):
            data[one.name] = _plain(value)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in sorted(value)}
    return list(value) if isinstance(value, tuple | list) else value


def saved_plan(
    plan: Plan,
    asked: Request,
    rules: Sequence[Mapping[str, Any]],
    work: Mapping[str, Any] | None,
    template: str | None,
    through: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a saved plan; its schema is `schemas/saved-plan.schema.json`.

    Args:
        rules: what goes where, for review, from `describe_rules`.
        work: the same in full, for parts, from `work_data`.
        template: the text of the mapping's chat template.
        through: the content of `plan.through`.
    """
    layout = plan.layout
    return {
        "plan": VERSION,
        "engine": __version__,
        "request": request_data(asked),
        "mapping": {"name": plan.mapping.name, "version": plan.mapping.version, "digest": plan.mapping.digest},
        "layout": {"name": layout.name, "version": layout.version, "digest": layout.digest},
        "files": [marks_of(file) for file in plan.files if file is not ZEROS],  # zeros are not a file
        "sizes": {name: plan.sizes[name] for name in sorted(plan.sizes)},
        "variants": {name: plan.decisions[name].choice for name in sorted(plan.decisions)},
        "options": {name: plan.options[name] for name in sorted(plan.options)},
        "mode": plan.grid.mode.name,
        "ranks": dict(plan.grid.sizes),
        "rules": [{key: value for key, value in row.items() if key != "place"} for row in rules],
        "outputs": plan.written_files(),
        "config": dict(sorted(plan.config.items())),
        "digest": digest_of_plan(plan),
        **({} if work is None else {"work": work}),
        **({} if template is None else {"chat_template": digest_of(template.encode())}),
        **({} if through is None else {"through": through}),
    }


def digest_of(raw: bytes) -> str:
    """The SHA-256 of a file's content."""
    return hashlib.sha256(raw).hexdigest()


def encode(data: Mapping[str, Any]) -> bytes:
    """The file of a saved plan."""
    return compact_json(data).encode()


def is_saved_plan(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a saved plan."""
    return re.match(rb'\{\s*"plan": \d+,\s*"engine": "', start) is not None


def parse_saved_plan(path: Path, raw: bytes) -> SavedPlan:
    """Parse a saved plan; at most one byte more than `MAX_BYTES` is needed. E102 when it is not one."""
    if len(raw) > MAX_BYTES:
        raise unreadable(path, f"more than {MAX_BYTES} bytes")
    try:
        data = parse_json(raw, own=True)
    except ValueError as error:
        raise unreadable(path, str(error)) from error
    if isinstance(data, dict) and isinstance(data.get("plan"), int) and data["plan"] != VERSION:
        raise EngineError(
            "E102",
            f"version {data['plan']} of saved plans is not known",
            place=Place(str(path)),
            got=f"plan: {data['plan']}",
            expected=f"plan: {VERSION}",
            fix="Use an engine that knows it, or plan again.",
        )
    through = data.get("through") if isinstance(data, dict) else None
    read = _read(path, data, raw)
    if (through is None) != (read.request.to is None):
        raise unreadable(path, "two mappings with the plan of one, or two plans of one mapping")
    if through is None:
        return read
    first = _read(path, through, raw)
    one, two = first.request, read.request
    if (one.mapping, one.src, one.to) != (two.mapping, two.src, None):
        raise unreadable(path, "`through` is another request's")
    return replace(read, through=first)


def _read(path: Path, data: Any, raw: bytes) -> SavedPlan:
    """A saved plan, without the one that it reads through."""
    own = {key: value for key, value in data.items() if key != "through"} if isinstance(data, dict) else data
    if problem := first_violation(own, "saved-plan"):
        raise unreadable(path, problem)
    try:
        asked = Request(**own["request"])
    except EngineError as error:
        raise unreadable(path, error.message) from None
    return SavedPlan(str(path), asked, own, raw)


def unreadable(path: Path | str, why: str) -> EngineError:
    """E102 for a file that is not a saved plan."""
    return EngineError(
        "E102",
        "the file is not a saved plan",
        place=Place(str(path)),
        got=why,
        expected="what `engine plan -o` writes",
        fix="Plan again with `engine plan -o`.",
    )


def check_rules(saved: SavedPlan, mapping: MappingFile, layout: Layout) -> None:
    """E217 unless mapping and layout are those of the saved plan."""
    for kind, now in (("mapping", mapping), ("layout", layout)):
        then = saved.data[kind]
        if then["digest"] != now.digest:
            raise EngineError(
                "E217",
                f"the {kind} changed since the plan was saved",
                place=now.place,
                got=f"{now.name} {now.version}, digest {now.digest[:12]}",
                expected=f"{then['name']} {then['version']}, digest {then['digest'][:12]}, as in {saved.path}",
                fix=AGAIN,
            )


def check_plan(
    saved: SavedPlan,
    plan: Plan,
    rules: Sequence[Mapping[str, Any]],
    work: Mapping[str, Any] | None,
    template: str | None,
) -> None:
    """E217 unless planning again gave the result in the saved plan."""
    now = json.loads(json.dumps(saved_plan(plan, saved.request, rules, work, template)))
    for key in ("variants", "sizes", "options", "config"):
        for name, *both in changed(now[key], saved.data[key]):
            raise _differs(saved, f"`{name}` of {key}", *both)
    for key in ("mode", "ranks", "chat_template"):
        if now.get(key) != saved.data.get(key):
            raise _differs(saved, f"`{key}`", now.get(key), saved.data.get(key))
    rows = [
        {f"{row['target']} {row['shape']} ({row['rule']})": row for row in one["rules"]} for one in (now, saved.data)
    ]
    for name, *both in changed(*rows):
        raise _differs(saved, f"`{name}`", *_first_difference(*both))
    if now["outputs"] != saved.data["outputs"]:
        raise _differs(saved, "what goes into which file", _counts(now["outputs"]), _counts(saved.data["outputs"]))
    if "work" in saved.data and now.get("work") != saved.data["work"]:
        raise _differs(saved, "what parts copy", "other copies", "those under `work`")
    if now["digest"] != saved.data["digest"]:
        raise _differs(saved, "what is copied", f"digest {now['digest'][:12]}", f"digest {saved.data['digest'][:12]}")


def check_tokenizer(saved: SavedPlan, taken: Mapping[str, str]) -> None:
    """E217 unless the tokenizer's files, by their digests, are those that were there when the plan was saved.

    A tokenizer that came later is used: then the saved plan has none, and a run says where it is from.
    """
    for name, now, then in changed(taken, saved.data.get("tokenizer", taken)):
        got = "no such file, or not of a tokenizer that fits this model" if now is None else f"digest {now[:12]}"
        expected = "no such file" if then is None else f"digest {then[:12]}"
        why = "The tokenizer beside the checkpoint changed; to use another one on purpose, give it with --tokenizer."
        raise _differs(saved, f"the tokenizer's `{name}`", got, expected, why)


def _counts(outputs: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{len(outputs)} files of {', '.join(str(n) for n in dict.fromkeys(one['tensors'] for one in outputs))} tensors"
    )


def _first_difference(now: Mapping[str, Any] | None, then: Mapping[str, Any] | None) -> tuple[Any, Any]:
    if now is None or then is None:
        return ("nothing" if now is None else "a tensor"), ("nothing" if then is None else "a tensor")
    key = next(k for k in (*now, *then) if now.get(k) != then.get(k))
    return f"{key} {compact_json(now.get(key))}".strip(), f"{key} {compact_json(then.get(key))}".strip()


def _differs(
    saved: SavedPlan,
    what: str,
    now: Any,
    then: Any,
    why: str = "The training configuration, the mapping or the engine changed.",
) -> EngineError:
    by = f" (by engine {saved.data['engine']}; this is {__version__})" if saved.data["engine"] != __version__ else ""
    return EngineError(
        "E217",
        f"planning again gives another plan: {what} differs",
        place=Place(saved.path),
        got=str(now),
        expected=f"{then}, as saved{by}",
        fix=f"{why} {AGAIN}",
    )
