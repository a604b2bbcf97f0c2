"""Parts that an executor runs, whatever it is, give the bytes of one run; Dask does those of killed workers again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine
from engine import api
from engine.api import spread
from engine.errors import EngineError
from tests.support.depth import deep

STEP = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"
MAPPING = "families/internlm2.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    api.save_plan(tmp_path / "plan.json", MAPPING, STEP, max_shard_size=200_000)
    engine.convert(MAPPING, STEP, tmp_path / "once", max_shard_size=200_000)
    return tmp_path / "plan.json"


def test_any_executor_of_the_standard_library_serves(plan: Path, tmp_path: Path) -> None:
    told: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        how = {"executor": pool, "parts": 3, "progress": lambda state: told.append(state.done)}
        engine.convert(MAPPING, STEP, tmp_path / "out", max_shard_size=200_000, **how)
        engine.reverse(MAPPING, tmp_path / "out", tmp_path / "ranks", tp=2, **how)
    assert files(tmp_path / "out") == files(tmp_path / "once") and told == [1, 2, 3] * 2
    engine.reverse(MAPPING, tmp_path / "once", tmp_path / "ranks once", tp=2)
    assert files(tmp_path / "ranks") == files(tmp_path / "ranks once")


class Later:
    """An executor with futures of its own, which do the work when they are asked, and are lost after some."""

    def __init__(self, left: int) -> None:
        self.left = left

    def submit(self, does: Callable[..., Any], *given: Any) -> SimpleNamespace:
        def result() -> Any:
            self.left -= 1
            if self.left < 0:
                raise ConnectionError("the scheduler is gone")
            return does(*given)

        return SimpleNamespace(result=result, cancel=lambda: None)


def test_an_executor_that_is_lost_leaves_its_parts_to_the_next(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"E409.*\n.*the scheduler is gone"):
        engine.run_plan(plan, tmp_path / "out", executor=Later(2), parts=4)
    (left,) = tmp_path.glob(".out.parts-*")
    assert len(list(left.glob(".part-*"))) == 2 and not (tmp_path / "out").exists()
    before = {path.name: path.stat().st_mtime_ns for path in left.glob(".part-*")}
    engine.run_plan(plan, tmp_path / "other", executor=Later(4), parts=4)
    engine.run_plan(plan, tmp_path / "out", executor=Later(4), parts=4, resume=True)
    assert len(before) == 2 and files(tmp_path / "out") == files(tmp_path / "other") == files(tmp_path / "once")


def test_what_an_executor_cannot_do_is_refused_as_itself(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with ProcessPoolExecutor(1) as pool:
        for how, code in (
            ({"executor": "ray"}, "no such executor"),
            ({"executor": "dask://host:port"}, "no Dask scheduler"),
            ({"executor": pool, "digests": False}, "cannot be used with an executor"),
            ({"executor": pool, "parts": 0}, "no such part"),
        ):
            with pytest.raises(EngineError, match=code):
                engine.run_plan(plan, tmp_path / "out", **how)
        with pytest.raises(EngineError, match="E401"):  # which comes from another process
            engine.run_plan(plan, tmp_path / "full", executor=pool, parts=1)
        with engine.virtual(engine.plan(MAPPING, STEP)) as whole, pytest.raises(EngineError, match="E001"):
            engine.reverse(MAPPING, whole.store, tmp_path / "out", executor=pool)


@pytest.mark.parametrize("gives", [None, SimpleNamespace(result=lambda: "done"), SimpleNamespace(result=lambda: 5)])
def test_an_executor_that_is_none_is_told_as_that(gives: Any, plan: Path, tmp_path: Path) -> None:
    executor = SimpleNamespace(submit=lambda *given: gives)
    with pytest.raises(EngineError, match="E409 the executor did not do all parts"):
        engine.run_plan(plan, tmp_path / "out", executor=executor, parts=2)


def test_an_option_that_is_none_is_not_given(plan: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        engine.run_plan(plan, tmp_path / "out", executor=pool, parts=None, digests=None, overwrite=None)
    assert files(tmp_path / "out") == files(tmp_path / "once")


def test_a_mistake_of_the_engine_itself_is_not_blamed_on_the_executor(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> int:
        raise KeyError("a mistake")

    monkeypatch.setattr(spread, "part", broken)
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="a mistake"):
        engine.run_plan(plan, tmp_path / "out", executor=pool, parts=2)


def test_dask_serves(plan: Path, tmp_path: Path) -> None:
    """In threads: starting its processes takes seconds."""
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    here = {"processes": False, "n_workers": 1, "threads_per_worker": 2}
    with distributed.Client(dashboard_address=None, silence_logs=50, **here) as client:
        engine.run_plan(plan, tmp_path / "out", executor=client.get_executor(pure=False), parts=3, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "once")


@deep
def test_dask_does_the_parts_of_killed_workers_again(plan: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())

        def kill() -> None:
            time.sleep(0.2)
            os.kill(pids[0], signal.SIGKILL)

        threading.Thread(target=kill).start()
        executor = client.get_executor(pure=False, retries=3)
        engine.run_plan(plan, tmp_path / "out", executor=executor, parts=12, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "once")


@deep  # an executor of our own is lost above
def test_a_dask_scheduler_that_is_lost_leaves_what_the_next_goes_on_with(plan: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    dask = pytest.importorskip("dask")
    run = partial(engine.run_plan, plan, tmp_path / "out", parts=12, workers=1)

    def started(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "dask", *more], stderr=subprocess.DEVNULL)

    with ExitStack() as running, dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
        file = tmp_path / "scheduler.json"
        here = ("--host", "127.0.0.1", "--scheduler-file", str(file))
        lost = running.enter_context(started("scheduler", *here, "--port", "0", "--no-dashboard"))
        running.callback(lost.kill)
        worker = running.enter_context(started("worker", *here, "--nworkers", "1", "--nthreads", "1", "--no-nanny"))
        running.callback(worker.kill)
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"].replace("tcp://", "dask://")
        with pytest.raises(EngineError, match="E409"):
            run(executor=address, progress=lambda state: lost.kill() if state.done == 2 else None)
        worker.kill()
        assert distributed
    (left,) = tmp_path.glob(".out.parts-*")
    done = {path.name: path.stat().st_mtime_ns for path in left.glob(".part-*")}
    assert len(done) >= 2 and not (tmp_path / "out").exists()
    with ThreadPoolExecutor(1) as pool:
        run(executor=pool)
    assert files(tmp_path / "out") == files(tmp_path / "once")
