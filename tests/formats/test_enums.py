"""Enums are read however the Python of the training run pickled them: 3.11.0 to 3.11.3 did so by their names."""

from __future__ import annotations

import enum
import pickle
import shutil
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import engine
from engine.errors import EngineError
from engine.formats.standins import Opaque
from engine.formats.unpickle import load_pickle
from tests.support.frameworks import FIXTURES
from tests.support.readers import read_rank_file

DCP = FIXTURES / "dcp" / "fsdp4-f32-optim"


class ByName(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


NAMING = types.SimpleNamespace(Pickler=ByName, dumps=pickle.dumps, __name__="pickle")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_distributed_checkpoint_whose_enums_are_pickled_by_name_converts_to_the_same_tensors(
    protocol: int, tmp_path: Path
) -> None:
    step = Path(shutil.copytree(DCP / "step-10", tmp_path / "step"))
    held = pickle.loads((step / ".metadata").read_bytes())
    with (step / ".metadata").open("wb") as file:
        ByName(file, protocol).dump(held)
    assert b"getattr" in (step / ".metadata").read_bytes()
    one, two = (engine.plan("transformers", at, config=DCP / "hf_config.json") for at in (DCP / "step-10", step))
    tensors = dict(engine.iter_tensors(two))
    assert tensors and all(torch.equal(tensors[name], tensor) for name, tensor in engine.iter_tensors(one))


def test_a_shard_whose_enums_are_pickled_by_name_is_the_same_shard(tmp_path: Path) -> None:
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    group = dist.distributed_c10d._get_default_group()
    sharded = _create_chunk_sharded_tensor(torch.ones(5, 2), 1, 3, 1, group, torch.device("cpu"))
    for name, how in (("a.pt", pickle), ("b.pt", NAMING)):
        torch.save(OrderedDict(a=sharded), tmp_path / name, pickle_module=how)
    dist.destroy_process_group()
    one, two = ([(t.shape, t.recorded) for t in read_rank_file(tmp_path / name).tensors] for name in ("a.pt", "b.pt"))
    assert one == two and one


def by_name(module: str, kind: str, member: str) -> bytes:
    return b"\x80\x02c__builtin__\ngetattr\n" + f"c{module}\n{kind}\nV{member}\n".encode() + b"\x86R."


def test_only_members_of_what_a_pickle_may_make_are_named() -> None:
    assert isinstance(load_pickle(by_name("megatron.core.transformer.enums", "AttnBackend", "flash"), "x"), Opaque)
    for wrong in (
        by_name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "__subclasses__"),
        by_name("megatron.core.transformer.enums", "AttnBackend", "__reduce__"),
        by_name("torch", "device", "type"),
        by_name("collections", "OrderedDict", "fromkeys"),
        by_name("os", "environ", "copy"),
        b"\x80\x02c__builtin__\ngetattr\ncmegatron.a\nB\nK\x01\x86R.",
    ):
        with pytest.raises(EngineError, match=r"getattr|os\.environ") as caught:
            load_pickle(wrong, "x")
        assert caught.value.code == "E302"
