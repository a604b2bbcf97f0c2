"""Nothing lost: an interrupted run leaves the old output whole and a partial one that can be resumed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import engine
from engine.commands.main import cli
from engine.errors import EngineError
from engine.move import blocks
from engine.planning.model import Plan
from engine.run import writer
from engine.run.journal import Begun, Done, Interrupted, Journal, identity_of, read_journal, split, states_of
from engine.run.schedule import Job, Unit
from engine.storage.replacing import OutputLock
from engine.storage.sinks import SinkFiles
from tests.support.depth import SOAK, sampled
from tests.support.disk import Disk, contents, partials
from tests.support.forked import run_engine, start_engine
from tests.support.frameworks import FIXTURES
from tests.support.old_output import old_output
from tests.support.shards import Model, save

MODEL = Model("v2", layers=4, groups=2, bias=False)
LETTERS = {"mlp_letters": "w2_is_down"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(MODEL, tmp_path / "step", tp=2, pp=2)
    return tmp_path / "step"


def convert(source: Path, out: Path, **how: Any) -> Any:
    return engine.convert(MODEL.mapping, source, out, settings=LETTERS, max_shard_size=2000, **how)


@sampled(2)
@pytest.mark.parametrize("good", [0, 1, 7, 20, 30])
def test_a_full_disk_leaves_a_partial_output_that_resumes_to_the_same_bytes(
    good: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Disk(patch, good)
        with pytest.raises(EngineError) as caught:
            convert(source, out)
    assert caught.value.code == "E403"
    assert not out.exists()
    assert len(partials(out)) == 1
    convert(source, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert not partials(out)


def test_what_was_written_is_read_again_to_its_end(tmp_path: Path) -> None:
    """More than one read gives at once."""
    data = random.Random(0).randbytes((2 << 20) + 5)
    (tmp_path / "file").write_bytes(data)
    with SinkFiles(tmp_path, ["file"]) as sinks:
        assert b"".join(map(bytes, sinks.read(0, 3, len(data) - 3))) == data[3:]


def test_what_the_system_writes_in_part_is_written_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: write(file, [memoryview(parts[0])[:3]], at))
    with SinkFiles(tmp_path, ["file"]) as sinks:
        sinks.write(0, 1, [b"abcd", memoryview(b"efghi")])
    assert (tmp_path / "file").read_bytes() == b"\0abcdefghi"


def test_a_resumed_run_writes_only_what_was_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, writes = tmp_path / "out", []
    with monkeypatch.context() as patch:
        Disk(patch, 30)
        with pytest.raises(EngineError):
            convert(source, out, workers=1)
    write = SinkFiles.write
    monkeypatch.setattr(SinkFiles, "write", lambda *a: (writes.append(a[2]), write(*a))[1])
    convert(source, out, resume=True, workers=1)
    resumed = len(writes)
    writes.clear()
    convert(source, tmp_path / "whole", workers=1)
    assert resumed < len(writes) - 10


def test_reverse_resumes_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "hf")
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "whole", tp=2, pp=2)
    with monkeypatch.context() as patch:
        Disk(patch, 30)
        with pytest.raises(EngineError):
            engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "out", tp=2, pp=2)
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "out", tp=2, pp=2, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bytes_that_changed_in_a_partial_output_are_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Disk(patch, 30)
        with pytest.raises(EngineError):
            convert(source, out)
    (partial,) = partials(out)
    for path in partial.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        for at in range(len(data) // 2, len(data), 97):
            data[at] ^= 255
        path.write_bytes(data)
    convert(source, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Disk(patch, 30)
        with pytest.raises(EngineError):
            convert(source, out)


def test_files_of_which_no_journal_tells_are_not_written_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no locks, a run that has just begun may still have them open."""
    interrupted(source, tmp_path / "out", monkeypatch)
    (partial,) = partials(tmp_path / "out")
    (partial / ".journal").unlink()
    with min(partial.glob("*.safetensors")).open("r+b") as file:
        convert(source, tmp_path / "out", resume=True)
        file.write(b"another run's")
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("how", "told"),
    [({"dtype": "float32"}, "settings"), ({"max_shard_size": 1 << 30}, "output files")],
    ids=["dtype", "shards"],
)
def test_another_conversion_does_not_resume_it(
    how: dict[str, Any], told: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(EngineError) as caught:
        engine.convert(
            MODEL.mapping, source, tmp_path / "out", settings=LETTERS, resume=True, **{"max_shard_size": 2000} | how
        )
    assert caught.value.code == "E407"
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda plan: {"config": {**plan.config, "rms_norm_eps": 0.5}}, "the configuration"),
        (lambda plan: {"sizes": {**plan.sizes, "head": 1}}, "the model's sizes"),
        (lambda plan: {"sources": (plan.sources[1], plan.sources[0], *plan.sources[2:])}, "what is copied from where"),
        (lambda plan: {"replicas": ()}, "what is copied from where"),
        (lambda plan: {"dtype": "float16"}, "the settings"),
        (lambda plan: {"options": {"one": 1}}, "the settings"),
        (lambda plan: {"shards": plan.shards[:-1]}, "the output files"),
        (lambda plan: {"files": (replace(plan.files[0], identity=""), *plan.files[1:])}, "the source files"),
    ],
)
def test_only_a_run_that_does_the_same_goes_on(change: Callable[[Plan], Any], told: str, tmp_path: Path) -> None:
    plan = engine.plan("families/internlm2.yaml", FIXTURES / "internevo" / "v2_tp2_pp2")
    Journal(tmp_path, plan, {}).close()
    assert read_journal(tmp_path, plan).states == states_of(plan)
    other = replace(plan, **change(plan))
    with pytest.raises(EngineError, match=f"E407 the interrupted run cannot be resumed: {told} changed"):
        read_journal(tmp_path, other)
    assert identity_of(other) != identity_of(plan)


