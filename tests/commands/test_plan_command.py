"""`engine plan --json` fits its schema, folds layers, and touches neither tensor data nor torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import jsonschema_rs
import pytest

from engine.explaining import describe
from engine.storage.cores import cores
from tests.support.invoking import invoke

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
SCHEMA = json.loads((ROOT / "schemas" / "plan.schema.json").read_text("utf-8"))


def plan(name: str, mapping: str, *more: str) -> dict[str, object]:
    done = invoke("plan", "-m", mapping, "--src", FIXTURES / name, "--json", *more)
    assert done.exit_code == 0, done.output
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("v1_tp2_pp2_chunks2", "internlm-7b"),
        ("v1_isp_tp1_wp2", "families/internlm.yaml"),
        ("v2_tp2_pp1_normhead", "families/internlm2-official.yaml"),
        ("v1_tp2_pp1_reward", "internlm-20b"),
    ],
)
def test_the_plan_fits_its_schema(name: str, mapping: str) -> None:
    jsonschema_rs.validator_for(SCHEMA).validate(plan(name, mapping))


def test_layers_are_folded_and_bytes_add_up() -> None:
    found = plan("v1_tp2_pp2_chunks2", "families/internlm.yaml", "--max-shard-size", "200kB")
    rules = found["rules"]
    outputs = found["outputs"]
    assert isinstance(rules, list) and isinstance(outputs, list)
    assert "model.layers.{0…5}.self_attn.q_proj.weight" in [row["target"] for row in rules]
    assert sum(row["count"] for row in rules) == found["tensors"] == sum(o["tensors"] for o in outputs)
    assert sum(o["bytes"] for o in outputs) == found["bytes"]
    assert all(o["bytes"] <= 200_000 for o in outputs)


@pytest.mark.parametrize("more", [("--pp", "2", "--chunks", "3"), ("--tp", "4")])
def test_tensors_whose_names_have_a_prefix_are_folded_by_the_layers_of_the_whole_model(more: tuple[str, ...]) -> None:
    found = plan("v1_tp2_pp2_chunks2", "families/internlm.yaml", "--for", "reshard", *more)
    jsonschema_rs.validator_for(SCHEMA).validate(found)
    rules = found["rules"]
    assert isinstance(rules, list)
    assert "blocks.{0…5}.norm1.weight" in [row["target"] for row in rules]


def test_four_of_the_files_that_a_rule_reads_are_named() -> None:
    found = plan("v1_tp4_pp1", "families/internlm.yaml", "--set", "mlp_letters=w2_is_down")
    rows = {row["target"]: row["source_files"] for row in found["rules"]}  # type: ignore[attr-defined]
    assert rows["lm_head.weight"] == [f"model_tp{rank}_pp0.pt" for rank in range(4)]
    assert found["replicas"] == {"sets": 9, "tensors": 36}  # norms, on four ranks


def test_memory_is_predicted_for_no_more_workers_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for count in (1, 64):
        monkeypatch.setattr(describe, "cores", lambda count=count: count)
        told.append(plan("v1_tp2_pp2", "families/internlm.yaml")["predicted_memory"])
    assert told[0] == told[1]


@pytest.mark.parametrize(("counted", "used"), [(3, 3), (None, 1)])
def test_all_cores_count_where_the_system_does_not_say_which_may_be_used(
    counted: int | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", Mock(side_effect=PermissionError))
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert cores() == used


def test_planning_imports_neither_torch_nor_transformers_nor_numpy() -> None:
    source = FIXTURES / "v2_tp2_pp2"
    code = (
        "import sys, engine\n"
        f"engine.plan('families/internlm2.yaml', {str(source)!r})\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_planning_and_running_read_no_more_than_they_must(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Payload is read once per run, and replicas once more for comparing; planning reads none of it."""
    import engine
    from engine.run.replicas import replica_bytes
    from engine.storage.sources import SourceFiles
    from tests.support.effort import beginnings

    read = 0
    original = SourceFiles.read_into

    def counting(self: SourceFiles, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        nonlocal read
        read += sum(map(len, parts))
        original(self, file, offset, parts)

    monkeypatch.setattr(SourceFiles, "read_into", counting)
    source = FIXTURES / "v1_tp2_pp2"
    compiled = engine.plan("families/internlm.yaml", source)
    assert read == 0
    engine.convert("families/internlm.yaml", source, tmp_path / "hf")
    assert read <= compiled.nbytes + 2 * replica_bytes(compiled) + beginnings(compiled)
