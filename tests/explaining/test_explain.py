"""What `engine explain` says is true, down to the byte, and what it refuses it refuses clearly."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine import api
from engine.commands.main import cli
from engine.errors import EngineError
from engine.explaining import words as in_words
from engine.explaining.explanation import Explained, Explanation, Selection, parse_selection
from engine.explaining.links import Lattice, index_text, join_lattices
from engine.explaining.tensors import explain, explain_source
from engine.formats.headers import ITEM_SIZES
from engine.language.axes import parse_axes
from tests.language import test_features as words
from tests.support.depth import examples
from tests.support.families import angles, model_of, save_family
from tests.support.frameworks import FIXTURES
from tests.support.fsdp import save_fsdp
from tests.support.shards import Model, save

PAIRS = Model("v2", layers=4, hidden=32, heads=4, groups=2, ffn=24, rotary="pairs")

CHECKPOINTS: dict[str, tuple[Model, dict[str, Any]]] = {
    "pairs": (PAIRS, {"tp": 2, "pp": 2}),
    "uneven": (Model("v1", layers=5, heads=4, vocab=31, embedding="by_vocab", dtype=torch.float32), {"tp": 3, "pp": 2}),
    "rows": (Model("v2", layers=4, heads=4, groups=2), {"mode": "isp_wp", "wp": 3, "pp": 2, "chunks": 2}),
    "old": (Model("v1", layers=2, letters="w2_is_up"), {"tp": 2, "legacy": True, "wrapped": True}),
}


FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {"layers": 2, "groups": 2, "heads": 4}, {"tp": 2, "pp": 2}, ""),
    "internlm3": ("internlm3", {"layers": 2}, {"mode": "isp_wp", "wp": 3}, ""),
    "experts": ("moe", {"layers": 2, "experts": 3}, {"tp": 2}, ""),
    "stacked": ("moe", {"layers": 2, "experts": 3}, {"tp": 2}, "families/moe-stacked.yaml"),
    "meta": ("meta", {"layers": 2, "vocab": 64, "embedding": "by_vocab", "rope_base": 500000.0}, {"tp": 2}, ""),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Each checkpoint's plan and its converted tensors."""
    folder = tmp_path_factory.mktemp("explained")
    result = {}
    for name, (model, layout) in CHECKPOINTS.items():
        save(model, folder / name, **layout)
        plan = engine.plan(model.mapping, folder / name)
        result[name] = plan, dict(engine.iter_tensors(plan))
    for name, (kind, facts, layout, mapping) in FAMILIES.items():
        family = model_of(kind, **facts)
        save_family(family, folder / name, **layout)
        plan = engine.plan(mapping or family.mapping, folder / name)
        result[name] = plan, dict(engine.iter_tensors(plan))
    return result


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "step"
    save(PAIRS, folder, tp=2, pp=2)
    return folder


def only(told: Explanation) -> Explained:
    (one,) = told.tensors
    return one


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read(plan: Any, file: str, ranges: Any) -> bytes:
    path = Path(plan.folder) / file
    data = path.read_bytes()
    return b"".join(data[low:high] for low, high in ranges)


# -- it is true


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_bytes_of_an_element_are_where_it_says(
    made: dict[str, tuple[Any, dict[str, torch.Tensor]]], data: st.DataObject
) -> None:
    plan, tensors = made[data.draw(st.sampled_from(sorted(made)), "checkpoint")]
    output = data.draw(st.sampled_from(plan.outputs), "output")
    index = [data.draw(st.integers(0, size - 1), "index") for size in output.shape]
    told = only(explain(plan, f"{output.name}{index}"))
    (flow,) = told.flows
    assert flow.elements == flow.range_count == 1
    ((low, high),) = flow.byte_ranges
    assert high - low == ITEM_SIZES[output.dtype]
    assert read(plan, flow.source.file or "", flow.byte_ranges) == raw(tensors[output.name][tuple(index)].reshape(1))
    # And back: the element it came from goes to where we came from.
    back = only(explain_source(plan, f"{flow.source.file}:{flow.source.name}{flow.source.slice}"))
    assert (f"{output.name}", str(index)) in {(f.target.name, f.target.slice) for f in back.flows}


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_bytes_of_a_slice_are_those_of_its_elements(
    made: dict[str, tuple[Any, dict[str, torch.Tensor]]], data: st.DataObject
) -> None:
    plan, tensors = made[data.draw(st.sampled_from(sorted(made)), "checkpoint")]
    output = data.draw(st.sampled_from(plan.outputs), "output")
    window = []
    for size in output.shape:
        low = data.draw(st.integers(0, size - 1))
        window.append((low, data.draw(st.integers(low + 1, size))))
    told = only(explain(plan, f"{output.name}[{', '.join(f'{a}:{b}' for a, b in window)}]"))
    part = tensors[output.name][tuple(slice(a, b) for a, b in window)]
    assert sum(flow.elements for flow in told.flows) == part.numel()
    if all(flow.range_count == len(flow.byte_ranges) for flow in told.flows):
        item = ITEM_SIZES[output.dtype]
        found = b"".join(read(plan, flow.source.file or "", flow.byte_ranges) for flow in told.flows)
        expected = raw(part)
        assert sorted(found[i : i + item] for i in range(0, len(found), item)) == sorted(
            expected[i : i + item] for i in range(0, len(expected), item)
        )


