"""Reads sharded tensors, as FSDP saves them, as data: what each rank's file records about its shard.

torch pickles a `ShardedTensor` as a call that rebuilds an empty tensor of its class, with the state
that `ShardedTensor.__getstate__` gives (torch/distributed/_shard/sharded_tensor/api.py): its local
shards, its metadata, the process group's ranks, its sharding spec and a flag. Objects of these
classes become an `Instance` each: a class, and its state as in the file. No torch code is called, and no
state is examined before the whole pickle has been read: lists can grow until then.

FSDP cuts dimension 0 into chunks of ceil(rows / ranks), so that the last ranks may hold fewer rows or
none (`_create_chunk_sharded_tensor` in torch/distributed/fsdp/_shard_utils.py). Any other record is
refused.

Weights that training casts to float8 on each use are rebuilt in the same way: such an object holds the weight in its
own type, and beside it how it is cast.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from engine.formats.dtensor import Distributed
from engine.formats.headers import Recorded
from engine.formats.standins import (
    DType,
    Function,
    Instance,
    Opaque,
    OpaqueClass,
    OtherClass,
    PlainClass,
    Refused,
    Tensor,
    attributes,
    element_type,
    int_list,
    ints,
    opaque,
    rebuild_from_type,
)

_MOST_RANKS = 1 << 20


class Sharded(Distributed):
    """A sharded tensor with its state as in the file."""


_SHARDED = OtherClass("ShardedTensor")  # never instantiated directly
_GROUP = PlainClass("ProcessGroupState")
_CAST = OtherClass("a weight that is cast on use")


def _getattr(*arguments: Any) -> PlainClass | Instance | Opaque:
    """Python pickles as a `getattr` call a nested class, of which only one occurs here, and before 3.11.4 an enum."""
    match arguments:
        case [OtherClass() as kind, "ProcessGroupState"] if kind is _SHARDED:
            return _GROUP
        case [PlainClass(takes=True) as kind, str(member)] if not member.startswith("_"):
            return Instance(kind, (member,))
        case [OpaqueClass() as kind, str(member)] if not member.startswith("_"):
            made: Opaque = kind.call()
            return made
    raise Refused("E302", "builtins.getattr")


def _layout(*arguments: Any) -> Opaque:
    if arguments != ("torch.strided",):
        raise Refused("E303", f"a tensor of layout {reprlib.repr(arguments)}")
    return Opaque("layout")


def _device(*arguments: Any) -> Opaque:
    if not 1 <= len(arguments) <= 2 or not all(type(a) in (str, int) for a in arguments):
        raise Refused("E301", f"a device {reprlib.repr(arguments)}")
    return Opaque("device")


def _empty(*arguments: Any) -> tuple[str, tuple[int, ...]]:
    """`_rebuild_wrapper_subclass`: class, type, shape, strides, offset, layout, device, requires_grad."""
    if arguments and isinstance(arguments[0], OpaqueClass):
        raise Refused("E303", arguments[0].call().kind)
    if len(arguments) != 8 or not _rebuilt(arguments[0]) or not isinstance(arguments[1], DType):
        raise Refused("E301", "an empty tensor that is not a sharded one")
    return arguments[1].held, ints(arguments[2])


_EMPTY = Function(_empty)


def _rebuilt(kind: Any) -> bool:
    return kind is _SHARDED or kind is _CAST or (isinstance(kind, PlainClass) and kind.name == "DTensor")


def _held(made: tuple[str, tuple[int, ...]], state: Any) -> Tensor:
    """The tensor in an object that is cast on use, which must be of the type and shape that the object has."""
    tensor = next((state[key] for key in ("_tensor", "_data") if key in state), None) if type(state) is dict else None
    if not isinstance(tensor, Tensor) or (tensor.dtype or tensor.storage.dtype, tensor.shape) != made:
        raise Refused("E301", f"a weight that is cast on use without a {made[0]} tensor of shape {made[1]}")
    return tensor


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor | Sharded | Distributed:
    if function is not _EMPTY:
        return rebuild_from_type(function, kind, arguments, state)
    if type(arguments) is not tuple:
        raise Refused("E301", "an empty tensor of another form than torch's")
    made = _empty(*arguments)
    if kind is _CAST:
        return _held(made, state)
    if isinstance(kind, PlainClass) and _rebuilt(kind):
        return Distributed(*made, state)
    if kind is not _SHARDED or type(state) is not tuple or len(state) != 5:
        raise Refused("E301", "a sharded tensor of another form than torch's")
    return Sharded(*made, state)


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_from_type),
    ("torch._utils", "_rebuild_wrapper_subclass"): _EMPTY,
    ("torch.serialization", "_get_layout"): Function(_layout),
    ("torch", "device"): Function(_device),
    ("builtins", "getattr"): Function(_getattr),
    ("__builtin__", "getattr"): Function(_getattr),
    ("torch.distributed.remote_device", "_remote_device"): PlainClass("_remote_device"),
}
_CASTING = ("torchao.", "xtuner.v1.float8.")  # what else they name is how it is cast, or a quantised tensor's class
_CAST_NAMES = ("Float8CastTensor", "TrainingWeightWrapperTensor")
_PACKAGE = "torch.distributed._shard."
_SPECS = ("ChunkShardingSpec", "EnumerableShardingSpec")
_PARTS = ("Shard", "ShardMetadata", "ShardedTensorMetadata", "TensorProperties")
_IN_PACKAGE: Mapping[str, Any] = {
    "ShardedTensor": _SHARDED,
    "ShardedTensor.ProcessGroupState": _GROUP,
    "MEM_FORMAT_ENCODING": PlainClass("MEM_FORMAT_ENCODING", takes=True),
    **{name: PlainClass(name) for name in (*_SPECS, *_PARTS)},
}


def sharding_global(module: str, name: str) -> Any:
    """The stand-in for a global in pickled sharded tensors, or None."""
    if module.startswith(_CASTING):
        return _CAST if name.endswith(_CAST_NAMES) else opaque(f"{module}.{name}")
    return _IN_PACKAGE.get(name) if module.startswith(_PACKAGE) else _KNOWN.get((module, name))


class ShardReader:
    """Reads the sharded tensors of one file; a list that many tensors share is read once."""

    def __init__(self) -> None:
        self._lists: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def read(self, sharded: Sharded) -> tuple[Tensor | None, Recorded]:
        """The local shard's tensor, None if this rank holds no rows, and its place.

        Raises:
            Refused: E301 for anything that torch would not have written, E303 for shards that are
                not rows in the order of ranks.
        """
        shards, metadata, group, spec, rrefs = sharded.state
        if type(shards) is not list or type(rrefs) is not bool:
            raise Refused("E301", "a sharded tensor whose state is not of torch's form")
        attributes(spec, *_SPECS)
        rank, ranks = _group(group)
        told = attributes(metadata, "ShardedTensorMetadata")
        whole, ends = ints(told.get("size")), self._ends(told.get("shards_metadata"))
        if whole != sharded.shape or element_type(told.get("tensor_properties")) != sharded.dtype:
            raise Refused("E301", f"a sharded tensor of shape {sharded.shape}, in its metadata {whole}")
        if (ends[0][-1], *ends[1]) != whole or len(ends[0]) > ranks:
            raise Refused("E301", f"{len(ends[0])} shards on {ranks} ranks do not make up a tensor of shape {whole}")
        start, end = ((0, *ends[0])[rank], ends[0][rank]) if rank < len(ends[0]) else (whole[0], whole[0])
        if len(shards) != (rank < len(ends[0])):
            raise Refused(
                "E301", f"{len(shards)} local shards on rank {rank} of a tensor cut over {len(ends[0])} ranks"
            )
        tensor = _local(shards[0], start, (end - start, *whole[1:]), sharded.dtype) if shards else None
        return tensor, Recorded((start, *(0,) * (len(whole) - 1)), whole)

    def _ends(self, listed: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The end of each rank's rows, and the other dimensions; rows are consecutive in the order of ranks."""
        if type(listed) is not list or not 0 < len(listed) <= _MOST_RANKS:
            raise Refused("E301", "a sharded tensor without a list of shards")
        known = self._lists.get(id(listed))
        if known is None:
            ends: list[int] = []
            _, first = _place(listed[0])
            for one in listed:
                offsets, sizes = _place(one)
                begin = (ends[-1] if ends else 0, *(0,) * (len(first) - 1))
                if offsets != begin or sizes[1:] != first[1:] or not sizes[0]:
                    raise Refused("E303", f"a shard at {offsets} of shape {sizes}: not rows in the order of ranks")
                ends.append(offsets[0] + sizes[0])
            known = self._lists[id(listed)] = (tuple(ends), first[1:])
        return known


