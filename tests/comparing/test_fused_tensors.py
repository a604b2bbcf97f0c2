"""What became of tensors that hold several things: packed q, k and v, and stacked experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import api

HEADS, GROUPS, DIM, HIDDEN = 8, 4, 16, 128
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HIDDEN}
QKV, EXPERTS = "model.layers.0.attention.wqkv.weight", "model.layers.0.feed_forward.experts.gate_up"
PER = HEADS // GROUPS + 2  # heads of a group: its queries, the key, the value


def pairs(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first heads of each group with their rotary pairs interleaved."""

    def change(t: torch.Tensor) -> torch.Tensor:
        groups = t.view(GROUPS, PER, 2, DIM // 2, HIDDEN).clone()
        turned = groups[:, :count].transpose(2, 3).reshape(GROUPS, count, 2, DIM // 2, HIDDEN)
        groups[:, :count] = turned
        return groups.view(t.shape)

    return change


def keys_for_values(t: torch.Tensor) -> torch.Tensor:
    return t.view(GROUPS, PER, DIM, HIDDEN)[:, [0, 1, 3, 2]].reshape(t.shape)


CASES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "rotary pairs of the queries alone": (QKV, pairs(2), "permuted", "rotary pairs in 8 of 16 heads"),
    "rotary pairs of queries and keys": (QKV, pairs(3), "permuted", "rotary pairs in 12 of 16 heads"),
    "keys and values exchanged": (
        QKV, keys_for_values, "permuted", "heads 2 and 3 exchanged (16 rows = 1 head each), in every key/value group"),
    "groups in another order": (
        QKV, lambda t: t.view(GROUPS, -1, HIDDEN)[[2, 0, 3, 1]].reshape(t.shape), "permuted",
        "key/value groups in another order (64 rows = 4 heads = 1 key/value group each): 0 holds 2"),
    "experts exchanged": (EXPERTS, lambda t: t[[1, 0, 2, 3]], "permuted", "experts 0 and 1 exchanged"),
    "gate and up exchanged": (
        EXPERTS, lambda t: torch.cat([t[:, 32:], t[:, :32]], 1), "permuted",
        "halves of the rows exchanged (32 rows each), in every expert"),
    "each expert transposed": (
        EXPERTS, lambda t: t.transpose(1, 2), "transposed", "rows are columns in each of its matrices"),
    "one expert zero": (
        EXPERTS, lambda t: torch.cat([t[:2], t[2:3] * 0, t[3:]]), "changed", "rows 128…191: all zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_became_of_a_tensor_of_several_parts_is_named(case: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    name, change, kind, words = CASES[case]
    state = {
        QKV: torch.randn(GROUPS * PER * DIM, HIDDEN, generator=generator).bfloat16(),
        EXPERTS: torch.randn(4, 64, HIDDEN, generator=generator).bfloat16(),
    }
    for side, tensors in (("ref", state), ("out", {**state, name: change(state[name]).contiguous()})):
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors")
        (tmp_path / side / "config.json").write_text(json.dumps(CONFIG))
    found = next(v for v in api.compare(tmp_path / "out", tmp_path / "ref").verdicts if v.name == name)
    assert found.kind == kind
    assert words in found.note
