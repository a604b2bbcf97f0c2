"""Training's own forward pass, found by the name of the layout whose files a folder has.

Another framework is a module here that offers what `Forward` lists, and a line in `FORWARDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.checkpoint.folder import list_folder
from engine.errors import EngineError, Place
from engine.language.layout_file import load_layout
from engine.language.names import pattern
from engine.planning.reading import read_checkpoint
from engine.storage.local import LocalStore

if TYPE_CHECKING:
    import torch

# Layout → the module with its `Forward`, and with `SETTINGS`: what a checkpoint may leave open → choices.
FORWARDS = {"internevo": "engine.oracle.internevo"}


class Forward(AbstractContextManager["Forward", None], Protocol):
    """The layers of a training checkpoint as functions, in float32. Leaving the context closes its files.

    Attributes:
        layers: how many.
        dtypes: the element types of its tensors.
        head_dim: width of an attention head.
        normalised: whether training divides the rows of the head by their length.
    """

    head_dim: int
    normalised: bool

    @property
    def layers(self) -> int: ...

    @property
    def dtypes(self) -> frozenset[str]: ...

    @property
    def numbers(self) -> Mapping[str, Any]: ...  # what config.json must say, by its keys, dotted where they are nested

    def vocab(self) -> int:
        """Rows of the embedding."""
        ...

    def embedding(self, low: int, high: int) -> torch.Tensor:
        """Rows low..high of the embedding [rows, hidden]."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens [sequence] → hidden states [sequence, hidden]."""
        ...

    def layer(self, number: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The steps of a layer by name, the last of them `out` [sequence, hidden]."""
        ...

    def head(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states → what the final norm gives, and the logits."""
        ...


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