def _place(value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of a shard; its device is ignored."""
    told = attributes(value, "ShardMetadata")
    offsets, sizes = int_list(told.get("shard_offsets")), int_list(told.get("shard_sizes"))
    if not sizes or len(offsets) != len(sizes):
        raise Refused("E301", f"a shard at {offsets} of shape {sizes}")
    return offsets, sizes


def _group(value: Any) -> tuple[int, int]:
    """The rank, and the number of ranks that the tensor is cut over."""
    told = attributes(value, "ProcessGroupState")
    rank, ranks = told.get("local_rank"), told.get("local_world_size")
    if type(rank) is not int or type(ranks) is not int or not 0 <= rank < ranks <= _MOST_RANKS:
        raise Refused("E301", f"rank {reprlib.repr(rank)} of {reprlib.repr(ranks)}")
    return rank, ranks


def _local(value: Any, start: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor of the local shard, which must agree with the list of all shards."""
    told = attributes(value, "Shard")
    tensor, (offsets, sizes) = told.get("tensor"), _place(told.get("metadata"))
    if offsets != (start, *(0,) * (len(shape) - 1)) or sizes != shape:
        raise Refused("E301", f"a local shard at {offsets} of shape {sizes}, listed at row {start} with {shape}")
    if not isinstance(tensor, Tensor) or tensor.shape != shape or (tensor.dtype or tensor.storage.dtype) != dtype:
        raise Refused("E301", f"a local shard that is not a {dtype} tensor of shape {shape}")
    return tensor
