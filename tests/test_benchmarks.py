"""The benchmarks compare like with like, and say what they measured. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from benchmarks import footprint, peers, rounds, virtual, ways
from benchmarks.bench import arguments
from benchmarks.fixed import planning
from benchmarks.generate import write_random, write_sparse
from benchmarks.measure import Measured, measure
from benchmarks.rounds import Result, run_group, with_room
from benchmarks.scaling import SERIES
from benchmarks.shapes import MAPPING, Ranks, Shape, Spec, slice_of
from benchmarks.table import table
from benchmarks.targets import FIXED, PLANS, TARGETS, Figure, Linear, Target, judged, runs_of, verdicts
from benchmarks.ways import CP, Bench, Group, Way
from tests.support.depth import deep, sampled
from tests.support.shards import State, same

TINY = Shape(layers=4, hidden=64, ffn=384, vocab=512, heads=16, groups=8)
ONE = Measured(wall=2.0, cpu=3.0, peak=40.0, anonymous=25.0, mapped=15.0)


def tensors(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A checkpoint of four ranks, and what the engine makes of it."""
    folder = tmp_path_factory.mktemp("merged")
    write_random(folder / "step", Spec(TINY))
    engine.convert(MAPPING, folder / "step", folder / "hf")
    return folder / "step", tensors(folder / "hf")


@sampled(2)
@pytest.mark.parametrize("ranks", [Ranks(1), Ranks(4), Ranks(2, 2), Ranks(2, 2, 2), Ranks(8, 3)], ids=str)
def test_the_engine_converts_what_is_generated(ranks: Ranks, tmp_path: Path) -> None:
    write_random(tmp_path / "random", Spec(TINY, ranks))
    write_sparse(tmp_path / "sparse", Spec(TINY, ranks))
    engine.convert(MAPPING, tmp_path / "random", tmp_path / "hf")
    found = tensors(tmp_path / "hf")
    assert sum(tensor.nbytes for tensor in found.values()) == TINY.nbytes
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        output.name: output.shape for output in engine.plan(MAPPING, tmp_path / "sparse").outputs
    }
    large = [tensor.view(torch.int16).flatten()[:1024].tolist() for tensor in found.values() if tensor.dim() == 2]
    assert len({tuple(start) for start in large}) == len(large), "tensors that are exchanged would not show"


def test_a_head_that_training_normalises_comes_out_normalised(tmp_path: Path) -> None:
    write_random(tmp_path / "step", Spec(TINY, norm_head=True))
    engine.convert(MAPPING, tmp_path / "step", tmp_path / "hf")
    lengths = tensors(tmp_path / "hf")["lm_head.weight"].float().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-2, rtol=0)


@sampled(3)
@pytest.mark.parametrize("peer", ["load", "mmap", "files"])
def test_a_peer_writes_the_tensors_that_the_engine_writes(
    peer: str, merged: tuple[Path, State], tmp_path: Path
) -> None:
    peers.PEERS[peer](merged[0], tmp_path)
    same(tensors(tmp_path), merged[1])


@deep
def test_so_does_torchs_consolidation(tmp_path: Path) -> None:
    """In processes of their own: it forks, and starts communicating."""
    write_random(tmp_path / "step", Spec(TINY, Ranks(2)))
    engine.convert(MAPPING, tmp_path / "step", tmp_path / "hf")
    for what, source, out in (("save", "step", "sharded"), ("consolidate", "sharded", "out")):
        measure([sys.executable, "-m", "benchmarks.peers", what, str(tmp_path / source), str(tmp_path / out)])
    same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


