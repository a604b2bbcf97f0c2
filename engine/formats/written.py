"""The file formats that are written: the content of each besides tensors, and its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from engine.formats.headers import Named
from engine.formats.safetensors import safetensors_file
from engine.formats.torch_files import dcp_file, torch_file


class FileLayout(Protocol):
    """The layout of a file: all content besides the payload, with offsets."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def size(self) -> int: ...  # bytes of the whole file

    def start(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of content that is known before any payload."""

    def after(self, tensor: int, checksum: int) -> list[tuple[int, bytes]]:
        """(offset, bytes) of content after a tensor's payload, given its CRC-32."""

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]:
        """(offset, bytes) of content after all payload, given the CRC-32 of each tensor."""


# Format → lays out a file, given its tensors, root name and other content.
FORMATS: dict[str, Callable[[Sequence[Named], str, Mapping[str, Any] | None], FileLayout]] = {
    "safetensors": safetensors_file,
    "torch": torch_file,
    "dcp": dcp_file,
}
CHECKED = frozenset(("torch", "dcp"))  # formats whose headers hold a CRC-32 of every payload
