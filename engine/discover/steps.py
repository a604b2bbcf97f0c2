"""Which layout's files a folder holds, and the steps in a folder of steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import list_folder
from engine.checkpoint.grid import NoWeights
from engine.checkpoint.hf_folder import is_whole, read_hf_folder
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.model import Layout
from engine.language.names import form
from engine.language.search import layout_names
from engine.planning.attempts import Checkpoint
from engine.planning.reading import read_checkpoint
from engine.storage.places import Source
from engine.storage.store import Store

HUGGING_FACE = "Hugging Face"  # the layout of a finished model among steps
MOST_STEPS = 20  # steps whose files are read, the newest first
_LEVELS = 3  # of folders: a run's own, a step's, and those of the models that it trains


def read_any(
    src: Source, layouts: Sequence[str] = (), *, config: str | Path | None = None, needed: bool = False
) -> tuple[Layout, Checkpoint]:
    """Read a training checkpoint by the first layout whose files are there.

    Args:
        layouts: the names to try; if empty, all layouts.
        config, needed: as for `read_checkpoint`.

    Raises:
        EngineError: E304 when no layout knows the files, else the error of the layout that does.
    """
    first: EngineError | None = None
    for name in layouts or layout_names():
        layout = load_layout(name)
        try:
            return layout, read_checkpoint(src, layout, config, needed=needed)
        except EngineError as error:
            if error.code != "E304":  # this layout knows the files
                raise
            if first is None or not isinstance(error, NoWeights):
                first = error
    raise first or EngineError("E002", "there are no layouts", fix="Reinstall the package.")


def find_steps(
    folder: Store, config: str | Path | None, layouts: Sequence[str] = (), *, most: int | None = MOST_STEPS
) -> dict[str, Any] | None:
    """The checkpoints in a folder, oldest first, and the newest complete one; None if there are none.

    If there are none, those one level deeper, or two: some trainers save the files of a step in a subfolder of it.

    Args:
        config, layouts: as for `read_any`.
        most: steps whose files are read, the newest; older ones are only named. None for all.
    """
    names = folders_of(folder)
    found = _found(folder, names, config, layouts, most)
    for _ in range(1, _LEVELS):
        if not found:
            names = [f"{name}/{one}" for name in names[-(most or 0) :] for one in folders_of(folder.inside(name))]
            found = _found(folder, names, config, layouts, most)
    complete = [one["name"] for one in found if one["complete"]]
    return {"steps": found, "newest": max(complete, key=_numbers, default=None)} if found else None


def step_below(error: EngineError, folder: Store, config: str | Path | None, layout: Layout) -> EngineError:
    """The error of a folder without weights; if checkpoints of the layout lie below it, its fix names one."""
    found = find_steps(folder, config, [layout.name], most=4) if isinstance(error, NoWeights) else None
    if found is not None:
        error.fix = f"Give the folder of one step, like {folder.place(one_of(found))}."
    return error


def one_of(found: Mapping[str, Any]) -> str:
    """The step to look at: the newest complete one, or the last, whose own message says more than the list."""
    return str(found["newest"] or found["steps"][-1]["name"])


def folders_of(folder: Store) -> list[str]:
    """The folders in a folder of steps, by the last number in their names."""
    try:
        entries = folder.entries()
    except OSError:  # it cannot be listed
        return []
    return sorted((n for n, state in entries.items() if state is None and not n.startswith(".")), key=_order)


def _found(
    folder: Store, names: Sequence[str], config: str | Path | None, layouts: Sequence[str], most: int | None
) -> list[dict[str, Any]]:
    steps: dict[str, dict[str, Any] | None] = {}
    for name in reversed(names):
        look = most is None or len(steps) < most
        steps[name] = _step(folder.inside(name), config, layouts) if look else _NOT_LOOKED_AT
    shapes = {form(name) for name, step in steps.items() if step is not None and step["complete"] is not None}
    return [{"name": n, **step} for n in names if (step := steps[n]) is not None and form(n) in shapes]


_NOT_LOOKED_AT = {"complete": None, "why": "", "bytes": None, "layout": None}


def _step(folder: Store, config: str | Path | None, layouts: Sequence[str]) -> dict[str, Any] | None:
    """Whether one folder is a complete checkpoint; None if it is not a checkpoint at all."""
    try:
        layout, checkpoint = read_any(folder, layouts, config=config)
        files, name = checkpoint.files, layout.name
    except EngineError as error:
        if not isinstance(error, NoWeights):  # or two modes lie in one folder, or it has no configuration
            return {"complete": False, "why": error.message, "bytes": None, "layout": ""}
        if layouts or not is_whole(list_folder(folder)):
            return None
        name = HUGGING_FACE
        try:
            files = read_hf_folder(folder)
        except EngineError as damaged:
            return {"complete": False, "why": damaged.message, "bytes": None, "layout": name}
    if not any(file.tensors for file in files):
        return None  # an optimizer's files alone
    return {"complete": True, "why": "", "bytes": sum(file.size for file in files), "layout": name}


def _order(name: str) -> tuple[int, str]:
    """The last number in a name, by which steps are sorted; names without one come first.

    >>> sorted(["1000", "iter_0000020", "500"], key=_order)
    ['iter_0000020', '500', '1000']
    """
    digits = re.findall("[0-9]+", name)
    return (int(digits[-1][:18]) if digits else -1, name)


def _numbers(name: str) -> list[int]:
    return [_order(part)[0] for part in name.split("/")]
