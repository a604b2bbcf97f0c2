"""DTensors that torch pickled are the boxes they were, for meshes of one and two dimensions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.formats.dtensor import Distributed, read_distributed
from engine.formats.headers import Recorded
from engine.formats.rank_files import read_rank_file
from engine.formats.standins import Instance, PlainClass, Refused, Storage, Tensor, slotted
from engine.storage.local import local_file
from tests.support.forked import run

_SAVE = """
import itertools, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
whole = torch.arange(35.0).view(7, 5)
for kind, rank in itertools.product(("plain", "hsdp", "strided"), range(4)):
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
        placements, chunks = [Replicate(), Shard(0)], whole.chunk(2)
        local = chunks[rank % 2]
    elif kind == "strided":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        local = whole.chunk(2)[rank % 2].chunk(2)[rank // 2]
    else:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
        placements, chunks = [Shard(0)], whole.chunk(4)
        local = chunks[rank] if rank < len(chunks) else whole[:0]
    sizes = {"shape": whole.size(), "stride": whole.stride()}
    one = DTensor.from_local(local.clone(), mesh, placements, run_check=False, **sizes)
    torch.save({"w": one}, f"{kind}_{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    done = run(lambda: exec(_SAVE, {}), folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["plain", "hsdp", "strided"])
def test_what_torch_pickles_is_read_as_the_box_that_it_is(kind: str, saved: Path) -> None:
    whole, made = torch.arange(35.0).view(7, 5), torch.full((7, 5), -1.0)
    for rank in range(4):
        path = saved / f"{kind}_{rank}.pt"
        (header,) = read_rank_file(local_file(path)).tensors
        assert header.recorded is not None and header.recorded.whole == (7, 5)
        (row, column), (rows, columns) = header.recorded.starts, header.shape
        raw = path.read_bytes()[header.offset : header.offset + header.nbytes]
        held = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(rows, columns) if raw else torch.empty(0, 5)
        made[row : row + rows, column : column + columns] = held
    assert torch.equal(made, whole)


def plain(kind: str, **state: Any) -> Instance:
    return Instance(PlainClass(kind), (), state)


def distributed(mesh: Instance, placements: tuple[Any, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> Any:
    meta = Instance(PlainClass("TensorMeta", True), (whole, (1,) * len(whole), None))
    tensor = Tensor(Storage("0", "F32", 999), 0, shape, (1,) * len(shape), None)
    spec = plain("DTensorSpec", mesh=mesh, placements=placements, tensor_meta=meta)
    return Distributed("F32", whole, (None, {"_local_tensor": tensor, "_spec": spec}))


SHARD = plain("Shard", dim=0)
RANKS = Tensor(Storage("1", "I32", 4), 0, (2, 2), (2, 1), None)


@pytest.mark.parametrize(
    "mesh",
    [
        plain("DeviceMesh", device_type="cuda", mesh=RANKS, mesh_dim_names=("ddp", "fsdp"), _coordinate_on_dim=[1, 0]),
        plain("DeviceMesh", _layout=plain("_MeshLayout", shape=(2, 2), stride=(2, 1)), _coordinate_on_dim=(1, 0)),
        plain(
            "DeviceMesh",
            _layout=plain("_MeshLayout", axes=(plain("_FlatLayout", shape=(2,)), plain("_FlatLayout", shape=(2,)))),
            _coordinate_on_dim=(1, 0),
        ),
    ],
    ids=["tensor of ranks, 2.3", "layout", "layout of axes, 2.13"],
)
def test_every_way_a_mesh_was_pickled_is_read(mesh: Instance) -> None:
    one = distributed(mesh, (plain("Replicate"), SHARD), (4, 3), (7, 3))
    assert read_distributed(one)[1] == Recorded((0, 0), (7, 3))


def test_a_state_is_that_of_slots_only_if_both_parts_are_attributes() -> None:
    assert slotted((None, {"a": 1})) == {"a": 1} and slotted(({"b": 2}, {"a": 1})) == {"a": 1, "b": 2}
    assert slotted(({}, 5)) == ({}, 5) and slotted((5, {})) == (5, {})


@pytest.mark.parametrize("others", [{}, {"requires_gradient_sync": True}])  # Python before 3.11 has {} for None
def test_a_dtensor_with_attributes_beside_its_slots_is_the_same(others: dict[str, Any]) -> None:
    mesh = plain("DeviceMesh", mesh=RANKS, _coordinate_on_dim=[1, 0])
    one = distributed(mesh, (plain("Replicate"), SHARD), (4, 3), (7, 3))
    beside = replace(one, state=(others, one.state[1]))
    assert read_distributed(beside) == read_distributed(one)


@pytest.mark.parametrize(
    ("placements", "place", "shape", "code"),
    [
        ((plain("Partial", reduce_op="sum"), SHARD), (0, 0), (4, 3), "E303"),
        ((plain("Replicate"), plain("Shard", dim=2)), (0, 0), (4, 3), "E303"),
        ((plain("_StridedShard", dim=0, split_factor=3), SHARD), (0, 0), (2, 3), "E303"),
        ((plain("Replicate"), SHARD), (0, 2), (4, 3), "E301"),
        ((plain("Replicate"), SHARD), None, (4, 3), "E301"),
        ((plain("Replicate"), SHARD), (0, 1), (4, 3), "E301"),
        ((SHARD,), (0, 0), (4, 3), "E301"),
        ("placements", (0, 0), (4, 3), "E301"),
    ],
)
def test_a_box_that_cannot_be_is_refused(placements: Any, place: Any, shape: tuple[int, ...], code: str) -> None:
    mesh = plain("DeviceMesh", mesh=RANKS, _coordinate_on_dim=place)
    with pytest.raises(Refused) as caught:
        read_distributed(distributed(mesh, placements, shape, (7, 3)))
    assert caught.value.code == code


def test_a_pickle_that_only_looks_like_a_dtensor_is_refused(tmp_path: Path) -> None:
    class Fake:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("torch.distributed.tensor",))

    torch.save({"w": Fake()}, tmp_path / "x.pt")
    with pytest.raises(EngineError) as caught:
        read_rank_file(local_file(tmp_path / "x.pt"))
    assert caught.value.code == "E302"


def held(**changed: Any) -> Any:
    """The state of a DTensor on a mesh of two by two, changed."""
    state = distributed(
        plain("DeviceMesh", mesh=RANKS, _coordinate_on_dim=[0, 0]), (SHARD, SHARD), (2, 5), (7, 5)
    ).state
    return {**state[1], **changed}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (None, "without its state"),
        ((1, {}), "without its state"),
        ({}, "no DTensorSpec"),
        (held(_local_tensor=None), "without a local tensor"),
        (held(_spec=plain("DTensorSpec", tensor_meta=None)), "without the shape of the whole"),
        (
            held(_spec=plain("DTensorSpec", tensor_meta=Instance(PlainClass("TensorMeta"), ((9, 5),)))),
            "in its metadata",
        ),
        (held(_spec=plain("DTensorSpec", tensor_meta=Instance(PlainClass("TensorMeta"), ((7, 5),)))), "no DeviceMesh"),
    ],
)
def test_a_state_that_torch_would_not_write_is_refused(state: Any, told: str) -> None:
    with pytest.raises(Refused, match=told) as caught:
        read_distributed(Distributed("F32", (7, 5), state))
    assert caught.value.code == "E301"


@pytest.mark.parametrize("shape", ["4", (1,) * 65, (4.0,), (-4,)])
def test_a_mesh_of_a_shape_that_cannot_be_is_refused(shape: Any) -> None:
    mesh = plain("DeviceMesh", _layout=plain("_MeshLayout", shape=shape), _coordinate_on_dim=[0])
    with pytest.raises(Refused) as caught:
        read_distributed(distributed(mesh, (SHARD,), (2, 5), (7, 5)))
    assert caught.value.code == "E301"
