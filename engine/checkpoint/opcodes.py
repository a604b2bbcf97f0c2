"""A look at a pickle's opcodes before it is unpickled.

The C unpickler makes room for a memo entry of any number it is told: 20 bytes of pickle can ask for
64 GiB. An honest pickle numbers its entries one after the other, so no number exceeds its length.
"""

from __future__ import annotations

# Opcode → bytes of its argument.
_ARGUMENTS = {
    **dict.fromkeys(b"KUChq\x80\x82\x8a\x8c", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"Jjr\x84BTX\x8b", 4),
    **dict.fromkeys(b"G\x8d\x8e\x95\x96", 8),
}
_LENGTHS = frozenset(b"UC\x8a\x8cBTX\x8b\x8d\x8e\x96")  # the argument is the length of what follows
_LINES = {**dict.fromkeys(b"FILSVPgp", 1), **dict.fromkeys(b"ci", 2)}
_STOP, _LONG_BINPUT, _PUT = ord("."), ord("r"), ord("p")


def memo_is_bounded(data: bytes) -> bool:
    """Whether every memo number of a pickle is smaller than the pickle's length in bytes.

    >>> import pickle
    >>> memo_is_bounded(pickle.dumps({"a": [1, 2.5, "x"]}, 2))
    True
    >>> memo_is_bounded(b"\\x80\\x02}r\\xff\\xff\\xff\\x0f.")
    False
    """
    at, end = 0, len(data)
    arguments, lengths, lines = _ARGUMENTS, _LENGTHS, _LINES
    while at < end:
        opcode = data[at]
        at += 1
        size = arguments.get(opcode)
        if size is not None:
            if opcode == _LONG_BINPUT and int.from_bytes(data[at : at + 4], "little") > end:
                return False
            at += size + (int.from_bytes(data[at : at + size], "little") if opcode in lengths else 0)
        elif opcode in lines:
            for _ in range(lines[opcode]):
                line_end = data.find(b"\n", at)
                if line_end < 0:
                    return True  # truncated: the unpickler says so
                if opcode == _PUT and line_end - at > len(str(end)):
                    return False
                at = line_end + 1
        elif opcode == _STOP:
            return True
    return True
