"""Rank dimensions are what a layout says they are: a new one is a few lines of a layout file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.checkpoint.identity import said_rank
from engine.checkpoint.ranks import RankFile, RankGrid, expected_files, sizes_in
from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader
from engine.language.layout_file import load_layout
from engine.language.model import Expression, RankMap
from engine.planning.destination import cut_layers, mode_of, ranks_of
from engine.planning.stages import in_order, laid_out
from engine.planning.zeros import ZEROS
from tests.support.depth import sampled
from tests.support.shards import State

ROOT = Path(__file__).parents[2]
GENUINE = ROOT / "tests" / "fixtures" / "internevo" / "moe_tp2_pp2_dp1"  # 4 experts
LAYOUT = (ROOT / "mappings" / "layouts" / "internevo.yaml").read_text("utf-8")
EXPERTS = ".mlp.moe_layer.experts.wrapped_experts."

# Experts are dealt over `ep` ranks and numbered from 0 on each; what every rank holds is in every file.
NEW = """
indices: {expert: ep * count + expert}

modes:
  expert_parallel:
    files:
      - name: model_tp{tp}_ep{ep}_stage{stage}.pt
        cuts: {layers: {tp: split}, first: {tp: split}, last: {tp: split}}
"""

TWO_CUTS = """
mapping: 1
name: words
version: 1.0.0
source: {layout: mine}
target: {model_type: llama, architecture: LlamaForCausalLM}
dims: {layer: num_layers, hidden: hidden_size, vocab: vocab_size}
config: {}
rules:
  - {name: embed, source: embed.weight, target: embed.weight, axes: vocab hidden, split: vocab, stage: first}
  - {name: mlp, source: "layers.{layer}.mlp", target: "h.{layer}.mlp", axes: ffn hidden, split: ffn}
  - {name: head, source: head.weight, target: head.weight, axes: vocab hidden, split: hidden, stage: last}
"""


@pytest.fixture
def mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The experts' mapping over a layout with ranks `ep`, and `stage` in place of `pp`."""
    folder = tmp_path / "mine"
    (folder / "layouts").mkdir(parents=True)
    before, _, after = LAYOUT.partition("\nmodes:")
    text = before + NEW + "\nskip:" + after.partition("\nskip:")[2]
    text = text.replace("name: internevo", "name: mine", 1)
    text = text.replace("stage: chunk * pps + (pps - 1 - pp if schedule == 'zbv' and chunk % 2 == 1 else pp)",
                        "stage: chunk * stages + stage")  # fmt: skip
    text = text.replace("{{ pps }}", "{{ stages }}").replace("{{ wps }}", "1")
    (folder / "layouts" / "mine.yaml").write_text(text, encoding="utf-8")
    (folder / "mine.yaml").write_text(
        "mapping: 1\nname: mine\nversion: 1.0.0\nextends: internlm-moe.yaml\nsource: {layout: mine}\n", encoding="utf-8"
    )
    monkeypatch.setenv("ENGINE_MAPPINGS", str(folder))
    return str(folder / "mine.yaml")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    engine.convert("families/internlm-moe.yaml", GENUINE, tmp_path / "hf")
    return tmp_path / "hf"


def files(folder: Path) -> dict[str, State]:
    return {p.name: torch.load(p, weights_only=True) for p in folder.glob("model_*stage*.pt")}


def genuine_experts() -> dict[tuple[int, int, str, int], torch.Tensor]:
    """(layer, expert, linear, tp) → what InternEvo saved; two layers on each of two stages."""
    found = {}
    for path in GENUINE.glob("model_moe_layer*_expert*_tp*.pt"):
        layer, expert, tp = (int("".join(c for c in part if c.isdigit())) for part in path.stem.split("_")[2:])
        for name, tensor in torch.load(path, weights_only=True).items():
            found[layer, expert, name.split(".")[-2], tp] = tensor
    return found


