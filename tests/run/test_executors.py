"""Parts that an executor runs, whatever it is, give the bytes of one run; Dask does those of killed workers again."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import engine
from engine import api
from engine.errors import EngineError

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
        api.run_parts(plan, pool, 3, tmp_path / "out", progress=lambda state: told.append(state.done))
    assert files(tmp_path / "out") == files(tmp_path / "once") and told == [1, 2, 3]


def test_an_executor_that_is_not_known_is_refused(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such executor"):
        api.run_plan_on(plan, "ray", 2, tmp_path / "out")


@pytest.mark.slow
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
        api.run_parts(plan, client.get_executor(pure=False, retries=3), 12, tmp_path / "out", workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "once")
