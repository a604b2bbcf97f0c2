"""Rank files of one framework become those of another: the Hugging Face checkpoint in between is never written."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import api
from tests.support.depth import sampled
from tests.support.shards import same

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@sampled(2)
@pytest.mark.parametrize("fixture", ["v2_tp2_pp2", "e052_v2_tp2_pp1_mult64"])
def test_rank_files_of_internevo_become_a_distributed_checkpoint_and_come_back_bit_for_bit(
    fixture: str, tmp_path: Path
) -> None:
    source = FIXTURES / fixture
    engine.reshard("families/internlm2.yaml", source, tmp_path / "dcp", to="transformers", ranks={"dp": 3})
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 3
    engine.convert("families/internlm2.yaml", source, tmp_path / "direct")
    engine.convert("transformers", tmp_path / "dcp", tmp_path / "hf")
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "direct" / "model.safetensors"))
    engine.reshard("transformers", tmp_path / "dcp", tmp_path / "back", to="families/internlm2.yaml", like=source)
    for path in source.glob("model_tp*.pt"):
        same(torch.load(tmp_path / "back" / path.name, weights_only=True), torch.load(path, weights_only=True))


def test_settings_go_to_the_mapping_that_has_them(tmp_path: Path) -> None:
    source = FIXTURES / "v2_tp4_pp1_nohf"
    letters = {"mlp_letters": "w2_is_down", "under": "model"}
    engine.reshard("families/internlm2.yaml", source, tmp_path / "dcp", to="transformers", settings=letters)
    engine.convert("transformers", tmp_path / "dcp", tmp_path / "hf")
    engine.convert("families/internlm2.yaml", source, tmp_path / "direct", settings={"mlp_letters": "w2_is_down"})
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "direct" / "model.safetensors"))
    with pytest.raises(engine.EngineError, match="nowhere"):
        engine.reshard("families/internlm2.yaml", source, tmp_path / "x", to="transformers", settings={"nowhere": 1})
    assert not (tmp_path / "x").exists()
    alone: dict[str, Any] = {"pp": 2, "chunks": 2, "settings": {"wrapped": True}}
    with pytest.raises(engine.EngineError, match="wrapped has no effect"):
        engine.plan_reshard("internlm2", FIXTURES / "v2_tp2_pp2", to="internlm2", **alone)


@pytest.mark.parametrize(
    ("to", "settings"), [("internlm2", {"rotary": "pairs"}), ("megatron-llama", {"rotary": "neighbours"})]
)
def test_a_choice_against_the_checkpoint_says_how_it_is_written(
    to: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(FIXTURES / "v2_tp2_pp2", tmp_path / "source"))
    (source / "of_nobody.pt").write_bytes(b"")
    engine.convert("internlm2", source, tmp_path / "direct")
    report = engine.reshard("internlm2", source, tmp_path / "made", to=to, settings=settings)
    assert any("of_nobody" in notice for notice in report.notices)  # what is told of the one that is read
    back = engine.convert(
        to, tmp_path / "made", tmp_path / "hf", settings={} if to == "internlm2" else {"vocab_size": 256}
    )
    same(load_file(back.out / "model.safetensors"), load_file(tmp_path / "direct" / "model.safetensors"))


@pytest.mark.parametrize("asked", [{"to": "transformers", "ranks": {"dp": 3}}, {"to": "megatron-llama", "tp": 2}])
def test_a_plan_of_two_mappings_is_saved_and_gives_the_same_bytes_or_nothing(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """Megatron's vocabulary is padded, with zeros that no file holds."""
    source = Path(shutil.copytree(FIXTURES / "v2_tp2_pp2", tmp_path / "source"))
    engine.save_plan(tmp_path / "plan.json", "families/internlm2.yaml", source, job="reshard", **asked)
    engine.run_plan(tmp_path / "plan.json", tmp_path / "planned")
    gc.freeze()  # what is left of tests before stays as it is
    opened = len(os.listdir("/proc/self/fd"))
    engine.reshard("families/internlm2.yaml", source, tmp_path / "direct", **asked)
    gc.collect()
    gc.unfreeze()
    assert len(os.listdir("/proc/self/fd")) == opened  # what lies between the two is closed
    for path in (one for kind in ("*.distcp", "*.pt") for one in (tmp_path / "direct").rglob(kind)):
        assert path.read_bytes() == (tmp_path / "planned" / path.relative_to(tmp_path / "direct")).read_bytes()
    for number in (2, 3, 1):
        api.part(tmp_path / "plan.json", f"{number}/3", tmp_path / "parts")
    api.commit(tmp_path / "plan.json", tmp_path / "parts")
    assert files(tmp_path / "parts") == files(tmp_path / "direct")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert "work" in data and "work" in data["through"], "parts need not plan again"
    path = next(source.glob("model_tp1*.pt"))
    torch.save({name: one + 1 for name, one in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(engine.EngineError) as caught:
        engine.run_plan(tmp_path / "plan.json", tmp_path / "again")
    assert caught.value.code == "E405" and not (tmp_path / "again").exists()


def test_a_part_compares_the_replicas_of_what_it_reads(tmp_path: Path) -> None:
    source = Path(shutil.copytree(FIXTURES / "v2_tp2_pp2", tmp_path / "source"))
    path = source / "model_tp1_pp0.pt"
    state = torch.load(path, weights_only=True)
    name = next(name for name in state if name.endswith("norm.weight"))
    torch.save({**state, name: state[name] + 1}, path)
    engine.save_plan(tmp_path / "plan.json", "families/internlm2.yaml", source, job="reshard", to="transformers")
    found = []
    for number in (1, 2, 3):
        try:
            api.part(tmp_path / "plan.json", f"{number}/3", tmp_path / "out")
        except engine.EngineError as error:
            found.append(error.code)
    assert "E402" in found and not (tmp_path / "out").exists()
