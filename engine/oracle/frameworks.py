"""Training's own forward pass, found by the name of the layout whose files a folder has.

Another framework is a module here, with a class `Forward` that has the methods and attributes of InternEvo's, and a
line in `FORWARDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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

FORWARDS = {"internevo": "engine.oracle.internevo"}  # layout → its module, which needs torch
# Settings that a checkpoint may leave open, as in the bundled mappings, and their choices. What its shapes or its
# configuration show is never overridden: a wrong setting must not make two errors agree.
SETTINGS = {
    "mlp_letters": ("w2_is_down", "w2_is_up"), "rotary": ("halves", "pairs"),
    "head": ("plain", "normalised", "lm", "reward"), "fusion": ("fused", "apart"),
}  # fmt: skip


def forward_of(folder: Path, settings: Mapping[str, Any]) -> Forward:
    """The forward pass of a training checkpoint.

    Raises:
        EngineError: E304 when there are no rank files of a known framework, else E2xx and E3xx of the checkpoint.
    """
    names = list_folder(LocalStore(folder))
    for name, module in FORWARDS.items():
        layout = load_layout(name)
        configured = any(one.file in names for one in layout.configs)  # without, common names may be another's
        files = [pattern(mode.files[0].name) for mode in layout.modes if configured or not mode.files[0].boxes]
        if any(file.match(one) is not None for file in files for one in names):
            _check(settings)
            checkpoint = read_checkpoint(folder, layout)
            told = {key: seen.one for key, seen in checkpoint.joined.items() if checkpoint.config.get(key) is None}
            whole = replace(checkpoint, config={**checkpoint.config, **told})
            made: Forward = import_module(module).Forward(whole, settings)
            return made
    raise EngineError(
        "E304",
        "there are no rank files here of a framework whose forward pass is known",
        place=Place(str(folder)),
        expected="a checkpoint of " + " or ".join(FORWARDS),
        fix="Leave --logits out; --src and --mapping compare every tensor all the same.",
    )


def _check(settings: Mapping[str, Any]) -> None:
    for name, choices in SETTINGS.items():
        if settings.get(name, choices[0]) not in choices:
            raise EngineError(
                "E001",
                f"`{name}` cannot be `{settings[name]}`",
                expected=" or ".join(choices),
                fix=f"For example --set {name}={choices[0]}.",
            )
