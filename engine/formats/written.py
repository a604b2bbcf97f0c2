"""The file formats that are written: what each puts where besides the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.formats.dcp_files import dcp_file
from engine.formats.safetensors import safetensors_file
from engine.formats.torch_files import torch_file


class FileLayout(Protocol):
    """A file format, laid out: what is written where besides the payload."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def end(self) -> int: ...

    def start(self) -> list[tuple[int, bytes]]: ...

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]: ...


# Format → the layout of a file that holds tensors (name, element type, shape) under a root name.
FORMATS: dict[str, Callable[[Sequence[tuple[str, str, tuple[int, ...]]], str], FileLayout]] = {
    "safetensors": safetensors_file,
    "torch": torch_file,
    "dcp": dcp_file,
}
CHECKED = frozenset(("torch", "dcp"))  # formats whose headers hold a CRC-32 of every payload
