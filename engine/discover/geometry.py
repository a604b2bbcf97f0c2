"""What names and configurations say about tensors: sizes, heads, and what their rows and columns are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.errors import counted
from engine.language.names import numbers_in

_ATTENTION = re.compile(r"attn|attention|mixer|qkv|(^|[._])w?[qkvo](_proj)?[._]")
_OUT = re.compile(r"(^|\.)(o_proj|wo|out_proj|dense|c_proj|proj)(\.|$)")
_OTHER = re.compile(r"norm|mlp|feed_forward|embed|lm_head|output\.|gate|expert")


# Axis → the keys that name its size; the first is the one that Hugging Face's configurations have.
KEYS = {
    "layer": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden": ("hidden_size", "dim", "d_model", "n_embd"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "groups": ("num_key_value_heads", "num_kv_attention_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_hidden_size", "ffn_dim"),
    "expert": ("num_experts", "n_experts"),
}


@dataclass(frozen=True, slots=True)
class Known:
    """Sizes that the configuration names: the value of each axis and the expression that claims it."""

    sizes: Mapping[str, int]
    dims: Mapping[str, str]


def known_sizes(config: Mapping[str, Any]) -> Known:
    """The sizes of axes, from the usual keys of a configuration.

    >>> known_sizes({"hidden_size": 64, "num_attention_heads": 4}).sizes
    {'hidden': 64, 'heads': 4, 'head_dim': 16}
    """
    sizes: dict[str, int] = {}
    dims: dict[str, str] = {}
    for axis, keys in KEYS.items():
        key = next((k for k in keys if type(config.get(k)) is int and config[k] > 0), None)
        if key is not None:
            sizes[axis], dims[axis] = config[key], key
        elif axis == "head_dim" and "heads" in sizes and "hidden" in sizes and sizes["hidden"] % sizes["heads"] == 0:
            sizes[axis], dims[axis] = sizes["hidden"] // sizes["heads"], "hidden // heads"
    return Known(sizes, dims)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Head counts of a model: query heads, key/value heads, rows per head."""

    heads: int
    groups: int
    head_dim: int

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by whose square roots tensors of attention may be scaled."""
        return {"head_dim": self.head_dim, "hidden": self.heads * self.head_dim}

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of rows: of the queries, of the keys or values, and of all three together."""
        return tuple(n * self.head_dim for n in (self.heads, self.groups, self.heads + 2 * self.groups))


def geometry_of(configs: Sequence[Mapping[str, Any]]) -> Geometry | None:
    """The geometry from configurations; the last one takes precedence.

    >>> geometry_of([{}, {"num_attention_heads": 4, "hidden_size": 32}])
    Geometry(heads=4, groups=4, head_dim=8)
    """
    for config in reversed(configs):
        inner = next((config[k] for k in ("text_config", "llm_config") if isinstance(config.get(k), Mapping)), config)
        sizes = known_sizes(inner).sizes
        if "heads" in sizes and "head_dim" in sizes:
            return Geometry(sizes["heads"], sizes.get("groups", sizes["heads"]), sizes["head_dim"])
    return None


@dataclass(frozen=True, slots=True)
class Units:
    """What is put in order: rows, columns or elements, and the names of blocks of them.

    Attributes:
        noun: `row`, `column` or `element`.
        sizes: name of a block → its rows: `{"head": 128, "key/value group": 512}`.
        head: rows of a head, if rows may belong to heads; else None.
        heads: whether rows belong to heads; None if that is unknown.
    """

    noun: str
    sizes: Mapping[str, int]
    head: int | None = None
    heads: bool | None = None

    def block(self, size: int) -> str:
        """
        >>> Units("row", {"head": 8, "group": 16}).block(16)
        '16 rows = 2 heads = 1 group'
        """
        told = [counted(size, self.noun)]
        told += [counted(size // one, name) for name, one in self.sizes.items() if one > 1 and size % one == 0]
        return " = ".join(told)

    def block_noun(self, size: int) -> str:
        """The name of a block of `size` units: a head, for example, or a block of so many rows.

        >>> [Units("row", {"head": 8}).block_noun(n) for n in (1, 8, 12)]
        ['row', 'head', 'block of 12 rows']
        """
        if size == 1:
            return self.noun
        named = next((name for name, one in self.sizes.items() if one == size), None)
        return named or f"block of {counted(size, self.noun)}"


def units_of(name: str, axis: int, shape: Sequence[int], geometry: Geometry | None) -> Units:
    """What the rows (axis 0) or columns of a tensor are: of heads in attention, of experts in a stack of experts.

    >>> units_of("h.0.attn.k_proj.weight", 0, (16, 32), Geometry(4, 2, 8)).sizes
    {'head': 8}
    >>> units_of("h.0.attn.q_proj.weight", 0, (32, 32), Geometry(4, 2, 8)).sizes
    {'head': 8, 'key/value group': 16}
    """
    noun = "column" if axis else "row" if len(shape) > 1 else "element"
    size = shape[-1] if axis else prod(shape[:-1]) if len(shape) > 1 else prod(shape)
    if len(shape) > 2 and axis == 0:
        return Units(noun, {"expert" if "expert" in name else "matrix": prod(shape[1:-1])}, heads=False)
    named, other = _ATTENTION.search(name), _OTHER.search(name)
    of_heads = None if not named and not other else bool(named and (axis == 1) == bool(_OUT.search(name)))
    if geometry is None or of_heads is False:
        return Units(noun, {}, heads=of_heads)
    sizes = {"head": geometry.head_dim}
    queries, _, fused = geometry.rows
    if size in (queries, fused) and geometry.groups < geometry.heads and geometry.heads % geometry.groups == 0:
        sizes["key/value group"] = size // geometry.groups
    if size not in geometry.rows:
        return Units(noun, {}, heads=of_heads)
    return Units(noun, sizes if named else {}, geometry.head_dim, of_heads)


def neighbours(name: str, candidates: Sequence[str]) -> list[str]:
    """Candidates other than the name itself, those of the same layer and expert first."""
    own = numbers_in(name)
    return sorted((other for other in candidates if other != name), key=lambda other: numbers_in(other) != own)
