"""FSDP checkpoints: torch's own sharded tensors, read without torch's classes, equal the unsharded truth."""

from __future__ import annotations

import pickle
import shutil
import sys
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.formats.headers import Recorded
from tests.support.depth import crossed, sampled
from tests.support.fsdp import FIXTURE, save_fsdp
from tests.support.readers import read_rank_file
from tests.support.shards import Model, State, build, same, save, with_root

GENUINE = Path(__file__).parents[1] / "fixtures" / "fsdp"
LETTERS = {"mlp_letters": "w2_is_down"}
V1, V2 = Model(layers=2), Model(family="v2", layers=2, groups=2, bias=False, ffn=26)


def convert(source: Path, mapping: str = V1.mapping, **options: Any) -> State:
    out = source.parent / "hf"
    engine.convert(mapping, source, out, settings=LETTERS, **options)
    return load_file(out / "model.safetensors")


def refusal(source: Path, code: str, *told: str) -> None:
    with pytest.raises(EngineError) as caught:
        convert(source)
    assert caught.value.code == code, str(caught.value)
    assert caught.value.fix
    for text in told:
        assert text in str(caught.value)


def test_files_that_fsdp_saved_give_the_unsharded_weights(tmp_path: Path) -> None:
    shutil.copytree(GENUINE, tmp_path / "step")
    same(convert(tmp_path / "step", FIXTURE.mapping), build(FIXTURE)[3])


@sampled(2)
@pytest.mark.parametrize(
    ("ranks", "model"),
    crossed(
        [
            {"dp": 3, "tp": 2},
            {"dp": 1},
            {"dp": 20},  # more ranks than rows: the last hold none
            {"dp": 40},
            {"dp": 4, "tp": 2, "zero": 2},  # two groups of ranks, each with the whole model
            {"dp": 4, "zero": 2},
            {"dp": 2, "legacy": True},
            {"dp": 3},
            {"dp": 2, "plain": "norm.weight"},
        ],
        [V1, V2],
    ),
    ids=str,
)
def test_rows_cut_over_ranks_are_put_together(ranks: dict[str, Any], model: Model, tmp_path: Path) -> None:
    expected = save_fsdp(model, tmp_path / "step", **ranks)
    same(convert(tmp_path / "step", model.mapping), expected)


def test_a_header_tells_which_rows_a_file_holds() -> None:
    headers = [read_rank_file(GENUINE / f"model_tp0_pp0_dp{rank}.pt").tensors for rank in range(3)]
    held = [next(t for t in tensors if t.name == "output.weight") for tensors in headers]
    assert [(t.shape, t.recorded) for t in held] == [
        ((3, 8), Recorded((0, 0), (7, 8))),
        ((3, 8), Recorded((3, 0), (7, 8))),
        ((1, 8), Recorded((6, 0), (7, 8))),
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_fsdp(V1, tmp_path / "step", dp=3)
    return tmp_path / "step"


def name(rank: int) -> str:
    return f"model_tp0_pp0_dp{rank}.pt"


def test_every_tensor_is_read_or_compared_with_one_that_is(tmp_path: Path) -> None:
    """Replicas of biases and norms too, of every group of ranks and in every layer."""
    save_fsdp(V1, tmp_path / "step", dp=4, tp=2, zero=2)
    plan = engine.plan(V1.mapping, tmp_path / "step", settings=LETTERS)
    read = {copy.source for output in range(len(plan.outputs)) for copy in plan.copies(output)}
    assert any(one.name.endswith(".bias") for one in plan.replicas)
    assert read.union(*(one.sources for one in plan.replicas)) == {*range(len(plan.sources))}


def test_groups_of_ranks_that_differ_are_told(tmp_path: Path) -> None:
    save_fsdp(V1, tmp_path / "step", dp=4, zero=2)
    save_fsdp(Model(layers=2, seed=1), tmp_path / "other", dp=4, zero=2)
    shutil.copy(tmp_path / "other" / name(3), tmp_path / "step" / name(3))
    refusal(tmp_path / "step", "E402", name(3), name(1))


@pytest.mark.parametrize(("root", "code"), [(None, "E306"), ("archive", "E208")])
def test_files_that_changed_their_names_are_refused(source: Path, root: str | None, code: str) -> None:
    """By the names they were saved under, else by the ranks that their shards record."""
    if root is not None:
        for rank in (0, 1):
            with_root(source / name(rank), root)
    (source / name(0)).rename(source / "x")
    (source / name(1)).rename(source / name(0))
    (source / "x").rename(source / name(1))
    refusal(source, code, name(0))


def test_a_missing_rank_is_named(source: Path) -> None:
    (source / name(1)).unlink()
    refusal(source, "E201", name(1))


def test_missing_last_ranks_are_seen_though_no_configuration_counts_them(source: Path) -> None:
    (source / name(2)).unlink()
    refusal(source, "E208", name(1))


def test_a_file_of_another_model_is_refused(source: Path) -> None:
    save_fsdp(Model(layers=2, vocab=33), source.parent / "other", dp=3)
    shutil.copy(source.parent / "other" / name(2), source / name(2))
    refusal(source, "E208", name(2))


def test_a_shard_under_the_name_of_another_mode_is_refused(source: Path) -> None:
    for rank in (1, 2):
        (source / name(rank)).unlink()
    with_root(source / name(0), "archive")
    (source / name(0)).rename(source / "model_tp0_pp0.pt")
    refusal(source, "E303", "a shard", "ShardedTensor")


def test_a_tensor_that_only_some_ranks_shard_is_refused(source: Path) -> None:
    save_fsdp(V1, source.parent / "plain", dp=3, plain="norm.weight")
    shutil.copy(source.parent / "plain" / name(1), source / name(1))
    refusal(source, "E303", "norm.weight", name(1))


def test_files_of_this_mode_are_not_written(source: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.reshard(V1.mapping, source, source.parent / "again", settings=LETTERS)
    assert caught.value.code == "E001"
    assert "only read" in str(caught.value)
    engine.reshard(V1.mapping, source, source.parent / "plain", mode="tensor", tp=2, settings=LETTERS)
    same(convert(source.parent / "plain"), build(V1)[3])


def test_a_universal_checkpoint_of_2025_gives_the_unsharded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InternEvo's `internlm/checkpoint/universal_checkpoint/filesystem.py`: torch's, with one class of its own."""
    step, module = tmp_path / "step", ModuleType("internlm.checkpoint.universal_checkpoint.filesystem")
    save(V2, step)
    dcp.save(torch.load(step / "model_tp0_pp0.pt"), checkpoint_id=step / "model", no_dist=True)
    directory = step / "model" / ".metadata"
    metadata = pickle.loads(directory.read_bytes())
    place = type("_StorageInfo", (), {"__module__": module.__name__})
    for name in accumulate(module.__name__.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "_StorageInfo", place, raising=False)
    for index, there in metadata.storage_data.items():
        metadata.storage_data[index] = place()
        vars(metadata.storage_data[index]).update(vars(there))
    directory.write_bytes(pickle.dumps(metadata))
    for other in ("model_tp0_pp0.pt", "topo_tp0_pp0.json"):
        (step / other).unlink(missing_ok=True)
    torch.save({"parallel_setting": {"tp_size": 1}, "metaData": []}, step / "metadata.pt")
    same(convert(step, V2.mapping), build(V2)[3])
    directory.rename(directory.with_name(".metadata.tmp"))
    refusal(step, "E201", "not saved to its end")
