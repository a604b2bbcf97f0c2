"""InternEvo since September 2024 saves a fused linear in pieces: the first rows of `wqkv` as `wq`, and so on."""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.language.mapping_file import load_mapping
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.depth import crossed, sampled
from tests.support.frameworks import FIXTURES, logits_off
from tests.support.shards import Model, same, save

GENUINE = FIXTURES / "internevo_2025" / "v2_isp_wp2"  # what its code of January 2025 saved of InternLM2
LLAMA = FIXTURES / "internevo" / "llama_tp2_pp1_default"
LETTERS = {"mlp_letters": "w2_is_down"}
V2 = Model("v2", heads=8, groups=4, hidden=32, bias=False)


def in_pieces(folder: Path, heads: int = 8, groups: int = 4) -> None:
    """Save the rows of each `wqkv` as InternEvo does: as many for `wq` as there would be queries, and so on."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith("wqkv.weight")]:
            rows = state.pop(name)
            sizes = [rows.shape[0] // (heads + 2 * groups) * count for count in (heads, groups, groups)]
            for word, piece in zip(("wq", "wk", "wv"), rows.split(sizes), strict=True):
                state[name.replace("wqkv", word)] = piece

    edit(folder, change)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], files: str = "model_*.pt") -> None:
    for path in sorted(folder.glob(files)):
        if path.name != "model_config.pt":
            state = torch.load(path, weights_only=True)
            change(state)
            torch.save(OrderedDict((name, one.clone()) for name, one in state.items()), path)


def configure(folder: Path, **values: Any) -> None:
    file = File(LocalStore(folder), "model_config.pt")
    torch.save({**read_pickled_mapping(file), "dtype": torch.bfloat16, **values}, folder / "model_config.pt")


def test_a_genuine_checkpoint_in_pieces_gives_trainings_logits(tmp_path: Path) -> None:
    engine.convert("internlm2", GENUINE, tmp_path / "hf")
    assert logits_off(tmp_path / "hf", GENUINE / "oracle.pt") < 1e-5
    found = engine.verify(tmp_path / "hf", src=GENUINE, mapping="internlm2", logits=True)
    assert found.problems == ()


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("lost", ["wq", "wk", "wv"])
def test_biases_of_only_some_of_three_linears_are_refused(family: str, lost: str, tmp_path: Path) -> None:
    model = Model(family, fused=False)
    save(model, tmp_path / "step")
    file = tmp_path / "step" / "model_tp0_pp0.pt"
    torch.save({n: one for n, one in torch.load(file).items() if not n.endswith(f"{lost}.bias")}, file)
    with pytest.raises(EngineError, match="attention_biases") as caught:
        engine.plan(model.mapping, tmp_path / "step", settings=LETTERS)
    assert caught.value.code == "E202"


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("lost", ["w1", "w2", "w3"])
def test_biases_of_only_some_linears_of_an_mlp_are_refused(family: str, lost: str, tmp_path: Path) -> None:
    model = Model(family, bias=False, layers=2)
    save(model, tmp_path / "step")

    def add(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if re.search(r"[.]w[123][.]weight", name) and lost not in name]:
            state[name.replace("weight", "bias")] = torch.ones(len(state[name])).bfloat16()

    edit(tmp_path / "step", add)
    with pytest.raises(EngineError, match="mlp_biases") as caught:
        engine.plan(model.mapping, tmp_path / "step", settings=LETTERS)
    assert caught.value.code == "E202"


@sampled(2, "rotary")
@pytest.mark.parametrize("rotary", ["halves", "pairs"])
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"mode": "isp_wp", "wp": 2}, {}], ids=str)
def test_pieces_are_the_rows_of_one_tensor_in_any_layout(layout: dict[str, Any], rotary: str, tmp_path: Path) -> None:
    expected = save(Model("v2", heads=8, groups=4, hidden=32, bias=False, rotary=rotary), tmp_path / "step", **layout)
    in_pieces(tmp_path / "step")
    engine.convert("internlm2", tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)


def test_reshard_writes_the_tensor_whole(tmp_path: Path) -> None:
    save(V2, tmp_path / "whole", tp=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "pieces")
    in_pieces(tmp_path / "pieces")
    for name in ("whole", "pieces"):
        engine.reshard("internlm2", tmp_path / name, tmp_path / f"{name} 4", tp=4, settings=LETTERS)
    for path in (tmp_path / "whole 4").glob("model_tp*.pt"):
        one, two = (
            torch.load(folder / path.name, weights_only=True) for folder in (path.parent, tmp_path / "pieces 4")
        )
        same(two, one)


def test_llamas_fused_linears_are_read_as_its_own_where_the_configuration_says_so(tmp_path: Path) -> None:
    source, fused = tmp_path / "apart", tmp_path / "fused"
    shutil.copytree(LLAMA, source)
    shutil.copytree(LLAMA, fused)

    def fuse(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith("attention.wq.weight")]:
            names = [name.replace("wq", word) for word in ("wq", "wk", "wv")]
            q, k, v = (state.pop(one).unflatten(0, (-1, 8)) for one in names)  # heads of 8, two queries for each key
            rows = torch.cat([q.unflatten(0, (-1, 2)), k[:, None], v[:, None]], 1).flatten(0, 2)
            pieces = rows.split([q.shape[0] * 8, k.shape[0] * 8, v.shape[0] * 8])
            state.update(zip(names, pieces, strict=True))

    edit(fused, fuse)
    configure(fused, enable_qkv_fusion=True)
    configure(source, enable_qkv_fusion=False)
    for folder in (source, fused):
        engine.convert("llama", folder, tmp_path / f"{folder.name} hf")
    same(load_file(tmp_path / "fused hf/model.safetensors"), load_file(tmp_path / "apart hf/model.safetensors"))
    assert engine.verify(tmp_path / "fused hf", src=fused, mapping="llama", logits=True).problems == ()


def test_llama_is_written_with_its_own_linears_or_with_one_if_asked(tmp_path: Path) -> None:
    engine.convert("llama", LLAMA, tmp_path / "hf")
    for fusion, words in (("apart", {"wq", "wk", "wv"}), ("fused", {"wqkv"})):
        folder = tmp_path / fusion
        engine.reverse("llama", tmp_path / "hf", folder, tp=2, settings={"fusion": fusion} | LETTERS)
        state = torch.load(folder / "model_tp0_pp0.pt", weights_only=True)
        assert {name.split(".")[3] for name in state if ".attention.w" in name} == {*words, "wo"}
        config = read_pickled_mapping(File(LocalStore(folder), "model_config.pt"))
        assert config["enable_qkv_fusion"] is (fusion == "fused")
        engine.convert("llama", folder, tmp_path / f"{fusion} hf")
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in (f"{fusion} hf", "hf"))
        same(one, two)


@pytest.mark.parametrize(
    ("layout", "rotary"), crossed([{"tp": 2, "pp": 2}, {"mode": "isp_wp", "wp": 2}], ["halves", "pairs"]), ids=str
)
def test_internlm2s_own_linears_are_converted_and_written_back(
    layout: dict[str, Any], rotary: str, tmp_path: Path
) -> None:
    """InternEvo since January 2025 with `enable_qkv_fusion=False`: the names of pieces, with another meaning."""
    step, hf, back = tmp_path / "step", tmp_path / "hf", tmp_path / "back"
    expected = save(Model("v2", heads=8, groups=4, hidden=32, bias=False, rotary=rotary), step, **layout)

    def part(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith("wqkv.weight")]:
            rows = state.pop(name).unflatten(0, (-1, 4, 4))  # two queries, the key and the value; heads of 4
            for word, own in zip(("wq", "wk", "wv"), (rows[:, :2], rows[:, 2], rows[:, 3]), strict=True):
                state[name.replace("wqkv", word)] = own.flatten(0, -2)

    edit(step, part)
    configure(step, enable_qkv_fusion=False)
    engine.convert("internlm2", step, hf, settings=LETTERS)
    same(load_file(hf / "model.safetensors"), expected)
    engine.reverse("internlm2", hf, back, like=step, **layout)
    for path in sorted(step.glob("model_[tw]*.pt")):
        same(torch.load(back / path.name, weights_only=True), torch.load(path, weights_only=True))
    assert read_pickled_mapping(File(LocalStore(back), "model_config.pt"))["enable_qkv_fusion"] is False
    engine.convert("internlm2-official", step, tmp_path / "official", settings=LETTERS)
    engine.reverse("internlm2-official", tmp_path / "official", tmp_path / "fused", settings=LETTERS)
    engine.convert("internlm2", tmp_path / "fused", tmp_path / "again", settings=LETTERS)
    same(load_file(tmp_path / "again/model.safetensors"), expected)


@pytest.mark.parametrize("rotary", ["halves", "pairs"])
def test_internlms_own_linears_with_biases_are_converted_and_written_back(rotary: str, tmp_path: Path) -> None:
    step, hf, back = tmp_path / "step", tmp_path / "hf", tmp_path / "back"
    expected = save(Model("v1", rotary=rotary), step, tp=2, pp=2)

    def part(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if "Wqkv" in name]:
            for word, own in zip(("wq", "wk", "wv"), state.pop(name).chunk(3), strict=True):
                state[name.replace("Wqkv", word)] = own

    edit(step, part)
    configure(step, enable_qkv_fusion=False)
    engine.convert("internlm", step, hf, settings=LETTERS)
    same(load_file(hf / "model.safetensors"), expected)
    assert engine.verify(hf, src=step, mapping="internlm", logits=True, settings=LETTERS).problems == ()
    engine.reverse("internlm", hf, back, like=step, settings=LETTERS)
    for path in sorted(step.glob("model_t*.pt")):
        same(torch.load(back / path.name, weights_only=True), torch.load(path, weights_only=True))
    assert read_pickled_mapping(File(LocalStore(back), "model_config.pt"))["enable_qkv_fusion"] is False


@pytest.mark.parametrize(
    ("kind", "cut"), crossed(["v1", "v2"], [({"mode": "isp", "wp": 2}, True), ({"mode": "isp_wp", "wp": 4}, False)])
)
def test_gate_and_up_as_halves_of_each_ranks_rows_are_told_apart(
    kind: str, cut: tuple[dict[str, Any], bool], tmp_path: Path
) -> None:
    """Under isp, a rank of `mlp_layer_fusion` has rows of one linear, which it saves as two by lengths alone."""
    layout, biases = cut
    step, hf, back = tmp_path / "step", tmp_path / "hf", tmp_path / "back"
    model = Model(kind, heads=8, groups={"v1": 8, "v2": 4}[kind], hidden=32, bias=False)
    expected = save(model, step, **layout)
    files = [path for path in sorted(step.glob("model_*.pt")) if path.name != "model_config.pt"]
    states = [torch.load(path, weights_only=True) for path in files]
    for name in [name for name in states[0] if biases and re.search("w[123].weight", name)]:
        own = re.sub(r".*[.](\d+)[.].*(w\d).*", r"model.layers.\1.mlp.\2_proj.bias", name)
        own = own.replace("w1", "gate").replace("w2", "down").replace("w3", "up")
        expected[own] = torch.randn(sum(len(state[name]) for state in states)).bfloat16()
        for state, held in zip(states, expected[own].chunk(len(states)), strict=True):
            state[name.replace("weight", "bias")] = held
    for name in [name for name in states[0] if re.search("w1.(weight|bias)", name)]:
        names = (name, name.replace("w1", "w3"))
        rows = torch.cat([state[one] for one in names for state in states])
        for state, held in zip(states, rows.chunk(len(states)), strict=True):
            state.update(zip(names, held.chunk(2), strict=True))
    for path, state in zip(files, states, strict=True):
        torch.save(OrderedDict((name, one.clone()) for name, one in state.items()), path)
    configure(step, mlp_layer_fusion=True)
    family = {"v1": "internlm", "v2": "internlm2"}[kind]
    engine.convert(family, step, hf)
    same(load_file(hf / "model.safetensors"), expected)
    assert engine.verify(hf, src=step, mapping=family, logits=True).problems == ()
    engine.reverse(family, hf, back, like=step)
    engine.convert(family, back, tmp_path / "again")
    same(load_file(tmp_path / "again/model.safetensors"), expected)
    for asked in ({"mode": "tensor", "tp": 2}, {"mode": "tensor", "to": family, "settings": {"gates": "joined"}}):
        with pytest.raises(EngineError) as caught:  # there, each rank has its own gate and up
            engine.reshard(family, step, tmp_path / "other", **asked)
        assert caught.value.code == "E214", caught.value


def exchange(state: dict[str, torch.Tensor]) -> None:
    one, two = (f"layers.1.attention.{word}.weight" for word in ("wq", "wk"))
    state[one], state[two] = state[two], state[one]


WRONG: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "a piece is missing on one rank": ("E207", "rank tp1", lambda folder: edit(
        folder, lambda state: state.__delitem__("layers.2.attention.wk.weight"), "model_tp1*.pt")),
    "a piece is missing on every rank": ("E207", "rank tp0", lambda folder: edit(
        folder, lambda state: state.__delitem__("layers.2.attention.wk.weight"))),
    "a rank has the whole as well": ("E206", "both whole and in pieces", lambda folder: edit(
        folder, lambda state: state.update({"layers.0.attention.wqkv.weight": state[
            "layers.0.attention.wq.weight"].repeat(2, 1)}), "model_tp1*.pt")),
    "two pieces changed names on one rank": ("E203", "model_tp1", lambda folder: edit(
        folder, exchange, "model_tp1*.pt")),
    "two pieces changed names on every rank": ("E203", "queries", lambda folder: edit(folder, exchange)),
    "nothing says what they are": ("E202", "enable_qkv_fusion", lambda folder: (folder / "config_file.pt").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(name: str, tmp_path: Path) -> None:
    code, told, change = WRONG[name]
    save(V2, tmp_path / "step", tp=2)
    in_pieces(tmp_path / "step")
    change(tmp_path / "step")
    with pytest.raises(EngineError) as caught:
        engine.convert("internlm2", tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    assert caught.value.code == code and told in str(caught.value), caught.value
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("order", [list, sorted], ids=["as saved", "sorted"])
def test_pieces_of_equal_lengths_that_exchanged_names_show_by_their_place_in_the_file(
    order: Callable[..., list[tuple[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """In whatever order the names are: each linear has a buffer of its own, which says nothing of that."""
    shutil.copytree(GENUINE, tmp_path / "step")
    file = tmp_path / "step" / "model_wp1_pp0.pt"
    state = torch.load(file, weights_only=True)
    one, two = (f"model.layers.1.attention.{word}.weight" for word in ("wk", "wv"))
    state[one], state[two] = state[two], state[one]
    torch.save(dict(order(state.items())), file)
    with pytest.raises(EngineError, match=r"E208 pieces of(.|\n)*model_wp1(.|\n)*wq\S+, \S+wv\S+, \S+wk") as caught:
        engine.plan("internlm2", tmp_path / "step")
    assert caught.value.place is not None and caught.value.place.tensor == one.replace("wk", "wq")


ODD = {
    "columns are cut": "split: hidden",
    "another axis is outermost": "axes: ((queries + k + v) groups head_dim) | hidden",
    "a term of the sum is cut": "axes: ((queries + k + v) groups head_dim) | hidden, split: queries",
    "a name twice": 'pieces: ["layers.{layer}.q.{param}", "layers.{layer}.q.{param}", "layers.{layer}.v.{param}"]',
    "two pieces for three terms": 'pieces: ["layers.{layer}.wq.{param}", "layers.{layer}.wkv.{param}"]',
}


@pytest.mark.parametrize("name", ODD)
def test_a_rule_whose_pieces_are_not_the_rows_of_ranks_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "mapping: 1\nname: own\nversion: 1.0.0\ndescription: d\nextends: internlm2\n"
        f"rules:\n  - {{name: qkv, {ODD[name]}}}\n"
    )
    with pytest.raises(EngineError) as caught:
        load_mapping(path)
    assert caught.value.code == "E102" and "`pieces` do not fit" in str(caught.value), caught.value


def test_pieces_are_refused_where_no_rank_cuts_rows(tmp_path: Path) -> None:
    save(V2, tmp_path / "step")
    in_pieces(tmp_path / "step")
    one = tmp_path / "step" / "model_tp0_pp0.pt"
    torch.distributed.checkpoint.save(torch.load(one, weights_only=True), checkpoint_id=tmp_path / "step", no_dist=True)
    for path in (one, *(tmp_path / "step").glob("topo*")):
        path.unlink()
    with pytest.raises(EngineError) as caught:
        engine.convert("internlm2", tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    assert caught.value.code == "E208" and "one of 3 pieces" in str(caught.value), caught.value
