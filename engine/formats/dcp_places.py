"""Where a distributed checkpoint's directory says that the bytes of each entry lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.standins import Refused, attributes, ints
from engine.language.documents import grouped

_Box = tuple[str, tuple[int, ...] | None]  # name and start
_Bytes = tuple[str, int, int]  # file, offset and length


def places_of(stored: Mapping[Any, Any]) -> tuple[dict[_Box, _Bytes], dict[_Box, int]]:
    """(name, start of the box) → file, offset and length; and → which of its tensor's boxes it is, if that is said.

    A Python object has no start.

    Raises:
        Refused: E301 for entries that are not in torch's form.
        EngineError: E303 for transformed entries, E306 for two boxes that exchanged places.
    """
    places: dict[_Box, _Bytes] = {}
    numbers: dict[_Box, int] = {}
    for index, info in stored.items():
        key, place = attributes(index, "MetadataIndex"), attributes(info, "_StorageInfo")
        name, at = key.get("fqn"), key.get("offset")
        file, offset, length = (place.get(word) for word in ("relative_path", "offset", "length"))
        if type(name) is not str or type(offset) is not int or type(length) is not int:
            raise Refused("E301", "an entry without name, offset or length")
        if type(file) is not str or not file.isprintable() or "/" in file or file in ("", ".", ".."):
            raise Refused("E301", f"`{name}` is in a file named {file!r}, outside the folder"[:200])
        if not 0 <= offset < 1 << 62 or not 0 <= length < 1 << 62:
            raise Refused("E301", f"`{name}` lies at byte {offset}, {length} long")
        if transforms := place.get("transform_descriptors"):
            told = ", ".join(map(str, transforms)) if type(transforms) is list else "?"
            raise EngineError(
                "E303",
                "the checkpoint was saved through extensions that transform its bytes, so values can only be "
                "found by decoding everything",
                place=Place(file, tensor=name),
                got=told[:100],
                expected="bytes as torch saves them",
                fix="With the package zstandard installed, torch decodes `stream.zstd`, in memory for the whole "
                "checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER whole.pt`, then "
                "the same with `torch_to_dcp whole.pt NEW`. An extension of your own needs your own program.",
            )
        where = (name, None if at is None else ints(at))
        if places.setdefault(where, (file, offset, length)) != (file, offset, length):
            raise Refused("E301", f"`{name}` at {at} is listed twice")
        if type(number := key.get("index")) is int:
            numbers[where] = number
    _check_order([*places.items()])
    return places, numbers


def check_numbers(name: str, starts: Sequence[tuple[int, ...]], numbers: Mapping[_Box, int]) -> None:
    """E306 for places of a tensor's boxes, which start at `starts`, that say to be in each other's place.

    torch numbers boxes as it lists them (`create_default_global_save_plan`); Megatron says no numbers.
    """
    said = {at: numbers[name, start] for at, start in enumerate(starts) if (name, start) in numbers}
    wrong = next((at for at, number in said.items() if number != at), None)
    if wrong is not None and {*said} == {*said.values()}:  # else a box is missing, or there twice
        raise EngineError(
            "E306",
            f"boxes of `{name}` have exchanged places in `.metadata`",
            place=Place(".metadata", tensor=name),
            got=f"a place of box {said[wrong]}, which starts at {starts[said[wrong]]}, with the start {starts[wrong]}",
            expected="places with the numbers and starts that boxes have in the list of tensors",
            fix="Copy `.metadata` again from the training run.",
        )


def _check_order(placed: Sequence[tuple[_Box, _Bytes]]) -> None:
    """E306 for two boxes of equal length that are in each other's place.

    Every writer lists a file's entries in a row, as it wrote them (`_write_files_from_queue` and `finish` of torch's
    filesystem.py); so do all genuine directories. It is only known if most are so, and the others exchanged in pairs.
    """
    row = {file: median(at) for file, at in grouped((one[1][0], at) for at, one in enumerate(placed)).items()}
    ordered = sorted(placed, key=lambda one: (row[one[1][0]], *one[1]))
    moved = {one: other for one, other in zip(placed, ordered, strict=True) if one != other}
    in_pairs = all(moved.get(other) == one and one[1][2] == other[1][2] for one, other in moved.items())
    if moved and in_pairs and 2 * len(moved) <= len(placed):
        (box, (file, offset, _)), (other, (their, at, _)) = next(iter(moved.items()))
        raise EngineError(
            "E306",
            "two boxes have exchanged places in `.metadata`",
            place=Place(".metadata", tensor=box[0]),
            got=f"{_told(box)} at byte {offset} of {file}, and {_told(other)} at byte {at} of {their}",
            expected="the other way round: the entries of a file are listed in the order in which they were written",
            fix="Copy `.metadata` again from the training run.",
        )


def _told(box: _Box) -> str:
    return f"`{box[0]}`" + (f" at {box[1]}" if box[1] else "")
