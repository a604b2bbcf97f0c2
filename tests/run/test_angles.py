"""Rotary angles that old files keep must be those of the configuration, since only the configuration is converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.errors import EngineError
from tests.support.families import angles, model_of, save_family
from tests.support.shards import Model, save

OLD = Model("v1", layers=2, hidden=32, heads=4)
NAME = "blocks.{layer}.mixer.rotary_emb.inv_freq"
LETTERS = {"mlp_letters": "w2_is_down"}
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def keep(folder: Path, kept: torch.Tensor, layer: int = 0, rank: int = 0) -> None:
    path = folder / f"model_tp{rank}_pp0.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {NAME.format(layer=layer): kept}, path)


def refused(mapping: str, folder: Path, **options: object) -> str:
    with pytest.raises(EngineError) as caught:
        engine.plan(mapping, folder, **options)
    assert caught.value.code == "E218"
    return str(caught.value)


def computed_in(dtype: torch.dtype, base: float, head_dim: int) -> torch.Tensor:
    """The angles if every step of their computation is rounded."""
    return 1.0 / torch.tensor(base, dtype=dtype) ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("base", [10000.0, 5e7])
def test_angles_of_the_configured_base_pass_in_any_type_and_those_of_another_are_refused(
    dtype: torch.dtype, base: float, tmp_path: Path
) -> None:
    step = tmp_path / "step"
    save(OLD, step, tp=2)
    torch.save(OLD.config(1) | {"rope_base": base}, step / "model_config.pt")
    right = angles(base, OLD.head_dim).to(dtype)
    for kept in (right, computed_in(torch.bfloat16, base, OLD.head_dim).to(dtype)):
        if dtype in (torch.float16, torch.bfloat16) or kept is right:
            keep(step, kept)
            engine.plan(OLD.mapping, step, settings=LETTERS)
    for layer, rank in ((0, 0), (1, 1)):
        keep(step, right)
        keep(step, angles(base * 1.5, OLD.head_dim).to(dtype), layer, rank)
        told = refused(OLD.mapping, step, settings=LETTERS)
        assert f"model_tp{rank}_pp0.pt:{NAME.format(layer=layer)}" in told and "at index 1" in told


NOT_ANGLES = (
    torch.ones(2, 4), torch.ones(()), torch.zeros(0), torch.ones(4, dtype=torch.int64), torch.full((4,), torch.nan),
)  # fmt: skip


@pytest.mark.parametrize("kept", NOT_ANGLES)
def test_a_tensor_that_cannot_be_angles_is_refused(kept: torch.Tensor, tmp_path: Path) -> None:
    save(OLD, tmp_path / "step")
    keep(tmp_path / "step", kept)
    refused(OLD.mapping, tmp_path / "step", settings=LETTERS)


@pytest.mark.parametrize("back", ["internlm2", "megatron-llama", "torchtitan-llama", "meta-llama", "transformers"])
def test_angles_in_hugging_face_files_are_compared_when_they_are_converted_back(back: str, tmp_path: Path) -> None:
    """As transformers before 4.32 saved them."""
    model = Model("v2", layers=2, hidden=32, heads=4, groups=4, ffn=88, bias=False)
    save(model, tmp_path / "step")
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path) | {name: angles(10000.0, model.head_dim)}, path, {"format": "pt"})
    assert name in engine.plan_reverse(back, tmp_path / "hf").ignored
    save_file(load_file(path) | {name: angles(20000.0, model.head_dim)}, path, {"format": "pt"})
    with pytest.raises(EngineError, match=name) as caught:
        engine.reverse(back, tmp_path / "hf", tmp_path / "other")
    assert caught.value.code == "E218" and not (tmp_path / "other").exists()


def test_metas_files_tell_the_base_that_params_json_does_not_have(tmp_path: Path) -> None:
    step = tmp_path / "step"
    save_family(model_of("meta", layers=2, hidden=32, heads=4, groups=4, vocab=16), step)
    assert engine.plan("meta-llama", step).config["rope_theta"] == 10000
    path = step / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"rope.freqs": angles(1e6, 8).to(torch.bfloat16)}, path)
    refused("meta-llama", step)
    assert engine.plan("meta-llama", step, settings={"rope_theta": 1e6}).config["rope_theta"] == 1e6
    params = json.loads((step / "params.json").read_text())
    (step / "params.json").write_text(json.dumps(params | {"rope_theta": 1e6}))
    assert engine.plan("meta-llama", step).config["rope_theta"] == 1e6
