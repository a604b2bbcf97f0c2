"""A plan is plain data: it can be copied and sent to another process, which does the same with it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.planning.model import Plan

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
MAPPING = "families/internlm.yaml"


def plans(tmp_path: Path) -> dict[str, Plan]:
    source = FIXTURES / "v1_tp2_pp2_chunks2"
    engine.convert(MAPPING, source, tmp_path / "hf")
    return {
        "run": engine.plan(MAPPING, source),
        "reverse": engine.plan_reverse(MAPPING, tmp_path / "hf", tp=2, pp=2, chunks=2),
        "reshard": engine.plan_reshard(MAPPING, FIXTURES / "v1_isp_tp1_wp2", tp=4, mode="mtp"),
    }


def copies(plan: Plan) -> list[Any]:
    return [plan.copies(index) for index in range(len(plan.outputs))]


@pytest.mark.parametrize("kind", ["run", "reverse", "reshard"])
def test_a_plan_that_is_pickled_or_copied_is_equal_and_copies_the_same(kind: str, tmp_path: Path) -> None:
    plan = plans(tmp_path)[kind]
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert copies(other) == copies(plan)
        assert other == plan


_WORKER = """
import pickle, sys
from pathlib import Path
from engine.run.runner import write_weights
from engine.storage.local import LocalStore
plan = pickle.loads(Path(sys.argv[1]).read_bytes())
out = Path(sys.argv[2])
out.mkdir()
write_weights(plan, LocalStore(out), workers=2, max_memory=None, listener=None, digests=True, resume=False)
"""


@pytest.mark.parametrize("kind", ["run", "reverse", "reshard"])
def test_a_plan_made_here_writes_the_same_bytes_in_another_process(kind: str, tmp_path: Path) -> None:
    plan = plans(tmp_path)[kind]
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    command = [sys.executable, "-c", _WORKER, str(tmp_path / "plan.pickle"), str(tmp_path / "there")]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    if kind == "run":
        engine.convert(MAPPING, FIXTURES / "v1_tp2_pp2_chunks2", tmp_path / "here")
    elif kind == "reverse":
        engine.reverse(MAPPING, tmp_path / "hf", tmp_path / "here", tp=2, pp=2, chunks=2)
    else:
        engine.reshard(MAPPING, FIXTURES / "v1_isp_tp1_wp2", tmp_path / "here", tp=4, mode="mtp")
    for file in plan.shards:
        assert (tmp_path / "there" / file.name).read_bytes() == (tmp_path / "here" / file.name).read_bytes()
