"""Megatron's two implementations name norms and experts in legacy files differently, and load others in silence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import api
from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.frameworks import source_of
from tests.support.megatron import FAMILIES, MEGATRON, convert, rewritten, state

pytestmark = pytest.mark.filterwarnings("ignore")
DENSE, MIXTURE, DIST = "leg_t2_distopt", "torch-ep2-moe", "dist-tp2pp2"
ENGINE = {DENSE: {"norms": "fused"}, MIXTURE: {"norms": "fused", "gemm": "grouped"}}
RANKS = {DENSE: "tp=2", MIXTURE: "ep=2"}


def engines(name: str) -> str:
    """A tensor's name in a layer of Transformer Engine, with --moe-grouped-gemm, as Megatron's layer specs say."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    start, local, rest = name.partition("mlp.experts.local_experts.")
    number, _, linear = rest.partition(".")
    return f"{start}mlp.experts.{linear}{number}" if local else name


def by_engine(name: str, folder: Path) -> Path:
    """A genuine checkpoint as the same training with Transformer Engine would have saved it."""
    shutil.copytree(source_of(MEGATRON / name), folder)
    rewritten(folder, lambda held: held.update(transformer_impl="transformer_engine", moe_grouped_gemm=True))
    for path in folder.glob("mp_rank_*/model_optim_rng.pt"):
        saved = torch.load(path, weights_only=False)
        mixed = any(".router." in one for one in saved["model"])
        fused = "pre_mlp_layernorm." if mixed else "mlp.linear_fc1.layer_norm_"  # a mixture's are no linear's
        model = {engines(n).replace("pre_mlp_layernorm.", fused): one for n, one in saved["model"].items()}
        torch.save({**saved, "model": model}, path)
    return folder