def test_every_output_and_every_source_tensor_can_be_explained(made: dict[str, Any]) -> None:
    for plan, _ in made.values():
        for output in plan.outputs:
            assert sum(flow.elements for flow in only(explain(plan, output.name)).flows) == output.elements
        for source in plan.sources:
            file = plan.files[source.file].name
            told = only(explain_source(plan, f"{file}:{source.header.name}"))
            assert sum(flow.elements for flow in told.flows) * ITEM_SIZES[source.header.dtype] == source.header.nbytes


# -- it is told in sentences


def test_rotary_pairs_are_worked_through_in_words(pairs: Path) -> None:
    told = only(api.explain("model.layers.1.self_attn.q_proj.weight[0:8, :]", PAIRS.mapping, pairs))
    sentences = "\n".join(told.words)
    assert "`(groups queries half pair) hidden`, with groups 2, queries 2, half 2, pair 4, hidden 32" in sentences
    assert "rows 0…7 are groups 0, queries 0, half 0…1, pair 0…3" in sentences
    assert "layers.{layer}.attention.wqkv.weight is `(groups (queries + k + v) pair half) | hidden`" in sentences
    assert "groups is cut over tp: ranks 0…1 hold 1 each" in sentences
    assert "layer 1 of 0…3, number 1 in pp0 (0…1)" in sentences
    file, line, _ = str(told.rule_place).split(":")
    assert told.rule == "qkv_pairs"
    assert (Path(__file__).parents[2] / file).read_text().splitlines()[int(line) - 1].strip() == "- name: qkv_pairs"
    (flow,) = told.flows
    (stretch,) = flow.stretches
    assert stretch.order == ("rows 0…7 come from rows 0, 2, 4, 6, then 1, 3, 5, 7",)
    assert flow.source.file == "model_tp0_pp0.pt"


def test_a_slice_that_takes_every_second_row_says_so(pairs: Path) -> None:
    told = only(api.explain("model.layers.1.self_attn.q_proj.weight[0:4, :]", PAIRS.mapping, pairs))
    (stretch,) = told.flows[0].stretches
    assert stretch.source == ("0:7:2", "0:32")
    assert told.flows[0].range_count == 4


@pytest.mark.parametrize("position", ["9" * 5000, "0:" + "9" * 5000, "0:4:" + "9" * 5000, "\uff10:2"])
def test_a_position_that_no_tensor_has_is_refused(position: str, pairs: Path) -> None:
    with pytest.raises(EngineError, match="E001"):
        api.explain(f"model.layers.1.self_attn.q_proj.weight[{position}]", PAIRS.mapping, pairs)


def test_a_source_tensor_of_every_rank_is_explained_without_a_file(pairs: Path) -> None:
    told = api.explain("layers.0.attention.wqkv.weight[0:4]", PAIRS.mapping, pairs, backward=True)
    assert [one.asked.file for one in told.tensors] == [f"model_tp{t}_pp{p}.pt" for t in (0, 1) for p in (0, 1)]
    assert {one.flows[0].target.name for one in told.tensors} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2)
    }


