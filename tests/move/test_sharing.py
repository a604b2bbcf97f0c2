"""Work is shared out whole, in order, and so that nobody is idle; whole runs are moved by the system."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.move.blocks import LARGE_BLOCK_BYTES
from engine.move.runs import MOST_SPAN
from engine.run.memory import predicted_memory, workers_of
from engine.run.meter import Meter, Progress
from engine.run.replicas import compare_replicas, replica_bytes
from engine.run.schedule import Job, Shares, Unit
from engine.storage.sources import SourceFiles
from tests.support.depth import sampled
from tests.support.effort import beginnings
from tests.support.shards import Model, save

MODEL = Model("v2", layers=3, hidden=64, heads=4, groups=2, ffn=96, vocab=128, bias=False)
LETTERS = {"mlp_letters": MODEL.letters}


def jobs_of(sizes: list[list[int]]) -> list[Job]:
    count = 0
    jobs = []
    for index, held in enumerate(sizes):
        units = tuple(Unit((count + n,)) for n in range(len(held)))
        jobs.append(Job((index,), units, tuple(held)))
        count += len(held)
    return jobs


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5),
    st.lists(st.integers(0, 3), min_size=30, max_size=30),
)
def test_every_unit_is_given_out_once_and_every_job_ends_once(sizes: list[list[int]], turns: list[int]) -> None:
    """`turns` says which of four workers asks next."""
    jobs = jobs_of(sizes)
    shares = Shares(jobs)
    given_out: list[Unit] = []
    ended: list[int] = []
    own: dict[int, int] = {}
    for worker in turns:
        taken = shares.take(own.get(worker))
        if taken is None:
            break
        own[worker], unit = taken
        assert unit in jobs[own[worker]].units
        given_out.append(unit)
        if shares.finish(own[worker]):
            ended.append(own[worker])
    assert sorted(given_out, key=lambda u: u.outputs) == [unit for job in jobs for unit in job.units]
    assert sorted(ended) == [index for index, job in enumerate(jobs) if job.units]


def test_workers_have_files_of_their_own_and_then_help_with_the_largest_left() -> None:
    shares = Shares(jobs_of([[5, 1, 1, 9], [1]]))
    assert shares.take(None) == (0, Unit((0,)))
    assert shares.take(None) == (1, Unit((4,)))
    assert shares.take(1) == (0, Unit((3,)))  # its own is done: the largest of the other
    assert shares.take(0) == (0, Unit((1,)))  # in the order of the file
    assert shares.take(0) == (0, Unit((2,)))
    assert shares.take(0) is None


def converted(tmp_path: Path, name: str, **options: Any) -> dict[str, bytes]:
    engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / name, settings=LETTERS, **options)
    return {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(MODEL, tmp_path / "step", tp=2)
    return tmp_path / "step"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux has it")
def test_without_digests_whole_runs_are_not_read_but_moved_by_the_system(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = converted(tmp_path, "seen")
    read, moved = [], []
    read_into, copy_range = SourceFiles.read_into, os.copy_file_range

    def reading(files: SourceFiles, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        read.append(sum(map(len, parts)))
        read_into(files, file, offset, parts)

    def moving(*arguments: int) -> int:
        moved.append(copy_range(*arguments))
        return moved[-1]

    monkeypatch.setattr(SourceFiles, "read_into", reading)
    monkeypatch.setattr(os, "copy_file_range", moving)
    assert converted(tmp_path, "moved", digests=False, workers=1) == seen
    whole = load_file(tmp_path / "moved" / "model.safetensors")
    # Cut by rows: query, key and value interleave, so gate, up and output are what is contiguous.
    rows = sum(t.nbytes for name, t in whole.items() if any(w in name for w in ("gate", "up_proj", "lm_head", "norm")))
    assert sum(moved) >= rows
    norms = sum(tensor.nbytes for name, tensor in whole.items() if "norm" in name)
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    assert sum(read) <= sum(t.nbytes for t in whole.values()) - rows + 3 * norms + beginnings(plan)


@sampled(2)
@pytest.mark.parametrize("how", ["cannot", "absent", "nothing", "little", "late"])
def test_where_the_system_cannot_move_bytes_they_are_read_and_written(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = converted(tmp_path, "seen")
    copy_range = getattr(os, "copy_file_range", None)
    calls = []

    def moving(source: int, target: int, count: int, start: int, to: int) -> int:
        calls.append(count)
        if how == "cannot" or copy_range is None or (how == "late" and len(calls) > 5):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return 0 if how == "nothing" else copy_range(source, target, min(count, 1000), start, to)

    if how == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", moving, raising=False)
    reached: list[Progress] = []
    assert converted(tmp_path, how, digests=False, workers=1, progress=reached.append) == seen
    assert reached[-1].done == reached[-1].total
    assert calls or how == "absent"


@sampled(2)
@pytest.mark.parametrize(
    "how", [{"dtype": "float32"}, {"dtype": "float16"}, {"max_shard_size": 20_000}, {"workers": 2}], ids=str
)
def test_without_digests_the_same_is_written(how: dict[str, Any], source: Path, tmp_path: Path) -> None:
    seen = converted(tmp_path, "seen", **how)
    assert converted(tmp_path, "unseen", digests=False, **{"workers": 1, **how}) == seen


def test_without_digests_a_transformed_tensor_is_still_transformed(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp1_normhead"
    written = []
    for digests in (True, False):
        out = tmp_path / str(digests)
        engine.convert("families/internlm2.yaml", folder, out, digests=digests, workers=1)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_without_digests_rank_files_have_their_checksums(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    written = []
    for digests in (True, False):
        out = tmp_path / str(digests)
        engine.reverse(MODEL.mapping, tmp_path / "hf", out, tp=2, digests=digests, workers=1)
        written.append({file.name: file.read_bytes() for file in out.glob("*.pt")})
    assert written[0] == written[1]


def test_many_workers_fill_one_file(source: Path, tmp_path: Path) -> None:
    seen = converted(tmp_path, "one", workers=1)
    assert list(seen) == ["model.safetensors"]
    assert converted(tmp_path, "many", workers=7) == seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds open files as Linux shows them")
def test_a_run_that_fails_leaves_no_file_open(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def failing(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        if offset:  # the header, at 0, comes before the journal is opened
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwritev(descriptor, parts, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing)
        for _ in range(3):
            with pytest.raises(engine.EngineError):
                converted(tmp_path, "hf", overwrite=True)
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.is_relative_to(tmp_path)]


def test_comparing_replicas_ends_when_the_run_is_stopped(source: Path) -> None:
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    assert plan.replicas
    told: list[Progress] = []
    stopped = Meter(replica_bytes(plan), told.append)
    stopped.stopped.set()
    compare_replicas(plan, stopped)
    assert not told
    compare_replicas(plan, Meter(replica_bytes(plan), told.append))
    assert told[-1].done == replica_bytes(plan)


def test_every_worker_that_compares_counts_in_the_memory_told(source: Path) -> None:
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    both_sides = 2 * (LARGE_BLOCK_BYTES + MOST_SPAN)
    assert predicted_memory(plan, 3) - predicted_memory(plan, 1) == 2 * both_sides
    tied: Any = replace(plan, replicas=(), tied=(None,))
    assert predicted_memory(tied, 3) - predicted_memory(tied, 1) == 2 * both_sides


def test_what_a_store_buffers_of_files_written_at_once_counts_for_every_worker(source: Path) -> None:
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    one, two = (predicted_memory(plan, 3, lambda files, each=each: files * each) for each in (1 << 20, 2 << 20))
    assert two - one == 3 * (3 << 20)


def test_a_worker_that_casts_counts_its_own_buffers(source: Path) -> None:
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS, dtype="float32")
    assert predicted_memory(plan, 3) - predicted_memory(plan, 1) == 2 * (5 * LARGE_BLOCK_BYTES + MOST_SPAN)


def test_as_many_workers_run_as_fit_beside_other_work_and_into_a_small_window(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    limit = predicted_memory(plan, 3) + 1000
    assert [workers_of(plan, 8, limit, beside, lambda files: 0) for beside in (1000, 1001)] == [3, 2]
    monkeypatch.setattr("os.cpu_count", lambda: 256)  # of which a job or a container has a few
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    stores = [SimpleNamespace(file=SimpleNamespace(store=SimpleNamespace(block=block << 20))) for block in (0, 8, 16)]
    found = [workers_of(SimpleNamespace(files=[one]), None, None, 0, lambda files: 0) for one in stores]  # type: ignore[arg-type]
    assert found == [16, 2, 16]