def test_ways_name_sources_that_are_there_and_outputs_of_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "generate", write_random)
    monkeypatch.setattr(Bench, "peers", lambda self, source: [])
    group = Bench(tmp_path, TINY, disk=True).all_of_tp()
    assert group.ways[0].name == CP and "sync" in " ".join(group.ways[0].command)
    assert len({way.name for way in group.ways}) == len(group.ways)
    assert all(way.source.is_dir() and way.makes == tmp_path / "out" for way in group.ways)
    assert {way.name for way in group.only("rotary").ways} == {
        CP,
        "engine run, rotary pairs",
        "engine run, rotary pairs, digests",
    }


@deep
def test_a_stopwatch_sees_the_copying_and_the_first_write(merged: tuple[Path, State], tmp_path: Path) -> None:
    way = Bench(tmp_path, TINY, disk=False).stopwatch("run", merged[0], ["run"])
    assert way.phases is not None
    found = measure(way.command, way.phases)
    assert found.copying is not None and found.first is not None
    assert 0 < found.copying < found.wall
    assert 0 < found.first < found.wall
    same(tensors(way.makes), merged[1])


def test_every_round_runs_every_way_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    ran: list[str] = []

    def measured(command: tuple[str, ...], phases: Path | None) -> Measured:
        ran.append(command[0])
        (tmp_path / "out").mkdir()
        return ONE

    monkeypatch.setattr(rounds, "measure", measured)
    ways = tuple(Way(name, (name,), tmp_path / "in", 7, tmp_path / "out") for name in (CP, "a", "b"))
    result = run_group("small", Group("merge", "", ways), 3, disk=True, say=lambda text: None)
    assert sorted(ran) == sorted([CP, "a", "b"] * 4)
    assert {name: len(runs) for name, runs in result.runs.items()} == {CP: 3, "a": 3, "b": 3}
    assert result.nbytes == 7
    assert not (tmp_path / "out").exists()


def test_a_way_without_room_is_left_out_and_named() -> None:
    way = Way("greedy", (), Path(), 1 << 60, Path())
    assert with_room([way], disk=False)[0] == []
    assert "needs" in with_room([way], disk=False)[1]["greedy"]
    assert with_room([way], disk=True) == ([way], {})


