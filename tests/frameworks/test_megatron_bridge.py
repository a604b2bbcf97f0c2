"""Checkpoints of Megatron-Bridge: no arguments, and run_config.yaml, which says what config.json does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import yaml

from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.frameworks import source_of, weights
from tests.support.megatron import MEGATRON, convert
from tests.support.megatron import state as state_of

NAME = "dist-tp2pp2"
MODEL: dict[str, Any] = {  # of GPTModelProvider, as PyYAML writes it
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider", "layernorm_epsilon": 1e-5,
    "rotary_base": 10000, "rotary_interleaved": False, "rope_scaling": False, "layernorm_zero_centered_gamma": False,
    "transformer_impl": "transformer_engine", "params_dtype": {"_target_": "torch.float32", "_call_": False},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(folder: Path, *, name: str = NAME, less_one: bool = False, text: str | None = None, **model: Any) -> Path:
    """A genuine checkpoint as Megatron-Bridge saves it."""
    held = state_of(source_of(MEGATRON / name))
    dcp.save({n: one - 1 if less_one and "norm" in n else one for n, one in held.items()}, checkpoint_id=folder)
    (folder / "metadata.json").write_bytes((source_of(MEGATRON / name) / "metadata.json").read_bytes())
    told = yaml.safe_dump({"model": MODEL | model, "train": {"train_iters": 10}, "also": MODEL})
    (folder / "run_config.yaml").write_text(told if text is None else text)
    return folder


def test_what_the_run_says_is_not_asked_for(tmp_path: Path) -> None:
    convert(NAME, tmp_path / "known")
    convert(NAME, tmp_path / "out", saved(tmp_path / "step"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "known" / file).read_bytes()
    source = saved(tmp_path / "less", less_one=True, layernorm_zero_centered_gamma=True)
    convert(NAME, tmp_path / "added", source)
    found, known = weights(tmp_path / "added"), weights(tmp_path / "known")
    assert all((found[name] - one).abs().max() < 1e-6 for name, one in known.items())


@sampled(2, "asks")
@pytest.mark.parametrize(
    ("model", "text", "asks"),
    [
        ({"layernorm_epsilon": 1e-6}, None, "epsilon"), ({"rotary_base": 500000}, None, "rotary base"),
        ({"rope_scaling": True}, None, "scaling of angles"), ({"num_attention_heads": 4}, None, "heads"),
        ({"num_query_groups": 8}, None, "heads"), ({"kv_channels": 16}, None, "heads"),
        ({"num_layers": 6}, None, "layers"), ({"hidden_size": 128}, None, "width"),
        ({"layernorm_zero_centered_gamma": True, "transformer_impl": "local"}, None, "norms"),
        ({}, "also: &a [x]\nmodel: !!python/object:os.system {rotary_base: 10000}", "rotary pairs"),
    ],
)  # fmt: skip
def test_what_the_run_says_otherwise_or_does_not_say_is_asked_for(
    model: dict[str, Any], text: str | None, asks: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "step", text=text, **model)
    with pytest.raises(EngineError, match=asks) as caught:
        convert(NAME, tmp_path / "out", source)
    assert caught.value.code == "E202" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["model: [", "- model", "", "[" * 100_000, "a: &a [*a]", "\0", "model: {}\nrotary_b",
                                  "a: !!bool maybe", 'a: !!int ""', "a: !!timestamp soon"])  # fmt: skip
def test_what_the_run_says_is_not_passed_over_where_it_cannot_be_read(text: str, tmp_path: Path) -> None:
    """It may say that norms are stored minus one."""
    source = saved(tmp_path / "step", less_one=True, text=text)
    with pytest.raises(EngineError, match=r"(?s)E301.*run_config\.yaml"):
        convert(NAME, tmp_path / "out", source, settings={"rotary": "halves"})


@sampled(2, "told")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"rotary_percent": 0.5}, "model.rotary_percent"), ({"seq_len_interpolation_factor": 4.0}, "model.seq_len"),
        ({"window_size": [128, 0]}, "model.window_size"), ({"softmax_scale": 0.3}, "model.softmax_scale"),
        ({"position_embedding_type": "none"}, "model.position_embedding_type"), ({"qk_l2_norm": True}, "model.qk_l2"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}}, "model.activation_func"),
        ({"gated_linear_unit": False}, "model.gated_linear_unit"), ({"normalization": "LayerNorm"}, "model.norm"),
        ({"no_rope_freq": [0, 1, 1, 1]}, "model.no_rope_freq"), ({"softmax_type": "learnable"}, "model.softmax_type"),
        ({"attention_output_gate": True}, "model.attention_output_gate"), ({"mtp_num_layers": 1}, "model.mtp_num"),
        ({"moe_router_score_function": "sigmoid"}, "model.moe_router_sc"), ({"moe_layer_freq": [0, 1]}, "model.moe_la"),
        ({"moe_router_topk_scaling_factor": 2.5}, "model.moe_router_topk_s"), ({"use_mup": True}, "model.use_mup"),
        ({"moe_router_num_groups": 2}, "model.moe_router_n"), ({"moe_expert_capacity_factor": 1.0}, "model.moe_exp"),
    ],
)  # fmt: skip
def test_what_the_run_says_of_another_model_is_refused(model: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=rf"E209 what `{told}.*run_config.yaml"):
        convert(NAME, tmp_path / "out", saved(tmp_path / "step", **model))


def test_what_every_run_says_is_no_other_model(tmp_path: Path) -> None:
    """As a dense provider has it, with what is not set."""
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    said: dict[str, Any] = {
        "rotary_percent": 1.0, "seq_len_interpolation_factor": None, "window_size": None, "softmax_scale": None,
        "position_embedding_type": "rope", "normalization": "RMSNorm", "activation_func": silu, "moe_layer_freq": 1,
        "gated_linear_unit": True, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8,
        "moe_router_topk": 2, "rope_scaling_factor": 8.0, "softmax_type": "vanilla", "no_rope_freq": None,
        "glu_linear_offset": 0.0, "mtp_num_layers": None, "num_moe_experts": None, "generation_config": None,
        "moe_router_pre_softmax": False, "moe_router_score_function": "softmax", "moe_router_group_topk": None,
        "moe_router_load_balancing_type": "aux_loss", "moe_expert_capacity_factor": None, "num_layers": 4,
        "is_hybrid_model": False,
    }  # fmt: skip
    convert(NAME, tmp_path / "out", saved(tmp_path / "step", **said))


def test_how_a_router_weighs_experts_is_the_run_s(tmp_path: Path) -> None:
    name = "dist-ep2-moe"
    told: dict[str, Any] = {"rotary_base": 10000, "num_moe_experts": 4, "moe_router_topk": 2, "moe_layer_freq": [1] * 4}
    for number, more in enumerate(({}, {"moe_router_pre_softmax": False})):
        convert(name, tmp_path / f"out{number}", saved(tmp_path / f"step{number}", name=name, **told, **more))
    with pytest.raises(EngineError, match=r"(?s)E202.*experts of a token and their weights"):
        convert(name, tmp_path / "no", saved(tmp_path / "step", name=name, **told, moe_router_pre_softmax=True))


def test_the_configuration_that_belongs_to_the_run_is_taken(tmp_path: Path) -> None:
    config = json.loads((MEGATRON / NAME / "hf_config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(NAME, tmp_path / "out", saved(tmp_path / "step", layernorm_epsilon=1e-6), config=tmp_path / "config.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_the_factor_of_scaled_angles_is_the_run_s(tmp_path: Path) -> None:
    """8 in Llama 3.1, 32 in 3.2; until 2025 the run had other names for it, and no switch."""
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = json.loads((MEGATRON / NAME / "hf_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": scaled}))
    given: Any = {"config": tmp_path / "config.json"}
    older: dict[str, Any] = {
        "rope_scaling": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "old_context_len": 8192,
    }
    newer: dict[str, Any] = {"rope_scaling": True, "rope_scaling_factor": 8.0}
    for number, said in enumerate((newer, older | {"scale_factor": 8.0})):
        source = saved(tmp_path / f"right{number}", **said)
        convert(NAME, tmp_path / f"out{number}", source, **given)
    for number, said in enumerate((newer | {"rope_scaling_factor": 32.0}, older | {"scale_factor": 32.0})):
        with pytest.raises(EngineError, match=r"(?s)E202.*scaling of angles"):
            convert(NAME, tmp_path / "no", saved(tmp_path / f"other{number}", **said), **given)
    with pytest.raises(EngineError, match=r"(?s)E202.*scaling of angles"):
        convert(NAME, tmp_path / "no", tmp_path / "right1")