def test_replicas_are_told_as_such(pairs: Path) -> None:
    told = api.explain("layers.0.attention_norm.weight", PAIRS.mapping, pairs, backward=True)
    notes = {one.asked.file: one.notes for one in told.tensors}
    assert notes["model_tp0_pp0.pt"] == ()
    assert "replica" in notes["model_tp1_pp0.pt"][0] and "model_tp0_pp0.pt" in notes["model_tp1_pp0.pt"][0]
    for one in told.tensors:
        other = {"0": "1", "1": "0"}[str(one.asked.file)[8]]
        (flow,) = one.flows
        assert flow.source.file == one.asked.file
        assert flow.replicas == (f"model_tp{other}{str(one.asked.file)[9:]}",)


def test_of_unlike_shards_those_are_explained_that_have_the_position(made: dict[str, Any]) -> None:
    plan, _ = made["uneven"]
    found = [
        [one.asked.file for one in explain_source(plan, f"embedding.word_embeddings.weight[{row}]").tensors]
        for row in (9, 10)
    ]
    assert [len(files) for files in found] == [3, 1]


@pytest.mark.parametrize(("boxes", "told"), [(4, "rows 0…7 are a 0; a 1; a 2; a 3"),
                                             (5, "rows 0…7 are a 0; a 1; a 2; a 3; … (5 boxes)")])  # fmt: skip
def test_of_many_boxes_four_are_named(boxes: int, told: str) -> None:
    group: Any = SimpleNamespace(instance=SimpleNamespace(axes=parse_axes("(a b)")))
    found: Any = [SimpleNamespace(box={"a": (at, at + 1)}) for at in range(boxes)]
    assert in_words.slice_sentences(group, [(0, 8)], found)[0].replace("elements", "rows") == told


def test_a_bias_that_one_rank_holds_undivided_is_told_as_such(made: dict[str, Any]) -> None:
    told = only(explain(made["uneven"][0], "model.layers.0.self_attn.o_proj.bias"))
    assert told.words[-1].endswith("; one rank holds it undivided")


