"""Every family goes both ways: the other layouts of Llama, InternLM3, experts and Meta's files."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.depth import deep, examples, sampled
from tests.support.families import Experts, model_of, save_family
from tests.support.family_cases import llamas, metas, mixtures, told
from tests.support.genuine import FIXTURES
from tests.support.reference_families import forward_experts
from tests.support.shards import Model, State, same

common = settings(deadline=None, max_examples=examples(24), suppress_health_check=list(HealthCheck))
Case = tuple[Any, dict[str, Any]]


def weights(folder: Path) -> dict[str, State]:
    paths = [p for glob in ("model_*.pt", "*.pth") for p in sorted(folder.glob(glob)) if p.name != "model_config.pt"]
    return {path.name: dict(torch.load(path, weights_only=False)) for path in paths}  # Python's own is quicker


def there_and_back(model: Model, layout: dict[str, Any], mapping: str = "") -> None:
    """convert, reverse as it was: every tensor of every file is the one that was read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_family(model, folder / "step", **layout)
        chosen = told(model)
        try:
            engine.convert(mapping or model.mapping, folder / "step", folder / "hf", settings=chosen)
        except EngineError as error:
            assert error.code in ("E202", "E207", "E211")
            assume(False)
        try:
            like = folder / "step"
            engine.reverse(mapping or model.mapping, folder / "hf", folder / "back", like=like, settings=chosen)
        except EngineError as error:
            assert error.code == "E214", str(error)  # training could not have cut it so
            return
        got, wanted = weights(folder / "back"), weights(folder / "step")
        assert sorted(got) == sorted(wanted)
        for file, state in wanted.items():
            same(got[file], {name: tensor for name, tensor in state.items() if name != "rope.freqs"})


@common
@given(llamas("llama"))
def test_a_llama_comes_back_bit_for_bit(case: Case) -> None:
    there_and_back(*case)


@common
@given(llamas("internlm3"))
def test_an_internlm3_comes_back_bit_for_bit(case: Case) -> None:
    there_and_back(*case)


@common
@given(metas())
def test_metas_files_come_back_bit_for_bit(case: Case) -> None:
    there_and_back(*case)


@deep
@common
@given(mixtures())
def test_experts_come_back_into_their_files(case: Case) -> None:
    there_and_back(*case)


@common
@given(mixtures())
def test_stacked_experts_come_back_into_their_files(case: Case) -> None:
    model, layout = case
    there_and_back(model, layout, "families/moe-stacked.yaml")


@sampled(2)
@pytest.mark.parametrize(
    ("ranks", "own", "said"),
    [
        ({"tp": 2, "pp": 2}, 1, "expert=dict(size=-1, no_tp=True), "),
        ({"mode": "isp_wp", "wp": 4}, 1, "expert_weight=dict(size=1, overlap=True), "),
        ({"mode": "isp_wp", "wp": 4}, 1, ""),  # what is written then has as many as the rest
        ({"mode": "isp_wp", "wp": 2, "pp": 2}, 4, "expert_weight=dict(size=4), "),
    ],
)
def test_experts_on_ranks_of_their_own_convert_and_come_back(
    ranks: dict[str, Any], own: int, said: str, tmp_path: Path
) -> None:
    model = model_of("moe", hidden=16, ffn=24)
    if said:
        there_and_back(model, {**ranks, "own": own, "said": said})
    same_experts = save_family(model, tmp_path / "step", **ranks, own=own, said=said)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    same(load_file(tmp_path / "hf" / "model.safetensors"), same_experts)
    (tmp_path / "step" / f"model_moe_layer0_expert0_{'wp' if 'wp' in ranks else 'tp'}{own - 1}.pt").unlink()
    with pytest.raises(EngineError) as caught:
        engine.plan(model.mapping, tmp_path / "step")
    assert caught.value.code == "E207"


def test_gate_and_up_of_experts_as_halves_of_each_ranks_rows_are_told_apart(tmp_path: Path) -> None:
    """As InternEvo saves `mlp_layer_fusion` where weight ranks cut experts that are linears of their own."""
    model, step = model_of("moe", hidden=16, ffn=24), tmp_path / "step"
    expected = save_family(model, step, mode="isp_wp", wp=2, own=2, said="expert_weight=dict(size=2), ")
    for file in step.glob("model_moe_*_wp0.pt"):
        paths = (file, file.with_name(file.name.replace("wp0", "wp1")))
        states = [torch.load(path) for path in paths]
        names = sorted(name for name in states[0] if "w2" not in name)
        rows = torch.cat([state[name] for name in names for state in states])
        for path, state, held in zip(paths, states, rows.chunk(2), strict=True):
            torch.save(state | dict(zip(names, map(torch.clone, held.chunk(2)), strict=True)), path)
    config = read_pickled_mapping(File(LocalStore(step), "model_config.pt"))
    torch.save({**config, "dtype": torch.bfloat16, "mlp_layer_fusion": True}, step / "model_config.pt")
    engine.convert(model.mapping, step, tmp_path / "hf", settings=told(model))
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", like=step, settings=told(model))
    engine.convert(model.mapping, tmp_path / "back", tmp_path / "again", settings=told(model))
    same(load_file(tmp_path / "again" / "model.safetensors"), expected)


