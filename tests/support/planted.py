# ruff: noqa: E501, E741 — a fault is a line or two
"""Faults planted in converted checkpoints, one at a time, and what `compare` must say of each.

Every fault is plain torch indexing on the tensors of a genuine fixture, and shares nothing with the engine.
`python -m tests.support.planted FILE` writes the table of docs/compare-faults.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import engine

State = dict[str, torch.Tensor]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
SOURCES = {
    "v1_tp2_pp2": ("families/internlm.yaml", {}),
    "v2_tp2_pp2": ("families/internlm2.yaml", {}),
    "llama_tp2_pp1_default": ("families/llama.yaml", {}),
    "moe_tp2_pp2_dp1": ("families/internlm-moe.yaml", {}),
}
V1, V2, LLAMA, MOE = SOURCES
AT = "model.layers.1.self_attn."
MLP = "model.layers.1.mlp."
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"


@dataclass(frozen=True)
class Fault:
    """What was done, to which tensors, and what is to be said of the first.

    Attributes:
        kind: the verdict on the first tensor.
        words: what its note or the diagnoses must contain, all of them.
    """

    what: str
    source: str
    name: str
    do: Callable[[State], None]
    kind: str
    words: tuple[str, ...]


def _on(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def do(state: State) -> None:
        state[name] = change(state[name].clone()).to(state[name].dtype).contiguous()

    return do


def _exchange(*names: str) -> Callable[[State], None]:
    def do(state: State) -> None:
        for name in [n for n in state if names[0] in n]:
            other = name.replace(names[0], names[1])
            state[name], state[other] = state[other], state[name]

    return do


def _all(*faults: Callable[[State], None]) -> Callable[[State], None]:
    def do(state: State) -> None:
        for fault in faults:
            fault(state)

    return do


def _copy(name: str, other: str) -> Callable[[State], None]:
    def do(state: State) -> None:
        state[name] = state[other].clone()

    return do


def _blocks(order: list[int], dim: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Equal blocks of a dimension in another order."""

    def change(t: torch.Tensor) -> torch.Tensor:
        parts = t.chunk(len(order), dim)
        return torch.cat([parts[i] for i in order], dim)

    return change


def _within(t: torch.Tensor, order: list[int]) -> torch.Tensor:
    heads = t.view(-1, len(order), *t.shape[1:])
    return heads[:, order].reshape(t.shape)


