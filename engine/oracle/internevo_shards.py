"""Where training left each tensor: InternEvo's rank files, told from their names alone.

The facts are those of InternEvo's own save code: file names give the ranks, and a layer's number in
a key counts within its pipeline stage and model chunk. The layout has only said which files there are:
how they cut the tensors is told here, so that what is computed can speak against mapping and layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.oracle.float_tensors import FloatTensors
from engine.planning.attempts import Checkpoint

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"model(?:_tp(?P<tp>\d+))?(?:_wp(?P<wp>\d+))?_pp(?P<pp>\d+)(?:_dp(?P<dp>\d+))?\.pt")
_KEY = re.compile(r"(?:(?P<chunk>\d+)\.)?(?:model\.)?(?:(?P<block>blocks|layers)\.(?P<layer>\d+)\.)?(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Spot:
    """A place among the stages: pipeline rank, model chunk and, unless -1, layer within the two."""

    pp: int
    chunk: int
    layer: int = -1


Piece = tuple[int, TensorHeader]  # the number of a file, and a tensor in it


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a rank: whole in one file, or under FSDP in pieces of rows, in order."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pieces[0][1].whole

    @property
    def lows(self) -> list[int]:
        """The first row of each piece."""
        return [0 if header.part is None else header.part.starts[0] for _, header in self.pieces]


@dataclass(frozen=True, slots=True)
class _File:
    """What one rank holds, in one file or in those of its data-parallel ranks."""

    tp: int | None
    wp: int | None
    tensors: Mapping[tuple[int, int, str], Stored]  # (chunk, layer, rest of the key)


class Shards(FloatTensors):
    """The rank files of a step folder, of which none is missing.

    Attributes:
        config: the model's settings, as training was given them.
        training: what can be told of the training configuration; often nothing.
        spots: where each layer of the model lies, first to last.
        block: what keys call the layers.
        dtypes: the element types of all tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        headers = checkpoint.files
        _check_dense(headers, checkpoint.folder)
        ranked = [found for header in headers if (found := _FILE.fullmatch(header.name))]
        self.config, self.training = checkpoint.config, checkpoint.training
        super().__init__(headers)
        self._stages: dict[int, list[_File]] = {}
        self.block = "blocks"
        self.dtypes = frozenset(tensor.dtype for header in headers for tensor in header.tensors)
        ranks: dict[tuple[int, int | None, int | None], dict[tuple[int, int, str], list[Piece]]] = {}
        for number, (found, header) in enumerate(zip(ranked, headers, strict=True)):
            tp, wp = (None if found[word] is None else int(found[word]) for word in ("tp", "wp"))
            keys = ranks.setdefault((int(found["pp"]), tp, wp), {})
            for tensor in header.tensors:
                key = _KEY.fullmatch(tensor.name)
                if key is not None:
                    self.block = key["block"] or self.block
                    place = int(key["chunk"] or 0), int(key["layer"] or -1), key["rest"]
                    keys.setdefault(place, []).append((number, tensor))
        for (pp, tp, wp), keys in ranks.items():
            whole = {key: _joined(pieces, key[2]) for key, pieces in keys.items()}
            self._stages.setdefault(pp, []).append(_File(tp, wp, whole))
        self.by_rows = ranked[0]["wp"] is not None  # isp: linears are cut on storage rows over wp
        self.spots = self._order()

    def _order(self) -> list[Spot]:
        """Layers first to last: chunk by chunk, pipeline ranks in turn, in ZBV every second chunk turned round."""
        counts: dict[tuple[int, int], int] = {}
        for pp, files in self._stages.items():
            for chunk, layer, _ in files[0].tensors:
                counts[chunk, pp] = max(counts.get((chunk, pp), 0), layer + 1)
        parallel = self.training.get("parallel")
        pipeline = parallel.get("pipeline") if isinstance(parallel, Mapping) else None
        mode = pipeline.get("mode") if isinstance(pipeline, Mapping) else None
        zbv = isinstance(mode, str) and mode.upper() == "ZBV"
        spots: list[Spot] = []
        for chunk in range(1 + max((chunk for chunk, _ in counts), default=0)):
            ranks = sorted(self._stages, reverse=zbv and chunk % 2 == 1)
            spots += [Spot(pp, chunk, i) for pp in ranks for i in range(counts.get((chunk, pp), 0))]
        return spots

    def has(self, spot: Spot, *keys: str) -> str | None:
        """The first of these keys that some rank holds at a spot."""
        held = {key for f in self._stages[spot.pp] for c, i, key in f.tensors if (c, i) == (spot.chunk, spot.layer)}
        return next((key for key in keys if key in held), None)

    def edge(self, *keys: str) -> tuple[Spot, str]:
        """Where the embedding, the last norm or the head lies, and under which of these keys; E207."""
        for pp, files in self._stages.items():
            for chunk in sorted({chunk for chunk, _, _ in files[0].tensors}):
                key = self.has(Spot(pp, chunk), *keys)
                if key is not None:
                    return Spot(pp, chunk), key
        raise EngineError(
            "E207",
            f"no rank file holds `{keys[0]}`",
            expected=", ".join(keys),
            fix="Training's own forward pass needs it; is a file missing?",
        )

    def replicated(self, spot: Spot, key: str) -> torch.Tensor:
        """A tensor that every rank holds whole, as the first rank has it."""
        return self._read(self._stages[spot.pp][0], spot, key)

    def linear(self, spot: Spot, key: str) -> list[torch.Tensor | None]:
        """A layer's weight or bias per tensor rank, None on ranks without it.

        With weight parallelism the rows of all ranks are put together, and there is one rank.
        """
        files = _one_each(self._stages[spot.pp], "wp" if self.by_rows else "tp")
        found = [self._read(f, spot, key) if (spot.chunk, spot.layer, key) in f.tensors else None for f in files]
        if not self.by_rows:
            return found
        import torch

        rows = [part for part in found if part is not None]
        return [torch.cat(rows) if rows else None]

    def edges(self, spot: Spot, key: str) -> list[Stored]:
        """The parts of the embedding or the head, cut over tp where there is tp, else over wp."""
        files = self._stages[spot.pp]
        files = _one_each(files, "wp" if files[0].tp is None else "tp")
        return [self._stored(f, spot, key) for f in files]

    def rows(self, part: Stored, low: int, high: int) -> torch.Tensor:
        """Rows low..high of a part, as far as it has them."""
        import torch

        found = [self.read(number, header, max(low - first, 0), max(high - first, 0))
                 for (number, header), first in zip(part.pieces, part.lows, strict=True)]  # fmt: skip
        return torch.cat(found) if len(found) > 1 else found[0]

    def _read(self, file: _File, spot: Spot, key: str) -> torch.Tensor:
        stored = self._stored(file, spot, key)
        return self.rows(stored, 0, stored.shape[0])

    def _stored(self, file: _File, spot: Spot, key: str) -> Stored:
        stored = file.tensors.get((spot.chunk, spot.layer, key))
        if stored is None:
            layer = f" of layer {spot.layer}" if spot.layer >= 0 else ""
            raise EngineError(
                "E207",
                f"a rank lacks `{key}`{layer}",
                got=f"pipeline rank {spot.pp}, tp {file.tp}, wp {file.wp}",
                fix="Training's own forward pass needs it; is the file of this run?",
            )
        return stored


