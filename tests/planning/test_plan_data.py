"""A plan is plain data: it can be copied and sent to another process, which does the same with it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import api
from engine.api.plans import read_whole
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.request import Request
from tests.support.depth import deep

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
MAPPING = "families/internlm.yaml"


KINDS = ("run", "reverse", "reshard")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    engine.convert(MAPPING, FIXTURES / "v1_tp2_pp2_chunks2", folder)
    return folder


def planned(kind: str, hf: Path) -> Plan:
    if kind == "run":
        return engine.plan(MAPPING, FIXTURES / "v1_tp2_pp2_chunks2")
    if kind == "reverse":
        return engine.plan_reverse(MAPPING, hf, tp=2, pp=2, chunks=2)
    return engine.plan_reshard(MAPPING, FIXTURES / "v1_isp_tp1_wp2", tp=4, mode="mtp")


def elsewhere(script: str, files: Sequence[Path]) -> None:
    """Do with each file what a script says, into its folder `there`, in a process that shares nothing with this."""
    command = [sys.executable, "-c", script, *map(str, files)]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})


def copies(plan: Plan) -> list[Any]:
    return [plan.copies(index) for index in range(len(plan.outputs))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_is_pickled_or_copied_is_equal_and_copies_the_same(kind: str, hf: Path) -> None:
    plan = planned(kind, hf)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert copies(other) == copies(plan)
        assert other == plan


_WORKER = """
import pickle, sys
from pathlib import Path
from engine.run.runner import write_weights
from engine.run.running import Running
from engine.storage.local import LocalStore
for file in map(Path, sys.argv[1:]):
    out = file.parent / "there"
    out.mkdir()
    write_weights(pickle.loads(file.read_bytes()), LocalStore(out), Running(workers=2))
"""


@deep
def test_a_plan_made_here_writes_the_same_bytes_in_another_process(hf: Path, tmp_path: Path) -> None:
    plans = {kind: planned(kind, hf) for kind in KINDS}
    for kind, plan in plans.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "plan.pickle").write_bytes(pickle.dumps(plan))
    elsewhere(_WORKER, [tmp_path / kind / "plan.pickle" for kind in KINDS])
    engine.convert(MAPPING, FIXTURES / "v1_tp2_pp2_chunks2", tmp_path / "run" / "here")
    engine.reverse(MAPPING, hf, tmp_path / "reverse" / "here", tp=2, pp=2, chunks=2)
    engine.reshard(MAPPING, FIXTURES / "v1_isp_tp1_wp2", tmp_path / "reshard" / "here", tp=4, mode="mtp")
    for kind, plan in plans.items():
        here, there = tmp_path / kind / "here", tmp_path / kind / "there"
        for file in plan.shards:
            assert (there / file.name).read_bytes() == (here / file.name).read_bytes()


_SAVED = """
import sys
from pathlib import Path
from engine import api
for file in map(Path, sys.argv[1:]):
    api.run_plan(file, file.parent / "there")
"""


def request(kind: str, hf: Path) -> tuple[Path, dict[str, Any]]:
    """A source and options for each kind of plan."""
    source = FIXTURES / "v1_tp2_pp2_chunks2"
    if kind == "reverse":
        return hf, {"ranks": "tp=2,pp=2", "chunks": 2, "settings": {"mlp_letters": "w2_is_down"}}
    if kind == "reshard":
        return FIXTURES / "v1_isp_tp1_wp2", {"tp": 4, "like": source}
    return source, {"dtype": "float32", "max_shard_size": "100kB", "settings": {"max_position_embeddings": 64}}


WRITERS: dict[str, Any] = {"run": engine.convert, "reverse": engine.reverse, "reshard": engine.reshard}


def test_a_plan_that_was_saved_is_the_same_when_loaded_and_runs_in_another_process(hf: Path, tmp_path: Path) -> None:
    plans: dict[str, Plan] = {}
    for kind in KINDS:
        source, options = request(kind, hf)
        (tmp_path / kind).mkdir()
        file = tmp_path / kind / "plan.json"
        plans[kind] = api.save_plan(file, MAPPING, source, job=kind, **options)
        loaded = api.load_plan(file)
        assert copies(loaded) == copies(plans[kind])
        assert loaded == plans[kind]
    elsewhere(_SAVED, [tmp_path / kind / "plan.json" for kind in KINDS])
    for kind, saved in plans.items():
        source, options = request(kind, hf)
        here, there = tmp_path / kind / "here", tmp_path / kind / "there"
        WRITERS[kind](MAPPING, source, here, **options)
        names = sorted(p.name for p in here.iterdir() if p.name != "conversion.json")
        assert sorted(p.name for p in there.iterdir() if p.name != "conversion.json") == names
        for shard in saved.shards:
            assert (there / shard.name).read_bytes() == (here / shard.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_plan_fits_its_schema_and_says_where_every_tensor_goes(kind: str, hf: Path, tmp_path: Path) -> None:
    source, options = request(kind, hf)
    api.save_plan(tmp_path / "plan.json", MAPPING, source, job=kind, **options)
    text = (tmp_path / "plan.json").read_text("utf-8")
    data = json.loads(text)
    jsonschema_rs.validator_for(json.loads((ROOT / "schemas" / "saved-plan.schema.json").read_text())).validate(data)
    assert len(text) < 40_000
    name = "model.layers.{0…5}.self_attn.q_proj.weight" if kind == "run" else "mixer.Wqkv.weight"
    tensors = sum(row["count"] for row in data["rules"] if name in row["target"])
    assert tensors == {"run": 6, "reverse": 12, "reshard": 16}[kind]


def test_a_whole_checkpoint_is_written_anew_as_a_whole_one(hf: Path) -> None:
    """The pair that no command asks for: a Hugging Face checkpoint in files of other sizes and another type."""
    mapping, layout = load_mapping(MAPPING), load_layout("internevo")
    source, _ = request("reverse", hf)
    asked = Request(MAPPING, source, reads="whole", writes="whole", dtype="float32", max_shard_size=100_000)
    plan = make_plan(mapping, layout, read_whole(source), asked)
    assert len(plan.shards) > 1
    before = load_file(source / "model.safetensors")
    for name, tensor in engine.iter_tensors(plan):
        assert torch.equal(tensor, before.pop(name).float())
    assert not before
    old = json.loads((source / "config.json").read_text("utf-8"))
    assert plan.config == {**old, "dtype": "float32", "torch_dtype": "float32"}


def test_a_plan_of_a_loaded_mapping_is_not_saved_as_no_other_process_could_load_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        api.save_plan(tmp_path / "p.json", load_mapping(MAPPING), FIXTURES / "v1_tp1_pp1")
    assert caught.value.code == "E001"
    assert not (tmp_path / "p.json").exists()