def test_a_process_that_fails_ends_the_benchmark_with_what_it_said() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        measure([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_memory_is_told_apart() -> None:
    code = (
        "import mmap, time; a = bytearray(b'1') * (64 << 20); b = mmap.mmap(-1, 32 << 20); b.write(b'1' * (32 << 20))"
    )
    found = measure([sys.executable, "-c", f"{code}; time.sleep(0.2)"])
    assert found.anonymous >= 64
    assert found.mapped >= 32
    assert found.peak >= 96


def made_up(**walls: float) -> Result:
    runs = {
        name.replace("_", " "): [replace(ONE, wall=wall * part) for part in (0.5, 1, 4)] for name, wall in walls.items()
    }
    runs[CP] = [replace(ONE, wall=wall) for wall in (1.0, 2.0, 2.5)]
    return Result("small", "merge", "a title", 3_000_000_000, runs, {"greedy": "needs 9 GB"})


def test_a_table_has_medians_spread_and_ratios() -> None:
    text = table(made_up(fast=1.0))
    assert "3.00 GB" in text
    assert "| fast | 1.00 (0.50–4.00) | 0.50 | 0.50 | 3.00 | 25 | 15 | 40 |" in text
    assert "| `cp -r` | 2.00 (1.00–2.50) | 1.00 | 1.00 |" in text
    assert "Left out: greedy needs 9 GB." in text


def test_verdicts_say_met_not_met_and_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    cp = Figure("small", "merge", CP)
    targets = [
        Target("good", Figure("small", "merge", "fast"), 0.5, "× cp", cp),
        Target("bad", Figure("small", "merge", "fast"), 0.4, "× cp", cp),
        Target("absolute", Figure("small", "merge", "fast", "peak"), 128, "MiB"),
        Target("absent", Figure("small", "merge", "slow"), 1, "s"),
        Target("no stopwatch", Figure("small", "merge", "fast", "copying"), 1, "s"),
    ]
    found = verdicts([made_up(fast=1.0)], targets)
    assert [one["met"] for one in found] == [True, False, True, None, None]
    judged(found)
    said = capsys.readouterr().out
    assert "| bad | 0.5 × cp | ≤ 0.4 | **NOT met** |" in said
    assert "| absent | – | ≤ 1 | not measured |" in said


def test_linear_means_that_files_cost_no_more_when_there_are_many() -> None:
    def result(per_file: dict[int, float]) -> Result:
        runs = {name: [replace(ONE, wall=0.5 + files * per_file[files])] for files, name in PLANS.items()}
        return Result(FIXED, "plan", "", 0, runs, {})

    target = Linear("plan", 1.25)
    assert target.value(runs_of([result(dict.fromkeys(PLANS, 0.002))])) == pytest.approx(1)
    assert (target.value(runs_of([result({16: 0.002, 256: 0.002, 1024: 0.008})])) or 0) > 4


def test_every_target_is_of_a_way_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "generate", write_random)
    monkeypatch.setattr(Bench, "peers", lambda self, source: [])
    monkeypatch.setattr(Bench, "made", lambda self, way: tmp_path / "step")
    bench = Bench(tmp_path, TINY, disk=False)
    small = {("small", group.name, way.name) for group in (bench.all_of_tp(),) for way in group.ways}
    (tmp_path / "other").mkdir()
    cast = Bench(tmp_path / "other", TINY, disk=False).cast()
    small |= {("small", cast.name, way.name) for way in cast.ways}
    merge = {(scene, group, way) for _, group, way in small for scene in ("large", "disk") if group == "merge"}
    fixed = {
        (FIXED, "plan", way.name) for way in planning(tmp_path, replace(TINY, layers=16, groups=64, heads=64)).ways
    }
    sparse = {("footprint", "run", f"{gb:g} GB") for gb in map(float, arguments([]).footprint_gb.split(","))}
    known = (
        small
        | merge
        | fixed
        | sparse
        | {(scene, "read", name) for name in virtual.READING for scene in ("virtual", "cold")}
    )
    for target in TARGETS:
        if isinstance(target, Target):
            for figure in (target.figure, target.against):
                if figure is not None:
                    assert (figure.scene, figure.group, figure.way) in known, target.text


@deep
def test_the_footprint_reads_everything_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "slice_of", lambda nbytes: TINY)
    measured, nbytes, counts = footprint.footprint(tmp_path, 1)
    assert measured.peak > 0
    assert nbytes > TINY.nbytes
    assert TINY.nbytes <= counts["written"] < TINY.nbytes + 64 * 1024
    assert list(tmp_path.iterdir()) == [tmp_path / "counts.json"]


@pytest.mark.parametrize("gb", [0.2, 3, 8, 200])
def test_a_slice_of_a_model_has_about_the_size_asked_for_and_cuts_evenly(gb: float) -> None:
    shape = slice_of(gb * 1e9)
    assert shape.nbytes == pytest.approx(gb * 1e9, rel=0.15)
    assert shape.layers % 2 == shape.vocab % 8 == shape.groups % 8 == 0


@pytest.mark.parametrize("name", SERIES)
def test_a_series_has_the_sizes_it_is_about(name: str) -> None:
    points = list(SERIES[name][0](8))
    places = [x for x, _, _ in points]
    assert places == sorted(set(places))
    sizes = [shape.nbytes for _, shape, _ in points]
    if name == "bytes":
        assert sizes[-1] / sizes[0] == pytest.approx(8, rel=0.1)
    else:
        assert max(sizes) < min(sizes) * 1.01
    assert all(shape.groups % tp == shape.vocab % tp == shape.ffn % tp == 0 for _, shape, tp in points)


def test_a_result_is_data() -> None:
    data = json.loads(json.dumps(made_up(fast=1.0).as_dict()))
    assert data["runs"]["fast"][0]["wall"] == 0.5
