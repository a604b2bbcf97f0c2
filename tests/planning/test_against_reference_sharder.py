"""The oracles themselves, held against genuine checkpoints, and whole runs held against the oracles.

The sharder must write what InternEvo wrote, byte for byte, and its expected result must compute
what the training tensors compute. Only then does an agreement with the engine mean something.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from tests.support import shards
from tests.support.cases import cases, same_files
from tests.support.depth import deep, examples, sampled
from tests.support.reference import forward, whole_training
from tests.support.shards import Model, State, same, save

GENUINE = Path(__file__).parents[1] / "fixtures" / "internevo"
V1 = Model("v1", layers=4, hidden=64, heads=8, groups=8, ffn=256, vocab=256)
V2 = Model("v2", layers=4, hidden=64, heads=8, groups=4, ffn=256, vocab=256, bias=False)
OLD, VOCAB = {"letters": "w2_is_up"}, {"embedding": "by_vocab"}
# name: the model that was trained and how it was laid out
LAYOUTS: dict[str, tuple[Model, dict[str, Any]]] = {
    "v1_tp1_pp1": (V1, {}),
    "v1_tp2_pp1_vocabsplit": (replace(V1, **VOCAB), {"tp": 2}),
    "v1_tp2_pp2": (V1, {"tp": 2, "pp": 2}),
    "v1_tp2_pp2_wrapped": (V1, {"tp": 2, "pp": 2, "wrapped": True}),
    "v1_tp4_pp1": (V1, {"tp": 4}),
    "v1_isp_tp1_wp2": (V1, {"mode": "isp", "wp": 2}),
    "old_v1_tp2_pp2": (replace(V1, **OLD), {"tp": 2, "pp": 2}),
    "v1_tp2_pp2_l5": (replace(V1, layers=5), {"tp": 2, "pp": 2}),
    "v1_tp2_pp2_chunks2": (replace(V1, layers=6), {"tp": 2, "pp": 2, "chunks": 2}),
    "v1_tp2_pp1_reward": (replace(V1, head="reward"), {"tp": 2}),
    "v2_tp2_pp2": (V2, {"tp": 2, "pp": 2}),
    "v2_tp2_pp1_normhead": (replace(V2, head="normalised"), {"tp": 2}),
    "v2_tp4_pp1_nohf": (replace(V2, rotary="pairs"), {"tp": 4}),
    "e052_v2_tp2_pp1_mult64": (replace(V2, ffn=176, rotary="pairs"), {"tp": 2}),
}
ONE_MODEL = list(LAYOUTS)[:7]  # the same weights, laid out in seven ways
modest = settings(deadline=None, max_examples=examples(25), suppress_health_check=list(HealthCheck))


def rank_files(folder: Path) -> dict[str, State]:
    files = sorted(p for p in folder.glob("model_*.pt") if p.name != "model_config.pt")
    return {p.name: torch.load(p, weights_only=True) for p in files}


def genuine_whole(model: Model) -> State:
    """The one model's whole weights, from its tp 1 checkpoint, under the names another layout uses."""
    whole = dict(rank_files(GENUINE / "v1_tp1_pp1")["model_tp0_pp0.pt"])
    if model.embedding == "by_vocab":
        whole["embedding.word_embeddings.weight"] = whole.pop("embedding.weight")
    if model.letters == "w2_is_up":
        letters = {".w2.": ".w3.", ".w3.": ".w2."}
        whole = {n.replace(n[-10:-6], letters.get(n[-10:-6], n[-10:-6])): t for n, t in whole.items()}
    return whole


@sampled(3)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sharder_writes_the_files_names_shapes_and_types_that_training_wrote(name: str, tmp_path: Path) -> None:
    model, layout = LAYOUTS[name]
    save(model, tmp_path / "step", **layout)

    def form(folder: Path) -> dict[str, list[tuple[str, tuple[int, ...], torch.dtype]]]:
        files = rank_files(folder).items()
        return {file: sorted((n, tuple(t.shape), t.dtype) for n, t in state.items()) for file, state in files}

    assert form(tmp_path / "step") == form(GENUINE / name)


