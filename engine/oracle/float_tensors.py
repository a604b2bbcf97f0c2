"""Reads tensors of checkpoint files as float32, one at a time, for computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from engine.errors import EngineError, Place
from engine.formats.headers import FLOATS, ITEM_SIZES, TORCH_NAMES, FileHeader, TensorHeader, span
from engine.storage.sources import SourceFiles


class FloatTensors:
    """Reads tensors of some files. A context manager that closes the files."""

    def __init__(self, files: Sequence[FileHeader]) -> None:
        self._headers = files
        self._files = SourceFiles(files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._files.__exit__(*details)

    def read(self, file: int, header: TensorHeader, low: int = 0, high: int | None = None) -> torch.Tensor:
        """Rows low..high of a tensor's first axis (default: all), in its own memory."""
        if header.dtype not in FLOATS:
            raise EngineError(
                "E303",
                "a tensor's element type is not one to compute with",
                place=Place(self._headers[file].name, tensor=header.name),
                got=header.dtype,
                expected=", ".join(FLOATS),
                fix="Quantised weights are not run.",
            )
        shape, start = header.shape, 0
        if shape:
            low, high, _ = slice(low, high).indices(shape[0])
            shape, start = (max(high - low, 0), *shape[1:]), low * header.strides[0]
        if 0 in shape:
            return torch.empty(shape)
        item = ITEM_SIZES[header.dtype]
        raw = bytearray(span(shape, header.strides) * item)
        self._files.read_into(file, header.offset + start * item, (memoryview(raw),))
        stored = torch.frombuffer(raw, dtype=getattr(torch, TORCH_NAMES[header.dtype]))
        return stored.as_strided(shape, header.strides).to(torch.float32).contiguous()
