"""Sharded tensors made to mislead: states changed by hand before torch pickles them, and pickles after."""

from __future__ import annotations

import os
import re
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor

from engine.errors import EngineError
from engine.formats.headers import Recorded
from engine.formats.sharded import _EMPTY, Sharded, ShardReader, _from_type, sharding_global
from engine.formats.standins import DType, Refused, Storage, Tensor
from engine.formats.unpickle import load_pickle
from tests.support.readers import read_rank_file

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor")


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Callable[[Callable[[Any], None]], Path]]:
    """Saves rank 1's part of five rows over three ranks, changed."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())

    def save(change: Callable[[Any], None] = lambda sharded: None) -> Path:
        group = dist.distributed_c10d._get_default_group()
        sharded = _create_chunk_sharded_tensor(torch.ones(5, 2), 1, 3, 1, group, torch.device("cpu"))
        change(sharded)
        torch.save(OrderedDict(a=sharded), tmp_path / "x.pt")
        return tmp_path / "x.pt"

    yield save
    dist.destroy_process_group()


def set_state(path: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute by its path: `_metadata.shards_metadata.0.shard_sizes`."""

    def change(sharded: Any) -> None:
        *parts, last = path.split(".")
        at = sharded
        for part in parts:
            at = at[int(part)] if part.isdigit() else getattr(at, part)
        if last.isdigit():
            at[int(last)] = value
        else:
            setattr(at, last, value)

    return change


def laughs() -> list[Any]:
    """Forty lists, each holding the one before twice."""
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    return value


def repeat(count: int) -> Callable[[Any], None]:
    return lambda s: s._metadata.shards_metadata.extend([s._metadata.shards_metadata[-1]] * count)


def second_shard(sharded: Any) -> None:
    sharded._local_shards.append(sharded._local_shards[0])


def column(sharded: Any) -> None:
    sharded._metadata.shards_metadata[:] = [ShardMetadata([0, c], [5, 1], "rank:0/cpu") for c in range(2)]


def on_ranks(count: int, *more: int) -> Callable[[Any], None]:
    """As if so many ranks held it, and after its last row shards of some rows more."""

    def change(sharded: Any) -> None:
        shards, metadata, group, *rest = type(sharded).__getstate__(sharded)
        metadata.shards_metadata.extend(ShardMetadata([5, 0], [rows, 2], "rank:0/cpu") for rows in more)
        group.local_world_size = count
        sharded.__getstate__ = lambda: (shards, metadata, group, *rest)

    return change


def other_shard(sharded: Any) -> None:
    sharded._local_shards[0] = Shard(torch.ones(1, 2), ShardMetadata([4, 0], [1, 2], "rank:2/cpu"))


def test_the_shard_that_the_attacks_start_from_is_read(saved: Callable[..., Path]) -> None:
    (header,) = read_rank_file(saved()).tensors
    assert (header.shape, header.strides, header.recorded) == ((2, 2), (2, 1), Recorded((2, 0), (5, 2)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (set_state("_sharding_spec", os.system), "E302"),
        (set_state("_metadata.shards_metadata.0.placement", print), "E302"),
        (set_state("_local_shards.0.tensor", eval), "E302"),
        (set_state("_sharding_spec", torch.device), "E301"),
        (set_state("_init_rrefs", getattr), "E301"),
        (set_state("_metadata", torch.Size), "E301"),
        (set_state("_metadata.tensor_properties.dtype", torch.half), "E301"),
        (set_state("_metadata.size", torch.Size([5, 3])), "E301"),
        (set_state("_metadata.size", (5, 1 << 70)), "E301"),
        (set_state("_metadata.size", laughs()), "E301"),
        (set_state("_metadata.shards_metadata", []), "E301"),
        (set_state("_metadata.shards_metadata", laughs()), "E301"),
        (set_state("_metadata.shards_metadata.1.shard_sizes", [1 << 50, 2]), "E303"),
        (set_state("_metadata.shards_metadata.1.shard_sizes", [2] * 1000), "E301"),
        (set_state("_metadata.shards_metadata.1.shard_sizes", [2]), "E301"),
        (set_state("__getstate__", lambda: (1, 2)), "E301"),
        (set_state("_metadata.shards_metadata.1.shard_offsets", [-2, 0]), "E301"),
        (set_state("_metadata.shards_metadata.1.shard_offsets", [1, 0]), "E303"),
        (set_state("_metadata.shards_metadata.2.shard_sizes", [2, 2]), "E301"),
        (column, "E303"),
        (repeat(1), "E303"),
        (repeat(1 << 20), "E301"),
        (on_ranks(2), "E301"),
        (on_ranks(4, 0), "E303"),
        (second_shard, "E301"),
        (other_shard, "E301"),
        (set_state("_local_shards.0.metadata.shard_sizes", [1, 2]), "E301"),
        (set_state("_local_shards", []), "E301"),
        (set_state("_local_shards", laughs()), "E301"),
        (set_state("_local_shards", 7), "E301"),
        (set_state("_init_rrefs", 7), "E301"),
        (set_state("_local_shards.0.tensor", torch.ones(3, 2)), "E301"),
        (set_state("_local_shards.0.tensor", torch.ones(2, 2).half()), "E301"),
        (set_state("_local_shards.0.tensor", "text"), "E301"),
    ],
)
def test_a_state_that_torch_would_not_write_is_refused(
    change: Callable[[Any], None], code: str, saved: Callable[..., Path]
) -> None:
    path = saved(change)
    started = time.process_time()
    with pytest.raises(EngineError) as caught:
        read_rank_file(path)
    assert time.process_time() - started < 20
    assert caught.value.code == code, str(caught.value)
    assert len(str(caught.value)) < 2000


