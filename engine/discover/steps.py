"""Which layout's files a folder holds, and the steps in a folder of steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import list_folder
from engine.checkpoint.hf_folder import WEIGHTS, read_hf_folder
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.model import Layout
from engine.language.search import layout_names
from engine.planning.attempts import Checkpoint
from engine.planning.reading import read_checkpoint
from engine.storage.places import Source
from engine.storage.store import Store

_MOST_STEPS = 20  # steps whose files are read, the newest first; older ones are only named


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
            if first is None or has_weights(error):
                first = error
    raise first or EngineError("E002", "there are no layouts", fix="Reinstall the package.")


def is_whole(names: Sequence[str]) -> bool:
    """Whether files are a Hugging Face checkpoint: weights with names that transformers looks for."""
    return any(name in names for stem in WEIGHTS for name in (stem, f"{stem}.index.json"))


def has_weights(error: EngineError) -> bool:
    """Whether a layout knew files of the folder despite an E304: two modes in one folder, or no configuration."""
    return not error.message.startswith("no weights files")


def find_steps(folder: Store, config: str | Path | None, *, every: bool = False) -> dict[str, Any] | None:
    """The checkpoints below a folder, oldest first, and the newest complete one; None if there are none."""
    names = sorted((n for n, state in folder.entries().items() if state is None and not n.startswith(".")), key=_number)
    steps: dict[str, dict[str, Any] | None] = {}
    for name in reversed(names):
        look = every or len(steps) < _MOST_STEPS
        steps[name] = _step(folder.inside(name), config) if look else _NOT_LOOKED_AT
    shapes = {_shape(name) for name, step in steps.items() if step is not None and step["complete"] is not None}
    found = [{"name": n, **step} for n in names if (step := steps[n]) is not None and _shape(n) in shapes]
    if not found:
        return None
    return {"steps": found, "newest": next((one["name"] for one in reversed(found) if one["complete"]), None)}


_NOT_LOOKED_AT = {"complete": None, "why": "", "bytes": None, "layout": None}


def _shape(name: str) -> str:
    """
    >>> _shape("iter_0000020"), _shape("500")
    ('iter_0', '0')
    """
    return re.sub("[0-9]+", "0", name)


def _step(folder: Store, config: str | Path | None) -> dict[str, Any] | None:
    """Whether one folder is a complete checkpoint; None if it is not a checkpoint at all."""
    try:
        layout, checkpoint = read_any(folder, config=config)
    except EngineError as error:
        if error.code == "E304" and not has_weights(error):
            if not is_whole(list_folder(folder)):
                return None
            try:
                files = read_hf_folder(folder)
            except EngineError as damaged:
                return {"complete": False, "why": damaged.message, "bytes": None, "layout": "Hugging Face"}
            size = sum(file.size for file in files)
            return {"complete": True, "why": "", "bytes": size, "layout": "Hugging Face"}
        return {"complete": False, "why": error.message, "bytes": None, "layout": ""}
    size = sum(file.size for file in checkpoint.files)
    return {"complete": True, "why": "", "bytes": size, "layout": layout.name}


def _number(name: str) -> tuple[int, str]:
    """
    >>> sorted(["1000", "iter_0000020", "500"], key=_number)
    ['iter_0000020', '500', '1000']
    """
    digits = "".join(c if c.isdecimal() else " " for c in name).split()
    return (int(digits[-1][:18]) if digits else -1, name)
