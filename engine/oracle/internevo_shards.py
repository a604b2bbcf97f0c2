"""Finds each tensor in InternEvo's rank files, from names alone.

The facts are those of InternEvo's own save code: file names give the ranks, and a layer's number in
a key counts within its pipeline stage and model chunk. The layout only lists the files: this module
knows how they cut the tensors, so that the result can contradict mapping and layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import EngineError, Place
from engine.formats.headers import TensorHeader
from engine.oracle.float_tensors import FloatTensors
from engine.planning.attempts import Checkpoint

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


Rank = tuple[int, int]  # of tp and of wp; -1 where files have no such dimension


class Shards(FloatTensors):
    """The rank files of a step folder; none is missing.

    Attributes:
        config: the model's settings, as given to training.
        training: the known part of the training configuration; often empty.
        spots: the place of each layer of the model, first to last.
        block: the name of the layers in keys.
        dtypes: the element types of all tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        headers = checkpoint.files
        self.config, self.training = checkpoint.config, checkpoint.training
        super().__init__(headers)
        self.block = "blocks"
        self.dtypes = frozenset(tensor.dtype for header in headers for tensor in header.tensors)
        pieces: dict[tuple[Spot, str], dict[Rank, list[Piece]]] = {}
        for number, header in enumerate(headers):
            named = _FILE.fullmatch(header.name)
            if named is None:
                raise EngineError(
                    "E303",
                    "training's own forward pass is not known for these files",
                    place=Place(checkpoint.folder),
                    got=header.name,
                    expected="a dense model's, such as model_tp0_pp0.pt",
                    fix="Leave --logits out; --src and --mapping compare every tensor all the same.",
                )
            rank = int(named["tp"] or -1), int(named["wp"] or -1)
            for tensor in header.tensors:
                key = _KEY.fullmatch(tensor.name)
                if key is not None:
                    self.block = key["block"] or self.block
                    spot = Spot(int(named["pp"]), int(key["chunk"] or 0), int(key["layer"] or -1))
                    pieces.setdefault((spot, key["rest"]), {}).setdefault(rank, []).append((number, tensor))
        self._held = {
            (spot, key): {rank: _joined(found, key) for rank, found in ranks.items()}
            for (spot, key), ranks in pieces.items()
        }
        self._ranks = sorted({rank for ranks in pieces.values() for rank in ranks})
        self.spots = self._order()

    def _order(self) -> list[Spot]:
        """Layers first to last: chunk by chunk, pipeline ranks in turn, in ZBV every second chunk in reverse.

        Where no mode is told, it is ZBV if pipeline rank 0 holds the last norm, in a second chunk.
        """
        parallel = self.training.get("parallel")
        pipeline = parallel.get("pipeline") if isinstance(parallel, Mapping) else None
        mode = pipeline.get("mode") if isinstance(pipeline, Mapping) else None
        ends = {(one.pp, one.chunk % 2) for one, key in self._held if one.layer < 0 and key == "norm.weight"}
        zbv = mode.upper() == "ZBV" if isinstance(mode, str) else (0, 1) in ends
        spots = {spot for spot, _ in self._held if spot.layer >= 0}
        return sorted(spots, key=lambda one: (one.chunk, -one.pp if zbv and one.chunk % 2 else one.pp, one.layer))

    def has(self, spot: Spot, *keys: str) -> str | None:
        """The first of these keys that some rank holds at a spot."""
        return next((key for key in keys if (spot, key) in self._held), None)

    def holds(self, *starts: str) -> bool:
        """Whether some key, without chunk and layer, starts so."""
        return any(key.startswith(starts) for _, key in self._held)

    def edge(self, *keys: str) -> tuple[Spot, str]:
        """The place of the embedding, the last norm or the head, and which of these keys it has; E207 if none."""
        found = next((one for one in self._held if one[0].layer < 0 and one[1] in keys), None)
        if found is None:
            raise EngineError(
                "E207",
                f"no rank file holds `{keys[0]}`",
                expected=", ".join(keys),
                fix="Training's own forward pass needs it; is a file missing?",
            )
        return found

    def replicated(self, spot: Spot, key: str) -> torch.Tensor:
        """A tensor that every rank holds whole, from the first rank."""
        return self._read(self._part(spot, key, self._ranks[0]))

    @property
    def by_rows(self) -> bool:
        """Whether linears are cut on storage rows over wp, as under isp."""
        return self._ranks[0][1] >= 0

    def linear(self, spot: Spot, *keys: str) -> list[torch.Tensor | None]:
        """A layer's weight or bias per tensor rank, None on ranks without it; of several keys, their rows in turn.

        With weight parallelism the rows of all ranks are joined, and there is one rank.
        """
        held = [self._held.get((spot, key), {}) for key in keys]
        parts = [[self._read(one[rank]) for one in held if rank in one] for rank in self._one_each(self.by_rows)]
        if self.by_rows:
            parts = [[row for rows in parts for row in rows]]
        return [torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None for rows in parts]

    def edges(self, spot: Spot, key: str) -> list[Stored]:
        """The parts of the embedding or the head, cut over tp where there is tp, else over wp."""
        return [self._part(spot, key, rank) for rank in self._one_each(self._ranks[0][0] < 0)]

    def rows(self, part: Stored, low: int, high: int) -> torch.Tensor:
        """Rows low..high of a part, as far as it has them."""
        pieces = ((number, header, header.starts[0]) for number, header in part.pieces)
        found = [self.read(number, header, max(low - at, 0), max(high - at, 0)) for number, header, at in pieces]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _read(self, part: Stored) -> torch.Tensor:
        return self.rows(part, 0, part.shape[0])

    def _one_each(self, wp: bool) -> list[Rank]:
        """One rank for each of tp, or of wp, in order; in isp several share either."""
        found: dict[int, Rank] = {}
        for rank in self._ranks:
            found.setdefault(rank[1] if wp else rank[0], rank)
        return [found[number] for number in sorted(found)]

    def _part(self, spot: Spot, key: str, rank: Rank) -> Stored:
        held = self._held.get((spot, key), {})
        if rank not in held:
            layer = f" of layer {spot.layer}" if spot.layer >= 0 else ""
            raise EngineError(
                "E207",
                f"a rank lacks `{key}`{layer}",
                got=f"pipeline rank {spot.pp}, tp {rank[0]}, wp {rank[1]}".replace(" -1", " none"),
                fix="Training's own forward pass needs it; is the file of this run?",
            )
        return held[rank]


def _joined(pieces: Sequence[Piece], key: str) -> Stored:
    """A rank's tensor from its data-parallel ranks: replicas, or rows without gaps; E207 for missing rows."""
    if any(header.recorded is None for _, header in pieces):
        return Stored((pieces[0],))
    at: dict[int, Piece] = {}
    for piece in pieces:
        box = piece[1].recorded
        if box is not None and piece[1].shape[0]:
            at.setdefault(box.starts[0], piece)
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


def setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A setting of the model; absent and None mean the default."""
    value = config.get(name)
    return default if value is None else value


def positive(config: Mapping[str, Any], key: str) -> int:
    """A setting that every model has; E303 when it is absent or not a positive number."""
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