def _joined(pieces: Sequence[Piece], key: str) -> Stored:
    """A rank's tensor from what its data-parallel ranks hold: replicas, or rows without gap; E207."""
    if any(header.part is None for _, header in pieces):
        return Stored((pieces[0],))
    at: dict[int, Piece] = {}
    for piece in pieces:
        part = piece[1].part
        if part is not None and piece[1].shape[0]:
            at.setdefault(part.starts[0], piece)
    row = 0
    for low in sorted(at):
        if low == row:
            row += at[low][1].shape[0]
    whole = pieces[0][1].whole
    if row != whole[0]:
        raise EngineError(
            "E207",
            f"rows of `{key}` are in no file",
            got=f"{row} rows",
            expected=f"{whole[0]}",
            fix="Copy the files of all data-parallel ranks.",
        )
    return Stored(tuple(at[low] for low in sorted(at)) or (pieces[0],))


def _one_each(files: Sequence[_File], word: str) -> list[_File]:
    """One file per rank of `tp` or `wp`, in order; in isp several files share either."""
    found: dict[int, _File] = {}
    for file in files:
        rank = file.tp if word == "tp" else file.wp
        found.setdefault(rank or 0, file)
    return [found[rank] for rank in sorted(found)]


def _check_dense(headers: Sequence[FileHeader], folder: str) -> None:
    hit = next((header.name for header in headers if header.name.startswith("model_moe_")), None)
    if hit is not None:
        raise EngineError(
            "E303",
            "training's own forward pass is not known for a mixture of experts",
            place=Place(folder),
            got=hit,
            expected="a dense model",
            fix="transformers has no model of it built in either, so there is nothing to run beside it. Leave --logits "
            "out; --src and --mapping compare every tensor all the same.",
        )


def setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting of the model, where absent and None mean the default."""
    value = config.get(name)
    return default if value is None else value


def positive(config: Mapping[str, Any], key: str) -> int:
    """A setting that every model has; E303 when it is absent or no positive number."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineError(
            "E303",
            f"the configuration does not say `{key}`",
            place=Place("model_config.pt"),
            got=repr(value)[:50],
            expected="a positive number",
            fix="Is it the model_config.pt of the training run?",
        )
    return value
