"""Unpickles metadata only, with a machine that builds plain data and stand-ins. Nothing is executed.

Python's own unpickler in C is three times as fast, but calls what a pickle names, sets its attributes,
hashes keys of any depth and allocates for any memo number: a few hundred bytes can change how the
next file is read, hang, or kill the process.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

from engine.errors import EngineError, Place
from engine.formats.beside import BESIDE
from engine.formats.headers import damaged
from engine.formats.sharded import sharding_global
from engine.formats.standins import (
    RECORD,
    Function,
    Instance,
    Opaque,
    OpaqueClass,
    OtherClass,
    OtherFunction,
    PlainClass,
    Record,
    Refused,
    Storage,
    known_global,
    scalar,
    storage_of,
)

MAX_PICKLE = 64 << 20  # bytes; a state dict of a hundred thousand tensors takes half of it
MOST_BITS = 4096  # of a number: Python shows none of more than 4300 digits
# What the machine raises on bytes that are not a pickle of the kinds above.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, OverflowError, LookupError,
    struct.error, ImportError, AssertionError,
)  # fmt: skip


class _Lines:
    """A file with a limit of bytes to read, and only complete lines.

    A line that the end of the file cuts off is not mistaken for a shorter name.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._left = limit
        self.read: Callable[[int], bytes] = self._read

    def _read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise EOFError("its text ends outside the file, or is too long")
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(min(self._left, 1 << 16))
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise EOFError("a line is cut off")
        return line


class _Memory(_Lines):
    """The same for bytes in memory, where reading past the end is harmless."""

    def __init__(self, data: bytes) -> None:
        file = io.BytesIO(data)
        super().__init__(file, len(data))
        self.read = file.read  # called for each opcode, so bound directly


class _Machine(pickle._Unpickler):
    """Python's pure-Python unpickler: iterative, with a dict as memo, and with opcodes replaced that act on objects."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Lines) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.read, self.readline = file.read, file.readline
        self.metastack: list[list[Any]] = []
        self.stack = []
        self.append = self.stack.append
        self.proto = 0

    def load(self) -> Any:
        """The inherited loop without frames, which only group reads."""
        read, dispatch = self.read, self.dispatch
        try:
            while opcode := read(1):
                dispatch[opcode[0]](self)
        except pickle._Stop as stopped:  # type: ignore[attr-defined]
            return stopped.value
        raise EOFError("it ends too early")

    def find_class(self, module: str, name: str) -> Any:
        known = BESIDE.get((module, name)) or sharding_global(module, name)
        return known_global(module, name) if known is None else known

    def persistent_load(self, pid: Any) -> Storage:
        storage = storage_of(pid)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Refused("E301", f"storage {storage.key[:40]} is described in two ways")
        return storage

    def put_items(self, into: Any, items: list[Any]) -> None:
        if isinstance(into, Opaque):
            return
        if not isinstance(into, dict):
            raise Refused("E301", f"items for a {type(into).__name__}")
        for i in range(0, len(items), 2):
            into[scalar(items[i])] = items[i + 1]


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.put_items(machine.stack[-1], [key, value])


def _setitems(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.put_items(machine.stack[-1], items)


def _dict(machine: _Machine) -> None:
    items, result = machine.pop_mark(), dict[Any, Any]()
    machine.put_items(result, items)
    machine.stack.append(result)


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine) -> None:
    items = machine.pop_mark()
    _extend(machine.stack[-1], items)


def _extend(into: Any, items: list[Any]) -> None:
    if isinstance(into, Opaque):
        return
    if type(into) is not list:
        raise Refused("E301", f"items for a {type(into).__name__}")
    into.extend(items)


def _additems(machine: _Machine) -> None:
    items = machine.pop_mark()
    if type(machine.stack[-1]) is not set:
        raise Refused("E301", "items for something that is no set")
    machine.stack[-1].update(map(scalar, items))


def _frozenset(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(frozenset(map(scalar, items)))


def _reduce(machine: _Machine) -> None:
    arguments = machine.stack.pop()
    function = machine.stack[-1]
    if isinstance(function, OtherFunction):
        raise Refused("E302", function.name)
    if type(arguments) is not tuple or not isinstance(function, Function | PlainClass):
        raise Refused("E301", f"a call of a {type(function).__name__}")
    if isinstance(function, Function):
        machine.stack[-1] = function.call(*arguments)
    elif function.takes:
        machine.stack[-1] = Instance(function, arguments)
    else:
        raise Refused("E301", f"a call of a {function.name}")


def _newobj(machine: _Machine) -> None:
    arguments, kind = machine.stack.pop(), machine.stack[-1]
    if isinstance(kind, PlainClass) and type(arguments) is tuple and (kind.takes or not arguments):
        machine.stack[-1] = Instance(kind, arguments)
    elif isinstance(kind, OpaqueClass):
        machine.stack[-1] = kind.call()
    elif kind is RECORD:
        machine.stack[-1] = Record()
    elif isinstance(kind, OtherClass) and kind.name == "ShardedTensor":
        raise Refused("E303", "ShardedTensor, as saved before torch 2.0")
    else:
        raise Refused("E301", f"an object of a {type(kind).__name__}")


def _build(machine: _Machine) -> None:
    """Set state: attributes of mappings and opaque objects are dropped, an instance's are kept; others have none."""
    state, built = machine.stack.pop(), machine.stack[-1]
    if isinstance(built, Instance):
        built.build(state)
    elif not isinstance(built, Record | Opaque):
        raise Refused("E301", f"attributes for a {type(machine.stack[-1]).__name__}")


