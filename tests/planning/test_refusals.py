"""What must be refused: one clear error with code, place, got, expected and fix, and nothing left."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine
from engine import api
from engine.errors import EngineError
from engine.language.axes import parse_axes
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning import rank_outputs
from engine.planning.completeness import check_known
from engine.planning.reading import read_checkpoint
from engine.planning.request import request_of
from engine.run import replicas
from engine.run.running import Running
from engine.storage import output, replacing
from engine.storage.objects import ObjectStore
from engine.storage.places import on_this_machine
from tests.support.disk import contents
from tests.support.old_output import old_output
from tests.support.shards import Model, save

V1 = Model(layers=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(V1, tmp_path / "step", tp=2, pp=2)
    return tmp_path / "step"


def refuse(source: Path, code: str, *told: str, mapping: str = V1.mapping, **options: Any) -> EngineError:
    """Convert, expect the error, and see that nothing is left beside the source."""
    options = {"settings": {"mlp_letters": "w2_is_down"} if mapping == V1.mapping else {}} | options
    before = sorted(p.name for p in source.parent.iterdir())
    with pytest.raises(EngineError) as caught:
        engine.convert(mapping, source, source.parent / "hf", **options)
    assert caught.value.code == code, str(caught.value)
    for text in told:
        assert text in str(caught.value)
    assert caught.value.fix
    left = [p.name for p in source.parent.iterdir() if code != "E403" or ".partial-" not in p.name]
    assert sorted(left) == before
    return caught.value


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(OrderedDict((k, v.clone()) for k, v in state.items()), path)


def test_a_missing_rank_file_is_named(source: Path) -> None:
    (source / "model_tp1_pp1.pt").unlink()
    refuse(source, "E201", "`model_tp1_pp1.pt` is missing", "tp 2 × pp 2")


@pytest.mark.parametrize("name", ["model_tp1_pp1 (1).pt", "model_tp1_pp1.pt.part"])
def test_a_file_of_a_similar_name_is_told_with_the_one_that_is_missing(source: Path, name: str) -> None:
    (source / "model_tp1_pp1.pt").rename(source / name)
    refuse(source, "E201", "`model_tp1_pp1.pt` is missing", f"`{name}` is here")


def test_what_lies_among_the_tensors_of_a_rank_file_is_told(source: Path) -> None:
    path = source / "model_tp1_pp0.pt"
    torch.save({**torch.load(path, weights_only=True), "optimizer": {"exp_avg": torch.zeros(3)}}, path)
    plan = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down"})
    assert "not part of the model, not converted: optimizer" in plan.notices


def test_a_rank_whose_files_are_all_missing_is_named_from_the_training_config(source: Path) -> None:
    for pp in range(2):
        (source / f"model_tp1_pp{pp}.pt").unlink()
    refuse(source, "E201", "model_tp1_pp0.pt", "tp 2")


def test_a_tensor_no_rule_matches_is_named(source: Path) -> None:
    edit(source / "model_tp0_pp1.pt", lambda s: s.update({"blocks.0.mystery.weight": torch.ones(3)}))
    refuse(source, "E205", "blocks.0.mystery.weight", "model_tp0_pp1.pt")


def test_a_tensor_a_rule_needs_is_named_when_missing(source: Path) -> None:
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: [s.pop("blocks.1.norm1.weight")])
    (source / "notes.bin").write_text("mine")
    assert "notes.bin" not in str(refuse(source, "E207", "blocks.3.norm1.weight"))  # no index leaves it out


def test_a_slice_that_one_rank_lacks_is_named(source: Path) -> None:
    edit(source / "model_tp1_pp0.pt", lambda s: [s.pop("blocks.0.mlp.w1.weight")])
    refuse(source, "E207", "blocks.0.mlp.w1.weight", "tp1", "`model_tp1_pp0.pt` is from another run")


def test_sizes_that_disagree_show_both_sides_and_the_file(source: Path) -> None:
    edit(source / "model_tp1_pp0.pt", lambda s: s.update({"blocks.1.mlp.w1.weight": torch.ones(8, 16).bfloat16()}))
    error = refuse(source, "E203", "axis `ffn`", "20", "24", "blocks.1.mlp.w1.weight")
    assert error.place is not None and error.place.file.endswith("internlm.yaml") and error.place.line


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("axes: vocab hidden\n    split: vocab\n", "axes: vocab hidden\n", "2 tp ranks make 32 together: its rule"),
        ("axes: hidden\n", "axes: hidden\n    split: hidden\n", "each of 2 tp ranks has 16: its rule may have a"),
    ],
    ids=["too little", "too much"],
)
def test_sizes_that_disagree_as_a_rule_cuts_too_much_or_too_little_tell_so(
    old: str, new: str, told: str, source: Path, tmp_path: Path
) -> None:
    text = Path("mappings/families/internlm.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "careless.yaml").write_text(text.replace(old, new), encoding="utf-8")
    refuse(source, "E203", told, mapping=str(tmp_path / "careless.yaml"), settings={"mlp_letters": "w2_is_down"})


@pytest.mark.parametrize("unknown", ["expert", "ffn"])
def test_a_size_of_a_number_in_names_must_be_known_as_that_of_an_axis(unknown: str) -> None:
    one: Any = SimpleNamespace(axis_names=("expert",), axes=parse_axes("hidden ffn"), rule=SimpleNamespace(place=None))
    sizes = dict.fromkeys(("expert", "hidden", "ffn"), 4)
    check_known([one], sizes, {})
    with pytest.raises(EngineError, match=f"E204 the size of axis `{unknown}` stays unknown"):
        check_known([one], {axis: size for axis, size in sizes.items() if axis != unknown}, {})


@pytest.mark.parametrize(("key", "size"), [("hidden_size", 8), ("vocab_size", 64)])
def test_sizes_of_another_models_configuration_say_nothing_of_a_rule_that_cuts_rightly(
    key: str, size: int, source: Path
) -> None:
    """Though a half and the double are what two ranks would make of a wrong `split`."""
    config = read_checkpoint(source, load_layout("internevo")).config
    torch.save({**config, key: size}, source / "model_config.pt")
    assert "split" not in str(refuse(source, "E203", f"{size} from"))


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("norm1.weight", 17, ("the shape", "17 in model_tp1_pp0.pt", "16, as in model_tp0_pp0.pt")),
        ("mixer.Wqkv.weight", 25, ("axis `heads`", "25 rows", "a multiple of 12")),
    ],
)
def test_a_shape_that_one_rank_has_in_a_later_layer_is_refused_whatever_its_values(
    name: str, rows: int, told: tuple[str, ...], source: Path
) -> None:
    def longer(state: dict[str, torch.Tensor]) -> None:
        whole = state[f"blocks.1.{name}"]
        state[f"blocks.1.{name}"] = torch.cat([whole, whole[: rows - len(whole)]])

    edit(source / "model_tp1_pp0.pt", longer)
    refuse(source, "E203", f"blocks.1.{name}", *told)


def test_tensors_are_in_the_order_of_the_model_and_its_type_is_that_of_most_numbers(tmp_path: Path) -> None:
    """Layer 10 is after layer 9. More tensors than matrices of the MLP are float32, and they are smaller."""
    save(Model(layers=11), tmp_path / "step", tp=1)
    wide = re.compile("norm|mixer")
    edit(
        tmp_path / "step" / "model_tp0_pp0.pt",
        lambda s: s.update({name: one.float() for name, one in s.items() if wide.search(name)}),
    )
    plan = engine.plan(V1.mapping, tmp_path / "step", settings={"mlp_letters": "w2_is_down"})
    layers = [int(one.name.split(".")[2]) for one in plan.outputs if ".layers." in one.name]
    assert layers == sorted(layers) and {*layers} == {*range(11)}
    assert [one.dtype for one in plan.outputs].count("F32") > len(plan.outputs) / 2
    assert plan.config["dtype"] == plan.config["torch_dtype"] == "bfloat16"


def test_a_config_of_another_model_disagrees_with_the_tensors(source: Path) -> None:
    other = Model(layers=4, hidden=16, ffn=32)
    save(other, source.parent / "other")
    shutil.copy(source.parent / "other" / "model_config.pt", source / "model_config.pt")
    refuse(source, "E203", "ffn", "32")


def test_a_wrong_mapping_says_so(source: Path) -> None:
    refuse(source, "E212", "is not the one for this checkpoint", mapping="families/internlm2.yaml")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(source: Path, keep: float) -> None:
    path = source / "model_tp1_pp0.pt"
    os.truncate(path, int(path.stat().st_size * keep))
    refuse(source, "E301", "model_tp1_pp0.pt")


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("name", ["model_tp0_pp0.pt", "model_config.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(source: Path, name: str, zipped: bool, tmp_path: Path) -> None:
    marker = source / "ran"
    torch.save({"x": Attack(marker)}, source / name, _use_new_zipfile_serialization=zipped)
    refuse(source, "E302", name, "system")
    assert not marker.exists()


def test_a_hostile_training_config_is_never_executed(source: Path) -> None:
    marker = source / "ran"
    torch.save(f"__import__('os').system('touch {marker}')\nparallel = dict(tensor=2)\n", source / "config_file.pt")
    engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down"})
    assert not marker.exists()


def test_replicas_that_differ_name_both_files_and_the_deviation(source: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["norm.weight"][3] += 2.0

    edit(source / "model_tp1_pp1.pt", change)
    refuse(source, "E402", "norm.weight", "model_tp1_pp1.pt", "model_tp0_pp1.pt", "1 of 16 elements")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "a signalling NaN"])
def test_the_deviation_of_replicas_that_are_no_numbers_is_told_without_a_warning(
    source: Path, value: float | str
) -> None:
    def change(state: dict[str, torch.Tensor], one: float) -> None:
        state["norm.weight"] = state["norm.weight"].float()
        state["norm.weight"].view(torch.int32)[1] = 0x7F800001 if isinstance(value, str) else 0
        if not isinstance(value, str):
            state["norm.weight"][1] = value
        state["norm.weight"][2] = one

    for rank in range(2):
        edit(source / f"model_tp{rank}_pp1.pt", lambda state, one=float(rank): change(state, one))
    refuse(source, "E402", "1 of 16 elements, by up to 1\n")


def test_the_deviation_of_replicas_is_that_of_all_their_blocks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BLOCK_BYTES", 16)
    for tp, values in enumerate(([1, 1, 1], [4, 1, 1.5])):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s, put=values: s["norm.weight"][::7].copy_(torch.tensor(put)))
    refuse(source, "E402", "2 of 16 elements, by up to 3\n")


def test_replicas_that_differ_are_refused_also_where_nothing_is_written(source: Path) -> None:
    letters = {"mlp_letters": "w2_is_down"}
    engine.convert(V1.mapping, source, source.parent / "hf", settings=letters)
    edit(source / "model_tp1_pp0.pt", lambda state: state["blocks.1.norm2.weight"][3].add_(1))
    with pytest.raises(EngineError, match=r"E402 .*step: replicas of `blocks.1.norm2.weight` differ"):
        engine.compare(source.parent / "hf", source, mapping=V1.mapping, settings=letters)


def test_reward_heads_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    save(Model(head="reward"), tmp_path / "step", tp=2)
    edit(tmp_path / "step" / "model_tp1_pp0.pt", lambda s: s.update({"head.weight": s["head.weight"] * 2}))
    refuse(tmp_path / "step", "E402", "head.weight")


def test_layer_norms_are_refused_with_the_reason(source: Path) -> None:
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: s.update({"norm.bias": torch.ones(16).bfloat16()}))
    refuse(source, "E209", "norm.bias")


def test_types_that_differ_inside_one_tensor_are_refused(source: Path) -> None:
    name = "blocks.0.mlp.w1.weight"
    edit(source / "model_tp1_pp0.pt", lambda s: s.update({name: s[name].float()}))
    refuse(source, "E210", "F32 in model_tp1_pp0.pt", "BF16 in model_tp0_pp0.pt")


def test_types_that_differ_between_layers_are_reported(source: Path) -> None:
    settings = {"mlp_letters": "w2_is_down"}
    name = "blocks.1.norm1.weight"
    for path in source.glob("model_tp*_pp*.pt"):  # norms of all layers alike: as training saves them
        edit(path, lambda s: s.update({key: s[key].float() for key in s if "norm" in key}))
    assert not engine.plan(V1.mapping, source, settings=settings).notices
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: s.update({name: s[name].bfloat16()}))
    plan = engine.plan(V1.mapping, source, settings=settings)
    told = "element types differ where training has one: blocks.0.norm1.weight in model_tp0_pp0.pt is F32, "
    assert plan.notices == (f"{told}{name} in model_tp0_pp1.pt is BF16; are all files from one run?",)
    others = {one: name.replace("norm1", one) for one in ("norm2", "mlp.w2")}
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: s.update({others["norm2"]: s[others["norm2"]].bfloat16()}))
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: s.update({others["mlp.w2"]: s[others["mlp.w2"]].float()}))
    (told,) = engine.plan(V1.mapping, source, settings=settings).notices
    assert told.endswith(" is F32, and 2 more kinds; are all files from one run?")


def test_both_types_of_16_bits_in_one_checkpoint_are_reported(source: Path) -> None:
    """As of tensors whose type was read wrong; float32 beside one of them is usual."""
    name = "embedding.weight"
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp0.pt", lambda s: s.update({name: s[name].view(torch.float16)}))
    (told,) = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down"}).notices
    assert f"{name} in model_tp0_pp0.pt is F16" in told and told.endswith(" is BF16; are all files from one run?")


def test_a_value_too_large_for_float16_is_refused(source: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["blocks.0.mlp.w1.weight"][0, 0] = 1e6

    edit(source / "model_tp1_pp0.pt", change)
    refuse(source, "E406", "float16", dtype="float16")


def test_two_prefixes_for_one_tensor_are_not_taken_for_replicas(source: Path) -> None:
    edit(
        source / "model_tp0_pp0.pt", lambda s: s.update({"blocks.0.mixer.wqkv.weight": s["blocks.0.mixer.Wqkv.weight"]})
    )
    refuse(source, "E206", "mixer.Wqkv", "mixer.wqkv")


def test_fsdp_files_among_others_are_refused(source: Path) -> None:
    (source / "model_tp0_pp0.pt").rename(source / "model_tp0_pp0_dp0.pt")
    refuse(source, "E304", "two parallel modes", "fsdp")


def test_files_of_two_modes_are_refused(source: Path) -> None:
    shutil.copy(source / "model_tp0_pp0.pt", source / "model_wp0_pp0.pt")
    refuse(source, "E304", "two parallel modes")


def test_an_existing_output_is_kept_unless_told_otherwise(source: Path) -> None:
    out = source.parent / "hf"
    old_output(out)
    refuse(source, "E401")
    assert (out / "mine.txt").read_text() == "keep"
    engine.convert(V1.mapping, source, out, settings={"mlp_letters": "w2_is_down"}, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()


def test_a_failing_overwrite_keeps_the_old_output(source: Path) -> None:
    out = source.parent / "hf"
    old_output(out)
    os.truncate(source / "model_tp1_pp0.pt", 1000)
    refuse(source, "E301", overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"


def test_an_output_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.convert(V1.mapping, source, source / "hf", settings={"mlp_letters": "w2_is_down"})
    assert caught.value.code == "E404"


@pytest.mark.parametrize("name", ["model_tp1_pp0.pt", "model_config.pt"])
def test_an_output_that_holds_a_file_which_the_source_links_to_is_refused(name: str, source: Path) -> None:
    out = source.parent / "hf"
    out.mkdir()
    (source / name).rename(out / name)
    (source / name).symlink_to(out / name)
    refuse(source, "E404", overwrite=True)
    assert (out / name).exists()


@pytest.mark.parametrize("name", ["hf", "a \\ b"])
def test_a_mount_point_is_refused_before_anything_is_written(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mounts = source.parent / name, source.parent / "mounts"
    told = str(out).replace("\\", r"\134").replace(" ", r"\040")
    mounts.write_text(f"36 35 98:0 /mnt1 {told} rw,noatime master:1 - ext3 /dev/root rw\n")
    out.mkdir()
    monkeypatch.setattr(replacing, "_MOUNTS", mounts)
    with pytest.raises(EngineError, match="a mount point"):
        engine.convert(V1.mapping, source, out, settings={"mlp_letters": "w2_is_down"})


def test_a_file_that_changes_after_planning_is_refused(source: Path) -> None:
    plan = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down"})
    with (source / "model_tp0_pp0.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(EngineError) as caught:
        dict(engine.iter_tensors(plan))
    assert caught.value.code == "E405"


def test_an_unknown_setting_suggests_the_near_one(source: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.plan(V1.mapping, source, settings={"mlp_leters": "w2_is_down"})
    assert caught.value.code == "E001"
    assert "mlp_letters" in str(caught.value)


def test_a_plain_zip_is_not_taken_for_a_checkpoint(source: Path) -> None:
    with zipfile.ZipFile(source / "model_tp0_pp0.pt", "w") as archive:
        archive.writestr("hello.txt", "hi")
    refuse(source, "E303", "model_tp0_pp0.pt")


def test_a_bare_pickle_is_not_taken_for_a_checkpoint(source: Path) -> None:
    (source / "model_tp0_pp0.pt").write_bytes(pickle.dumps([1, 2, 3]))
    refuse(source, "E303", "model_tp0_pp0.pt")


@pytest.mark.parametrize("variant", ["attention_biases=none", "mlp_biases=all", "embedding=by_vocab"])
def test_a_setting_cannot_contradict_what_the_files_hold(variant: str, source: Path) -> None:
    """Else the config would leave out biases that are written: a model that loads and talks nonsense."""
    name, choice = variant.split("=")
    with pytest.raises(EngineError) as caught:
        engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down", name: choice})
    assert caught.value.code == "E202"
    assert f"--set {variant}" in str(caught.value)
    assert "contradicts the files" in str(caught.value)


def test_biases_in_part_are_refused_also_when_set(source: Path) -> None:
    for path in sorted(source.glob("model_tp*.pt")):
        edit(path, lambda s: [s.pop(n) for n in list(s) if n.endswith("out_proj.bias")])
    for choice in ("all", "none"):
        with pytest.raises(EngineError) as caught:
            engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down", "attention_biases": choice})
        assert caught.value.code == "E202"


def test_a_setting_against_the_config_is_obeyed_and_told(source: Path) -> None:
    plan = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down", "rotary": "pairs"})
    assert plan.decisions["rotary"].choice == "pairs"
    (notice,) = [n for n in plan.notices if "rotary" in n]
    assert "halves" in notice
    agreeing = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down", "rotary": "halves"})
    assert not any("rotary" in n for n in agreeing.notices)


def test_a_configuration_without_items_is_refused(source: Path) -> None:
    """A Config class that keeps its content in attributes reads as empty; defaults must not stand in for it."""
    torch.save({}, source / "model_config.pt")
    refuse(source, "E303", "model_config.pt", "empty")


@pytest.mark.parametrize(
    ("key", "fix"), [("eos_token_id", "`config` of a mapping of your own"), ("hidden_size", "key in it.")]
)
def test_a_given_key_that_training_files_do_not_hold_is_told_with_where_it_belongs(
    key: str, fix: str, source: Path
) -> None:
    settings = {"mlp_letters": "w2_is_down"}
    config = engine.plan(V1.mapping, source, settings=settings).config
    (source.parent / "config.json").write_text(json.dumps({**config, key: 7}))
    refuse(source, "E218", key, fix, config=source.parent / "config.json")


def test_a_file_outside_the_grid_is_named(tmp_path: Path) -> None:
    """isp writes one file per process; a file of the cross product comes from another run."""
    save(V1, tmp_path / "step", mode="isp", tp=2, wp=4)
    shutil.copy(tmp_path / "step" / "model_tp0_wp0_pp0.pt", tmp_path / "step" / "model_tp1_wp0_pp0.pt")
    refuse(tmp_path / "step", "E304", "`model_tp1_wp0_pp0.pt` does not belong")


def test_more_ranks_than_the_training_config_claims_are_refused(source: Path) -> None:
    text = "parallel = dict(tensor=2, pipeline=dict(size=1))\n"
    torch.save(text, source / "config_file.pt")
    refuse(source, "E201", "model_tp0_pp1.pt", "does not belong", "pp 1")


def test_a_rank_with_fewer_layers_than_its_stage_is_named(source: Path) -> None:
    edit(source / "model_tp1_pp0.pt", lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")])
    refuse(source, "E211", "model_tp1_pp0.pt", "1 layers", "2 layers")


def test_a_whole_stage_short_of_layers_disagrees_with_the_config(source: Path) -> None:
    for tp in range(2):
        edit(source / f"model_tp{tp}_pp1.pt", lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")])
    refuse(source, "E203", "axis `layer`", "3 layers", "4 from")


def test_a_rename_that_fails_puts_the_old_output_back(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = source.parent / "hf"
    old_output(out)
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if ".partial-" in str(old):
            raise OSError(5, "input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(output, "exchange", lambda *_: False)  # a file system that cannot
    refuse(source, "E403", overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"


def test_an_output_is_replaced_whole_where_names_cannot_be_exchanged(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = source.parent / "hf", {"mlp_letters": "w2_is_down"}
    engine.convert(V1.mapping, source, source.parent / "other", settings=settings)
    old_output(out)
    monkeypatch.setattr(output, "exchange", lambda *_: False)
    engine.convert(V1.mapping, source, out, settings=settings, overwrite=True)
    assert contents(out) == contents(source.parent / "other") and not list(source.parent.glob(".hf.*"))


def test_the_old_output_of_a_run_that_was_killed_after_two_renames_is_removed(source: Path) -> None:
    out = source.parent / "hf"
    engine.convert(V1.mapping, source, out, settings={"mlp_letters": "w2_is_down"})
    before = contents(out)
    shutil.copytree(out, source.parent / ".hf.old-00000002")
    assert [path.name for path in engine.api.clean(out)] == [".hf.old-00000002"]
    assert contents(out) == before and not list(source.parent.glob(".hf.*"))


@pytest.mark.parametrize("then", ["run", "clean", "overwrite"])
def test_the_old_output_of_a_run_that_was_killed_between_two_renames_comes_back(then: str, source: Path) -> None:
    out = source.parent / "hf"
    settings = {"mlp_letters": "w2_is_down"}
    engine.convert(V1.mapping, source, out, settings=settings)
    before = contents(out)
    (source.parent / ".hf.partial-00000001").mkdir()
    out.rename(source.parent / ".hf.old-00000002")
    if then == "clean":
        assert [path.name for path in engine.api.clean(out)] == [".hf.partial-00000001"]
    elif then == "run":
        with pytest.raises(EngineError, match="exists already"):
            engine.convert(V1.mapping, source, out, settings=settings)
    else:
        engine.convert(V1.mapping, source, out, settings=settings, overwrite=True)
    assert contents(out) == before and not list(source.parent.glob(".hf.old-*"))


def test_a_write_that_fails_leaves_only_what_resumes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    refuse(source, "E403", "No space left", max_shard_size=2000, workers=2)


def test_a_plan_that_would_leave_a_gap_is_refused(source: Path) -> None:
    """The proof itself: shards are disjoint, so a short count is a gap and a long one an overlap."""
    from engine.planning.classes import prove_total

    plan = engine.plan(V1.mapping, source, settings={"mlp_letters": "w2_is_down"})
    group = plan.copies.outputs[0][0]
    prove_total(plan.copies(0), plan.outputs[0].shape, group)
    with pytest.raises(EngineError) as caught:
        prove_total(plan.copies(0)[1:], plan.outputs[0].shape, group)
    assert caught.value.code == "E208"
    assert "512 elements" in str(caught.value)


def test_an_element_type_that_rank_files_have_no_storage_for_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = {"mlp_letters": "w2_is_down"}
    engine.convert(V1.mapping, source, tmp_path / "hf", settings=letters)
    monkeypatch.setattr(rank_outputs, "WRITABLE", frozenset(["F64"]))
    with pytest.raises(EngineError, match="E209 rank files cannot hold"):
        engine.reverse(V1.mapping, tmp_path / "hf", tmp_path / "ranks")


def test_a_tokenizer_with_more_pieces_than_rows_is_not_this_models(source: Path, tmp_path: Path) -> None:
    from tests.support.sentencepiece_models import train

    model = tmp_path / "other.model"
    model.write_bytes(train())
    refuse(source, "E501", "at most 32", tokenizer=model)


def test_key_value_heads_repeated_over_ranks_are_refused_with_how_often(tmp_path: Path) -> None:
    """Two ranks, one key/value head: both hold it. The grid and the shapes alone would call it two heads."""
    from tests.support.families import model_of, save_family

    model = model_of("llama", heads=4, groups=1, hidden=16, layers=2)
    save_family(model, tmp_path / "one", tp=1)
    whole = torch.load(tmp_path / "one" / "model_tp0_pp0.pt", weights_only=True)
    (tmp_path / "step").mkdir()
    for rank in range(2):
        state = {}
        for name, tensor in whole.items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
            cut = tensor.chunk(2, dim)[rank] if not name.endswith(("wk.weight", "wv.weight", "norm.weight")) else tensor
            state[name] = cut.clone()
        torch.save(state, tmp_path / "step" / f"model_tp{rank}_pp0.pt")
    (tmp_path / "step" / "model_config.pt").write_bytes((tmp_path / "one" / "model_config.pt").read_bytes())
    with pytest.raises(EngineError) as caught:
        engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings={"mlp_letters": "w2_is_down"})
    assert caught.value.code == "E203"
    assert "stored 2 times" in str(caught.value)


STEP = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"
FAMILY = "families/internlm2.yaml"


@pytest.mark.parametrize(
    ("ask", "code", "told"),
    [
        (lambda: engine.plan(FAMILY, STEP, settings={"rotary": "x"}), "E001", "variant `rotary` has no choice `x`"),
        (lambda: engine.plan(FAMILY, STEP, settings={"fusion": "apart"}), "E205", "matched by no active rule"),
        (
            lambda: engine.plan(replace(load_mapping(FAMILY), expect={"hiden": 3}), STEP),
            "E108",
            "Did you mean `hidden`",
        ),
        (lambda: request_of(FAMILY, STEP, {}, "view"), "E001", "there is no job `view`"),
        (lambda: Running(max_memory="x"), "E001", "`x` is not a size"),
        (lambda: api.save_plan("p.json", load_mapping(FAMILY), STEP), "E001", "the loaded mapping `internlm2`"),
        (lambda: api.save_plan("p.json", FAMILY, "s3://me:pw@b/x"), "E001", "a password in it"),
        (lambda: on_this_machine(ObjectStore("s3://b/x"), "--load"), "E001", "--load needs local files"),
    ],
)
def test_what_a_request_cannot_ask_for_is_told(ask: Callable[[], object], code: str, told: str) -> None:
    with pytest.raises(EngineError) as caught:
        ask()
    assert caught.value.code == code and told in str(caught.value), str(caught.value)
    assert "pw@" not in str(caught.value)


def test_a_file_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    with pytest.raises(EngineError, match="writing failed") as caught:
        api.save_plan(tmp_path / "plan.json" / "plan.json", FAMILY, STEP)
    assert caught.value.code == "E403"


@pytest.mark.parametrize("place", ["n" * 300, "n" * 300 + "/x", "loop/x"])
def test_a_path_that_no_file_system_takes_is_wrong_usage(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for ask in (
        lambda: engine.convert(FAMILY, STEP, place), lambda: engine.plan(FAMILY, STEP, config=place),
        lambda: engine.plan(FAMILY, place), lambda: api.clean(place), lambda: api.save_plan(place, FAMILY, STEP),
    ):  # fmt: skip
        with pytest.raises(EngineError, match="cannot be at this path") as caught:
            ask()
        assert caught.value.code == "E001"


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".yaml", "./" + "n" * 300, "loop/x.yaml"])
def test_a_mapping_whose_name_no_file_can_have_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for ask in (lambda: engine.lint([name]), lambda: engine.load_mapping(name), lambda: engine.diff(name, name)):
        with pytest.raises(EngineError, match="there is no mapping") as caught:
            ask()
        assert caught.value.code == "E002"