def test_where_a_shard_lay_is_not_looked_at(saved: Callable[..., Path]) -> None:
    path = saved(set_state("_metadata.shards_metadata.0.placement", laughs()))
    assert read_rank_file(path).tensors[0].recorded == Recorded((2, 0), (5, 2))


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """The same file with other bytes in its pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    assert members["x/data.pkl"].count(old) in (1, 2)  # Python since 3.13 names the class of a method with it
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data.replace(old, new) if member.endswith("data.pkl") else data)
    return path


PLACE = b"ctorch.distributed._shard.metadata\nShardMetadata\n"


@pytest.mark.parametrize(
    ("old", "new", "code", "told"),
    [
        (b"\x00ProcessGroupState", b"\x00__subclasshook__x", "E302", "getattr"),
        (b"\ngetattr\n", b"\neval\n", "E302", "eval"),
        (b"\nShardedTensorMetadata\n", b"\nShardedTensorBase\n", "E303", "ShardedTensorBase"),
        (b"._shard.sharded_tensor.api\nShardedTensor\n", b".tensor\nDTensor\n", "E301", "an object of"),
        (b"\n_rebuild_wrapper_subclass\n", b"\n_rebuild_meta_tensor_no_storage\n", "E303", "no_storage"),
        (b"torch.strided", b"torch.sparse_", "E303", "sparse"),
        (PLACE, b"N0" + PLACE + b")\x81}b}b" + b"0" + PLACE, "E301", "second state"),
        (PLACE, b"N0" + PLACE + b"K\x01\x85\x81" + b"0" + PLACE, "E301", "an object"),
        (PLACE, b"N0" + PLACE + b")R" + b"0" + PLACE, "E301", "a call"),
        (PLACE, b"N0ctorch\ndevice\n]\x85R0" + PLACE, "E301", "a device"),
    ],
)
def test_a_pickle_that_does_more_than_describe_a_shard_is_refused(
    old: bytes, new: bytes, code: str, told: str, saved: Callable[..., Path]
) -> None:
    path = rewritten(saved(), old, new)
    with pytest.raises(EngineError, match=re.escape(told)) as caught:
        read_rank_file(path)
    assert caught.value.code == code


INNER = Tensor(Storage("0", "F32", 8), 0, (4, 2), (2, 1), None)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"_scale": INNER},
        {"_tensor": [INNER]},
        {"_tensor": replace(INNER, shape=(2, 4))},
        {"_data": replace(INNER, dtype="F8_E4M3")},
        {"_tensor": None, "_data": INNER},
    ],
    ids=str,
)
def test_a_weight_that_is_cast_on_use_holds_one_of_its_own_type_and_shape(state: Any) -> None:
    kind = sharding_global("torchao.float8.fsdp_utils", "WeightWithDynamicFloat8CastTensor")
    made = (kind, DType("float32"), (4, 2), (2, 1), 0, None, None, False)
    assert _from_type(_EMPTY, kind, made, {"_tensor": INNER, "_scale": None}) is INNER
    with pytest.raises(Refused, match=r"without a F32 tensor of shape \(4, 2\)"):
        _from_type(_EMPTY, kind, made, state)
    with pytest.raises(Refused, match="of another form than torch's"):
        _from_type(_EMPTY, kind, [*made], {"_tensor": INNER})


def test_every_flipped_bit_of_a_sharded_pickle_is_read_or_refused(saved: Callable[..., Path]) -> None:
    path = saved()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x/data.pkl")
        pickled = archive.read("x/data.pkl")
    assert info.file_size == len(pickled)
    for at in range(len(pickled)):
        flipped = bytearray(pickled)
        flipped[at] ^= 1 << at % 8
        try:
            value = load_pickle(bytes(flipped), "x")
            found = value.get("a") if isinstance(value, dict) else None
            if isinstance(found, Sharded):
                ShardReader().read(found)
        except (EngineError, Refused) as error:
            assert error.code in ("E301", "E302", "E303")