@pytest.mark.parametrize("entry", ["[1, 2]", '["a"]', '["a", "b"]', '["a", 1, "b"]', '["a", 1, 2, 3]', '"a"', "null"])
def test_an_entry_that_no_run_wrote_is_passed_over(entry: str, tmp_path: Path) -> None:
    plan = engine.plan("families/internlm2.yaml", FIXTURES / "internevo" / "v2_tp2_pp2")
    Journal(tmp_path, plan, {}).close()
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + f'{{"0": {entry}, "1": ["a", 1], "2": ["b", 0, 8]}}\n')
    assert read_journal(tmp_path, plan).begun == {1: Begun("a", None), 2: Begun("b", 8)}


def test_a_line_that_the_system_writes_in_part_is_written_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, write = engine.plan(MODEL.mapping, FIXTURES / "internevo" / "v2_tp2_pp2"), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:99]))
    Journal(tmp_path, plan, {7: Done("a" * 200, 1)}).close()
    assert read_journal(tmp_path, plan).begun == {7: Begun("a" * 200, None)}


def test_what_a_run_goes_on_with_depends_on_what_is_known_of_its_sources() -> None:
    """Files that nothing touched and that hold checksums; else whole tensors are read again, others anew."""
    known = engine.plan("families/internlm2.yaml", FIXTURES / "internevo" / "v2_tp2_pp2")
    plain = replace(known, files=tuple(replace(file, summed=False) for file in known.files))
    begun = {0: Begun("", None), 1: Begun("", 8)}
    left = Interrupted(begun, states_of(known))
    assert split(known, left, ()) == (begun, set())
    for plan, states in ((known, {}), (plain, left.states)):
        assert split(plan, Interrupted(begun, states), ()) == ({0: begun[0]}, {0})
        scattered = Job((0,), (Unit((0,), scattered=True),), (8,))
        assert split(plan, Interrupted(begun, states), [scattered]) == ({}, set())
    for plan, told in ((known, False), (plain, True)):
        state: Any = plan.files[0].state
        touched = replace(plan.files[0], state=replace(state, modified=state.modified + 1))
        other = replace(plan, files=(touched, *plan.files[1:]))
        assert (identity_of(other) != identity_of(plan)) == told


