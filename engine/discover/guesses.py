"""What a tensor that differs may be instead: other orders of its rows, other tensors of its layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.move.tensors import Pair, Tensors, common_types
from engine.move.views import View

_MOST_ROWS = 1 << 20  # a vocabulary has fewer
_WIDEST_ROW = 1 << 16  # elements
_VOCABULARY = ("embed_tokens", "lm_head", "tok_embeddings", "output")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Head counts of a model: query heads, key/value heads, rows per head."""

    heads: int
    groups: int
    head_dim: int


def geometries(configs: Sequence[Mapping[str, Any]]) -> tuple[Geometry, ...]:
    """The different geometries that configurations tell, the reference's (the last) first.

    >>> geometries([{}, {"num_attention_heads": 4, "hidden_size": 32}])
    (Geometry(heads=4, groups=4, head_dim=8),)
    """
    found = []
    for config in reversed(configs):
        inner = next((config[k] for k in ("text_config", "llm_config") if isinstance(config.get(k), Mapping)), config)
        heads = inner.get("num_attention_heads")
        if not _positive(heads):
            continue
        groups, head_dim, hidden = (inner.get(k) for k in ("num_key_value_heads", "head_dim", "hidden_size"))
        if not _positive(head_dim) and _positive(hidden):
            head_dim = hidden // heads
        if _positive(head_dim) and head_dim % 2 == 0:
            found.append(Geometry(heads, groups if _positive(groups) else heads, head_dim))
    return tuple(dict.fromkeys(found))


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def rotary_orders(out: View, ref: View, heads: Geometry) -> Iterator[tuple[str, list[Pair]]]:
    """Pairs of views that are the same if rotary pairs are stored the other way, per right choice.

    Rows are (heads, half, pair) where the two halves of a head lie one after the other, and (heads,
    pair, half) where pairs are interleaved. The output of a run with the wrong choice was left as
    training had it, or rearranged although it was right:

        `pairs` would be right:   output (heads, pair, half)  →  reference (heads, half, pair)
        `halves` would be right:  output (heads, half, pair)  →  reference (heads, pair, half)

    A fused tensor (groups, queries + k + v, head_dim) is rearranged but for its values.
    """
    if not out.shape:
        return
    rows, dim = out.shape[0], heads.head_dim
    if rows in (heads.heads * dim, heads.groups * dim):
        parts = [(out.split(0, rows // dim, dim), ref.split(0, rows // dim, dim))]
        kept: list[Pair] = []
    elif heads.heads % heads.groups == 0 and rows == (heads.heads + 2 * heads.groups) * dim:
        last = heads.heads // heads.groups + 1
        one, two = (view.split(0, heads.groups, last + 1, dim) for view in (out, ref))
        parts = [(one.pick(1, i), two.pick(1, i)) for i in range(last)]
        kept = [(one.pick(1, last), two.pick(1, last))]
    else:
        return
    half = (2, dim // 2)
    pair = half[::-1]
    for rotary, ours, theirs in (("pairs", pair, half), ("halves", half, pair)):
        yield rotary, [(one.split(1, *ours).swap(1, 2), two.split(1, *theirs)) for one, two in parts] + kept


def recut(out: View, ref: View) -> Pair | None:
    """Views that are the same if square blocks were joined along the other dimension.

    Reading two exchanged names, rows of blocks become columns of blocks: (blocks · hidden) × hidden
    from hidden × (blocks · hidden). Shapes can hide the exchange only where blocks are square.
    """
    if len(out.shape) != 2 or out.shape != ref.shape[::-1]:
        return None
    rows, columns = out.shape
    if rows == columns or min(out.shape) == 0 or max(out.shape) % min(out.shape):
        return None
    side, blocks = min(out.shape), max(out.shape) // min(out.shape)
    if rows > columns:
        return out.split(0, blocks, side), ref.split(1, blocks, side).swap(0, 1)
    return out.split(1, blocks, side).swap(0, 1), ref.split(0, blocks, side)


def reordered_rows(tensors: Tensors, name: str, out: View, ref: View, configs: Sequence[Mapping[str, Any]]) -> int:
    """How many rows lie elsewhere, for a vocabulary's tensor whose rows are the same but for order; else 0."""
    vocabulary = name.split(".")[-2:-1] in ([n] for n in _VOCABULARY)
    kinds = common_types(out.dtype, ref.dtype)
    if len(out.shape) != 2 or not kinds or not 0 < out.shape[0] <= _MOST_ROWS or out.shape[1] > _WIDEST_ROW:
        return 0
    if not vocabulary and all(config.get("vocab_size") != out.shape[0] for config in configs):
        return 0
    one, two = (list(tensors.row_digests(view, kinds[0])) for view in (out, ref))
    return sum(a != b for a, b in zip(one, two, strict=True)) if Counter(one) == Counter(two) else 0


def numbers(name: str) -> tuple[int, ...]:
    """The integers of a name: its layer, and its expert if it has one.

    >>> numbers("model.layers.3.mlp.experts.7.w1.weight")
    (3, 7)
    """
    return tuple(int(part) for part in name.split(".") if is_number(part))


def is_number(part: str) -> bool:
    """Whether a part of a name counts layers or experts."""
    return part.isascii() and part.isdecimal() and len(part) < 10


def neighbours(name: str, candidates: Sequence[str], *, only: bool = False) -> list[str]:
    """Candidates other than the name itself, those of the same layer and expert first, or only those."""
    own = numbers(name)
    near = [other for other in candidates if other != name and numbers(other) == own]
    return near if only else near + [other for other in candidates if other != name and numbers(other) != own]
