"""What training computes, by its configuration; and what differing steps mean: functions by themselves."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.oracle.frameworks import forward_of
from engine.oracle.internevo_said import Said
from engine.oracle.logits import _EXACT, _tolerance, deviation
from engine.oracle.wrong_layers import explain
from engine.storage.local import local_file

V2 = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"


@pytest.mark.parametrize(
    ("one", "told", "pairs"),
    [
        (Said({}, v1=True), None, False),
        (Said({"qk_interleaved": True}, v1=True), None, True),
        (Said({"qk_interleaved": True, "adapt_hf": True}), None, True),
        (Said({"adapt_hf": True}), None, False),
        (Said({}, late=True), None, False),
        (Said({}, "INTERNLM2_PUBLIC"), None, False),
        (Said({}, "INTERNLM3_M8"), None, False),
        (Said({}, "LLAMA2"), None, True),
        (Said({}, "LLAMA2"), "halves", False),
        (Said({}, "INTERNLM3_M8"), "pairs", True),
    ],
)
def test_the_order_of_rotary_pairs_is_configured_or_that_of_the_model(one: Said, told: str | None, pairs: bool) -> None:
    assert one.in_pairs(told) is pairs


@pytest.mark.parametrize(
    ("one", "told", "pieces"),
    [
        (Said({}, "INTERNLM2_PUBLIC"), None, True),
        (Said({}, "INTERNLM2_PUBLIC"), "apart", True),
        (Said({}, "LLAMA2"), "fused", False),
        (Said({}), "fused", True),
        (Said({}), None, False),
        (Said({"enable_qkv_fusion": False}, "INTERNLM2_PUBLIC"), None, False),
        (Said({"enable_qkv_fusion": True}), "apart", True),
    ],
)
def test_whether_three_linears_are_one_is_configured_or_told_by_the_model(
    one: Said, told: str | None, pieces: bool
) -> None:
    assert one.in_pieces(told) is pieces


@pytest.mark.parametrize(
    ("one", "told", "works"),
    [
        (Said({}), "plain", True),
        (Said({"qk_interleaved": False}, late=True), None, True),
        (Said({"qk_interleaved": False}), "normalised", True),
        (Said({"qk_interleaved": False}), "plain", False),
        (Said({"qk_interleaved": False}), None, None),
    ],
)
def test_whether_the_head_was_normalised_is_asked_of_releases_that_may_not_have(
    one: Said, told: str | None, works: bool | None
) -> None:
    with nullcontext() if works is not None else pytest.raises(EngineError, match="E202"):
        assert replace(one, config={**one.config, "norm_head": True}).normalises(told, "") is works


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layer_norm_epsilon": 1e-6, "rope_base": 5000}, None),
        ({"num_layers": 5}, "E201"),
        ({"apply_post_layer_norm": True}, "E303"),
        ({"num_attention_heads": 0}, "E303"),
    ],
)
def test_the_numbers_of_training_are_those_of_its_configuration(
    change: dict[str, Any], code: str | None, tmp_path: Path
) -> None:
    shutil.copytree(V2, tmp_path / "step")
    config = read_pickled_mapping(local_file(V2 / "model_config.pt"))
    config = {key: value for key, value in config.items() if key != "dtype"}
    torch.save({**config, **change}, tmp_path / "step" / "model_config.pt")
    if code is not None:
        with pytest.raises(EngineError, match=code):
            forward_of(tmp_path / "step", {})
        return
    with forward_of(tmp_path / "step", {}) as forward:
        assert forward.numbers == {
            "rms_norm_eps": 1e-6, "rope_parameters.rope_theta": 5000, "hidden_size": 64, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 4, "hidden_act": "silu",
            "tie_word_embeddings": False,
        }  # fmt: skip


def test_what_is_no_number_or_of_another_shape_deviates_without_end() -> None:
    one = torch.ones(2, 2)
    assert deviation(one, one) == 0
    assert deviation(one * float("nan"), one) == deviation(one[:1], one) == float("inf")


@pytest.mark.parametrize(
    ("written", "source", "exact"),
    [
        ({"BF16"}, {"BF16"}, True),
        ({"F32"}, {"BF16"}, True),
        ({"F64", "F32"}, {"BF16", "F32"}, True),
        ({"BF16"}, {"F32"}, False),
        ({"BF16", "F32"}, {"F16"}, False),
    ],
)
def test_rounding_is_allowed_for_where_weights_were_rounded(written: set[str], source: set[str], exact: bool) -> None:
    assert (_tolerance(frozenset(written), source) == _EXACT) is exact


def step(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    return deviation(got, wanted), got, wanted


def test_what_steps_hold_instead_is_named() -> None:
    torch.manual_seed(0)
    q, k, v, other = (torch.randn(1, 5, 8) for _ in range(4))
    pairs = q.view(1, 5, 1, 4, 2).transpose(-1, -2).flatten(-3)

    def why(**wrong: tuple[float, torch.Tensor, torch.Tensor]) -> str:
        found = explain("layer 0", {"q": step(q, q), "k": step(k, k), "v": step(v, v)} | wrong, 1e-3, 8)
        return "" if found is None else found.why

    assert why() == ""
    assert why(k=step(v, k), v=step(k, v)) == "k_proj and v_proj are exchanged"
    assert why(k=step(v, k), v=step(other, v)) == "k_proj holds what v_proj should; v_proj is wrong"
    assert (
        why(q=step(pairs, q)) == why(q=step(q, pairs)) == "q_proj has its rotary pairs in another order than training"
    )
    assert why(q=step(other, q), out=step(other, q)) == "q_proj is wrong"
    assert why(out=step(other, q)) == "the layer adds its parts differently"
    assert why(q=step(q[..., :4], q)) == "q_proj gives 4 columns, not 8"
