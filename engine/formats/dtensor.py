"""Reads DTensors, as FSDP2 and verl pickle them, as data: the local tensor, and its place in the whole.

torch pickles a `DTensor` as a call that rebuilds an empty tensor of its class, with the local tensor and a
`DTensorSpec`: a mesh of ranks, one placement for each of its dimensions, and the shape of the whole
(torch/distributed/tensor/_api.py). The mesh gives the saving rank's position in it. From torch 2.3 on a mesh is
pickled in one of two ways: with a tensor of rank numbers (`mesh`), whose shape is the mesh's, or with a
`_layout` of axes. The rank numbers do not matter here, only the sizes of the dimensions.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.formats.headers import Recorded
from engine.formats.standins import Instance, Refused, Tensor, attributes, int_list, ints, slotted

_MESH = "DeviceMesh"
_SPLITS = ("Shard", "_StridedShard")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Distributed:
    """A DTensor with its state as in the file."""

    dtype: str
    shape: tuple[int, ...]
    state: Any


def read_distributed(one: Distributed) -> tuple[Tensor, Recorded]:
    """The local tensor and the box that it fills.

    Raises:
        Refused: E301 for anything that torch would not have written, E303 for placements that give elements
            no place, such as partial sums.
    """
    state = slotted(one.state)
    if type(state) is not dict:
        raise Refused("E301", "a DTensor without its state")
    spec, tensor = attributes(state.get("_spec"), "DTensorSpec"), state.get("_local_tensor")
    if not isinstance(tensor, Tensor):
        raise Refused("E301", "a DTensor without a local tensor")
    whole = _whole(spec.get("tensor_meta"))
    if whole != one.shape:
        raise Refused("E301", f"a DTensor of shape {one.shape}, in its metadata {whole}")
    sizes, place = _mesh(spec.get("mesh"))
    placements = spec.get("placements")
    if type(placements) is not tuple or len(placements) != len(sizes):
        raise Refused("E301", f"placements {reprlib.repr(placements)} on a mesh of {sizes}")
    starts, shape = _box(whole, placements, sizes, place)
    if tensor.shape != shape or (tensor.dtype or tensor.storage.dtype) != one.dtype:
        raise Refused("E301", f"a local tensor of shape {tensor.shape}, by its placements {shape} of {one.dtype}")
    return tensor, Recorded(starts, whole)


def _whole(meta: Any) -> tuple[int, ...]:
    """The shape from a `TensorMeta`, which is a tuple of shape, strides and element type."""
    if isinstance(meta, Instance) and meta.kind.name == "TensorMeta" and meta.arguments:
        return ints(meta.arguments[0])
    raise Refused("E301", "a DTensor without the shape of the whole")


def _mesh(mesh: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a mesh's dimensions, and the saving rank's position on each."""
    told = attributes(mesh, _MESH)
    ranks = told.get("mesh", told.get("_mesh"))
    sizes = ranks.shape if isinstance(ranks, Tensor) else _axes(told.get("_layout"))
    place = int_list(told.get("_coordinate_on_dim"))
    if len(place) != len(sizes) or any(at >= size for at, size in zip(place, sizes, strict=True)):
        raise Refused("E301", f"place {place} on a mesh of {sizes}")
    return sizes, place


def _axes(layout: Any) -> tuple[int, ...]:
    """Sizes of the axes of a `_MeshLayout`: each axis is an object with a shape, or all are in one shape.

    An axis of one rank has an empty shape.
    """
    told = attributes(layout, "_MeshLayout", "_FlatLayout", "Layout")
    axes = told.get("axes")
    if type(axes) is tuple and len(axes) <= 64:
        kinds = ("_FlatLayout", "_MeshLayout", "Layout")
        return tuple(prod(_shape(attributes(axis, *kinds).get("shape"))) for axis in axes)
    return _shape(told.get("shape"))


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is int:
        shape = (shape,)
    if type(shape) is not tuple or len(shape) > 64:
        raise Refused("E301", f"a mesh of shape {reprlib.repr(shape)}")
    return tuple(prod(ints(size)) if type(size) is tuple else ints((size,))[0] for size in shape)


def _box(
    whole: tuple[int, ...], placements: tuple[Any, ...], sizes: tuple[int, ...], place: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The start and shape of the local tensor, by torch's chunking.

    Each `Shard` cuts what the ones before it left. A `_StridedShard` cuts what the ones after it left, as FSDP2
    does inside tensor parallelism.
    """
    starts, shape = [0] * len(whole), list(whole)
    cuts: list[tuple[bool, int, int, int]] = []  # strided, dimension, ranks, this rank
    for number, placement in enumerate(placements):
        kind = placement.kind.name if isinstance(placement, Instance) else type(placement).__name__
        if kind == "Replicate":
            continue
        told = attributes(placement, *_SPLITS) if kind in _SPLITS else {}
        dim = told.get("dim")
        if type(dim) is not int or not 0 <= dim < len(whole):
            raise Refused("E303", f"a DTensor placed as {kind}")
        if kind == "_StridedShard":
            later = zip(placements[number + 1 :], sizes[number + 1 :], strict=True)
            cut = [(one, size) for one, size in later if isinstance(one, Instance) and one.kind.name == "Shard"]
            after = [size for one, size in cut if attributes(one, "Shard").get("dim") == dim]
            if told.get("split_factor") != prod(after):
                raise Refused("E303", f"a DTensor whose strides are {reprlib.repr(told.get('split_factor'))}")
        cuts.append((kind == "_StridedShard", dim, sizes[number], place[number]))
    for _, dim, ranks, rank in sorted(cuts, key=lambda cut: cut[0]):
        step = -(-shape[dim] // ranks)
        low, high = min(rank * step, shape[dim]), min((rank + 1) * step, shape[dim])
        starts[dim], shape[dim] = starts[dim] + low, high - low
    return tuple(starts), tuple(shape)
