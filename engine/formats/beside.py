"""What lies beside weights: numbers of numpy, containers and times of Python, states and settings of frameworks.

A configuration can mean such a number or container, so it is read as one. Of all else only its kind is known.
"""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

from engine.formats.standins import (
    Function,
    Instance,
    Opaque,
    OtherFunction,
    PlainClass,
    Record,
    Refused,
    opaque,
    scalar,
)

_MOST_ITEMS = 64  # of a set: a pickle can ask for the same copy many times over
_MOST_BYTES = 256  # of a number or a text
_CODES = {
    "b1": "?", "f2": "e", "f4": "f", "f8": "d",
    "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
}  # fmt: skip


def _set(items: Any = ()) -> Any:
    if type(items) not in (list, tuple) or len(items) > _MOST_ITEMS:
        raise Refused("E301", "a set of many items")
    return {scalar(item) for item in items}


def _counter(counts: Any = None) -> Any:
    if not isinstance(counts, dict):
        raise Refused("E301", "a counter of something that is no mapping")
    return counts


def _bytes(text: Any = "", encoding: Any = None) -> Any:
    """Bytes, as pickles that Python 2 can read hold them."""
    known = type(text) is str and encoding == "latin1" and len(text) <= _MOST_BYTES and max(text, default="") < "\u0100"
    return text.encode("latin1") if known else Opaque("bytes")


def _number(dtype: Any = None, data: Any = None) -> Any:
    """The number, truth value or text that a scalar of numpy is."""
    name = dtype.arguments[0] if isinstance(dtype, Instance) and dtype.arguments else None
    if type(name) is str and type(data) is bytes and len(data) <= _MOST_BYTES:
        big = type(dtype.state) is tuple and ">" in dtype.state[1:2]
        if name in _CODES and len(data) == int(name[1]):
            return struct.unpack((">" if big else "<") + _CODES[name], data)[0]
        if name.startswith("U"):
            return data.decode("utf-32-be" if big else "utf-32-le").rstrip("\0")
    return Opaque("numpy.scalar")


_NUMPY = "bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64"
# Modules | names in them | what stands for each of these.
_TABLE: tuple[tuple[str, str, Any], ...] = (
    ("builtins __builtin__", "set frozenset", Function(_set)),
    ("builtins __builtin__", "bytes", Function(lambda *given: Opaque("bytes") if given else b"")),
    ("builtins __builtin__", "bool dict float int list long str tuple unicode", OtherFunction),
    ("builtins __builtin__", "bytearray complex range slice xrange", opaque),
    ("collections", "Counter", Function(_counter)),
    ("collections", "defaultdict", Function(lambda factory=None: Record())),
    ("collections", "deque", opaque),
    ("datetime", "date datetime time timedelta timezone", opaque),
    ("decimal", "Decimal", opaque),
    ("fractions", "Fraction", opaque),
    ("uuid", "UUID", opaque),
    ("signal", "Signals", opaque),
    ("_io", "BytesIO", opaque),
    ("pathlib pathlib._local", "PosixPath WindowsPath PurePosixPath PureWindowsPath", opaque),
    ("argparse", "Namespace", PlainClass("Namespace")),
    ("types", "SimpleNamespace", PlainClass("Namespace", takes=True)),
    ("_codecs", "encode", Function(_bytes)),
    ("numpy", "ndarray", opaque),
    ("numpy", "dtype", PlainClass("numpy.dtype", takes=True)),
    ("numpy", _NUMPY, OtherFunction),
    ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", opaque("numpy.ndarray")),
    ("numpy.core.numeric numpy._core.numeric", "_frombuffer", opaque("numpy.ndarray")),  # by protocol 5
    ("numpy.core.multiarray numpy._core.multiarray", "scalar", Function(_number)),
)
BESIDE: dict[tuple[str, str], Any] = {
    (module, name): stands(f"{module}.{name}") if callable(stands) else stands
    for modules, names, stands in _TABLE
    for module, name in product(modules.split(), names.split())
}
