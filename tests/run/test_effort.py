"""A guard on effort that needs no clock: bytes read, system calls, copies and memory per conversion."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import engine
from engine.checkpoint import folder as indexing
from engine.formats import rank_files
from engine.formats.unpickle import load_pickle
from engine.move import blocks as cutting
from engine.run.memory import predicted_memory
from engine.run.meter import Progress
from engine.run.schedule import Sets
from engine.storage.sinks import SinkFiles
from engine.storage.sources import AHEAD, SourceFiles
from tests.support.depth import deep
from tests.support.effort import beginnings
from tests.support.readers import read_headers, read_rank_file
from tests.support.shards import Model, save

LETTERS = {"mlp_letters": "w2_is_down"}
BLOCK = 512 * 1024


@dataclass
class Effort:
    reads: int = 0
    read: int = 0
    writes: int = 0
    written: int = 0


@contextmanager
def counted() -> Iterator[Effort]:
    """What sources and sinks are asked for."""
    effort = Effort()
    read, write = SourceFiles.read_into, SinkFiles.write

    def reading(files: SourceFiles, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        effort.reads += 1
        effort.read += sum(map(len, parts))
        read(files, file, offset, parts)

    def writing(files: SinkFiles, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        effort.writes += 1
        effort.written += sum(map(len, parts))
        write(files, file, offset, parts)

    with mock.patch.object(SourceFiles, "read_into", reading), mock.patch.object(SinkFiles, "write", writing):
        yield effort


def model_of(layers: int) -> Model:
    return Model("v2", layers=layers, hidden=512, heads=8, groups=8, ffn=1536, vocab=1024, bias=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("effort")
    for layers in (2, 8):
        save(model_of(layers), folder / f"step{layers}", tp=4)
    return {layers: folder / f"step{layers}" for layers in (2, 8)}


def payload(plan: Any) -> int:
    return sum(output.nbytes for output in plan.outputs)


def test_merging_reads_every_byte_once_in_long_runs(sources: dict[int, Path], tmp_path: Path) -> None:
    plan = engine.plan(model_of(8).mapping, sources[8], settings=LETTERS)
    with counted() as effort:
        engine.convert(model_of(8).mapping, sources[8], tmp_path / "hf", settings=LETTERS)
    norms = (2 * 8 + 1) * 512 * 2  # each is on four ranks: three are compared with the first, which is read twice more
    assert effort.read <= payload(plan) + 6 * norms + beginnings(plan)
    assert effort.written <= payload(plan) + 64 * 1024
    blocks = payload(plan) // BLOCK
    assert effort.writes <= 2 * blocks + 3 * len(plan.outputs)
    assert effort.reads <= 8 * blocks + 12 * len(plan.outputs)


def test_permuting_rotary_pairs_reads_every_byte_once_too(sources: dict[int, Path], tmp_path: Path) -> None:
    """Half a head fills a block here, and its rows lie between those of the other half."""
    plan = engine.plan(model_of(8).mapping, sources[8], settings=LETTERS | {"rotary": "pairs"})
    half = 32 * 512 * 2
    with counted() as effort, mock.patch.multiple(cutting, BLOCK_BYTES=half, LARGE_BLOCK_BYTES=4 * half):
        engine.convert(model_of(8).mapping, sources[8], tmp_path / "hf", settings=LETTERS | {"rotary": "pairs"})
    assert effort.read <= payload(plan) + 6 * (2 * 8 + 1) * 512 * 2 + beginnings(plan)


def test_splitting_columns_reads_every_byte_once_too(sources: dict[int, Path], tmp_path: Path) -> None:
    engine.convert(model_of(8).mapping, sources[8], tmp_path / "hf", settings=LETTERS)
    plan = engine.plan_reverse(model_of(8).mapping, tmp_path / "hf", tp=8)
    with counted() as effort:
        engine.reverse(model_of(8).mapping, tmp_path / "hf", tmp_path / "back", tp=8)
    replicas = (2 * 8 + 1) * 512 * 2 * 8
    embedding = 1024 * 512 * 2
    assert effort.read <= payload(plan) + replicas + embedding
    assert effort.written <= payload(plan) + 8 * 64 * 1024


def test_resharding_reads_every_byte_once(sources: dict[int, Path], tmp_path: Path) -> None:
    plan = engine.plan_reshard(model_of(8).mapping, sources[8], tp=2, pp=2, settings=LETTERS)
    with counted() as effort:
        engine.reshard(model_of(8).mapping, sources[8], tmp_path / "b", tp=2, pp=2, settings=LETTERS)
    assert effort.read <= payload(plan) + 12 * (2 * 8 + 1) * 512 * 2 + beginnings(plan)


@pytest.mark.parametrize("command", ["run", "reverse"])
def test_memory_does_not_grow_with_the_model(command: str, sources: dict[int, Path], tmp_path: Path) -> None:
    peaks = []
    for layers, source in sources.items():
        model = model_of(layers)
        if command == "reverse":
            engine.convert(model.mapping, source, tmp_path / f"hf{layers}", settings=LETTERS)
        tracemalloc.start()
        if command == "run":
            engine.convert(model.mapping, source, tmp_path / f"out{layers}", settings=LETTERS, workers=1)
        else:
            engine.reverse(model.mapping, tmp_path / f"hf{layers}", tmp_path / f"out{layers}", tp=4, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 8 << 20
    assert peaks[1] < peaks[0] + (2 << 20)  # headers and plan of six more layers


@pytest.mark.parametrize(
    "how",
    [pytest.param([], marks=deep), ["--dtype", "float32"], pytest.param(["--set", "rotary=pairs"], marks=deep)],
    ids=["plain", "cast", "pairs"],
)
def test_the_memory_allowed_is_kept_and_told_before(how: list[str], sources: dict[int, Path], tmp_path: Path) -> None:
    """The kernel's own account of a whole process."""
    command = ["run", "-m", model_of(8).mapping, "-s", str(sources[8]), "--set", "mlp_letters=w2_is_down", *how]
    options = {"dtype": how[1]} if "--dtype" in how else {}
    plan = engine.plan(model_of(8).mapping, sources[8], settings=LETTERS, **options)
    allowed = predicted_memory(plan, 1)
    code = """
import re, sys
from engine.commands.main import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
    command += ["-o", str(tmp_path / "hf"), "-q", "--max-memory", str(allowed)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 <= allowed
    with pytest.raises(engine.EngineError) as caught:
        engine.convert(
            model_of(8).mapping, sources[8], tmp_path / "no", settings=LETTERS, max_memory=allowed - 1, **options
        )
    assert caught.value.code == "E001"


def test_copies_are_made_once_per_class_whatever_the_number_of_layers(sources: dict[int, Path]) -> None:
    classes = []
    for layers, source in sources.items():
        plan = engine.plan(model_of(layers).mapping, source, settings=LETTERS)
        for index in range(len(plan.outputs)):
            plan.copies(index)
        classes.append(plan.copies.classes)
    assert classes[0] == classes[1] <= 12


def test_an_output_has_as_many_copies_as_ranks_hold_of_it(sources: dict[int, Path]) -> None:
    plan = engine.plan(model_of(2).mapping, sources[2], settings=LETTERS)
    wanted = {"q_proj": 4, "k_proj": 4, "o_proj": 4, "gate_proj": 4, "down_proj": 4, "embed_tokens": 4, "norm": 1}
    for index, output in enumerate(plan.outputs):
        for part, count in wanted.items():
            if part in output.name:
                assert len(plan.copies(index)) == count, output.name


def test_outputs_that_share_a_source_are_joined_without_comparing_each_with_each() -> None:
    class Number(int):
        compared = 0

        def __lt__(self, other: int) -> bool:
            Number.compared += 1
            return int(self) < int(other)

    sets = Sets(300)
    sets.join(map(Number, range(299, 2, -1)))
    assert {sets.find(number) for number in range(3, 300)} == {3}
    assert Number.compared < 1000


def test_the_same_pickle_is_read_once() -> None:
    """Ranks of one stage save the same names and shapes, so their pickles are mostly the same bytes."""
    folder = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp4_pp1_nohf"
    read: list[str] = []

    def reading(data: bytes, name: str) -> Any:
        read.append(name)
        return load_pickle(data, name)

    names = [f"model_tp{rank}_pp0.pt" for rank in range(4)]
    with (
        mock.patch.object(rank_files, "load_pickle", reading),
        mock.patch.object(indexing, "_READERS", 1),
    ):
        together = read_headers(folder, names)
    assert read == names[:1]
    assert together == tuple(read_rank_file(folder / name) for name in names)


def test_every_weight_file_is_on_stable_storage_before_the_output_is_there(
    sources: dict[int, Path], tmp_path: Path
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.suffix != ".safetensors" or not (tmp_path / "hf").exists()
        synced.add(path.name)
        fsync(descriptor)

    with mock.patch.object(os, "fsync", syncing):
        engine.convert(model_of(2).mapping, sources[2], tmp_path / "hf", settings=LETTERS, max_shard_size=2_000_000)
    weights = {file.name for file in (tmp_path / "hf").glob("*.safetensors")}
    assert len(weights) > 1 and weights <= synced


def test_the_progress_of_verifying_ends_at_all(sources: dict[int, Path], tmp_path: Path) -> None:
    for name, how in (("with", {}), ("without", {"digests": False})):
        engine.convert(model_of(2).mapping, sources[2], tmp_path / name, settings=LETTERS, **how)
        seen: list[Progress] = []
        engine.api.verify(tmp_path / name, seen.append)
        assert seen[-1].done == seen[-1].total


class _Counted:
    """A store's file whose bytes are counted while they are on their way or at hand."""

    place, name, file, state, block = "", "", property(lambda self: self), None, 8 << 20
    store = property(lambda self: self)

    def __init__(self) -> None:
        self.live = self.most = 0
        self.held: Any = ()

    def ranges(self, name: str, state: None) -> Any:
        return self

    def fetch(self, ranges: Any) -> Any:
        self.live += sum(end - start for start, end in ranges)
        self.most = max(self.most, self.live)
        return ranges

    def hold(self, fetched: Any) -> None:
        self.live -= sum(end - start for start, end in self.held)
        self.held = fetched


@pytest.mark.parametrize("users", [1, 2])
def test_those_who_read_at_the_same_time_share_a_small_window(users: int) -> None:
    file = _Counted()
    files = SourceFiles([file], users)
    for _ in files.ahead((n, {0: [(0, files.block)]}) for n in range(9)):
        pass
    assert users * file.most == (AHEAD + 1) * file.block
