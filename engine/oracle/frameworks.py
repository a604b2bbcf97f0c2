"""Training's own forward pass, found by the name of the layout whose files a folder has.

Another framework is a module here, with a class `Forward` that has the methods and attributes of InternEvo's and with
`SETTINGS`, and a line in `FORWARDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import list_folder
from engine.errors import EngineError, Place
from engine.language.layout_file import load_layout
from engine.language.names import pattern
from engine.planning.reading import read_checkpoint
from engine.storage.local import LocalStore

if TYPE_CHECKING:
    from engine.oracle.internevo import Forward

# Layout → its module. `SETTINGS` are what a checkpoint may leave open, and the choices.
FORWARDS = {"internevo": "engine.oracle.internevo"}


def forward_of(folder: Path, settings: Mapping[str, Any]) -> Forward:
    """The forward pass of a training checkpoint.

    Raises:
        EngineError: E304 when no known framework's rank files are there, else E2xx and E3xx of the checkpoint.
    """
    names = list_folder(LocalStore(folder))
    for name, module in FORWARDS.items():
        layout = load_layout(name)
        if any(pattern(mode.files[0].name).match(one) is not None for mode in layout.modes for one in names):
            made: Forward = import_module(module).Forward(read_checkpoint(folder, layout), settings)
            return made
    raise EngineError(
        "E304",
        "there are no rank files here of a framework whose forward pass is known",
        place=Place(str(folder)),
        expected="a checkpoint of " + " or ".join(FORWARDS),
        fix="Leave --logits out; --src and --mapping compare every tensor all the same.",
    )


def settings_of() -> dict[str, tuple[str, ...]]:
    """What `--set` may tell a forward pass, whatever the framework: name → choices."""
    found: dict[str, tuple[str, ...]] = {}
    for module in FORWARDS.values():
        found |= import_module(module).SETTINGS
    return found