def saved(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    return {path.parent.name: torch.load(path, weights_only=False) for path in files}


def check_same(made: Path, wanted: Path) -> None:
    """Names and values, but for rows of padding."""
    ours, theirs = saved(made), saved(wanted)
    assert ours.keys() == theirs.keys()
    for rank, one in theirs.items():
        assert {n for n in one["model"] if "_extra_state" not in n} == ours[rank]["model"].keys()
        for name, value in ours[rank]["model"].items():
            assert "word_embeddings" in name or "output_layer" in name or torch.equal(value, one["model"][name]), name


@pytest.mark.parametrize("name", [DENSE, MIXTURE])
def test_files_for_transformer_engine_are_those_that_it_saves(name: str, tmp_path: Path) -> None:
    source = by_engine(name, tmp_path / "step")
    first, second = convert(name, tmp_path / "local").out, convert(name, tmp_path / "fused", source).out
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    report = engine.reverse(FAMILIES[name], first, tmp_path / "set", ranks=RANKS[name], settings=ENGINE[name])
    engine.reverse(FAMILIES[name], first, tmp_path / "like", like=source)
    kept = engine.reverse(FAMILIES[name], first, tmp_path / "kept", like=source_of(MEGATRON / name))
    for made in (tmp_path / "set", tmp_path / "like"):
        check_same(made, source)
        for one in saved(made).values():
            assert one["args"].transformer_impl == "transformer_engine"
            assert name == DENSE or one["args"].moe_grouped_gemm is True
    assert not any("implementation" in told or "gemm" in told for told in (*report.notices, *kept.notices))


def test_norms_of_arguments_that_do_not_say_whether_they_add_one_do_not(tmp_path: Path) -> None:
    source = by_engine(DENSE, tmp_path / "step")
    rewritten(source, lambda held: held.pop("apply_layernorm_1p"))
    first, second = convert(DENSE, tmp_path / "local").out, convert(DENSE, tmp_path / "fused", source).out
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    engine.reverse(FAMILIES[DENSE], first, tmp_path / "back", like=source)
    check_same(tmp_path / "back", source)


@pytest.mark.parametrize("name", [DENSE, MIXTURE])
def test_a_run_says_which_implementation_loads_what_it_writes_if_it_was_not_told(name: str, tmp_path: Path) -> None:
    first = convert(name, tmp_path / "hf").out
    report = engine.reverse(FAMILIES[name], first, tmp_path / "back", ranks=RANKS[name])
    told = [one for one in report.notices if "--set" in one]
    assert "--transformer-impl local" in told[0] and "--set norms=fused" in told[0]
    assert [one for one in told if "--set gemm=grouped" in one] == told[1:] and len(told) == len(ENGINE[name])
    for one in saved(tmp_path / "back").values():
        assert one["args"].transformer_impl == "local"
        assert name == DENSE or one["args"].moe_grouped_gemm is False  # which --use-checkpoint-args takes over


def test_of_torch_dist_only_a_mixture_is_for_one_implementation(tmp_path: Path) -> None:
    for name in (DENSE, MIXTURE):
        first = convert(name, tmp_path / name).out
        report = engine.reverse(FAMILIES[name], first, tmp_path / f"{name}-back", mode="torch_dist")
        told = [one for one in report.notices if "--like" in one]
        assert len(told) == (name == MIXTURE) and not any("--set norms" in one for one in report.notices)
        args = torch.load(tmp_path / f"{name}-back" / "common.pt", weights_only=False)["args"]
        assert not hasattr(args, "transformer_impl") and not hasattr(args, "moe_grouped_gemm")
    held = state(tmp_path / f"{MIXTURE}-back")
    assert "decoder.layers.pre_mlp_layernorm.weight" in held
    like = source_of(MEGATRON / "dist-ep2-moe")
    report = engine.reverse(FAMILIES[MIXTURE], tmp_path / MIXTURE, tmp_path / "like", like=like)
    assert state(tmp_path / "like").keys() == state(like).keys()
    assert not any("--like" in one for one in report.notices)


def test_names_begin_as_in_the_mode_that_is_written_whatever_the_mode_of_like(tmp_path: Path) -> None:
    """The weights of legacy files are under `model`, where Megatron looks for them; those of torch_dist are not."""
    first, legacy, stacked = convert(DENSE, tmp_path / "hf").out, *(source_of(MEGATRON / one) for one in (DENSE, DIST))
    made = engine.reverse(FAMILIES[DENSE], first, tmp_path / "dist", like=legacy, mode="torch_dist").out
    assert state(Path(made)).keys() == state(stacked).keys()
    back = engine.reverse(FAMILIES[DENSE], first, tmp_path / "back", like=made, mode="torch", ranks=RANKS[DENSE]).out
    rewritten(shutil.copytree(legacy, tmp_path / "step"), lambda _: None)  # without Megatron's own classes
    check_same(Path(back), tmp_path / "step")


def test_a_mode_that_is_not_that_of_the_ranks_is_refused(tmp_path: Path) -> None:
    first = convert(DENSE, tmp_path / "hf").out
    with pytest.raises(EngineError, match=r"E214 mode `torch_pp` is not that of these ranks(?s:.*)Leave --mode out"):
        engine.reverse(FAMILIES[DENSE], first, tmp_path / "back", mode="torch_pp", ranks={"tp": 2})


@sampled(2)
@pytest.mark.parametrize("name", [DENSE, MIXTURE])
def test_files_of_one_implementation_become_those_of_the_other(name: str, tmp_path: Path) -> None:
    local, fused = source_of(MEGATRON / name), by_engine(name, tmp_path / "step")
    family, config = FAMILIES[name], {"config": MEGATRON / name / "hf_config.json"}
    asked: dict[str, Any] = {"to": family, "ranks": RANKS[name], **config}
    engine.reshard(family, local, tmp_path / "fused", settings=ENGINE[name], **asked)
    check_same(tmp_path / "fused", fused)
    engine.reshard(family, fused, tmp_path / "kept", **config)
    check_same(tmp_path / "kept", fused)
    plain = {"norms": "plain"} | ({"gemm": "single"} if name == MIXTURE else {})
    report = engine.reshard(family, fused, tmp_path / "local", settings=plain, **asked)
    assert not any("--set" in told for told in report.notices)  # they are set
    rewritten(shutil.copytree(local, tmp_path / "known"), lambda _: None)
    check_same(tmp_path / "local", tmp_path / "known")


def test_a_plan_to_write_files_counts_those_that_are_there_and_says_why_in_words(tmp_path: Path) -> None:
    first = convert(DENSE, tmp_path / "hf").out
    plan = engine.plan_reverse(FAMILIES[DENSE], first, settings={"norms": "plain"})
    found = api.describe_plan(plan)
    assert (found["source"]["files"], found["source"]["tensors"]) == (1, 21)  # not the zeros of padding
    told = {name: one["evidence"] for name, one in found["variants"].items()}
    assert told["norms"] == "--set norms=plain" and told["names"] == "as mode torch has it"
    assert told["biases"].startswith("the weights give no ") and "present(" not in "".join(told.values())
