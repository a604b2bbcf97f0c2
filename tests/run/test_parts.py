"""A saved plan's work in parts: any number of them, in any order, gives the bytes of one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import api
from engine.api.parts import loaded_part
from engine.api.plans import read_saved
from engine.commands.main import cli
from engine.errors import EngineError
from engine.run.digests import Total, digest_of
from engine.run.parts import Part, read_markers, share
from engine.run.schedule import Job, Unit, schedule
from engine.storage.local import LocalStore
from tests.attacks.values import mutated
from tests.support.depth import SOAK, sampled
from tests.support.readers import read_safetensors
from tests.support.shards import Model, save

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
MAPPING, STEP = "families/internlm2.yaml", FIXTURES / "v2_tp2_pp2"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    api.save_plan(tmp_path / "plan.json", MAPPING, STEP, max_shard_size=200_000)
    return tmp_path / "plan.json"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    engine.convert(MAPPING, STEP, tmp_path / "whole", max_shard_size=200_000)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("cut", range(1, 9))
def test_bytes_that_parts_cut_in_the_middle_of_a_number_look_like_the_whole(cut: int) -> None:
    data = memoryview(bytes.fromhex("ff3d") * 12 + bytes(8))  # bfloat16, whose lower byte is not its sign
    one, parts = (Total(len(data), digest=True, checksum=False) for _ in range(2))
    one.add(0, data)
    for start in range(0, len(data), 8 + cut):
        parts.add(start, data[start : start + 8 + cut])
    assert one.digest(list) == parts.digest(list)
    assert (one.look.wild, one.look.word) == (parts.look.wild, parts.look.word) == (False, bytes(data[:8]))


def refused(code: str, *arguments: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        api.commit(*arguments)
    assert caught.value.code == code, str(caught.value)
    return caught.value


@sampled(2)
@pytest.mark.parametrize("count", [1, 2, 5, 100 if SOAK else 20])
def test_any_number_of_parts_gives_the_bytes_of_one_run(
    count: int, plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    nbytes = 0
    for number in order:
        nbytes += api.part(plan, f"{number}/{count}", tmp_path / "out", workers=1)
        assert not (tmp_path / "out").exists()
    report = api.commit(plan, tmp_path / "out")
    assert nbytes == report.bytes
    assert files(tmp_path / "out") == whole and report.content_id
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert not api.verify(tmp_path / "out").problems


def test_values_that_a_rule_transforms_are_written_in_parts_too(tmp_path: Path) -> None:
    source = FIXTURES / "v2_tp2_pp1_normhead"
    engine.convert(MAPPING, source, tmp_path / "once")
    api.save_plan(tmp_path / "plan.json", MAPPING, source)
    for number in (1, 2):
        api.part(tmp_path / "plan.json", f"{number}/2", tmp_path / "out")
    api.commit(tmp_path / "plan.json", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "once")


MEGATRON = FIXTURES.parent / "megatron" / "leg_t4_g2"
CHUNKED = FIXTURES.parent / "megatron" / "torch-tp2pp2-vpp2"
PADDED = {"settings": {"vocab_multiple": 8}}  # the vocabulary, with zeros that no file holds


@sampled(3, "job")
@pytest.mark.parametrize(
    ("job", "mapping", "options"),
    [
        ("reverse", MAPPING, {"tp": 4}),
        ("reshard", MAPPING, {"tp": 1, "pp": 4}),
        ("reverse", "megatron-llama", {"tp": 4, **PADDED}),  # its files hold the configuration, too
        ("reverse", "megatron-llama", {"ranks": {"dp": 2}, "mode": "torch_dist", **PADDED}),
        ("reshard", "megatron-llama", {"tp": 1, "config": CHUNKED / "hf_config.json"}),  # it has a text twice
    ],
)
def test_rank_files_are_written_in_parts_too(job: str, mapping: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = STEP
    if job == "reverse":
        source = tmp_path / "hf"
        engine.convert(MAPPING, STEP, source)
    if "config" in options:
        source = CHUNKED / "ckpt" / "iter_0000010"
    elif mapping != MAPPING:
        source = tmp_path / "hf-megatron"
        engine.convert(mapping, MEGATRON / "iter_0000010", source, config=MEGATRON / "hf_config.json")
    report = getattr(engine, job)(mapping, source, tmp_path / "once", check_source=True, **options)
    assert "zeros" not in str(report.notices), "padding is no hole, and no file of the source"
    api.save_plan(tmp_path / "plan.json", mapping, source, job=job, **options)
    assert "work" in json.loads((tmp_path / "plan.json").read_text()), "parts need not plan again"
    for number in (2, 3, 1):
        api.part(tmp_path / "plan.json", f"{number}/3", tmp_path / "out")
    api.commit(tmp_path / "plan.json", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_a_part_looks_at_no_file_but_its_own(whole: dict[str, bytes], tmp_path: Path) -> None:
    step, moved = shutil.copytree(STEP, tmp_path / "step"), tmp_path / "moved"
    api.save_plan(tmp_path / "mine.json", MAPPING, step, max_shard_size=200_000)
    for number in (1, 2):
        work, _ = loaded_part(read_saved(tmp_path / "mine.json"), Part(number, 2), positioned=True)
        read = {file.name for file in work.files if file.tensors}
        others = [path for path in step.glob("model_t*.pt") if path.name not in read]
        assert others, "of four files, those of the other stage"
        moved.mkdir()
        for path in others:
            path.rename(moved / path.name)
        api.part(tmp_path / "mine.json", f"{number}/2", tmp_path / "out")
        for path in others:
            (moved / path.name).rename(path)
        moved.rmdir()
    api.commit(tmp_path / "mine.json", tmp_path / "out")
    assert files(tmp_path / "out").keys() == whole.keys()
    weights = [name for name in whole if name.endswith(".safetensors")]
    assert weights and all((tmp_path / "out" / name).read_bytes() == whole[name] for name in weights)


@sampled(2)
@pytest.mark.parametrize("to", [None, "transformers"])
def test_no_copies_of_a_saved_plan_break_a_part(to: str | None, plan: Path) -> None:
    """Of one that reads with one mapping and writes with another, those of the first: other names are other files."""
    if to is not None:
        api.save_plan(plan, MAPPING, STEP, job="reshard", to=to, overwrite=True)
    data = json.loads(plan.read_text())
    work = (data if to is None else data["through"]).pop("work")
    assert work["checks"] and work["outputs"]
    for name, damage in mutated(work):
        (data if to is None else data["through"])["work"] = "DAMAGE"
        plan.write_bytes(json.dumps(data).encode().replace(b'"DAMAGE"', damage))
        try:
            loaded_part(read_saved(plan), Part(1, 2), positioned=True)
        except EngineError as error:
            other = to is not None and name.split()[0] in ("outputs.0.0", "files.0.0")
            assert error.code in (("E102", "E305", "E405") if other else ("E102",)), (name, error)


@sampled(2)
@pytest.mark.parametrize(
    ("part", "at", "value"),
    [
        ("files", 0, [0]),
        ("files", 1, "zip"),
        ("outputs", 2, [0, 0.0, 2]),
        ("kinds", 5, ["normalize"]),
        ("kinds", 5, ["normalize", "vocab"]),
        ("outputs", 0, {}),
        ("checks", 3, []),
        ("checks", 3, [0, 0]),
        ("checks", 3, [0, 0, 4]),  # the file of zeros, which has none of this name
    ],
)
def test_what_a_part_would_stumble_over_while_it_writes_is_no_saved_plan(
    plan: Path, tmp_path: Path, part: str, at: int, value: Any
) -> None:
    data = json.loads(plan.read_text())
    del data["work"][part][0][at + 1 if part == "checks" else len(data["work"][part][0]) :]
    data["work"][part][0][at] = value
    plan.write_text(json.dumps(data))
    with pytest.raises(EngineError) as caught:
        api.part(plan, "1/1", tmp_path / "out")
    assert caught.value.code == "E102"
    assert not (tmp_path / "out").exists()


WRONG_COPIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a copy that reads beyond its tensor": lambda work: add(work["kinds"][0][-1][0], 1),
    "a copy that writes beyond its output": lambda work: add(work["kinds"][0][-1][-1], 2),
    "an output that is not filled": lambda work: work["kinds"][0][-1].pop(),
    "an output of another type than its source": lambda work: work["kinds"][0].__setitem__(1, "F32"),
    "a number to add that is none": lambda work: work["kinds"][0].__setitem__(slice(5, 7), [["add", "nan"], 0]),
    "a tensor that is compared with nothing": lambda work: work["checks"][0].__setitem__(slice(3, None), [[0, 0]]),
}


def add(row: list[int], at: int) -> None:
    row[at] += 1


@pytest.mark.parametrize("name", WRONG_COPIES)
def test_copies_that_would_make_other_bytes_are_of_no_saved_plan(name: str, plan: Path, tmp_path: Path) -> None:
    data = json.loads(plan.read_text())
    WRONG_COPIES[name](data["work"])
    plan.write_text(json.dumps(data))
    with pytest.raises(EngineError, match="E102 the file is not a saved plan"):
        api.part(plan, "1/1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mode_that_the_layout_does_not_have_is_of_no_saved_plan(plan: Path, tmp_path: Path) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "mode": "x"}))
    with pytest.raises(EngineError, match="E102"):
        api.part(plan, "1/1", tmp_path / "out")


def test_a_plan_that_was_saved_without_its_copies_is_planned_by_each_part(
    plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    data = json.loads(plan.read_text())
    del data["work"]
    plan.write_text(json.dumps(data))
    parts = [loaded_part(read_saved(plan), Part(number, 3), positioned=True)[0] for number in (1, 2, 3)]
    held = [one for part in parts for one in (*part.replicas, *part.slices, *part.tied)]
    again = api.load_plan(plan)
    expected = (*again.replicas, *again.slices, *again.tied)
    assert len(held) == len(expected) and all(one in held for one in expected)  # all are compared, each by one part
    for number in (2, 1):
        api.part(plan, f"{number}/2", tmp_path / "out")
    api.commit(plan, tmp_path / "out")
    assert files(tmp_path / "out") == whole


def test_a_tied_tensor_is_compared_by_the_part_that_begins_what_it_is_tied_to(tmp_path: Path) -> None:
    source = FIXTURES.parent / "dcp" / "tt03_tied_fsdp4"
    known = {"config": source / "hf_config.json"}
    api.save_plan(tmp_path / "plan.json", "torchtitan-llama", source / "step-10", **known)

    def told(plan: Any) -> list[Any]:
        read = [[(plan.sources[copy.source].name, *copy[2:]) for copy in one.copies] for one in plan.tied]
        return [(one.output, plan.outputs[one.same_as].name, set(at)) for one, at in zip(plan.tied, read, strict=True)]

    expected = told(engine.plan("torchtitan-llama", source / "step-10", **known))
    saved = read_saved(tmp_path / "plan.json")
    parts = [loaded_part(saved, Part(number, 3), positioned=True)[0] for number in (1, 2, 3)]
    assert len(expected) == 1 and [one for part in parts for one in told(part)] == expected


def test_replicas_of_what_several_parts_write_are_compared_by_the_part_that_begins_it(tmp_path: Path) -> None:
    model = Model("v2", layers=1, ffn=48, bias=False)
    save(model, tmp_path / "step", tp=2)
    api.save_plan(tmp_path / "plan.json", model.mapping, tmp_path / "step")
    whole = engine.plan(model.mapping, tmp_path / "step")
    norm, jobs = [output.name for output in whole.outputs].index("model.norm.weight"), schedule(whole)
    parts = [Part(number, 600) for number in range(1, 601)]
    mine = [part for part in parts for job in share(jobs, part, cut=True) if any(norm in u.outputs for u in job.units)]
    assert len(mine) > 1
    works = [loaded_part(read_saved(tmp_path / "plan.json"), part, positioned=True)[0] for part in mine]
    assert [[one.name for one in work.replicas] for work in works] == [["norm.weight"], *[[]] * (len(mine) - 1)]


def test_a_source_that_changed_since_its_plan_was_saved_is_refused_by_the_part_that_reads_it(tmp_path: Path) -> None:
    step = shutil.copytree(STEP, tmp_path / "step")
    api.save_plan(tmp_path / "mine.json", MAPPING, step)
    state = torch.load(step / "model_tp1_pp1.pt", weights_only=True)
    torch.save({name: one + 1 for name, one in state.items()}, step / "model_tp1_pp1.pt")
    api.part(tmp_path / "mine.json", "1/4", tmp_path / "out")
    with pytest.raises(EngineError, match=r"E405 `model_tp1_pp1[.]pt` changed since"):
        api.part(tmp_path / "mine.json", "4/4", tmp_path / "out")


def test_a_part_of_a_plan_whose_mapping_changed_since_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    text = "mapping: 1\nname: mine\nversion: 1.0.0\nextends: internlm2.yaml\n"
    mine.write_text(text, encoding="utf-8")
    api.save_plan(tmp_path / "plan.json", mine, STEP)
    api.part(tmp_path / "plan.json", "1/2", tmp_path / "out")
    mine.write_text(text + "config: {bos_token_id: 7}\n", encoding="utf-8")
    with pytest.raises(EngineError, match="E217"):
        api.part(tmp_path / "plan.json", "2/2", tmp_path / "out")


def test_copies_that_are_not_those_of_the_plan_are_found_at_the_end(plan: Path, tmp_path: Path) -> None:
    data = json.loads(plan.read_text())
    kinds = [row[1] for row in data["work"]["outputs"]]
    one, other = next((a, b) for a in range(9) for b in range(a + 1, len(kinds)) if kinds[a] == kinds[b])
    first, second = data["work"]["outputs"][one], data["work"]["outputs"][other]
    first[2:], second[2:] = second[2:], first[2:]
    plan.write_text(json.dumps(data))
    for number in (1, 2):
        api.part(plan, f"{number}/2", tmp_path / "out")
    refused("E217", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_is_done_once_and_a_commit_names_what_is_missing(
    plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused("E409", plan, out)
    assert api.part(plan, "1/3", out) > 0 and api.part(plan, "1/3", out) == 0
    assert api.part(plan, "3/3", out) > 0
    assert "missing: 2" in str(refused("E409", plan, out).got)
    assert api.part(plan, "2/3", out) > 0
    api.commit(plan, out)
    assert files(out) == whole


def test_a_commit_that_is_interrupted_is_repeated(
    plan: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        api.part(plan, f"{number}/3", tmp_path / "out")
    put = LocalStore.put

    def interrupted(store: LocalStore, name: str, data: bytes) -> None:
        if name == "conversion.json":
            raise KeyboardInterrupt
        put(store, name, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LocalStore, "put", interrupted)
        api.commit(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    next(tmp_path.glob(".out.parts-*/.part-00002-of-00003")).unlink()  # as when it ends while they are removed
    assert ".part" not in str(api.commit(plan, tmp_path / "out").files)
    assert files(tmp_path / "out") == whole


def test_parts_of_different_numbers_or_plans_are_not_put_together(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.part(plan, "1/2", out)
    api.part(plan, "2/3", out)
    refused("E409", plan, out)
    assert not out.exists()
    api.save_plan(tmp_path / "other.json", MAPPING, STEP, dtype="float32")
    refused("E409", tmp_path / "other.json", out)
    assert len(api.clean(out)) == 1


def test_a_damaged_marker_is_refused(plan: Path, tmp_path: Path) -> None:
    api.part(plan, "1/1", tmp_path / "out")
    (marker,) = next(tmp_path.glob(".out.parts-*")).glob(".part-*")
    told, compiled = json.loads(marker.read_text()), api.load_plan(plan)
    apart = json.dumps({**told, "spans": [[0, 8, 16, "0" * 32]]}).encode()
    told["spans"] = [[0, 0, 8, "0" * 32]]
    told["outputs"] = dict(list(told["outputs"].items())[:2])
    more = [("a count like 1.0", json.dumps({**told, "part": [1, 1.0]}).encode()), ("spans that do not join", apart)]
    for name, damage in [*mutated(told), *more]:
        marker.write_bytes(damage)
        with pytest.raises(EngineError) as caught:
            read_markers(compiled, told["work"], LocalStore(marker.parent))
        assert caught.value.code == "E409", name
    refused("E409", plan, tmp_path / "out")


def test_parts_write_to_nothing_that_lies_elsewhere(plan: Path, tmp_path: Path) -> None:
    """A link in the place of the partial output, and a hard link in the place of a file in it."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    api.part(plan, "1/2", out)
    partial = next(tmp_path.glob(".out.parts-*"))
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    file = max(partial.glob("*.safetensors"))
    file.unlink()
    file.hardlink_to(elsewhere / "thesis.txt")
    with pytest.raises(EngineError, match="E403"):
        api.part(plan, "2/2", out)
    shutil.rmtree(partial)
    api.part(plan, "1/1", out)
    partial.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", elsewhere, dirs_exist_ok=True)
    partial.symlink_to(elsewhere)
    refused("E401", plan, out)
    (elsewhere / ".part-00001-of-00001").unlink(missing_ok=True)
    with pytest.raises(EngineError, match="E401"):
        api.part(plan, "2/2", out)
    assert (elsewhere / "thesis.txt").read_text() == "mine"