def _number(opcode: int) -> Callable[[_Machine], None]:
    """The inherited action, which appends a number of any size."""
    load: Any = pickle._Unpickler.dispatch[opcode]

    def bounded(machine: _Machine) -> None:
        load(machine)
        if (bits := machine.stack[-1].bit_length()) > MOST_BITS:
            raise Refused("E301", f"a number of {bits} bits")

    return bounded


def _bytearray(machine: _Machine) -> None:
    """Skip what arrays hold by protocol 5, which Python from 3.14 on writes if nobody says otherwise."""
    (size,) = struct.unpack("<Q", machine.read(8))
    machine.read(size)
    machine.stack.append(Opaque("bytearray"))


def _refuse(name: str) -> Callable[[_Machine], None]:
    def refuse(machine: _Machine) -> None:
        raise Refused("E302", f"pickle opcode {name}")

    return refuse


_ACTIONS: dict[int, Any] = {
    pickle.SETITEM[0]: _setitem,
    pickle.SETITEMS[0]: _setitems,
    pickle.DICT[0]: _dict,
    pickle.APPEND[0]: _append,
    pickle.APPENDS[0]: _appends,
    pickle.ADDITEMS[0]: _additems,
    pickle.FROZENSET[0]: _frozenset,
    pickle.REDUCE[0]: _reduce,
    pickle.NEWOBJ[0]: _newobj,
    pickle.BUILD[0]: _build,
    **{opcode: _number(opcode) for opcode in (pickle.INT[0], pickle.LONG[0], pickle.LONG4[0])},
    pickle.BYTEARRAY8[0]: _bytearray,
    pickle.FRAME[0]: lambda machine: machine.read(8),
    **{
        getattr(pickle, name)[0]: _refuse(name)
        for name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
    },
}  # fmt: skip
_Machine.dispatch = {**pickle._Unpickler.dispatch, **_ACTIONS}


def load_pickle(data: bytes, name: str) -> Any:
    """One pickle from memory."""
    return _run(_Machine(_Memory(data)), name)


def load_next(file: BinaryIO, name: str, limit: int = MAX_PICKLE) -> tuple[Any, dict[str, Storage]]:
    """The pickle at the file's position, and the storages it names; the position moves past it."""
    machine = _Machine(_Lines(file, limit))
    return _run(machine, name), machine.storages


def _run(machine: _Machine, name: str) -> Any:
    try:
        return machine.load()
    except Refused as refused:
        raise error_of(refused, name) from None
    except RecursionError:
        raise damaged(name, "a pickle nested too deeply") from None
    except MemoryError:
        raise damaged(name, "a pickle that claims more memory than there is") from None
    except _MALFORMED as error:
        raise damaged(name, f"its pickle cannot be read: {type(error).__name__}: {error}"[:200]) from None


def error_of(refused: Refused, name: str, tensor: str | None = None) -> EngineError:
    """A refusal as an error that names the file."""
    if refused.code == "E302":
        return EngineError(
            "E302",
            f"a checkpoint file asks to run code: `{refused}`",
            place=Place(name, tensor=tensor),
            expected="tensors, numbers and text",
            fix="Nothing of it was executed. If you trust the file, load it in the "
            "training environment and save a plain state dict.",
        )
    if refused.code == "E303":
        return EngineError(
            "E303",
            f"a checkpoint file holds what only code can rebuild: `{refused}`",
            place=Place(name, tensor=tensor),
            fix="Saved in a form that is not read, as by a sharding library, sparse or quantised: load it once in the "
            "training environment and save full tensors; docs/fsdp.md shows how.",
        )
    return damaged(name, str(refused)[:400], tensor)