def test_a_source_that_changed_is_named_when_resuming(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    path = source / "model_tp1_pp0.pt"
    torch.save({k: v + 1 if "wqkv" in k else v for k, v in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(EngineError) as caught:
        convert(source, tmp_path / "out", resume=True)
    assert caught.value.code == "E407"
    assert "model_tp1_pp0.pt" in str(caught.value)


def test_without_resume_a_run_starts_over_and_clean_removes_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    interrupted(source, out, monkeypatch)
    assert len(partials(out)) == 1
    result = CliRunner().invoke(cli, ["clean", str(out)])
    assert result.exit_code == 0 and "removed" in result.output
    assert not partials(out)
    assert "nothing to remove" in CliRunner().invoke(cli, ["clean", str(out)]).output


def test_nothing_is_kept_when_the_input_is_at_fault(source: Path, tmp_path: Path) -> None:
    path = source / "model_tp1_pp0.pt"
    torch.save({k: v + 1 if "norm" in k else v for k, v in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(EngineError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.code == "E402"
    assert not partials(tmp_path / "out")


def test_a_second_run_to_one_output_is_refused_until_the_first_ends(source: Path, tmp_path: Path) -> None:
    with OutputLock(tmp_path / "out"), pytest.raises(EngineError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.code == "E408"
    convert(source, tmp_path / "out")
    assert not partials(tmp_path / "out")


def test_a_lock_whose_file_its_last_holder_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, out = fcntl.flock, tmp_path / "out"

    def slow(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / ".out.lock").unlink()  # its holder ends after we opened it
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with OutputLock(out), pytest.raises(EngineError, match="E408"), OutputLock(out):
        pass


def test_a_lock_whose_file_cannot_be_removed_is_free_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, OutputLock(tmp_path / "out"):
        patch.setattr(os, "unlink", failing)
    with OutputLock(tmp_path / "out"):
        pass


def test_many_runs_may_read_one_source(source: Path, tmp_path: Path) -> None:
    runs = [threading.Thread(target=convert, args=(source, tmp_path / f"out{i}")) for i in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert all(contents(tmp_path / f"out{i}") == contents(tmp_path / "out0") for i in range(4))


def test_too_little_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EngineError) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.code == "E403"
    assert "1000 bytes free" in str(caught.value)
    assert not partials(tmp_path / "out")


def test_an_old_output_is_replaced_in_one_step(source: Path, tmp_path: Path) -> None:
    """While a run overwrites it, the old output is there at every moment, or the new one."""
    out = tmp_path / "out"
    convert(source, out)
    stop, missing = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            if not (out / "config.json").exists():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        convert(source, out, overwrite=True)
    stop.set()
    watcher.join()
    assert not missing


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes long enough to be interrupted, and what a run makes of it."""
    folder = tmp_path_factory.mktemp("large")
    model = Model("v2", layers=12, hidden=256, heads=4, groups=2, ffn=2048, vocab=2048, bias=False)
    save(model, folder / "step", tp=2)
    engine.convert(model.mapping, folder / "step", folder / "whole", settings=LETTERS, max_shard_size=3_000_000)
    return folder


@sampled(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_the_old_output_and_a_run_that_resumes(number: int, large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = old_output(out)
    command = ["run", "-m", MODEL.mapping, "-s", str(large / "step"), "-o", str(out)]
    command += ["--set", "mlp_letters=w2_is_down", "--overwrite", "--max-shard-size", "3MB", "--quiet"]
    dice = random.Random(number)
    lock = out.with_name(f".{out.name}.lock")  # held while a run writes
    for _ in range(3 if SOAK else 1):
        process = start_engine(*command, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 8
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(process, number)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 0:
            break  # it was done before the signal came
        assert code in (-number, 128 + number)
        assert contents(out) == old
        if "--resume" not in command:
            command.append("--resume")
    assert run_engine(*command, cwd=Path(__file__).parents[2]).returncode == 0
    assert contents(out) == contents(large / "whole")
    assert not partials(out)


def test_a_source_rewritten_while_it_is_read_is_noticed(source: Path, tmp_path: Path) -> None:
    """The same size, other bytes: training goes on writing."""
    plan = engine.plan(MODEL.mapping, source, settings=LETTERS)
    path = source / "model_tp0_pp0.pt"
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    with pytest.raises(EngineError) as caught:
        list(engine.iter_tensors(plan))
    assert caught.value.code == "E405"


@sampled(2)
@pytest.mark.parametrize("command", ["convert", "reverse"])
def test_a_tensor_in_progress_goes_on_where_it_was_marked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the journal come every so many bytes of a tensor, not only at its end."""
    monkeypatch.setattr(writer, "MARK_BYTES", 3000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(blocks, "LARGE_BLOCK_BYTES", 1000)
    model = Model("v2", layers=2, hidden=64, heads=4, groups=2, ffn=256, vocab=512, bias=False)
    save(model, tmp_path / "step", tp=2)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)

    def go(out: str, **how: Any) -> None:
        if command == "convert":
            engine.convert(model.mapping, tmp_path / "step", tmp_path / out, settings=LETTERS, workers=1, **how)
        else:
            engine.reverse(model.mapping, tmp_path / "hf", tmp_path / out, tp=1, workers=1, **how)

    go("whole")
    writes: list[int] = []
    write = SinkFiles.write

    def counted(sinks: SinkFiles, file: int, offset: int, data: bytes | memoryview) -> None:
        writes.append(sum(map(len, data)))
        write(sinks, file, offset, data)

    for good in (20, 50, 90):
        with monkeypatch.context() as patch:
            Disk(patch, good)
            with pytest.raises(EngineError):
                go("out", resume=good > 20)
    monkeypatch.setattr(SinkFiles, "write", counted)
    go("out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    resumed = sum(writes)
    writes.clear()
    go("again")
    assert resumed < 0.8 * sum(writes)