SIZE = 1 << 62  # stands for the tensor's size


@pytest.mark.parametrize(
    ("spans", "joined"),
    [
        ([(0, 8), (8, SIZE)], True),
        ([(0, 8)], False),
        ([(8, SIZE)], False),
        ([(0, 8), (16, SIZE)], False),
        ([(0, 16), (8, SIZE)], False),
    ],
    ids=["whole", "the end lacks", "the beginning lacks", "a hole", "twice"],
)
def test_what_parts_wrote_of_one_tensor_must_be_all_of_it_once(
    spans: list[tuple[int, int]], joined: bool, plan: Path, tmp_path: Path
) -> None:
    api.part(plan, "1/1", tmp_path / "out")
    (marker,) = next(tmp_path.glob(".out.parts-*")).glob(".part-*")
    told, compiled = json.loads(marker.read_text()), api.load_plan(plan)
    del told["outputs"]["0"]
    size = compiled.outputs[0].nbytes
    told["spans"] = [[0, min(low, size), min(high, size), "0" * 32] for low, high in spans]
    marker.write_text(json.dumps(told))
    with nullcontext() if joined else pytest.raises(EngineError, match="parts do not cover the plan"):
        read_markers(compiled, told["work"], LocalStore(marker.parent))


def test_parts_of_another_number_of_parts_are_not_joined_with_others(plan: Path, tmp_path: Path) -> None:
    api.part(plan, "1/1", tmp_path / "out")
    (marker,) = next(tmp_path.glob(".out.parts-*")).glob(".part-*")
    told, compiled = json.loads(marker.read_text()), api.load_plan(plan)
    marker.unlink()
    for part in ([1, 2], [2, 2], [2, 3]):
        at = marker.with_name(f".part-{part[0]:05d}-of-{part[1]:05d}")
        at.write_text(json.dumps({**told, "part": part} | ({} if part[0] == 1 else {"outputs": {}})))
    with pytest.raises(EngineError, match="of different numbers of parts"):
        read_markers(compiled, told["work"], LocalStore(marker.parent))


