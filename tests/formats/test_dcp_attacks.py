"""Directories of distributed checkpoints that torch would not write: each is refused by one of our errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest

from engine.errors import EngineError
from engine.formats.dcp import Entry, _directory
from engine.formats.standins import DType, Instance, PlainClass, Refused


def plain(kind: str, **state: Any) -> Instance:
    return Instance(PlainClass(kind), (), state)


def index(**changed: Any) -> Instance:
    return plain("MetadataIndex", **{"fqn": "a", "offset": (0, 0), **changed})


def place(**changed: Any) -> Instance:
    return plain("_StorageInfo", **{"relative_path": "__0_0.distcp", "offset": 0, "length": 100, **changed})


def chunk(starts: tuple[int, ...] = (0, 0), shape: tuple[int, ...] = (4, 2)) -> Instance:
    return plain("ChunkStorageMetadata", offsets=starts, sizes=shape)


def tensor(**changed: Any) -> Instance:
    properties = Instance(PlainClass("TensorProperties"), (), (DType("float32"),))
    return plain("TensorStorageMetadata", **{"properties": properties, "size": (4, 2), "chunks": [chunk()], **changed})


def read(listed: Any = None, stored: Any = None) -> tuple[Entry, ...]:
    listed = {"a": tensor()} if listed is None else listed
    stored = {index(): place()} if stored is None else stored
    return _directory(plain("Metadata", state_dict_metadata=listed, storage_data=stored), "", 1000).entries


def test_the_directory_that_the_attacks_start_from_is_read() -> None:
    assert read() == (Entry("a", "F32", (4, 2), (0, 0), (4, 2), "__0_0.distcp", 0, 100),)
    assert read({"a": tensor(chunks=[chunk((4, 0), (0, 2))])}, {}) == ()  # a rank that holds nothing


LISTED: Mapping[str, tuple[Any, str]] = {
    "nothing": ([], "without state_dict_metadata"),
    "a number as name": ({7: tensor()}, "a name 7"),
    "a line in a name": ({"a\nb": tensor()}, "a name 'a"),
    "another object": ({"a": 7}, "no TensorStorageMetadata"),
    "bytes that are nowhere": ({"b": plain("BytesStorageMetadata")}, "its bytes are not"),
    "no element type": ({"a": tensor(properties=None)}, "without an element type"),
    "no state": ({"a": Instance(PlainClass("TensorStorageMetadata"))}, "without an element type"),
    "a state of another kind": ({"a": Instance(PlainClass("TensorStorageMetadata"), (), 7)}, "no TensorStorage"),
    "a shape of text": ({"a": tensor(size="42")}, "a shape or stride"),
    "no list of boxes": ({"a": tensor(chunks=(chunk(),))}, "no list of its boxes"),
    "a box beyond": ({"a": tensor(chunks=[chunk((2, 0))])}, "has a box at"),
    "a box of another dimension": ({"a": tensor(chunks=[chunk((0,), (4,))])}, "has a box at"),
    "a box that is nowhere": ({"a": tensor(chunks=[chunk((2, 0), (2, 2))])}, "its bytes are not"),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_list_of_tensors_that_torch_would_not_write_is_refused(name: str) -> None:
    listed, told = LISTED[name]
    with pytest.raises(Refused, match=told) as caught:
        read(listed)
    assert caught.value.code == "E301"


def test_boxes_that_are_listed_more_often_than_a_file_can_are_refused() -> None:
    listed = dict.fromkeys(map(str, range(200)), tensor(chunks=[chunk((0, 0), (0, 2))] * 6))
    with pytest.raises(Refused, match="more often"):
        read(listed)


STORED: Mapping[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: (), "storage_data"),
    "no name": (lambda: {index(fqn=None): place()}, "without name"),
    "an offset of text": (lambda: {index(): place(offset="0")}, "without name"),
    "an offset below zero": (lambda: {index(): place(offset=-1)}, "at byte -1"),
    "a length without end": (lambda: {index(): place(length=1 << 62)}, "at byte 0"),
    "a file elsewhere": (lambda: {index(): place(relative_path="../x")}, "outside the folder"),
    "a file without name": (lambda: {index(): place(relative_path="")}, "outside the folder"),
    "a start of text": (lambda: {index(offset="0"): place()}, "a shape or stride"),
    "two places": (lambda: {index(): place(), index(index=1): place(offset=100)}, "listed twice"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_list_of_places_that_torch_would_not_write_is_refused(name: str) -> None:
    stored, told = STORED[name]
    with pytest.raises(Refused, match=told) as caught:
        read(None, stored())
    assert caught.value.code == "E301"


@pytest.mark.parametrize(
    ("numbers", "exchanged"), [((0, 1), False), ((None, None), False), ((1, 0), True), ((0, 0), False), ((0, 9), False)]
)
def test_a_place_whose_number_is_that_of_another_box_is_not_that_box_s(
    numbers: tuple[int | None, int | None], exchanged: bool
) -> None:
    """torch numbers the boxes of a tensor as it lists them, and writes the number beside each place."""
    starts, chunks = ((0, 0), (2, 0)), [chunk((0, 0), (2, 2)), chunk((2, 0), (2, 2))]
    both = zip(starts, numbers, strict=True)
    stored = {index(offset=at, index=number): place(offset=100 * at[0]) for at, number in both}
    told = r"E306(?s:.*)a place of box 1, which starts at \(2, 0\), with the start \(0, 0\)"
    with pytest.raises(EngineError, match=told) if exchanged else nullcontext():
        assert [one.starts for one in read({"a": tensor(chunks=chunks)}, stored)] == [*starts]


def test_places_that_are_listed_in_another_order_throughout_have_not_been_exchanged() -> None:
    """Only if most are in the order of their bytes, it is the order in which they were written."""
    names = ["b", "a", "d", "c"]
    stored = {index(fqn=name): place(offset=100 * at) for name, at in zip(names, (1, 0, 3, 2), strict=True)}
    assert [one.name for one in read({name: tensor() for name in "abcd"}, stored)] == [*"abcd"]


@pytest.mark.parametrize("how", [["zstd"], "zstd", plain("Zstd")])
def test_bytes_that_an_extension_transformed_are_refused(how: Any) -> None:
    with pytest.raises(EngineError, match="extensions that transform") as caught:
        read(None, {index(): place(transform_descriptors=how)})
    assert caught.value.code == "E303"
