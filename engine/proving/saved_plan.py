"""Saved plans: what was asked for, what it was asked of, and what came out, in one small file.

Copies are computed anew when a saved plan is run; the file holds what they must come out as.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import __version__
from engine.errors import EngineError, Place
from engine.explaining.describe import fold
from engine.formats.headers import FileHeader
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.language.validation import violations
from engine.planning.digest import digest_of_plan
from engine.planning.model import Plan
from engine.proving.normal import normal_form
from engine.storage.json_text import parse_json
from engine.storage.regular import open_regular
from engine.storage.replacing import write_file

VERSION = 1
MAX_BYTES = 64 << 20
_AGAIN = "Plan again with `engine plan -o`, and look at what differs before running it."


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: the arguments of `engine.plan`."""

    mapping: str
    src: str
    settings: Mapping[str, Any]
    dtype: str
    max_shard_size: int
    strict: bool
    config: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            **({} if self.config is None else {"config": self.config}),
            "mapping": self.mapping,
            "src": self.src,
            "settings": dict(sorted(self.settings.items())),
            "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
            "strict": self.strict,
        }


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A saved plan as read: its request, and the whole file as data."""

    path: str
    request: Request
    data: Mapping[str, Any]


def saved_plan(plan: Plan, request: Request) -> dict[str, Any]:
    """The content of a saved plan; the shape is `schemas/saved-plan.schema.json`."""
    return {
        "plan": VERSION,
        "engine": __version__,
        "request": request.as_dict(),
        "mapping": {"name": plan.mapping.name, "version": plan.mapping.version, "digest": plan.mapping.digest},
        "layout": {"name": plan.layout.name, "version": plan.layout.version, "digest": plan.layout.digest},
        "files": [_file(file) for file in plan.files],
        "sizes": {name: plan.sizes[name] for name in sorted(plan.sizes)},
        "variants": {name: plan.decisions[name].choice for name in sorted(plan.decisions)},
        "options": {name: plan.options[name] for name in sorted(plan.options)},
        "normal": normal_form(plan),
        "outputs": [
            {
                "file": one.name,
                "tensors": len(one.outputs),
                "bytes": sum(plan.outputs[i].nbytes for i in one.outputs),
            }
            for one in plan.shards
        ],
        "config": dict(sorted(plan.config.items())),
        "digest": digest_of_plan(plan),
    }


def _file(header: FileHeader) -> dict[str, Any]:
    """What tells a file from others. Where no checksums tell its content, only the file itself will do, untouched."""
    told: dict[str, Any] = {"name": header.name, "size": header.size, "identity": header.identity}
    if not header.summed and header.state is not None:
        told["state"] = dict(header.state.told())
    return told


def write_saved_plan(path: Path, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write the file; E401 when something is there, with `overwrite` unless it is a saved plan."""
    write_file(path, compact_json(data).encode(), overwrite=overwrite, ours=is_saved_plan)


def is_saved_plan(start: bytes) -> bool:
    """Whether a file of these first bytes was written as a saved plan."""
    return re.match(rb'\{\s*"plan": \d+,\s*"engine": "', start) is not None


def read_saved_plan(path: Path) -> SavedPlan:
    """Read and check a saved plan; E305 or E102 when it is none."""
    with open_regular(path) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise _unreadable(path, f"more than {MAX_BYTES} bytes")
    try:
        data = parse_json(raw, own=True)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if isinstance(data, dict) and isinstance(data.get("plan"), int) and data["plan"] != VERSION:
        raise EngineError(
            "E102",
            f"version {data['plan']} of saved plans is not known",
            place=Place(str(path)),
            got=f"plan: {data['plan']}",
            expected=f"plan: {VERSION}",
            fix="Use an engine that knows it, or plan again.",
        )
    problem = next(iter(violations(data, "saved-plan")), None)
    if problem is not None:
        raise _unreadable(path, f"{'.'.join(map(str, problem.absolute_path)) or 'the file'}: {problem.message[:160]}")
    return SavedPlan(str(path), Request(**data["request"]), data)


def _unreadable(path: Path, why: str) -> EngineError:
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
                fix=_AGAIN,
            )