@sampled(2)
@pytest.mark.parametrize("name", ONE_MODEL)
def test_the_sharder_cuts_genuine_weights_into_the_very_bytes_training_wrote(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = LAYOUTS[name]
    whole = genuine_whole(model)
    layers, first, last, expected = shards.build(model)
    refilled = [[replace(w, data=whole[f"blocks.{i}.{w.name}"]) for w in one] for i, one in enumerate(layers)]
    ends = ([replace(w, data=whole[w.name]) for w in end] for end in (first, last))
    built = (refilled, *ends, expected)
    monkeypatch.setattr(shards, "build", lambda _: built)
    save(model, tmp_path / "step", **layout)
    written, genuine = rank_files(tmp_path / "step"), rank_files(GENUINE / name)
    assert written.keys() == genuine.keys()
    for file, state in genuine.items():
        same(written[file], state)


@pytest.mark.parametrize("layout", [{"tp": 12}, {"mode": "isp", "wp": 12}, {"pp": 12}], ids=str)
def test_more_than_ten_ranks_are_in_the_order_of_their_numbers(layout: dict[str, Any], tmp_path: Path) -> None:
    model = replace(V2, layers=layout.get("pp", 1), hidden=24, heads=12, groups=12, ffn=48, vocab=24)
    expected = save(model, tmp_path / "step", **layout)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    engine.reverse(model.mapping, tmp_path / "hf", tmp_path / "back", like=tmp_path / "step")
    same_files(rank_files(tmp_path / "back"), rank_files(tmp_path / "step"))


def test_the_reference_forward_gives_internevos_own_logits() -> None:
    oracle = torch.load(GENUINE / "v1_tp1_pp1" / "oracle.pt", weights_only=True)
    logits = forward(V1, genuine_whole(V1), oracle["input_ids"])
    torch.testing.assert_close(logits, oracle["logits"], atol=1e-4, rtol=0)


@sampled(2)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary": "pairs"},
        {"family": "v2", "groups": 2},
        {"family": "v2", "groups": 1, "rotary": "pairs", "bias": False},
        {"family": "v2", "head": "normalised"},
        {"letters": "w2_is_up", "embedding": "by_vocab"},
        {"family": "v2", "groups": 2, "rotary": "pairs", "head": "reward"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_a_converted_model_computes_what_its_training_tensors_compute(changes: dict[str, Any], tmp_path: Path) -> None:
    from tests.support.genuine import logits

    # Small weights, as training has: random ones of size 1 saturate the softmax and hide mistakes.
    model = replace(Model(layers=2, hidden=32, heads=4, dtype=torch.float32), **changes)
    save(model, tmp_path / "step", tp=1)
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = torch.load(path, weights_only=True)
    scaled = OrderedDict((n, t / 4 if t.ndim == 2 else t.clone()) for n, t in state.items())
    torch.save(scaled, path)
    assert scaled.keys() == whole_training(model).keys()
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings={"mlp_letters": model.letters})
    ids = torch.randint(0, model.vocab, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = forward(model, scaled, ids)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits(tmp_path / "hf", ids), expected, atol=2e-4, rtol=1e-4)


@modest
@given(cases(), st.sampled_from(["auto", "bfloat16", "float32"]), st.sampled_from([1, 700, 5_000_000_000]))
def test_the_written_files_hold_the_unsharded_truth(
    case: tuple[Model, dict[str, Any]], dtype: str, max_shard_size: int
) -> None:
    model, layout = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = save(model, folder / "step", **layout)
        kind = model.dtype if dtype == "auto" else getattr(torch, dtype)
        given_ = {"mlp_letters": model.letters}
        engine.convert(
            model.mapping, folder / "step", folder / "hf", settings=given_, dtype=dtype, max_shard_size=max_shard_size
        )
        found: State = {}
        for file in (folder / "hf").glob("*.safetensors"):
            found |= load_file(file)
        same(found, {n: t.to(kind) for n, t in truth.items()})


@deep
@modest
@given(cases())
def test_any_two_layouts_of_a_model_give_the_same_files(case: tuple[Model, dict[str, Any]]) -> None:
    model, layout = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = []
        for nth, one in enumerate([{}, layout]):
            save(model, folder / f"step{nth}", **one)
            out = folder / f"hf{nth}"
            given_ = {"mlp_letters": model.letters}
            engine.convert(model.mapping, folder / f"step{nth}", out, settings=given_, max_shard_size=2000)
            written.append({p.name: p.read_bytes() for p in out.glob("model*")})
        assert written[0] == written[1]


WHOLE_LAYOUTS: list[dict[str, Any]] = [{"tp": 2, "pp": 2}, {"tp": 3}, {"mode": "isp", "tp": 2, "wp": 4}]


@pytest.mark.parametrize("layout", WHOLE_LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_an_embedding_that_every_rank_holds_whole_is_one_embedding(
    family: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    """InternEvo 0.3.10 to 0.4.9 does not cut it with embed_split_hidden=False, its default."""
    model = Model(family, layers=2, hidden=24, heads=6, groups=6, ffn=36, embedding="whole")
    truth = save(model, tmp_path / "step", **layout)
    same(dict(engine.iter_tensors(engine.plan(model.mapping, tmp_path / "step"))), truth)


@pytest.mark.parametrize(("told", "tp"), [(None, 2), (False, 3), (True, 1)])
def test_a_whole_embedding_is_written_cut_and_the_configuration_says_so(
    told: bool | None, tp: int, tmp_path: Path
) -> None:
    model = Model("v2", layers=2, hidden=24, heads=6, groups=6, ffn=36, embedding="whole")
    truth = save(model, tmp_path / "step", tp=3)
    config = model.config(1) | ({} if told is None else {"embed_split_hidden": told})
    torch.save(config, tmp_path / "step" / "model_config.pt")
    engine.reshard(model.mapping, tmp_path / "step", tmp_path / "cut", tp=tp)
    assert torch.load(tmp_path / "cut" / "model_config.pt", weights_only=True) == config | {"embed_split_hidden": True}
    same(dict(engine.iter_tensors(engine.plan(model.mapping, tmp_path / "cut"))), truth)


@pytest.mark.parametrize("layout", [{"mode": "isp", "tp": 2, "wp": 4}, {"tp": 1}], ids=["replicas", "one rank"])
def test_an_embedding_that_no_two_ranks_hold_whole_leaves_the_configuration_as_it_is(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    model = Model("v2", layers=2, hidden=24, heads=6, groups=6, ffn=36)
    save(model, tmp_path / "step", **layout)
    config = model.config(1)
    torch.save(config, tmp_path / "step" / "model_config.pt")
    engine.reshard(model.mapping, tmp_path / "step", tmp_path / "cut", tp=2)
    assert torch.load(tmp_path / "cut" / "model_config.pt", weights_only=True) == config


@pytest.mark.parametrize("row", [0, 500])
def test_whole_embeddings_that_differ_between_ranks_are_refused(row: int, tmp_path: Path) -> None:
    model = Model(layers=1, vocab=512, embedding="whole")
    save(model, tmp_path / "step", tp=2)
    path = tmp_path / "step" / "model_tp1_pp0.pt"
    state = torch.load(path, weights_only=True)
    state["embedding.weight"][row] += 1
    torch.save(state, path)
    with pytest.raises(EngineError) as caught:
        engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    assert caught.value.code == "E402"
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_norms_kept_in_float32_stay_so_unless_told_otherwise(dtype: str, tmp_path: Path) -> None:
    truth = save(V1, tmp_path / "step", tp=2, pp=2)
    for path in (tmp_path / "step").glob("model_tp*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save(OrderedDict((n, t.float() if "norm" in n else t.clone()) for n, t in state.items()), path)
    given_ = {"mlp_letters": V1.letters}
    engine.convert(V1.mapping, tmp_path / "step", tmp_path / "hf", settings=given_, dtype=dtype)
    wide = {n: t.float() if "norm" in n and dtype == "auto" else t for n, t in truth.items()}
    same(load_file(tmp_path / "hf" / "model.safetensors"), wide)


def save_moe(model: Model, folder: Path, *, experts: int, tp: int, pp: int, wrapped: str = "wrapped_experts") -> State:
    """A mixture of experts in v1 names: a float32 gate in every rank file, each expert in its own.

    Experts are named by the local layer, their files by pp · (layers // pp) + the local layer.
    """
    truth = {n: t for n, t in save(model, folder, tp=tp, pp=pp).items() if ".mlp." not in n}
    make = torch.Generator().manual_seed(7)
    stem, inner, outer = "mlp.moe_layer.experts", (model.ffn, model.hidden), (model.hidden, model.ffn)
    down, up = ("w2", "w3") if model.letters == "w2_is_down" else ("w3", "w2")
    shape, called = {"w1": inner, down: outer, up: inner}, {"w1": "gate_proj", down: "down_proj", up: "up_proj"}
    for (_, p), mine in shards.stages(model.layers, pp, 1, zbv=False).items():
        gates = {local: torch.randn(experts, model.hidden, generator=make) for local in range(len(mine))}
        truth |= {f"model.layers.{mine[n]}.mlp.gate.weight": gate for n, gate in gates.items()}
        for t in range(tp):
            path = folder / f"model_tp{t}_pp{p}.pt"
            state = {n: v.clone() for n, v in torch.load(path, weights_only=True).items() if ".mlp." not in n}
            state |= {f"blocks.{n}.mlp.moe_layer.gate.wg.weight": gate for n, gate in gates.items()}
            torch.save(OrderedDict(state), path)
        for local, e in ((local, e) for local in range(len(mine)) for e in range(experts)):
            parts = {w: torch.randn(s, generator=make).to(model.dtype) for w, s in shape.items()}
            for w, whole in parts.items():
                truth[f"model.layers.{mine[local]}.mlp.experts.{e}.{called[w]}.weight"] = whole
            for t in range(tp):
                low, high = shards.shares(model.ffn, tp)[t]
                cut = {w: v[:, low:high] if w == down else v[low:high] for w, v in parts.items()}
                named = {f"blocks.{local}.{stem}.{wrapped}.{e}.{w}.weight": v.clone() for w, v in cut.items()}
                number = p * (model.layers // pp) + local
                torch.save(named, folder / f"model_moe_layer{number}_expert{e}_tp{t}.pt")
    said = torch.load(folder / "config_file.pt", weights_only=True)
    torch.save(said.replace(model.model_type, "INTERNLM_MoE") + "moe = dict(top_k=2)\n", folder / "config_file.pt")
    return truth


@sampled(2)
@pytest.mark.parametrize(("layers", "tp", "pp"), [(4, 1, 1), (4, 2, 2), (5, 3, 2), (3, 1, 3)])
def test_experts_come_together_from_their_own_files(layers: int, tp: int, pp: int, tmp_path: Path) -> None:
    model = replace(V1, layers=layers, hidden=32, ffn=40)
    truth = save_moe(model, tmp_path / "step", experts=3, tp=tp, pp=pp)
    same(dict(engine.iter_tensors(engine.plan("families/internlm-moe.yaml", tmp_path / "step"))), truth)


def test_experts_are_read_by_the_name_that_they_had_until_2024(tmp_path: Path) -> None:
    model = replace(V1, layers=3, hidden=32, ffn=40, **OLD)
    truth = save_moe(model, tmp_path / "step", experts=2, tp=2, pp=2, wrapped="experts")
    same(dict(engine.iter_tensors(engine.plan("families/internlm-moe.yaml", tmp_path / "step"))), truth)


def test_a_layer_whose_experts_another_stage_overwrote_is_named(tmp_path: Path) -> None:
    """5 layers over 3 stages (1, 2, 2): the second and third stage both write layer number 2."""
    model = replace(V1, layers=5, hidden=32, ffn=40)
    save_moe(model, tmp_path / "step", experts=2, tp=1, pp=3)
    with pytest.raises(EngineError) as caught:
        engine.plan("families/internlm-moe.yaml", tmp_path / "step")
    # Stage 1's second layer, global 2, was overwritten by stage 2's first, global 3.
    assert caught.value.code == "E207"
    assert "nothing for layer 2, expert 0" in str(caught.value)
    assert "lost at saving" in str(caught.value)


def test_an_expert_whose_file_is_missing_is_named(tmp_path: Path) -> None:
    save_moe(replace(V1, hidden=32, ffn=40), tmp_path / "step", experts=2, tp=2, pp=2)
    (tmp_path / "step" / "model_moe_layer3_expert1_tp1.pt").unlink()
    with pytest.raises(EngineError) as caught:
        engine.plan("families/internlm-moe.yaml", tmp_path / "step")
    assert caught.value.code == "E207"
    assert "wrapped_experts.1.w1.weight` is missing on rank tp1" in str(caught.value)
    assert "model_moe_layer3_expert1_tp0.pt" in str(caught.value)


def _no_text(folder: Path) -> None:
    (folder / "config_file.pt").unlink()


def _computed_schedule(folder: Path) -> None:
    said = torch.load(folder / "config_file.pt", weights_only=True)
    torch.save("import cluster\n" + said.replace('"ZBV"', "cluster.mode"), folder / "config_file.pt")


@pytest.mark.parametrize("silenced", [_no_text, _computed_schedule])
def test_where_the_ends_of_a_model_lie_shows_a_schedule_that_no_file_tells(silenced: Any, tmp_path: Path) -> None:
    truth = save(replace(V2, layers=6, hidden=32, ffn=40), tmp_path / "step", tp=2, pp=3, chunks=2, zbv=True)
    silenced(tmp_path / "step")
    same(dict(engine.iter_tensors(engine.plan("families/internlm2", tmp_path / "step"))), truth)


def test_a_schedule_that_the_training_config_tells_is_not_another_one(tmp_path: Path) -> None:
    save(V2, tmp_path / "step", pp=2, chunks=2, zbv=True)
    said = torch.load(tmp_path / "step" / "config_file.pt", weights_only=True)
    torch.save(said.replace("ZBV", "1F1B"), tmp_path / "step" / "config_file.pt")
    with pytest.raises(EngineError) as caught:
        engine.plan("families/internlm2", tmp_path / "step")
    assert caught.value.code == "E211"


@pytest.mark.parametrize("zbv", [False, True])
def test_exchanged_ends_of_a_model_are_not_taken_for_another_schedule(zbv: bool, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    save(V2, folder, pp=2, chunks=2, zbv=zbv)
    _no_text(folder)
    files = [folder / f"model_tp0_pp{p}.pt" for p in range(2)]
    for path in files:
        shards.with_root(path, "archive")  # which names no rank
    files[0].rename(folder / "other")
    files[1].rename(files[0])
    (folder / "other").rename(files[1])
    with pytest.raises(EngineError) as caught:
        engine.plan("families/internlm2", folder)
    assert caught.value.code == "E211"
