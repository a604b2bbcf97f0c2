"""Whether a checkpoint's files are still those that something was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader

Told = Mapping[str, Any]  # of a file: what tells it from others


def told(header: FileHeader) -> dict[str, Any]:
    """What tells a file from others. Where no checksums tell its content, only the file itself will do, untouched."""
    found: dict[str, Any] = {"name": header.name, "size": header.size, "identity": header.identity}
    if not header.summed and header.state is not None:
        found["state"] = dict(header.state.told())
    return found


def check_files(then: Sequence[Told], files: Sequence[FileHeader], folder: str, saved: str, again: str) -> None:
    """E405 for the first file that is not as it was.

    Args:
        then: what was told of the files.
        saved: where that was saved.
        again: what to do about it.
    """
    before = {one["name"]: one for one in then}
    now = {header.name: told(header) for header in files}
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name):
            continue
        fix = again
        if name not in now or name not in before:
            got, expected = ("gone", "present") if name not in now else ("new", "no such file")
        elif now[name]["identity"] != before[name]["identity"]:
            got, expected = (
                f"{one['size']} bytes, headers {one['identity'][:12]}" for one in (now[name], before[name])
            )
        else:
            got, expected = (_state(one.get("state", {})) for one in (now[name], before[name]))
            fix = (
                f"The headers are the same, but the file holds no checksums that tell whether its tensors are. {again}"
            )
        raise EngineError(
            "E405",
            f"`{name}` changed since the plan was saved",
            place=Place(folder),
            got=got,
            expected=f"{expected}, as in {saved}",
            fix=fix,
        )


def _state(state: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in state.items()) or "nothing told of the file itself"