def test_experts_over_a_new_dimension_are_numbered_by_the_layout_both_ways(
    mapping: str, whole: Path, tmp_path: Path
) -> None:
    engine.reverse(mapping, whole, tmp_path / "ranks", ranks="tp=2,ep=2,stage=2")
    written, experts = files(tmp_path / "ranks"), genuine_experts()
    assert sorted(written) == [f"model_tp{t}_ep{e}_stage{p}.pt" for t in (0, 1) for e in (0, 1) for p in (0, 1)]
    seen = 0
    for name, state in written.items():
        tp, ep, stage = (int(part[-1]) for part in name.removesuffix(".pt").split("_")[1:])
        for key, tensor in state.items():
            if EXPERTS in key:
                _, layer, *_, expert, linear, _ = key.split(".")
                assert torch.equal(tensor, experts[2 * stage + int(layer), 2 * ep + int(expert), linear, tp])
                seen += 1
            else:
                assert torch.equal(tensor, written[f"model_tp{tp}_ep{1 - ep}_stage{stage}.pt"][key])
    assert seen == len(experts)
    engine.convert(mapping, tmp_path / "ranks", tmp_path / "again")
    again, before = load_file(tmp_path / "again" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_ranks_of_any_dimension_can_be_changed(mapping: str, whole: Path, tmp_path: Path) -> None:
    engine.reverse(mapping, whole, tmp_path / "ranks", ranks={"ep": 4, "stage": 2})
    engine.reshard(mapping, tmp_path / "ranks", tmp_path / "other", ranks="ep=2, stage=1")  # the rest as it is
    engine.reverse(mapping, whole, tmp_path / "direct", ranks={"ep": 2})
    for name in files(tmp_path / "direct"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_copies_that_ranks_of_a_new_dimension_hold_are_compared(mapping: str, whole: Path, tmp_path: Path) -> None:
    engine.reverse(mapping, whole, tmp_path / "ranks", ranks={"ep": 2})
    path = tmp_path / "ranks" / "model_tp0_ep1_stage0.pt"
    state = torch.load(path, weights_only=True)
    state["blocks.1.norm1.weight"][3] += 1
    torch.save(state, path)
    with pytest.raises(EngineError) as caught:
        engine.convert(mapping, tmp_path / "ranks", tmp_path / "again")
    assert caught.value.code == "E402"
    assert "ep1" in str(caught.value)


def test_a_missing_rank_of_a_new_dimension_is_named(mapping: str, whole: Path, tmp_path: Path) -> None:
    engine.reverse(mapping, whole, tmp_path / "ranks", ranks={"ep": 4})
    (tmp_path / "ranks" / "model_tp0_ep2_stage0.pt").unlink()
    with pytest.raises(EngineError) as caught:
        engine.plan(mapping, tmp_path / "ranks")
    assert caught.value.code == "E201"
    assert "model_tp0_ep2_stage0.pt" in str(caught.value)


def test_a_rank_with_fewer_experts_is_named(mapping: str, whole: Path, tmp_path: Path) -> None:
    engine.reverse(mapping, whole, tmp_path / "ranks", ranks={"ep": 2})
    path = tmp_path / "ranks" / "model_tp0_ep1_stage0.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if f"{EXPERTS}1." not in name}, path)
    with pytest.raises(EngineError) as caught:
        engine.plan(mapping, tmp_path / "ranks")
    assert caught.value.code == "E211"
    assert path.name in str(caught.value)


@pytest.mark.parametrize(("width", "code"), [(3, None), (2, "E203")])
def test_ranks_of_one_dimension_hold_equal_parts_of_what_another_one_cuts(
    width: int, code: str | None, mapping: str, tmp_path: Path
) -> None:
    layout = Path(mapping).parent / "layouts" / "mine.yaml"
    text = layout.read_text("utf-8").replace("indices: {expert: ep * count + expert}", "")
    layout.write_text(text.replace("layers: {tp: split}", "layers: {tp: split, ep: hidden}"), encoding="utf-8")
    words = tmp_path / "words.yaml"
    words.write_text(TWO_CUTS, encoding="utf-8")
    (tmp_path / "step").mkdir()
    torch.save({"num_layers": 1, "hidden_size": 4, "vocab_size": 8}, tmp_path / "step" / "model_config.pt")
    whole = torch.randn(6, 4)
    for tp, ep in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = whole[3 * tp : 3 * tp + (width if tp == 0 and ep == 1 else 3), 2 * ep : 2 * ep + 2].clone()
        state = {"embed.weight": whole[:4], "layers.0.mlp": part, "head.weight": torch.ones(8, 2)}
        torch.save(state, tmp_path / "step" / f"model_tp{tp}_ep{ep}_stage0.pt")
    if code is None:
        got = dict(engine.iter_tensors(engine.plan(words, tmp_path / "step")))
        assert torch.equal(got["h.0.mlp"], whole)
        return
    with pytest.raises(EngineError, match="3 as in its other ranks") as caught:
        engine.plan(words, tmp_path / "step")
    assert caught.value.code == code


@sampled(2, "code")
@pytest.mark.parametrize(
    ("ranks", "code", "told"),
    [
        ({"ep": 3}, "E214", "1, 2, 4"),
        ({"stage": 5}, "E214", "stage=5"),
        ("tp=2,xp=2", "E001", "has no xp ranks"),
        ("tp", "E001", "tp=2,pp=4"),
        ("tp=2,tp=4", "E001", "each dimension once"),
        ({"tp": 2.0}, "E001", "whole number"),
        ({"tp": 0}, "E001", "at least one"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    ranks: object, code: str, told: str, mapping: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        engine.reverse(mapping, whole, tmp_path / "ranks", ranks=ranks)  # type: ignore[arg-type]
    assert caught.value.code == code
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "fix"),
    [
        ({"wp": 2}, "Leave wp out."),
        ({"pp": 2, "ep": 2}, "Give ranks that one mode has, or give --mode torch_pp_ep."),
        ({"ep": 2, "dp": 2}, "Give ranks that one mode has."),
    ],
)
def test_ranks_that_a_mode_does_not_have_are_told_with_those_of_every_mode(ranks: dict[str, int], fix: str) -> None:
    layout = load_layout("megatron")
    with pytest.raises(EngineError) as caught:
        ranks_of(layout, mode_of(layout, "torch", ranks), ("tp",), ranks)
    assert caught.value.fix == fix
    assert "tp in mode torch; tp, pp in mode torch_pp; tp, ep in mode torch_ep;" in str(caught.value)


def test_an_index_that_gives_a_number_twice_is_refused(mapping: str, whole: Path, tmp_path: Path) -> None:
    path = Path(mapping).parent / "layouts" / "mine.yaml"
    path.write_text(path.read_text("utf-8").replace("ep * count + expert", "ep + expert"), encoding="utf-8")
    with pytest.raises(EngineError) as caught:
        engine.reverse(mapping, whole, tmp_path / "ranks", ranks={"ep": 2})
    assert caught.value.code == "E105"
    assert "mine.yaml" in str(caught.value.place)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("pp", "0 for chunk0 pp0 and for chunk1 pp0"),
        ("chunk + pp", "1 for chunk0 pp1 and for chunk1 pp0"),
        ("chunk if pp else 'x'", "got       'x'"),
        ("pp > chunk", "is not a whole number"),
        ("omit", "got       nothing"),
    ],
)
def test_a_layout_must_number_each_stage_once(stage: str, told: str) -> None:
    layout = load_layout("internevo")
    layout = replace(layout, layers=replace(layout.layers, stage=Expression(stage, Place("own.yaml", 3))))
    with pytest.raises(EngineError, match=r"own\.yaml:3") as caught:
        in_order(layout, {"tp": 1, "pp": 2}, ("pp",), 2, {})
    assert caught.value.code == "E105" and told in str(caught.value)


def test_stages_in_another_order_than_is_asked_for_are_not_taken_over() -> None:
    layout = load_layout("internevo")
    order = in_order(layout, {"pp": 2}, ("pp",), 2, {"schedule": "zbv"})
    like = laid_out(zip(order, (1, 1, 1, 5), strict=True), 2, ("pp",))
    assert cut_layers(layout, 8, {"pp": 2}, 2, {"schedule": "zbv"}, like) is like
    assert [*cut_layers(layout, 8, {"pp": 2}, 2, {"schedule": "interleaved"}, like).counts.values()] == [2, 2, 2, 2]


@pytest.mark.parametrize("rank", ["10 ** 30", "none", "rank - 1", "rank > 0"])
def test_a_layout_must_give_each_file_a_rank(rank: str) -> None:
    experts = load_layout("internevo").modes[0].files[1]
    assert experts.ranks is not None
    wrong = RankMap(experts.ranks.count, {"tp": Expression(rank, Place("own.yaml", 3))})
    with pytest.raises(EngineError, match=r"own\.yaml:3") as caught:
        list(expected_files(replace(experts, ranks=wrong), {"tp": 2}, {"tps": 2, "training": {"parallel": {}}}))
    assert caught.value.code == "E105" and "`ranks.tp` is not a whole number" in str(caught.value)


def test_a_rank_of_a_mode_s_first_files_is_below_their_number() -> None:
    file = next(mode for mode in load_layout("internevo").modes if mode.name == "isp").files[0]
    assert file.ranks is not None
    wrong = RankMap(file.ranks.count, {**file.ranks.dims, "tp": Expression("rank % wps", Place("own.yaml", 3))})
    counts, sizes = {"tps": 2, "wps": 4, "pps": 1}, {"tp": 2, "wp": 4, "pp": 1}
    with pytest.raises(EngineError, match=r"`ranks.tp` is not a whole number from 0 to 1"):
        list(expected_files(replace(file, ranks=wrong), sizes, counts, main=True))


@pytest.mark.parametrize(("told", "ranks"), [(2, 2), (1, 1), (0, 1), (-1, 1), (True, 1), (None, 1)])
def test_as_many_ranks_of_experts_are_expected_as_the_training_file_says(told: object, ranks: int) -> None:
    """Where it says no number, as many as there are."""
    layout = load_layout("internevo")
    mode = next(mode for mode in layout.modes if mode.name == "isp_wp")
    main, experts = mode.files
    files = (
        RankFile("model_wp0_pp0.pt", main, {"wp": 0}),
        RankFile("model_moe_layer0_expert0_wp0.pt", experts, {"wp": 0}),
    )
    said = {"options": {}, "training": {"parallel": {"expert_weight": {"size": told}}}}
    assert sizes_in(main, RankGrid(mode, {"wp": 4, "pp": 1}, files), said)["wp"] == 4
    assert sizes_in(experts, RankGrid(mode, {"wp": 4, "pp": 1}, files), said)["wp"] == ranks


@pytest.mark.parametrize("rank", ["none", "{'a': 1}", "args.rank"])
def test_what_a_file_says_of_its_rank_is_nothing_if_it_is_no_number(rank: str) -> None:
    layout = load_layout("megatron")
    said = {**layout.says_ranks, "tp": Expression(rank, Place("own.yaml"))}
    header = replace(FileHeader(ZEROS.file, 0, (), "mp_rank_00/model_optim_rng.pt"), says={"args.rank": "%s"})
    assert said_rank(header, layout.modes[0].files[0], replace(layout, says_ranks=said)) is None