def test_the_weight_ranks_of_written_experts_are_what_the_configuration_says(tmp_path: Path) -> None:
    model = model_of("moe", hidden=16, ffn=24)
    save_family(model, tmp_path / "step", tp=1, pp=1)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told(model))
    engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", mode="isp_wp", wp=4)
    assert "'expert_weight': {'size': 4}" in torch.load(tmp_path / "back" / "config_file.pt")
    assert (tmp_path / "back" / "model_moe_layer0_expert0_wp3.pt").is_file()
    how: dict[str, Any] = {"mode": "isp_wp", "wp": 4, "settings": {"expert_weight": 2}}
    jobs: list[tuple[Any, str, str, dict[str, Any]]] = [
        (engine.reverse, "hf", "own", how),
        (engine.reshard, "back", "own of ranks", how),
        (engine.reverse, "hf", "like", {"like": tmp_path / "own"}),
        (engine.reshard, "own", "fewer", {"wp": 1}),
    ]
    for job, source, made, asked in jobs:
        job(model.mapping, tmp_path / source, tmp_path / made, **asked)
        names = {path.name for path in (tmp_path / made).glob("model_moe_layer0_expert0_*")}
        assert names == {f"model_moe_layer0_expert0_wp{rank}.pt" for rank in range(2)}
        engine.convert(model.mapping, tmp_path / made, tmp_path / f"{made} again", settings=told(model))
        same(*(load_file(tmp_path / name / "model.safetensors") for name in ("hf", f"{made} again")))


def test_experts_of_uneven_stages_that_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    model = model_of("moe", layers=5)
    save_family(model, tmp_path / "step", tp=1, pp=1)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told(model))
    with pytest.raises(EngineError) as caught:
        engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", pp=3)
    assert caught.value.code == "E214"
    assert "--pp" in str(caught.value) and "1, 5" in str(caught.value)


def test_genuine_experts_come_back_bit_for_bit(tmp_path: Path) -> None:
    source = FIXTURES / "moe_tp2_pp2_dp1"
    engine.convert("families/internlm-moe.yaml", source, tmp_path / "hf")
    engine.reverse("families/internlm-moe.yaml", tmp_path / "hf", tmp_path / "back", like=source)
    for name, state in weights(source).items():
        same(weights(tmp_path / "back")[name], state)


def test_biases_of_experts_attention_are_read_by_upstreams_own_word(tmp_path: Path) -> None:
    engine.convert("families/internlm-moe.yaml", FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert config["bias"] and config.pop("attention_bias")
    path.write_text(json.dumps(config))
    assert engine.plan_reverse("families/internlm-moe.yaml", tmp_path / "hf").outputs


def test_genuine_experts_on_one_rank_compute_internevos_own_logits(tmp_path: Path) -> None:
    source = FIXTURES / "moe_tp2_pp2_dp1"
    engine.reshard("families/internlm-moe.yaml", source, tmp_path / "one", tp=1, pp=1)
    whole = {name: tensor for state in weights(tmp_path / "one").values() for name, tensor in state.items()}
    model = model_of("moe", layers=4, hidden=64, heads=8, groups=8, ffn=256, vocab=256, experts=4)
    oracle = torch.load(source / "oracle.pt", weights_only=True)
    ours = forward_experts(model, whole, oracle["input_ids"])
    torch.testing.assert_close(ours, oracle["logits"], atol=1e-4, rtol=0)


def test_experts_of_any_ranks_reshard_to_any_other(tmp_path: Path) -> None:
    model = Experts(layers=4)
    expected = save_family(model, tmp_path / "a", tp=2, pp=2)
    engine.reshard(model.mapping, tmp_path / "a", tmp_path / "b", tp=1, pp=4, settings=told(model))
    engine.convert(model.mapping, tmp_path / "b", tmp_path / "hf", settings=told(model))
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    shutil.rmtree(tmp_path / "hf")
    save_family(model, tmp_path / "genuine", tp=1, pp=4)
    got, wanted = weights(tmp_path / "b"), weights(tmp_path / "genuine")
    assert sorted(got) == sorted(wanted)
    for file, state in wanted.items():
        same(got[file], state)


@pytest.mark.parametrize("by_rows", [False, True])
def test_experts_of_isp_are_read_and_written_as_either_code_cut_them(by_rows: bool, tmp_path: Path) -> None:
    """InternEvo 0.3.10 to 0.4.9 cuts all their linears on rows; before, ranks had columns of the one down."""
    model, step, cut = Experts(layers=2), tmp_path / "step", {"mode": "isp", "tp": 2, "wp": 2}
    expected = save_family(model, step, **cut, by_rows=by_rows)
    engine.convert(model.mapping, step, tmp_path / "hf", settings=told(model))
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", like=step, settings=told(model), **cut)
    for name, state in weights(step).items():
        same(weights(tmp_path / "back")[name], state)
    engine.reshard(model.mapping, step, tmp_path / "one", to=model.mapping, mode="tensor", tp=2, settings=told(model))
    engine.convert(model.mapping, tmp_path / "one", tmp_path / "again", settings=told(model))
    same(load_file(tmp_path / "again" / "model.safetensors"), expected)
