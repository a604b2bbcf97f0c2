"""Writes pickles like torch's, without torch: only the names of its classes are written.

The stdlib's pure-Python pickler does the work; this adds writing a name without importing it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from engine.formats.headers import STORAGES, Named, dense_strides
from engine.language.documents import grouped


@dataclass(frozen=True)
class Global:
    """A module's name, written by reference: `torch.bfloat16`."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Storage:
    identifier: tuple[Any, ...]


@dataclass(frozen=True)
class Made:
    """An object of a class, made without arguments, with its state for `__setstate__` or `__dict__`."""

    kind: Global
    state: Any


@dataclass(frozen=True)
class Pairs:
    """A dict, or an object that `made` makes, given by its items; keys may be stand-ins."""

    items: tuple[tuple[Any, Any], ...]
    made: Call | None = None


_Base: Any = pickle._Pickler


class _Pickler(_Base):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 2)
        self._texts: dict[str, str] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Refer back to an earlier object for equal texts, but never for a list or dict."""
        if type(obj) is str:
            obj = self._texts.setdefault(obj, obj)
        elif type(obj) in (list, dict):
            obj = obj.copy()
        super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        return obj.identifier if isinstance(obj, _Storage) else None

    def _global(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def _call(self, obj: Call) -> None:
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    def _made(self, obj: Made) -> None:
        self.save(obj.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(obj.state)
        self.write(pickle.BUILD)

    def _pairs(self, obj: Pairs) -> None:
        if obj.made is None:
            self.write(pickle.EMPTY_DICT)
        else:
            self.save(obj.made)
        self._batch_setitems(iter(obj.items))

    dispatch: ClassVar[Any] = {**_Base.dispatch, Global: _global, Call: _call, Made: _made, Pairs: _pairs}


_ORDERED = Call(Global("collections", "OrderedDict"), ())
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_CLASSES = {dtype: Global("torch", name) for name, dtype in STORAGES.items()}
WRITABLE = frozenset(_CLASSES)  # element types that have a storage class of their own


def dumps(value: Any) -> bytes:
    """Pickle plain values and the stand-ins of this module, in torch's protocol 2; equal values have equal bytes.

    >>> dumps(["two words", "two words", [], []]) == dumps(["".join(["two", " words"]) for _ in "12"] + [[]] * 2)
    True
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def state_dict(tensors: Sequence[Named], around: Mapping[str, Any] | None = None) -> bytes:
    """The pickle of a state dict whose tensors are contiguous, each in a storage of its own.

    Args:
        tensors: their types are of `WRITABLE`; storage keys are `0`, `1`, ...
        around: the other content of the file, by key; then names begin with the key of their state dict.
    """
    made = [(name, tensor(dtype, shape, index)) for index, (name, dtype, shape) in enumerate(tensors)]
    if around is None:
        return dumps(Pairs(tuple(made), _ORDERED))
    below = grouped((key, (inside, one)) for name, one in made for key, _, inside in (name.partition("."),))
    states = {key: Pairs(tuple(items), _ORDERED) for key, items in below.items()}
    return dumps(Pairs(tuple({**around, **states}.items())))


def tensor(dtype: str, shape: tuple[int, ...], index: int = 0) -> Call:
    """A contiguous tensor that is all of a storage; the storage's key is its number."""
    storage = _Storage(("storage", _CLASSES[dtype], str(index), "cpu", prod(shape)))
    own = tuple([*shape])  # a pickle refers back to the same object: a copy, so that equal plans write equal bytes
    return Call(_REBUILD, (storage, 0, own, dense_strides(shape), False, _ORDERED))


def with_dtypes(value: Any) -> Any:
    """Configuration values, with texts such as `torch.bfloat16` replaced by the objects that they name."""
    if isinstance(value, dict):
        return {key: with_dtypes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_dtypes(item) for item in value]
    if isinstance(value, str) and value in _DTYPES:
        return Global("torch", value.removeprefix("torch."))
    return value


_DTYPES = frozenset(f"torch.{name}" for name in ("bfloat16", "float16", "float32", "float64", "half", "float"))
