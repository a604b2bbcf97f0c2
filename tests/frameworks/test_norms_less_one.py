"""Megatron's --apply-layernorm-1p: norms that hold their weights less one, as Transformer Engine adds one again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import engine
from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.frameworks import logits_off, source_of
from tests.support.frameworks import weights as engine_weights
from tests.support.megatron import FAMILIES, MEGATRON, convert, rewritten, state

pytestmark = pytest.mark.filterwarnings("ignore")


def less_one(name: str, folder: Path, **args: Any) -> Path:
    """A genuine checkpoint as the same training would have saved it with its norms less one."""
    shutil.copytree(source_of(MEGATRON / name), folder)

    def change(held: dict[str, Any]) -> None:
        """The argument is `layernorm_zero_centered_gamma` since core 0.16, and there is no other then."""
        old = held.get("layernorm_zero_centered_gamma") is None
        held.update({"apply_layernorm_1p" if old else "layernorm_zero_centered_gamma": True})
        held.update({"transformer_impl": "transformer_engine", **args})

    rewritten(folder, change)
    for path in folder.glob("mp_rank_*/model_optim_rng.pt"):
        saved = torch.load(path, weights_only=False)
        saved["model"] = {n: one - 1 if "norm" in n else one for n, one in saved["model"].items()}
        torch.save(saved, path)
    if (folder / ".metadata").exists():
        held = state(folder)
        dcp.save({n: one - 1 if "norm" in n else one for n, one in held.items()}, checkpoint_id=folder, no_dist=True)
    return folder


def norms(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one for name, one in weights.items() if "norm" in name}


@sampled(2)
@pytest.mark.parametrize("name", ["leg_t2_distopt", "torch-ep2-moe", "dist-tp2pp2"])
def test_the_model_is_the_one_whose_norms_add_one(name: str, tmp_path: Path) -> None:
    source = less_one(name, tmp_path / "step")
    convert(name, tmp_path / "out", source)
    assert logits_off(tmp_path / "out", MEGATRON / name / "oracle.pt") < 1e-4


def test_norms_are_written_in_the_type_in_which_one_is_added_and_come_back(tmp_path: Path) -> None:
    """bfloat16 does not hold one and a small number; float32 holds the sum that Transformer Engine computes with."""
    name = "dist-tp2pp1-bf16-qkvbias"
    source = less_one(name, tmp_path / "step")
    report = convert(name, tmp_path / "out", source)
    convert(name, tmp_path / "rounded", source, dtype="bfloat16")
    assert any("1 was added to what is stored, in float32" in one for one in report.notices)
    stored = {n: one for n, one in state(source).items() if "norm" in n}
    found, rounded = (norms(engine_weights(tmp_path / out)) for out in ("out", "rounded"))
    sums = stored["decoder.layers.mlp.linear_fc1.layer_norm_weight"].float() + 1
    for layer, one in enumerate(sums):
        key = f"model.layers.{layer}.post_attention_layernorm.weight"
        assert torch.equal(found[key], one) and torch.equal(rounded[key], one.bfloat16())
    assert {one.dtype for n, one in engine_weights(tmp_path / "out").items() if "norm" not in n} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    report = engine.reverse(FAMILIES[name], tmp_path / "out", tmp_path / "back", mode="torch_dist", like=source)
    assert any("-1 was added to what is stored, in float32" in one for one in report.notices)
    back = state(tmp_path / "back")
    for n, one in stored.items():
        assert torch.equal(back[n].to(one.dtype), one), n


@pytest.mark.parametrize("args", [{"transformer_impl": "local"}, {"add_rmsnorm_offset": False}], ids=str)
def test_norms_that_are_not_known_to_add_one_are_asked_about(args: dict[str, Any], tmp_path: Path) -> None:
    source = less_one("leg_t2_distopt", tmp_path / "step", **args)
    with pytest.raises(EngineError, match="norms") as caught:
        convert("leg_t2_distopt", tmp_path / "out", source)
    assert caught.value.code == "E202" and list(caught.value.answers["norms"]) == ["minus_one", "plain"]
    convert("leg_t2_distopt", tmp_path / "out", source, settings={"norms": "minus_one"})
    convert("leg_t2_distopt", tmp_path / "known", source_of(MEGATRON / "leg_t2_distopt"))
    found, known = (norms(engine_weights(tmp_path / out)) for out in ("out", "known"))
    assert all((found[name] - one).abs().max() < 1e-6 for name, one in known.items())


def test_files_for_transformer_engine_have_its_names_and_what_ranks_hold_stays(tmp_path: Path) -> None:
    name = "leg_t2_distopt"
    out = convert(name, tmp_path / "out").out
    engine.reverse(FAMILIES[name], out, tmp_path / "back", ranks="tp=2", settings={"norms": "minus_one"})
    saved = torch.load(tmp_path / "back" / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert saved["args"].apply_layernorm_1p and saved["args"].transformer_impl == "transformer_engine"
    held = saved["model"]
    assert not any("input_layernorm" in n or "pre_mlp_layernorm" in n for n in held)
    first = engine_weights(tmp_path / "out")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(held["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"], first - 1)
    engine.reshard(FAMILIES[name], tmp_path / "back", tmp_path / "one", ranks="tp=1")
    one = torch.load(tmp_path / "one" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    assert one["args"].apply_layernorm_1p
    assert all(torch.equal(one["model"][n], value) for n, value in held.items() if "norm" in n)
    config = MEGATRON / name / "hf_config.json"
    engine.reshard(FAMILIES[name], tmp_path / "back", tmp_path / "dcp", to="transformers", config=config)
    engine.convert("transformers", tmp_path / "dcp", tmp_path / "again", config=config)
    for n, value in norms(engine_weights(tmp_path / "out")).items():
        assert (engine_weights(tmp_path / "again")[n] - value).abs().max() < 1e-6
