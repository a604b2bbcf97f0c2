"""What a checkpoint of a given size holds: InternLM2's tensors, rank by rank. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

MAPPING = "families/internlm2.yaml"
NARROW_BELOW = 2e9  # bytes; a slice of a 7B model that has layers enough for every case is larger


@dataclass(frozen=True)
class Shape:
    """A model's sizes. Element type bfloat16."""

    layers: int
    hidden: int = 4096
    ffn: int = 14336
    vocab: int = 92544
    heads: int = 32
    groups: int = 8

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_bytes(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.groups * self.head
        return 2 * (attention + 3 * self.hidden * self.ffn + 2 * self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model, every tensor counted once."""
        return self.layers * self.layer_bytes + 2 * self.hidden * (2 * self.vocab + 1)


@dataclass(frozen=True)
class Ranks:
    """How a checkpoint is cut. With chunks, each pipeline rank holds so many runs of layers in turn."""

    tp: int = 4
    pp: int = 1
    chunks: int = 1


@dataclass(frozen=True)
class Spec:
    """A checkpoint: what to generate, as data for the process that generates it."""

    shape: Shape
    ranks: Ranks = Ranks()
    norm_head: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Spec:
        return cls(Shape(**data["shape"]), Ranks(**data["ranks"]), data["norm_head"])


def slice_of(nbytes: float) -> Shape:
    """A model of about so many bytes: some layers of InternLM2-7B, and as much of its vocabulary as of its layers.

    So the parts of a checkpoint have the proportions of the real one at every size. Below 2 GB the
    layers are narrower, for trying things out; above 40 GB they are as wide as a 70B model's.
    """
    wide = Shape(80, 8192, 28672, 92544, 64, 8) if nbytes > 40e9 else Shape(32)
    if nbytes < NARROW_BELOW:
        wide = Shape(32, 1024, 3584, 92544 // 4, 16, 8)
    layers = max(4, 2 * round(wide.layers * nbytes / wide.nbytes / 2))  # even: two chunks hold as many each
    return replace(wide, layers=layers, vocab=max(256, wide.vocab * layers // wide.layers // 256 * 256))


def config(spec: Spec) -> dict[str, Any]:
    """What training writes as model_config.pt."""
    shape = spec.shape
    found = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "num_attention_heads": shape.heads,
        "num_kv_attention_heads": shape.groups,
        "mlp_ratio": shape.ffn / shape.hidden,
        "multiple_of": math.gcd(shape.ffn, 256),
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
        "rope_base": 1000000,
        "dtype": "torch.bfloat16",
        "num_chunks": spec.ranks.chunks,
        "adapt_hf": True,
    }
    return found | ({"norm_head": True} if spec.norm_head else {})


def stages(layers: int, ranks: Ranks) -> dict[tuple[int, int], range]:
    """(pipeline rank, chunk) → the layers it holds: all ranks' first chunks, then their second. Late ranks have more.

    >>> stages(8, Ranks(tp=1, pp=2, chunks=2))
    {(0, 0): range(0, 2), (1, 0): range(2, 4), (0, 1): range(4, 6), (1, 1): range(6, 8)}
    """
    found: dict[tuple[int, int], range] = {}
    each, low = layers // ranks.chunks, 0
    for chunk in range(ranks.chunks):
        for p in range(ranks.pp):
            high = low + each // ranks.pp + (p >= ranks.pp - each % ranks.pp)
            found[p, chunk] = range(low, high)
            low = high
    return found


def rank_files(ranks: Ranks) -> Iterator[tuple[str, int]]:
    """(file name, pipeline rank) of every rank file."""
    for p in range(ranks.pp):
        yield from ((f"model_tp{t}_pp{p}.pt", p) for t in range(ranks.tp))


def rank_tensors(spec: Spec, pp: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether every tensor-parallel rank has the same) in the order of a file of this stage."""
    shape, ranks = spec.shape, spec.ranks
    hidden, ffn, tp = shape.hidden, shape.ffn // ranks.tp, ranks.tp
    packed = (shape.heads + 2 * shape.groups) // tp * shape.head
    for (p, chunk), mine in stages(shape.layers, ranks).items():
        if p != pp:
            continue
        prefix = f"{chunk}.model." if ranks.chunks > 1 else ""
        if mine and mine.start == 0:
            yield f"{prefix}tok_embeddings.weight", (shape.vocab, hidden // tp), False
        for local in range(len(mine)):
            name = f"{prefix}layers.{local}."
            yield f"{name}attention.wqkv.weight", (packed, hidden), False
            yield f"{name}attention.wo.weight", (hidden, hidden // tp), False
            yield f"{name}feed_forward.w1.weight", (ffn, hidden), False
            yield f"{name}feed_forward.w2.weight", (hidden, ffn), False
            yield f"{name}feed_forward.w3.weight", (ffn, hidden), False
            yield f"{name}attention_norm.weight", (hidden,), True
            yield f"{name}ffn_norm.weight", (hidden,), True
        if mine and mine.stop == shape.layers:
            yield f"{prefix}norm.weight", (hidden,), True
            yield f"{prefix}output.weight", (shape.vocab // tp, hidden), False
