"""Padding that is written: pieces that no checkpoint holds, read from a file of zeros."""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.ranks import whole_grid
from engine.formats.headers import FileHeader, TensorHeader, dense_strides
from engine.language.axes import Axes, Axis
from engine.language.names import pattern
from engine.planning.completeness import check_known
from engine.planning.groups import Cut, Group
from engine.planning.pieces import Key
from engine.planning.sides import Side
from engine.planning.source import Source
from engine.planning.stored import Instance, Stored
from engine.storage.store import File
from engine.storage.virtual import VirtualFile, VirtualState, VirtualStore

_FILE = VirtualFile("zeros", 1 << 62, "zeros")  # long enough for any request
ZEROS = FileHeader(File(VirtualStore("zeros", {"zeros": _FILE}), "zeros"), 0, (), "zeros", True, VirtualState.of(_FILE))


def zeros_of(dtype: str, shape: tuple[int, ...]) -> TensorHeader:
    """Zeros of a type and shape, in `ZEROS`."""
    return TensorHeader("zeros", dtype, shape, dense_strides(shape), 0)


def padded(source: Source) -> Source:
    """A source with the padding that rules write as zeros, in an extra file, with its neighbours' element type.

    Raises:
        EngineError: E204 for padding of unknown size.
    """
    checkpoint, side, sizes = source.checkpoint, source.side, source.side.sizes
    check_known([one for one in source.used if one.rule.zeros], sizes, source.unread)
    dtypes = {one.instance.key: one.first.header.dtype for one in side.groups}
    groups: list[Group] = []
    keys: dict[tuple[str, frozenset[str]], Key] = {}
    for one in source.used:
        for piece in one.pieces:
            if not any(axis in piece and sizes[axis] for axis in one.rule.zeros):
                continue
            names = tuple(axis for axis in (*one.axis_names, *one.axes.names()) if axis in piece)
            axes = Axes(tuple(map(Axis, names)))
            held = Instance(f"zeros.{one.key}.{'.'.join(names)}", one.rule, None, axes, (pattern("zeros"),), ())
            shape = tuple(sizes[axis] for axis in names)
            dtype = next(dtypes[name.text] for name, _ in one.targets if name.text in dtypes)
            header = zeros_of(dtype, shape)
            groups.append(Group(held, {}, Cut(), {(): (Stored(len(checkpoint.files), header, "zeros", 0),)}))
            keys[held.key, piece] = (f"{one.rule.name}.{one.param}", piece)
    if not groups:
        return source
    grid = replace(checkpoint.grid, files=(*checkpoint.grid.files, *whole_grid([ZEROS.name]).files))
    with_zeros = replace(checkpoint, files=(*checkpoint.files, ZEROS), grid=grid)
    return replace(source, checkpoint=with_zeros, side=Side((*side.groups, *groups), {**side.keys, **keys}, sizes))