def _pairs(t: torch.Tensor, head_dim: int = 8) -> torch.Tensor:
    return _within(
        t, [i for pair in zip(range(head_dim // 2), range(head_dim // 2, head_dim), strict=True) for i in pair]
    )


def _put(value: float, *at: int | slice) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[at] = value
        return t

    return change


def _times(factor: float, *at: int | slice) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[at] = t[at] * factor
        return t

    return change


def _rows_from(name: str, low: int, high: int, other: str, start: int) -> Callable[[State], None]:
    def do(state: State) -> None:
        state[name] = state[name].clone()
        state[name][low:high] = state[other][start : start + high - low]

    return do


def _random(name: str) -> Callable[[State], None]:
    def do(state: State) -> None:
        generator = torch.Generator().manual_seed(7)
        old = state[name]
        state[name] = (torch.randn(old.shape, generator=generator) * old.float().std()).to(old.dtype)

    return do


def _layers(one: int, two: int) -> Callable[[State], None]:
    return _exchange(f"layers.{one}.", f"layers.{two}.")


def _resize(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def do(state: State) -> None:
        state[name] = change(state[name]).contiguous()

    return do


def _misread_qkv(state: State) -> None:
    """[q0, k0, v0, q1, k1, v1] read as q, k, v."""
    halves = [state[name].chunk(2) for name in (Q, K, V)]
    packed = torch.cat([part[rank] for rank in (0, 1) for part in halves])
    state[Q], state[K], state[V] = (t.clone() for t in packed.chunk(3))


def _rename(name: str, other: str) -> Callable[[State], None]:
    def do(state: State) -> None:
        state[other] = state.pop(name)

    return do


Q, K, V, O = (f"{AT}{x}_proj.weight" for x in "qkvo")
QB, KB, OB = (f"{AT}{x}_proj.bias" for x in "qko")
GATE, UP, DOWN = (f"{MLP}{x}_proj.weight" for x in ("gate", "up", "down"))
E = "model.layers.1.mlp.experts."


def _misread_gates(state: State) -> None:
    """[gate0, up0, gate1, up1] read as gate, up."""
    halves = [state[name].chunk(2) for name in (GATE, UP)]
    packed = torch.cat([part[rank] for rank in (0, 1) for part in halves])
    state[GATE], state[UP] = (t.clone() for t in packed.chunk(2))


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def _noisy(t: torch.Tensor) -> torch.Tensor:
    return (t.float() + 0.01 * t.float().std() * _drawn(*t.shape)).to(t.dtype)


def _quantised(t: torch.Tensor, levels: int, dim: int | None = None) -> torch.Tensor:
    size = t.float().abs()
    step = (size.max() if dim is None else size.amax(dim, keepdim=True)) / levels
    return (t.float() / step).round() * step


def _low(t: torch.Tensor, rank: int) -> torch.Tensor:
    """A product of low rank, a fifth as large."""
    product = _drawn(t.shape[0], rank) @ _drawn(t.shape[1], rank).t()
    return product * (0.2 * t.float().std() / product.std())


def _truncated(t: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(t.float(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _half_of_heads(state: State) -> None:
    """The second half of each head, of another layer."""
    heads = state[Q].clone().view(8, 8, 64)
    heads[:, 4:] = state[Q.replace("1", "2")].view(8, 8, 64)[:, 4:]
    state[Q] = heads.view(64, 64)


def _perm(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


FAULTS: tuple[Fault, ...] = (
    # order of rows, columns and blocks
    Fault("two heads exchanged", V1, Q, _on(Q, _blocks([0, 5, 2, 3, 4, 1, 6, 7])), "permuted", ("heads 1 and 5 exchanged",)),
    Fault("heads in a random order", V1, K, _on(K, _blocks(_perm(1, 8))), "permuted", ("heads in another order",)),
    Fault("heads of the output projection in a random order", V1, O, _on(O, _blocks(_perm(2, 8), 1)), "permuted",
          ("heads in another order", "8 columns = 1 head")),
    Fault("heads reversed", V2, Q, _on(Q, _blocks([*range(7, -1, -1)])), "permuted", ("heads in reverse order",)),
    Fault("key/value groups of queries exchanged", V2, Q, _on(Q, _blocks([0, 2, 1, 3])), "permuted",
          ("key/value groups 1 and 2 exchanged",)),
    Fault("key heads rolled by one", V2, K, _on(K, lambda t: t.roll(8, 0)), "permuted", ("heads shifted by 1",)),
    Fault("queries stored queries first, then groups", V2, Q,
          _on(Q, lambda t: t.view(4, 2, 8, 64).transpose(0, 1).reshape(64, 64)), "permuted", ("interleaved", "(4 × 2 × 8)")),
    Fault("bias heads in a random order", V1, QB, _on(QB, _blocks(_perm(3, 8))), "permuted", ("heads in another order",)),
    Fault("tensor ranks joined in the other order, rows", V2, GATE, _on(GATE, _blocks([1, 0])), "permuted",
          ("halves of the rows exchanged", "2 tensor ranks")),
    Fault("tensor ranks joined in the other order, columns", V2, DOWN, _on(DOWN, _blocks([1, 0], 1)), "permuted",
          ("halves of the columns exchanged", "2 tensor ranks")),
    Fault("four tensor ranks joined in another order", V2, UP, _on(UP, _blocks([2, 0, 3, 1])), "permuted",
          ("in another order", "4 tensor ranks", "64 rows")),
    Fault("two of eight slices of columns exchanged", V2, DOWN, _on(DOWN, _blocks([0, 1, 6, 3, 4, 5, 2, 7], 1)),
          "permuted", ("blocks 2 and 6 exchanged", "32 columns")),
    Fault("slices of an output projection joined along rows", V2, DOWN,
          _on(DOWN, lambda t: torch.cat(t.chunk(2, 1), 0).reshape(t.shape)), "recut", ("interleaved", "2 tensor ranks")),
    Fault("the same, with the shape it then has", V1, O,
          _resize(O, lambda t: torch.cat(t.chunk(4, 1), 0)), "recut", ("4 tensor ranks", "wrong axis")),
    Fault("rows of two ranks interleaved one by one", V1, UP,
          _on(UP, lambda t: t.view(2, -1, 64).transpose(0, 1).reshape(t.shape)), "permuted", ("interleaved",)),
    Fault("columns interleaved one by one", V1, DOWN,
          _on(DOWN, lambda t: t.view(64, 2, -1).transpose(1, 2).reshape(t.shape)), "permuted", ("columns interleaved",)),
    Fault("rows and columns in random orders", V1, GATE,
          _on(GATE, lambda t: t[_perm(4, 256)][:, _perm(5, 64)]), "permuted", ("rows in another order", "columns in another order")),
    Fault("transposed, square", V1, O, _on(O, lambda t: t.t()), "transposed", ("transposing",)),
    Fault("transposed, with the shape it then has", V1, DOWN, _resize(DOWN, lambda t: t.t()), "transposed", ("transposing",)),
    Fault("transposed, in the shape it had before", V2, DOWN, _on(DOWN, lambda t: t.t().reshape(t.shape)), "recut",
          ("its transpose, 256 × 64", "only reshaped")),
    Fault("rows reversed", V1, GATE, _on(GATE, lambda t: t.flip(0)), "permuted", ("rows in reverse order",)),
    Fault("columns reversed", V1, GATE, _on(GATE, lambda t: t.flip(1)), "permuted", ("columns in reverse order",)),
    Fault("one rank's slice twice", V1, K, _on(K, _blocks([0, 0])), "changed", ("rows 32…63", "holds rows 0…31 of the reference")),
    # rotary pairs
    Fault("queries left in pairs", V1, Q, _on(Q, _pairs), "permuted", ("rotary pairs in every head", "`rotary` should be `pairs`")),
    Fault("keys left in pairs", V2, K, _on(K, _pairs), "permuted", ("rotary pairs in every head", "k_proj in layer 1")),
    Fault("queries and keys turned to pairs twice", LLAMA, Q,
          _all(*(_on(x, lambda t: _within(t, [0, 2, 4, 6, 1, 3, 5, 7])) for x in (Q, K))), "permuted",
          ("rotary pairs in every head", "`rotary` should be `halves`")),
    Fault("bias of queries left in pairs", V1, QB, _on(QB, _pairs), "permuted", ("rotary pairs in every head",)),
    Fault("halves of every head exchanged", V1, Q, _on(Q, lambda t: _within(t, [4, 5, 6, 7, 0, 1, 2, 3])), "permuted",
          ("halves", "in every head")),
    # values
    Fault("doubled", V1, V, _on(V, _times(2)), "scaled", ("2 times the reference",)),
    Fault("doubled bias, as summed over two ranks", V1, OB, _on(OB, _times(2)), "scaled", ("2 times the reference",)),
    Fault("halved", V2, GATE, _on(GATE, _times(0.5)), "scaled", ("0.5 times the reference",)),
    Fault("times the root of head_dim", V1, Q, _on(Q, lambda t: t.float() * 8**0.5), "scaled", ("√8", "head_dim")),
    Fault("divided by the root of head_dim", V2, Q, _on(Q, lambda t: t.float() / 8**0.5), "scaled", ("1/√8", "head_dim")),
    Fault("times 0.9", V2, UP, _on(UP, lambda t: t.float() * 0.9), "scaled", ("scaled: 0.",)),
    Fault("each row by its own factor", V2, HEAD,
          _on(HEAD, lambda t: t.float() * torch.linspace(0.5, 2, 256)[:, None]), "scaled", ("each row by a factor of its own",)),
    Fault("rows scaled to length 1", V2, HEAD, _on(HEAD, lambda t: torch.nn.functional.normalize(t.float())), "scaled",
          ("each row", "to length 1")),
    Fault("each column by its own factor, as a norm folded in", V2, Q,
          _on(Q, lambda t: t.float() * torch.linspace(0.5, 2, 64)), "scaled", ("each column by a factor of its own",)),
    Fault("norm plus one", V1, NORM, _on(NORM, lambda t: t.float() + 1), "shifted", ("plus 1",)),
    Fault("norm minus one", V2, NORM, _on(NORM, lambda t: t.float() - 1), "shifted", ("minus 1",)),
    Fault("zeroed", V1, UP, _on(UP, torch.zeros_like), "zeroed", ("all zero",)),
    Fault("bias zeroed", V1, KB, _on(KB, torch.zeros_like), "zeroed", ("all zero",)),
    Fault("norm set to one", V1, NORM, _on(NORM, torch.ones_like), "constant", ("1 throughout",)),
    Fault("negated", V2, DOWN, _on(DOWN, torch.neg), "negated", ("negated",)),
    Fault("bias negated", V1, OB, _on(OB, torch.neg), "negated", ("negated",)),
    Fault("through float16 and back", V1, EMBED, _on(EMBED, lambda t: (t.float() * 1e-4).half() * 1e4), "different", ()),
    Fault("through float8 and back", V2, UP, _on(UP, lambda t: t.to(torch.float8_e4m3fn)), "rounded", ("F8_E4M3",)),
    Fault("through float8_e5m2 and back", V2, UP, _on(UP, lambda t: t.to(torch.float8_e5m2)), "rounded", ("F8_E5M2",)),
    Fault("lowest bits cut off", V2, GATE, _on(GATE, lambda t: (t.view(torch.int16) & -8).view(torch.bfloat16)), "rounded",
          ("only 4 of 7 bits",)),
    Fault("through float16, which few elements tell", V2, GATE, _on(GATE, torch.Tensor.half), "rounded", ("F16 and back",)),
    Fault("all NaN", V1, V, _on(V, lambda t: t * float("nan")), "constant", ("all NaN",)),
    # parts
    Fault("one element changed", V1, UP, _on(UP, _put(3.0, 17, 5)), "changed", ("one element differs", "[17, 5]")),
    Fault("one NaN", V2, DOWN, _on(DOWN, _put(float("nan"), 3, 9)), "changed", ("one element differs", "NaN")),
    Fault("a row of NaN", V2, DOWN, _on(DOWN, _put(float("nan"), 3)), "changed", ("one row differs", "row 3", "NaN")),
    Fault("a few elements of a norm changed", V1, NORM, _on(NORM, lambda t: _put(3.0, 11)(_put(9.0, 3)(t))), "changed",
          ("a part of it differs: elements 3, 11",)),
    Fault("one row zeroed", V1, EMBED, _on(EMBED, _put(0, 77)), "changed", ("one row differs", "row 77", "all zero")),
    Fault("one column doubled", V1, O, _on(O, _times(2, slice(None), 6)), "changed", ("one column differs", "column 6", "2 times")),
    Fault("one head scaled", V2, Q, _on(Q, _times(4, slice(16, 24))), "changed", ("rows 16…23", "4 times the reference")),
    Fault("a block zeroed", V2, GATE, _on(GATE, _put(0, slice(32, 64), slice(8, 24))), "changed",
          ("a block", "rows 32…63", "columns 8…23", "all zero")),
    Fault("one rank's rows negated", V1, UP, _on(UP, _times(-1, slice(128, 256))), "changed", ("rows 128…255", "negated")),
    Fault("one rank's rows zero", V1, GATE, _on(GATE, _put(0, slice(0, 128))), "changed", ("rows 0…127", "all zero")),
    Fault("a row of another tensor", V2, K, _rows_from(K, 8, 16, V, 8), "changed", ("rows 8…15", f"of {V}")),
    Fault("three elements changed", V1, DOWN, _all(*(_on(DOWN, _put(2.0, i, j)) for i, j in ((1, 3), (9, 200), (60, 77)))),
          "changed", ("3 scattered elements",)),
    # other tensors
    Fault("gate and up exchanged", V2, GATE, _exchange("gate_proj", "up_proj"), "swapped", ("gate_proj and up_proj are exchanged",)),
    Fault("queries and keys exchanged", V1, Q, _exchange("q_proj", "k_proj"), "swapped", ("q_proj are exchanged",)),
    Fault("keys and values exchanged", V2, K, _exchange("k_proj", "v_proj"), "swapped", ("k_proj and v_proj are exchanged",)),
    Fault("norms exchanged", V1, NORM, _exchange("input_layernorm", "post_attention_layernorm"), "swapped",
          ("input_layernorm and post_attention_layernorm are exchanged",)),
    Fault("layers exchanged", V1, Q, _layers(1, 3), "swapped", ("layers are in another order: 1 holds 3, 3 holds 1",)),
    Fault("layers rotated", V2, Q, _all(_layers(0, 1), _layers(1, 2)), "swapped",
          ("layers are in another order: 0 holds 1, 1 holds 2, 2 holds 0",)),
    Fault("attention of two layers exchanged", V2, Q,
          _all(*(_exchange(f"layers.1.self_attn.{x}_proj", f"layers.2.self_attn.{x}_proj") for x in "qkvo")), "swapped",
          ("layers are in another order: 1 holds 2, 2 holds 1, in self_attn alone",)),
    Fault("experts of two layers exchanged", MOE, f"{E}0.gate_proj.weight",
          _exchange("layers.1.mlp.experts.", "layers.2.mlp.experts."), "swapped", ("1 holds 2, 2 holds 1, in mlp.experts alone",)),
    Fault("half of every head of another layer", V2, Q, _half_of_heads, "part", ("rows 4…7 hold 4…7", f"of {Q.replace('1', '2')}")),
    Fault("one tensor copied over another", V1, K, _copy(K, V), "copied", ("k_proj in layer 1 is a copy of v_proj",)),
    Fault("a layer's tensor copied over the next", V1, Q, _copy(Q, "model.layers.0.self_attn.q_proj.weight"), "copied",
          ("is a copy of q_proj", "in layer 0")),
    Fault("a bias in another's place", V1, KB, _copy(KB, QB), "copied", ("is a copy of q_proj",)),
    Fault("biases exchanged", V1, KB, _exchange("k_proj.bias", "q_proj.bias"), "swapped", ("exchanged",)),
    Fault("a bias moved", V1, "model.layers.1.mlp.up_proj.bias", _rename(OB, "model.layers.1.mlp.up_proj.bias"), "extra",
          ("up_proj.bias is model.layers.1.self_attn.o_proj.bias in the reference",)),
    Fault("head tied by mistake", V2, HEAD, _copy(HEAD, EMBED), "copied", ("lm_head is a copy of embed_tokens",)),
    Fault("keys are rows of the queries", V2, K, lambda s: s.__setitem__(K, s[Q][16:48].clone()), "part", (f"rows 16…47 of {Q}",)),
    Fault("gate is up transposed from another layer's down", V1, GATE,
          lambda s: s.__setitem__(GATE, s["model.layers.2.mlp.down_proj.weight"].t().contiguous()), "copied", ("transposed",)),
    Fault("experts permuted", MOE, f"{E}0.gate_proj.weight", _exchange("experts.0.", "experts.2."), "swapped",
          ("experts are in another order: 0 holds 2, 2 holds 0",)),
    Fault("rows of the router in another order", MOE, f"{MLP}gate.weight", _on(f"{MLP}gate.weight", lambda t: t[[2, 1, 0, 3]]),
          "permuted", ("rows 0 and 2 exchanged",)),
    Fault("packed q, k, v of two ranks split as if of one", V1, K, _misread_qkv, "part",
          (f"rows 0…31 hold 0…31 of {V}", f"rows 32…63 hold 32…63 of {Q}")),
    Fault("key heads repeated for every query", V2, K,
          _resize(K, lambda t: t.view(4, 1, 8, 64).expand(4, 2, 8, 64).reshape(64, 64)), "extended",
          ("each block of 8 is there 2 times",)),
    Fault("a norm reversed", V1, NORM, _on(NORM, lambda t: t.flip(0)), "permuted", ("elements in reverse order",)),
    Fault("two rows exchanged", V2, EMBED, _on(EMBED, lambda t: t[[0, 9, 2, 3, 4, 5, 6, 7, 8, 1, *range(10, 256)]]), "permuted",
          ("rows 1 and 9 exchanged",)),
    # the vocabulary
    Fault("embedding shifted by one, round", V1, EMBED, _on(EMBED, lambda t: t.roll(1, 0)), "permuted", ("rows shifted by 1",)),
    Fault("embedding shifted by one, first row zero", V1, EMBED,
          _on(EMBED, lambda t: torch.cat([torch.zeros_like(t[:1]), t[:-1]])), "permuted", ("rows shifted by 1", "row 1 holds row 0")),
    Fault("vocabulary in another order", V2, EMBED, _on(EMBED, lambda t: t[_perm(6, 256)]), "permuted",
          ("rows in another order", "tokenizer")),
    Fault("a row taken out, the rest moved up", V2, EMBED,
          _on(EMBED, lambda t: torch.cat([t[:100], t[101:], torch.zeros_like(t[:1])])), "permuted", ("rows 100…254 hold 101…255",)),
    Fault("a row put in, the rest moved down", V2, HEAD,
          _on(HEAD, lambda t: torch.cat([t[:100], torch.zeros_like(t[:1]), t[100:-1]])), "permuted", ("rows 101…255 hold 100…254",)),
    Fault("a row moved to the end", V2, HEAD, _on(HEAD, lambda t: torch.cat([t[:100], t[101:], t[100:101]])), "permuted",
          ("rows 100…254 hold 101…255, 255 holds 100",)),
    Fault("padding rows of zeros", V1, EMBED, _resize(EMBED, lambda t: torch.cat([t, torch.zeros_like(t[:8])])), "padded",
          ("8 rows more",)),
    Fault("padding rows, the mean", V1, HEAD, _resize(HEAD, lambda t: torch.cat([t, t.float().mean(0, True).to(t.dtype).expand(8, 64)])),
          "padded", ("8 rows more",)),
    Fault("vocabulary cut off", V2, HEAD, _resize(HEAD, lambda t: t[:250]), "truncated", ("6 rows fewer",)),
    Fault("first rows lost", V2, HEAD, _resize(HEAD, lambda t: t[6:]), "truncated", ("6 rows fewer", "the others in order")),
    Fault("padding after each rank's rows", V2, HEAD,
          _resize(HEAD, lambda t: torch.cat([t[:128], torch.zeros_like(t[:4]), t[128:], torch.zeros_like(t[:4])])), "padded",
          ("8 rows more", "rows 132…259 hold 128…255")),
    # types
    Fault("written in float32", V1, UP, lambda s: s.__setitem__(UP, s[UP].float()), "cast", ("equal after casting",)),
    Fault("rotary pairs and float32", V1, Q, lambda s: s.__setitem__(Q, _pairs(s[Q]).float()), "permuted", ("rotary pairs in every head",)),
    # two things at once
    Fault("transposed and doubled", V1, O, _on(O, lambda t: t.t() * 2), "transposed", ("rows are columns", "2 times")),
    Fault("another tensor, doubled", V1, K, lambda s: s.__setitem__(K, s[V] * 2), "copied", ("is a copy of v_proj", "2 times")),
    Fault("another tensor, negated", V1, GATE, lambda s: s.__setitem__(GATE, -s[UP]), "copied", ("is a copy of up_proj", "negated")),
    Fault("rotary pairs and a factor", V2, Q, _on(Q, lambda t: _pairs(t).float() * 8**-0.5), "permuted",
          ("rotary pairs in every head", "1/√8")),
    Fault("rotary pairs in one head only", V2, Q, _on(Q, lambda t: torch.cat([_pairs(t[:8]), t[8:]])), "permuted",
          ("rotary pairs in head 0",)),
    Fault("one rank's columns twice", V2, DOWN, _on(DOWN, lambda t: t[:, :128].repeat(1, 2)), "changed",
          ("columns 128…255", "holds columns 0…127 of the reference")),
    Fault("every other row negated", V2, Q, _on(Q, lambda t: t * torch.tensor([1, -1]).repeat(32)[:, None]), "scaled",
          ("each row by a factor of its own: -1 and 1",)),
    Fault("0.01 added", V2, UP, _on(UP, lambda t: t.float() + 0.01), "shifted", ("plus 0.01",)),
    Fault("absolute values", V1, UP, _on(UP, torch.abs), "clipped", ("absolute values",)),
    Fault("cut off at 0.3", V1, UP, _on(UP, lambda t: t.clamp(-0.3, 0.3)), "clipped", ("cut off to -0.3",)),
    Fault("a norm of another shape", V1, NORM, _resize(NORM, lambda t: t.view(1, 64)), "recut", ("the same elements in a row",)),
    Fault("half of the rows", V1, UP, _resize(UP, lambda t: t[:128]), "truncated", ("128 rows fewer",)),
    Fault("half of the columns", V1, DOWN, _resize(DOWN, lambda t: t[:, 128:]), "truncated", ("128 columns fewer", "hold 128…255")),
    Fault("an infinite element", V2, DOWN, _on(DOWN, _put(float("inf"), 3, 9)), "changed", ("one element differs",)),
    # other values in another order
    Fault("heads permuted and scaled", V2, Q, _on(Q, lambda t: _blocks(_perm(8, 8))(t).float() * 0.3), "permuted",
          ("heads in another order", "scaled: 0.3 times")),
    Fault("heads permuted, through float8", V2, Q, _on(Q, lambda t: _blocks(_perm(8, 8))(t).to(torch.float8_e4m3fn)), "permuted",
          ("heads in another order", "F8_E4M3")),
    Fault("heads permuted and disturbed", V2, Q, _on(Q, lambda t: _noisy(_blocks(_perm(8, 8))(t))), "permuted",
          ("heads in another order", "close")),
    Fault("heads permuted and one element changed", V2, Q, _on(Q, lambda t: _put(9.0, 3, 3)(_blocks(_perm(8, 8))(t))), "permuted",
          ("heads in another order", "1 row from elsewhere")),
    Fault("rotary pairs and heads permuted", V2, Q, _on(Q, lambda t: _blocks(_perm(8, 8))(_pairs(t))), "permuted",
          ("rotary pairs in every head", "heads in another order", "`rotary` should be `pairs`")),
    Fault("halves of every head exchanged, one negated", V2, Q,
          _on(Q, lambda t: torch.cat([-t.view(8, 2, 4, 64)[:, 1:], t.view(8, 2, 4, 64)[:, :1]], 1).reshape(64, 64)), "permuted",
          ("halves of the rows exchanged", "in every head", "-1 and 1")),
    Fault("tensor ranks exchanged, quantised to 8 bits", V2, UP, _on(UP, lambda t: _quantised(_blocks([1, 0])(t), 127)), "permuted",
          ("halves of the rows exchanged", "8 bits")),
    Fault("transposed and disturbed", V1, O, _on(O, lambda t: _noisy(t.t())), "transposed", ("rows are columns", "close")),
    Fault("transposed and one element changed", V1, O, _on(O, lambda t: _put(9.0, 3, 3)(t.t().clone())), "transposed",
          ("rows are columns", "1 row from elsewhere")),
    Fault("another layer's tensor, disturbed", V2, V, lambda s: s.__setitem__(V, _noisy(s[V.replace("1", "0")])), "copied",
          ("is a copy of v_proj", "in layer 0", "close")),
    Fault("another layer's heads in another order, scaled", V2, Q,
          lambda s: s.__setitem__(Q, (_blocks(_perm(8, 8))(s[Q.replace("1", "0")]).float() * 3).bfloat16()), "copied",
          ("in layer 0", "heads in another order", "3 times")),
    Fault("gate and up exchanged and disturbed", V2, GATE,
          _all(_exchange("gate_proj", "up_proj"), *(_on(x, lambda t: _noisy(t)) for x in (GATE, UP))), "swapped",
          ("gate_proj and up_proj are exchanged", "close")),
    Fault("gate and up of two ranks split as of one", V2, GATE, _misread_gates, "changed", (f"holds rows 0…127 of {UP}",)),
    Fault("padded and scaled", V1, EMBED, _resize(EMBED, lambda t: torch.cat([t * 2, torch.zeros_like(t[:8])])), "padded",
          ("8 rows more", "2 times")),
    # quantised, pruned, mapped
    Fault("quantised to 8 bits by its largest", V2, UP, _on(UP, lambda t: _quantised(t, 127)), "rounded", ("8 bits",)),
    Fault("quantised to 4 bits in groups of 32", V2, UP,
          _on(UP, lambda t: _quantised(t.reshape(-1, 32), 7, 1).view(t.shape)), "rounded", ("4 bits", "32 elements in a row")),
    Fault("float8 with a scale", V2, UP,
          _on(UP, lambda t: (t.float() * 77.7).to(torch.float8_e4m3fn).float() / 77.7), "rounded", ("F8_E4M3 with a scale",)),
    Fault("half of the elements pruned", V2, UP, _on(UP, lambda t: t * (t.abs() > t.float().abs().median())), "changed", ("pruned: 50",)),
    Fault("without negative values", V2, UP, _on(UP, lambda t: t.clamp(min=0)), "clipped", ("without negative values",)),
    Fault("reciprocal of a norm", V2, NORM, _on(NORM, lambda t: 1 / t.float()), "mapped", ("the reciprocal",)),
    Fault("squared", V2, UP, _on(UP, lambda t: t.float() ** 2), "mapped", ("squared",)),
    Fault("bytes of every element exchanged", V2, UP,
          _on(UP, lambda t: t.view(torch.uint8).view(-1, 2).flip(1).contiguous().view(torch.bfloat16).view(t.shape)), "mapped",
          ("bytes of each element in reverse order",)),
    Fault("float16 read as bfloat16", V2, UP, _on(UP, lambda t: t.half().view(torch.bfloat16)), "mapped", ("bits of F16 read as BF16",)),
    Fault("each row less its mean", V2, UP, _on(UP, lambda t: t.float() - t.float().mean(1, True)), "shifted", ("each row by a summand",)),
    Fault("one rank doubled, the other NaN", V2, UP, _on(UP, lambda t: torch.cat([t[:128] * 2, t[128:] * float("nan")])), "changed",
          ("rows 0…127: scaled: 2 times", "rows 128…255: all NaN")),
    Fault("doubled, but for one element", V2, UP, _on(UP, lambda t: _put(9.0, 3, 3)(t * 2)), "scaled", ("2 times", "but for 1 element")),
    # sums
    Fault("mean of two layers", V2, UP,
          lambda s: s.__setitem__(UP, ((s[UP].float() + s[UP.replace("1", "0")].float()) / 2).bfloat16()), "different",
          ("the mean of", UP.replace("1", "0"))),
    Fault("sum of gate and up", V2, UP, lambda s: s.__setitem__(UP, (s[UP].float() + s[GATE].float()).bfloat16()), "different",
          ("the sum of", GATE)),
    Fault("ranks averaged in place of joined", V2, UP, _on(UP, lambda t: (t[:128].float() + t[128:].float()).repeat(2, 1) / 2),
          "different", ("rows 0…127 are the mean of rows",)),
    Fault("key heads averaged in pairs", V2, K, _on(K, lambda t: t.view(-1, 2, 8, t.shape[1]).float().mean(1).flatten(0, 1)),
          "shape", ("rows 0…7 are the mean of", "rows 8…15")),
    Fault("an adapter of rank 4 merged", V2, Q, _on(Q, lambda t: t.float() + _low(t, 4)), "different", ("a product of rank 4 was added",)),
    Fault("cut off to rank 8", V2, UP, _on(UP, lambda t: _truncated(t, 8)), "different", ("of rank 8 only",)),
    Fault("columns turned by a rotation", V2, UP,
          _on(UP, lambda t: t.float() @ torch.linalg.qr(_drawn(64, 64))[0]), "different", ("mixed by a rotation",)),
    Fault("half of it another model's", V2, UP, _on(UP, lambda t: (t.float() + t.float().std() * _drawn(*t.shape)) / 2), "different",
          ("times the reference and something else",)),
    # flat pieces
    Fault("flat elements shifted by one", V2, UP, _on(UP, lambda t: t.flatten().roll(1).view(t.shape)), "permuted",
          ("elements in a row shifted by 1",)),
    Fault("flat pieces of three ranks in another order", V2, UP,
          _on(UP, lambda t: torch.cat([t.flatten().chunk(3)[i] for i in (1, 0, 2)]).view(t.shape)), "permuted", ("pieces of elements in a row",)),
    Fault("two elements exchanged", V2, DOWN, _on(DOWN, lambda t: _put(float(t[5, 9]), 1, 2)(_put(float(t[1, 2]), 5, 9)(t.clone()))),
          "changed", ("exchanged with each other",)),
    Fault("elements shuffled", V2, DOWN,
          _on(DOWN, lambda t: t.flatten()[torch.randperm(t.numel(), generator=torch.Generator().manual_seed(1))].view(t.shape)),
          "permuted", ("the same elements in another order",)),
    # nothing in common
    Fault("random values", V2, GATE, _random(GATE), "different", ()),
    Fault("a random norm", V2, NORM, _random(NORM), "different", ()),
    Fault("a random bias", V1, QB, _random(QB), "different", ()),
    Fault("a little noise, as of another step", V2, UP,
          _on(UP, lambda t: t.float() + 0.01 * t.float().std() * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))),
          "different", ("close: off by",)),
)  # fmt: skip


# Another value in config.json: what it is, the values, the key that must be told, and a word of what it does.
SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "theta": ({"rope_theta": 5000.0, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
              "rope_parameters.rope_theta", "different speeds"),
    "theta a little": ({"rope_theta": 10001.0, "rope_parameters": {"rope_theta": 10001.0, "rope_type": "default"}},
                       "rope_parameters.rope_theta", "different speeds"),
    "scaling": ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}},
                "rope_parameters.rope_type", "scaled differently"),
    "epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "every norm"),
    "epsilon that is absent": ({"rms_norm_eps": None}, "rms_norm_eps", "every norm"),
    "tie": ({"tie_word_embeddings": True}, "tie_word_embeddings", "the head is tied"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "activation"),
    "heads": ({"num_attention_heads": 16, "head_dim": 4}, "num_attention_heads", "different heads"),
    "key/value heads": ({"num_key_value_heads": 8}, "num_key_value_heads", "share"),
    "head_dim": ({"head_dim": 16}, "head_dim", "width"),
    "eos": ({"eos_token_id": 5}, "eos_token_id", "stops"),
    "eos list": ({"eos_token_id": [2, 5]}, "eos_token_id", "stops"),
    "bos": ({"bos_token_id": 3}, "bos_token_id", "begins"),
    "pad": ({"pad_token_id": 0}, "pad_token_id", "padded"),
    "architecture": ({"architectures": ["MistralForCausalLM"]}, "architectures", "different class"),
    "model type": ({"model_type": "mistral"}, "model_type", "different code"),
    "vocabulary": ({"vocab_size": 300}, "vocab_size", "rows"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers", "left out"),
    "hidden": ({"hidden_size": 128}, "hidden_size", "do not fit"),
    "ffn": ({"intermediate_size": 512}, "intermediate_size", "do not fit"),
    "attention bias": ({"attention_bias": True}, "attention_bias", "biases"),
    "sight": ({"is_causal": False}, "is_causal", "sees those behind it"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias", "biases"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}},
                  "quantization_config.bits", "as quantised"),
}  # fmt: skip


def convert(source: str, folder: Path) -> Path:
    """The reference made of a fixture."""
    mapping, settings = SOURCES[source]
    engine.convert(mapping, FIXTURES / source, folder, settings=settings)
    return folder


def plant(fault: Fault, reference: Path, folder: Path) -> Path:
    """A copy of the reference with one fault."""
    folder.mkdir(parents=True)
    shutil.copy(reference / "config.json", folder)
    state = load_file(reference / "model.safetensors")
    fault.do(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def told_of(fault: Fault, reference: Path, folder: Path) -> tuple[str, str, str]:
    """The kind and the note of the fault's tensor, and all diagnoses."""
    done = engine.api.compare(plant(fault, reference, folder), reference)
    verdict = next(v for v in done.verdicts if v.name == fault.name)
    return verdict.kind, verdict.note, " · ".join(done.diagnoses)


def row(fault: Fault, kind: str, note: str, means: str) -> str:
    """A fault and what is said of it, as Markdown."""
    named = kind == fault.kind and all(word in f"{note} · {means}" for word in fault.words)
    return f"| {fault.what} | {kind} | {means or note or '-'} | {'yes' if named else 'no'} |"


def table(folder: Path) -> str:
    """Every fault and what is said of it, as Markdown."""
    references = {source: convert(source, folder / source) for source in SOURCES}
    rows = [row(f, *told_of(f, references[f.source], folder / str(i))) for i, f in enumerate(FAULTS)]
    return "\n".join(["| fault | verdict | what is said | named |", "|---|---|---|---|", *rows]) + "\n"


def settings_table(folder: Path) -> str:
    """Every setting, and what is said of another value, as Markdown."""
    reference = convert(V2, folder / "reference")
    rows = []
    for number, (what, (values, key, effect)) in enumerate(SETTINGS.items()):
        out = folder / f"setting{number}"
        shutil.copytree(reference, out)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        (out / "config.json").write_text(json.dumps(config | values), encoding="utf-8")
        done = engine.api.compare(out, reference)
        told = [str(one) for one in done.differences if one.what == key and effect in one.effect]
        rows.append(f"| {what} | {told[0] if told else '-'} | {'no' if done.same() or not told else 'yes'} |")
    return "\n".join(["| setting | what is said | named, exit code 1 |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        text = f"{table(Path(made))}\n## Settings\n\n{settings_table(Path(made))}"
    page = Path(sys.argv[1])
    page.write_text(page.read_text(encoding="utf-8").partition("| fault |")[0] + text, encoding="utf-8")