def test_what_parts_wrote_of_one_tensor_and_something_changed_is_not_committed(
    plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    api.part(plan, "1/1", tmp_path / "out")
    (marker,) = next(tmp_path.glob(".out.parts-*")).glob(".part-*")
    told, compiled = json.loads(marker.read_text()), api.load_plan(plan)
    path = marker.parent / next(file.name for file in compiled.shards if 0 in file.outputs)
    at = next(one.offset for one in read_safetensors(path).tensors if one.name == compiled.outputs[0].name)
    raw, edges = path.read_bytes(), (0, 8, compiled.outputs[0].nbytes)
    del told["outputs"]["0"]
    told["spans"] = [[0, low, high, digest_of([raw[at + low : at + high]])] for low, high in pairwise(edges)]
    marker.write_text(json.dumps(told))
    for changed in (at, at + 8):
        path.write_bytes(raw[:changed] + bytes([raw[changed] ^ 1]) + raw[changed + 1 :])
        assert path.name in str(refused("E409", plan, tmp_path / "out"))
    path.write_bytes(raw)
    api.commit(plan, tmp_path / "out")
    assert files(tmp_path / "out") == whole


def _edited(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])


def _moved(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@sampled(2)
@pytest.mark.parametrize(
    "change", [_edited, _moved, lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink()]
)
def test_what_a_part_wrote_and_something_changed_is_not_committed(
    change: Callable[[Path], object], plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        api.part(plan, f"{number}/2", out)
    partial = next(tmp_path.glob(".out.parts-*"))
    file = max(partial.glob("*.safetensors"))
    (partial / "modeling_evil.py").write_text("import os")
    with file.open("r+b") as header:  # what can be written anew is
        header.write(bytes(8))
    shutil.copytree(partial, tmp_path / "kept")
    change(file)
    assert file.name in str(refused("E409", plan, out)) and not out.exists()
    shutil.rmtree(partial)
    (tmp_path / "kept").rename(partial)
    api.commit(plan, out)
    assert files(out) == whole


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_into_the_same_output_leaves_what_parts_wrote(
    resume: bool, plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Other processes, also on other machines, may be writing it."""
    out = tmp_path / "out"
    api.part(plan, "1/2", out)
    written = files(next(tmp_path.glob(".out.parts-*")))
    engine.convert(MAPPING, STEP, out, resume=resume)
    assert files(next(tmp_path.glob(".out.parts-*"))) == written
    api.part(plan, "2/2", out, overwrite=True)
    api.commit(plan, out, overwrite=True)
    assert files(out) == whole
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_part_that_is_killed_is_run_again(plan: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "import os, sys, signal\nfrom engine.storage.sinks import SinkFiles\nwrite, left = SinkFiles.write, [12]\n"
    script += "def writing(*a):\n    left[0] -= 1\n    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n    write(*a)\n"
    script += "SinkFiles.write = writing\nfrom engine import api\napi.part(sys.argv[1], '1/2', sys.argv[2])"
    done = subprocess.run([sys.executable, "-c", script, str(plan), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert "no part" in str(refused("E409", plan, out))
    api.part(plan, "2/2", out)
    api.part(plan, "1/2", out)
    api.commit(plan, out)
    assert files(out) == whole


def test_the_commands_take_the_part_from_an_array(plan: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for number in "12":
        array = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
        done = CliRunner().invoke(cli, ["part", "--plan", str(plan), "-o", out, "--json"], env=array)
        assert done.exit_code == 0 and '"bytes"' in done.output, done.output
    again = CliRunner().invoke(cli, ["part", "1/2", "--plan", str(plan), "-o", out])
    assert f"next: engine commit --plan {plan} --out {out}   (when all" in again.stdout
    assert CliRunner().invoke(cli, ["commit", "--plan", str(plan), "-o", out, "-q"]).exit_code == 0
    assert files(tmp_path / "out") == whole


def test_the_part_comes_from_slurm_or_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.api.parts import part_of

    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert part_of("", array) == Part(1, 4)
    assert part_of("4", {"JOB_COMPLETION_INDEX": "3"}) == Part(4, 4)
    for text in ("", "x", "0/4", "5/4", "4"):
        with pytest.raises(EngineError, match="E001"):
            part_of(text, {})
    with pytest.raises(EngineError, match=r"E001[^$]*got +3, of type int"):
        engine.api.part("plan.json", 3)  # type: ignore[arg-type]
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        with pytest.raises(EngineError, match="E001"):
            part_of("", {**array, name: "9" * 5000})
    with pytest.raises(EngineError, match="E001"):  # it is not 0 then
        part_of("", {**array, "SLURM_ARRAY_TASK_MIN": "one"})
    with pytest.raises(EngineError, match="E001"):
        part_of("4", {"JOB_COMPLETION_INDEX": "9" * 5000})
    with pytest.raises(EngineError, match=r"got +JOB_COMPLETION_INDEX=3"):  # of how many?
        part_of("", {"JOB_COMPLETION_INDEX": "3"})


def test_what_is_scattered_is_not_cut() -> None:
    jobs = [Job((0,), (Unit((0,), scattered=True),), (100,))]
    shares = [share(jobs, Part(number, 2), cut=True) for number in (1, 2)]
    assert [unit.span for jobs in shares for job in jobs for unit in job.units] == [None]


@given(st.lists(st.lists(st.integers(0, 100), max_size=6), min_size=1, max_size=5), st.integers(1, 9), st.booleans())
def test_every_byte_is_in_one_part_and_parts_differ_by_a_unit_or_by_little(
    sizes: list[list[int]], count: int, cut: bool
) -> None:
    jobs, number = [], 0
    for file, held in enumerate(sizes):
        units = tuple(Unit((number + i,)) for i in range(len(held)))
        number += len(held)
        jobs.append(Job((file,), units, tuple(held)))
    flat = [size for held in sizes for size in held]
    shares = [share(jobs, Part(k, count), cut=cut) for k in range(1, count + 1)]
    dealt = sorted(
        (*u.outputs, *(u.span or (0, flat[u.outputs[0]]))) for one in shares for job in one for u in job.units
    )
    ends = [0] * number
    for output, low, high in dealt:
        assert low == ends[output] and (low < high or not flat[output])
        ends[output] = high
    assert ends == flat and {output for output, *_ in dealt} == set(range(number))
    most = max(sum(job.nbytes for job in one) for one in shares)
    assert most <= sum(flat) / count * (1.04 if cut else 1) + (1 if cut else max(flat, default=0) + 1)