def check_files(saved: SavedPlan, files: Sequence[FileHeader], folder: str) -> None:
    """E405 for the first checkpoint file that is not the one the plan was made from."""
    then = {one["name"]: one for one in saved.data["files"]}
    now = {header.name: _file(header) for header in files}
    for name in sorted({*then, *now}):
        if then.get(name) == now.get(name):
            continue
        fix = _AGAIN
        if name not in now or name not in then:
            got, expected = ("gone", "present") if name not in now else ("new", "no such file")
        elif now[name]["identity"] != then[name]["identity"]:
            got, expected = (f"{one['size']} bytes, headers {one['identity'][:12]}" for one in (now[name], then[name]))
        else:
            got, expected = (_told_state(one.get("state", {})) for one in (now[name], then[name]))
            fix = (
                "The headers are the same, but the file holds no checksums that tell whether its tensors are. " + _AGAIN
            )
        raise EngineError(
            "E405",
            f"`{name}` changed since the plan was saved",
            place=Place(folder),
            got=got,
            expected=f"{expected}, as in {saved.path}",
            fix=fix,
        )


def _told_state(state: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in state.items()) or "nothing told of the file itself"


def check_plan(saved: SavedPlan, plan: Plan) -> None:
    """E217 unless planning again came out as the saved plan says."""
    now = json.loads(json.dumps(saved_plan(plan, saved.request)))
    for key in ("variants", "sizes", "options", "config"):
        for name in sorted({*now[key], *saved.data[key]}):
            if now[key].get(name) != saved.data[key].get(name):
                raise _differs(saved, f"`{name}` of {key}", now[key].get(name), saved.data[key].get(name))
    for key in ("mode", "ranks", "stages", "ignored"):
        if now["normal"][key] != saved.data["normal"].get(key):
            raise _differs(saved, f"`{key}`", now["normal"][key], saved.data["normal"].get(key))
    then = {_told(row): row for row in saved.data["normal"]["tensors"]}
    for told in (rows := {_told(row): row for row in now["normal"]["tensors"]}).keys() | then.keys():
        if rows.get(told) != then.get(told):
            raise _differs(saved, f"`{told}`", *_first_difference(rows.get(told), then.get(told)))
    if now["outputs"] != saved.data["outputs"]:
        raise _differs(saved, "what goes into which file", _counts(now["outputs"]), _counts(saved.data["outputs"]))
    if now["digest"] != saved.data["digest"]:
        raise _differs(saved, "what is copied", f"digest {now['digest'][:12]}", f"digest {saved.data['digest'][:12]}")


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['target']} ({row['rule']})"


def _counts(outputs: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(outputs)} files of {fold([one['tensors'] for one in outputs])} tensors"


def _first_difference(now: Mapping[str, Any] | None, then: Mapping[str, Any] | None) -> tuple[Any, Any]:
    if now is None or then is None:
        return ("nothing" if now is None else "a tensor"), ("nothing" if then is None else "a tensor")
    key = next(k for k in (*now, *then) if now.get(k) != then.get(k))
    return f"{key} {compact_json(now.get(key))}".strip(), f"{key} {compact_json(then.get(key))}".strip()


def _differs(saved: SavedPlan, what: str, now: Any, then: Any) -> EngineError:
    by = f" (by engine {saved.data['engine']}; this is {__version__})" if saved.data["engine"] != __version__ else ""
    return EngineError(
        "E217",
        f"the plan would be another now: {what} differs",
        place=Place(saved.path),
        got=str(now),
        expected=f"{then}, as saved{by}",
        fix="The training configuration, the mapping or the engine changed. " + _AGAIN,
    )


def compact_json(data: Any, width: int = 120) -> str:
    """JSON with a line for each value, except lists and objects that fit on one; ends with a newline.

    >>> print(compact_json({"a": [1, 2], "b": {}}, 8), end="")
    {
     "a": [
      1,
      2
     ],
     "b": {}
    }
    """

    def put(value: Any, indent: int, room: int) -> str:
        flat = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, (dict, list)) or not value or (len(flat) <= room and indent > 0):
            return flat
        pad, end = "\n" + " " * (indent + 1), "\n" + " " * indent
        if isinstance(value, list):
            return "[" + ",".join(pad + put(item, indent + 1, width - indent - 2) for item in value) + end + "]"
        keys = [json.dumps(str(key), ensure_ascii=False) + ": " for key in value]
        items = zip(keys, value.values(), strict=True)
        body = ",".join(pad + key + put(item, indent + 1, width - indent - 2 - len(key)) for key, item in items)
        return "{" + body + end + "}"

    return put(data, 0, width) + "\n"