def test_the_order_of_very_many_positions_is_not_examined(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = []
    for most in (8, 7):
        monkeypatch.setattr(in_words, "MOST_ORDERED", most)
        told = only(explain(made["pairs"][0], "model.layers.1.self_attn.q_proj.weight[0:8, :]"))
        orders.append(told.flows[0].stretches[0].order)
    assert orders == [("rows 0…7 come from rows 0, 2, 4, 6, then 1, 3, 5, 7",), ()]


def test_an_ignored_tensor_is_told_with_its_reason(tmp_path: Path) -> None:
    save(PAIRS, tmp_path / "step")
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = torch.load(path, weights_only=True)
    state["layers.0.attention.rotary_emb.inv_freq"] = angles(10000.0, PAIRS.head_dim)
    torch.save(state, path)
    name = "layers.0.attention.rotary_emb.inv_freq"
    told = only(api.explain(name, PAIRS.mapping, tmp_path / "step", backward=True))
    assert told.notes == ("ignored: recomputed by transformers",)
    assert told.flows == ()


def test_dropped_rows_are_told_with_their_reason(tmp_path: Path) -> None:
    whole = {"embed.weight": torch.randn(8, 4), "head.weight": torch.randn(11, 4)}
    whole |= {f"layers.{i}.mlp.weight": torch.randn(6, 4) for i in range(2)}
    words.shards(whole, tmp_path)
    padded = {"axes": "(vocab + padding) hidden", "target": None, "drop": {"padding": "rows added to divide by tp"}}
    data = words.rule("head", **padded, targets=[{"name": "head.weight", "axes": "vocab hidden"}])
    mapping = str(words.write(data, tmp_path))
    told = only(api.explain("model_tp1_pp0.pt:head.weight[7:10]", mapping, tmp_path / "step", backward=True))
    assert told.notes == ("dropped: 4 elements of `padding`: rows added to divide by tp",)
    assert [(flow.target.slice, flow.elements) for flow in told.flows] == [("[7, 2:4]", 2)]


def test_a_tensor_that_is_not_written_because_it_is_tied_is_told(tmp_path: Path) -> None:
    whole = {"embed.weight": torch.randn(8, 4), "head.weight": torch.randn(8, 4)}
    whole |= {f"layers.{i}.mlp.weight": torch.randn(6, 4) for i in range(2)}
    words.shards(whole, tmp_path)
    data = {**words.rule("head", tied_to="embed.weight"), "config": {"tie_word_embeddings": True}}
    mapping = str(words.write(data, tmp_path))
    forward = only(api.explain("head.weight[0]", mapping, tmp_path / "step"))
    assert forward.asked.name == "embed.weight"
    assert "ties it to embed.weight" in forward.notes[0]
    backward = only(api.explain("model_tp0_pp0.pt:head.weight", mapping, tmp_path / "step", backward=True))
    assert backward.flows == ()
    assert "tied to embed.weight" in backward.notes[0]


def test_a_transposed_tensor_is_told_as_such(tmp_path: Path) -> None:
    whole = {"embed.weight": torch.randn(8, 4), "head.weight": torch.randn(8, 4)}
    whole |= {f"layers.{i}.mlp.weight": torch.randn(6, 4) for i in range(2)}
    words.shards(whole, tmp_path)
    data = words.rule("head", target=None, targets=[{"name": "head.weight", "axes": "hidden vocab"}])
    told = only(api.explain("head.weight[1, 2:6]", str(words.write(data, tmp_path)), tmp_path / "step"))
    (flow,) = told.flows
    (stretch,) = flow.stretches
    assert (stretch.source, stretch.target) == (("2:6", "1"), ("1", "2:6"))
    assert stretch.order == ("columns 2…5 come from rows 2…5",)


def test_values_that_are_changed_on_the_way_are_told(tmp_path: Path) -> None:
    model = Model("v2", head="normalised")
    save(model, tmp_path / "step")
    told = only(api.explain("lm_head.weight[0]", model.mapping, tmp_path / "step", dtype="float32"))
    assert any("normalize over hidden" in note for note in told.notes)
    assert any("cast from BF16 to F32" in note for note in told.notes)


# -- what cannot be read is refused


@pytest.mark.parametrize(
    ("text", "why"),
    (
        ("[-1]", "negative"),
        ("[0:4:2]", "step"),
        ("[0:99999]", "positions, 0…31"),
        ("[4:4]", "nothing"),
        ("[5:2]", "nothing"),
        ("[x]", "neither"),
        ("[0, 0, 0]", "2 dimensions"),
        ("[...]", "neither"),
        ("[0", "cannot be read"),
    ),
)
def test_slices_that_cannot_be_used_are_refused(pairs: Path, text: str, why: str) -> None:
    with pytest.raises(EngineError) as caught:
        api.explain("lm_head.weight" + text, PAIRS.mapping, pairs)
    assert caught.value.code == "E001"
    assert why in str(caught.value)


def test_near_names_are_suggested(pairs: Path) -> None:
    for text, backward, near in (
        ("lm_heed.weight", False, "lm_head.weight"),
        ("layers.0.attention.wkqv.weight", True, "layers.0.attention.wqkv.weight"),
        ("model_tp0_pp9.pt:norm.weight", True, "model_tp0_pp"),
    ):
        with pytest.raises(EngineError, match=near):
            api.explain(text, PAIRS.mapping, pairs, backward=backward)


def test_a_name_of_the_other_side_is_recognised(pairs: Path) -> None:
    with pytest.raises(EngineError, match="give it with --from"):
        api.explain("layers.0.attention.wqkv.weight[0]", PAIRS.mapping, pairs)
    with pytest.raises(EngineError, match="give it without --from"):
        api.explain("lm_head.weight", PAIRS.mapping, pairs, backward=True)


def test_spaces_and_trailing_commas_are_as_in_numpy() -> None:
    assert parse_selection(" a.b [ 0:4 , : ] ") == Selection("a.b", ("0:4", ":"))
    assert parse_selection("a.b[3,]") == Selection("a.b", ("3",))
    assert parse_selection("f:a[3]") == Selection("f:a", ("3",))  # a name may hold a colon
    assert parse_selection("f:a[3]", file=True) == Selection("a", ("3",), "f")
    assert Selection("a", (":", "2:")).window((3, 4, 5)) == ((0, 3), (2, 4), (0, 5))


def test_a_slice_of_very_many_runs_is_counted_not_listed() -> None:
    lattice = Lattice(3, ((2, 1000), (4000, 1000)))
    assert join_lattices([lattice], 2) == ([(3, 4), (5, 6)], 1_000_000)
    later = Lattice(5_000_000, ((2, 10),))
    assert join_lattices([later, lattice], 2) == ([(3, 4), (5, 6)], 1_000_010)
    assert index_text(lattice) == "from 3, 1,000,000 positions"


# -- on the command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_shows_rule_file_and_bytes(pairs: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight[2, 5]"
    done = invoke("explain", "-m", PAIRS.mapping, "-s", pairs, name)
    assert done.exit_code == 0, done.stderr
    told = json.loads(invoke("explain", "-m", PAIRS.mapping, "-s", pairs, name, "--json").stdout)
    (flow,) = told["tensors"][0]["flows"]
    ((low, high),) = flow["byte_ranges"]
    assert f"bytes {low}…{high - 1} of model_tp0_pp0.pt" in done.stdout
    assert "rule qkv_pairs, mappings/families/internlm2.yaml:" in done.stdout
    assert "source [20, 5] → target [2, 5]" in done.stdout


def test_the_command_goes_the_other_way(pairs: Path) -> None:
    done = invoke("explain", "-m", PAIRS.mapping, "-s", pairs, "--from", "model_tp1_pp1.pt:output.weight[0]")
    assert done.exit_code == 0, done.stderr
    assert "to lm_head.weight[16, :]" in done.stdout


def test_many_ranks_are_counted_on_the_terminal_and_all_there_as_json(tmp_path: Path) -> None:
    model = Model("v2", layers=2, hidden=64, heads=16, groups=16, ffn=32, bias=False)
    save(model, tmp_path / "step", tp=16, pp=2)
    given = ("explain", "-m", model.mapping, "-s", tmp_path / "step")
    shown = invoke(*given, "--from", "layers.0.attention.wqkv.weight")
    assert "… and 24 more files; name one, as in `FILE:TENSOR`" in shown.stdout
    assert len(json.loads(invoke(*given, "--from", "layers.0.attention.wqkv.weight", "--json").stdout)["tensors"]) == 32
    shown = invoke(*given, "model.layers.1.self_attn.o_proj.weight")
    assert "… and 8 more source tensors; `--json` lists all" in shown.stdout


def test_the_command_says_what_is_missing() -> None:
    assert invoke("explain").exit_code == 2
    assert invoke("explain", "model.norm.weight", "--src", "nowhere").exit_code == 1  # nothing to choose a mapping by
    assert invoke("explain", "x", "--from", "y").exit_code == 2


@pytest.mark.skipif(find_spec("engine.explaining.codes") is None, reason="error pages are not there")
def test_a_piece_is_not_taken_for_the_whole_tensor() -> None:
    genuine = FIXTURES / "internevo_2025" / "v2_isp_wp2"
    told = api.explain("layers.0.attention.wk.weight", "internlm2", genuine, backward=True).tensors[0]
    assert any("attention.wqkv.weight, of which this is a piece, is `(groups (que" in one for one in told.words)


def test_an_error_code_is_explained_without_a_checkpoint() -> None:
    done = invoke("explain", "E203")
    assert done.exit_code == 0, done.stderr
    assert "E203" in done.stdout
    assert json.loads(invoke("explain", "E203", "--json").stdout)["code"] == "E203"


def test_every_cut_of_a_tensor_is_told(tmp_path: Path) -> None:
    save_fsdp(Model("v1"), tmp_path / "fsdp", dp=2, tp=2)
    fsdp = ["explain", "model.layers.0.mlp.gate_proj.weight", "-m", Model("v1").mapping, "-s", str(tmp_path / "fsdp")]
    told = CliRunner().invoke(cli, [*fsdp, "--set", "mlp_letters=w2_is_down"]).output
    assert "ffn is cut over tp: ranks 0…1 hold" in told and "storage rows are cut over dp, wherever" in told, told
    experts, name = Path(__file__).parents[1] / "fixtures/internevo_2025/moe_isp_wp2_ep2", "up_proj.weight"
    grouped = ["explain", f"model.layers.1.mlp.experts.3.{name}", "-m", "families/moe-grouped", "-s", str(experts)]
    told = CliRunner().invoke(cli, grouped).output
    assert (
        "storage rows of slices by the number of expert are cut over wp, wherever that falls: rank 0 holds 128" in told
    )
