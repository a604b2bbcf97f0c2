"""Readers of rank files, configurations and safetensors: exact on good files, refusing on bad ones."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.formats import zipdir
from engine.formats.checksums import check_files
from engine.formats.configs import literals
from engine.formats.headers import ITEM_SIZES
from engine.formats.rank_files import _SHORT, Pickles, read_torch_file
from engine.formats.rank_files import read_rank_file as rank_file
from engine.formats.safetensors import encode_header, index_json, read_sharded_safetensors, shard_names, split_shards
from engine.formats.standins import Opaque
from engine.formats.torch_files import torch_file
from engine.formats.unpickle import load_pickle
from engine.storage.local import LocalStore, local_file
from tests.support.depth import examples
from tests.support.readers import (
    read_config,
    read_pickled_mapping,
    read_python_source,
    read_rank_file,
    read_safetensors,
)

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def tensors() -> dict[str, torch.Tensor]:
    flat = torch.arange(60, dtype=torch.float32)
    half = torch.randn(5, 7).half()
    return OrderedDict(
        whole=flat.view(6, 10),
        later=flat[20:44].view(4, 6),
        turned=flat[:24].view(4, 6).t(),
        every_other=flat[::2],
        bf16=torch.randn(3, 4).bfloat16(),
        f16=half,
        row=half[3],
        i64=torch.arange(5),
        **{
            str(one): torch.ones(2, dtype=one)
            for one in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
        },
        f64=torch.randn(2).double(),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
    )


@BOTH
def test_headers_lead_to_the_bytes_that_torch_reads(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model_tp0_pp0.pt"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    truth = torch.load(path, weights_only=True)
    raw = path.read_bytes()
    header = read_rank_file(path)
    assert [t.name for t in header.tensors] == list(truth)
    assert header.size == len(raw)
    for tensor in header.tensors:
        expected = truth[tensor.name].detach()
        assert tensor.shape == tuple(expected.shape)
        item = ITEM_SIZES[tensor.dtype]
        assert item == expected.element_size()
        for index in product(*map(range, expected.shape)):
            at = tensor.offset + item * sum(i * s for i, s in zip(index, tensor.strides, strict=True))
            one = expected[index].reshape(1).contiguous().view(torch.uint8)
            assert raw[at : at + item] == one.numpy().tobytes(), tensor.name


class Called:
    """Pickled as a call that builds a tensor, with what the call takes last."""

    def __init__(self, build: Any, tensor: torch.Tensor, last: Any) -> None:
        self.build, self.tensor, self.last = build, tensor, last

    def __reduce__(self) -> tuple[Any, ...]:
        one = self.tensor
        storage = one._typed_storage()
        return self.build, (storage, one.storage_offset(), tuple(one.shape), one.stride(), False, {}, self.last)


def _rebuild_npu_tensor(*_: Any) -> None:
    """Stands for the function of that name in `torch_npu`, of which a pickle has the name only."""


_rebuild_npu_tensor.__module__ = "torch_npu.utils.storage"

MARKS = {
    "base_sizes_/2/3/": True,
    "base_strides_/3/1/": True,
    "storage_sizes_/6/": True,
    "npu_format_/FRACTAL_NZ": True,
}


@pytest.mark.parametrize("last", [29, True, MARKS], ids=["before torch 2.1", "and without a form", "since"])
def test_a_tensor_that_an_ascend_npu_saved_is_a_tensor(
    last: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])
    build = torch._utils._rebuild_tensor_v2 if last is MARKS else _rebuild_npu_tensor
    torch.save({"a": Called(build, torch.arange(8.0)[2:].view(2, 3), last)}, tmp_path / "x.pt")
    header = read_rank_file(tmp_path / "x.pt")
    ((name, shape, at),) = [(one.name, one.shape, one.offset) for one in header.tensors]
    assert (name, shape) == ("a", (2, 3))
    assert (tmp_path / "x.pt").read_bytes()[at : at + 8] == struct.pack("<2f", 2, 3)


@pytest.mark.parametrize("marks", [{"conj": True}, {"neg": True, **MARKS}, {"npu_format": True}, {1: True}, [1], "neg"])
def test_a_tensor_that_is_marked_in_another_way_is_refused(marks: Any, tmp_path: Path) -> None:
    torch.save({"a": Called(torch._utils._rebuild_tensor_v2, torch.ones(2), marks)}, tmp_path / "x.pt")
    with pytest.raises(EngineError, match="marked as") as caught:
        read_rank_file(tmp_path / "x.pt")
    assert caught.value.code == "E303"


PLAIN = {
    "a number of numpy": (np.float64(1e-5), 1e-5),
    "a float of 32 bits": (np.float32(1e-5), float(np.float32(1e-5))),
    "a float of 16 bits": (np.float16(0.5), 0.5),
    "a number in the other order of bytes": (np.array([1.5], ">f8")[0], 1.5),
    "a whole number": (np.int64(-7), -7),
    "a truth value": (np.bool_(True), True),
    "a text of numpy": (np.str_("läuft"), "läuft"),
    "a kind of number": (np.float32, "numpy.float32"),
    "what is no number here": (np.longdouble(1.5), "numpy.scalar"),
    "an array": (np.arange(3), "numpy.ndarray"),
    "its element type": (np.dtype("float32"), "numpy.dtype"),
    "a counter": (Counter("aab"), {"a": 2, "b": 1}),
    "a mapping with a default": (defaultdict(list, {"a": [1]}), {"a": [1]}),
    "settings": (SimpleNamespace(a=[1]), {"a": [1]}),
    "a frozen set": (frozenset([1, 2]), [1, 2]),
    "a set": ({1, 2}, [1, 2]),
    "a queue": (deque([1.5], maxlen=8), "collections.deque"),
    "a date": (datetime(2026, 1, 1), "datetime.datetime"),
    "bytes": (b"abc", "bytes"),
    "a complex number": (1j, "__builtin__.complex"),
    "a range": (range(3), "__builtin__.xrange"),
    "bytes that change": (bytearray(b"abc"), "__builtin__.bytearray"),
}


@pytest.mark.parametrize("value, read", PLAIN.values(), ids=PLAIN)
def test_numbers_of_numpy_and_containers_of_python_are_plain_data(value: Any, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "model_config.pt"
    torch.save({"value": value, "tensor": torch.ones(2)}, path)
    found = read_pickled_mapping(path)["value"]
    assert (found, type(found)) == (read, type(read))
    assert [tensor.name for tensor in read_rank_file(path).tensors] == ["tensor"]


@pytest.mark.parametrize("value", [np.arange(3), np.ones((2, 2), order="F"), bytearray(b"abc")])
@pytest.mark.parametrize("module", [b"numpy._core.numeric", b"numpy.core.numeric"])
def test_arrays_and_bytes_that_protocol_5_pickles_otherwise_are_known(value: Any, module: bytes) -> None:
    pickled = pickle.dumps({"value": value, "after": 1}, 5)
    old = b"\x8c" + bytes([len(module)]) + module
    data = pickled.replace(b"\x8c\x13numpy._core.numeric", old)
    found = load_pickle(data, "x")
    assert isinstance(found["value"], Opaque) and found["after"] == 1


@pytest.mark.parametrize("data", [b"", b"1234567", b"\0" * 9, "12345678", [1], None])
def test_a_number_of_numpy_that_is_none_is_not_looked_at(data: Any) -> None:
    called = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\2\0\0\0f8\x89\x88tR"
    found = load_pickle(b"\x80\x02" + called + pickle.dumps(data, 3)[2:-1] + b"tR.", "x")
    assert isinstance(found, Opaque)


def test_members_that_are_not_aligned_are_read_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(6.0)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for info in source.infolist():
            target.writestr(zipfile.ZipInfo(info.filename.replace("x/", "longer_name/")), source.read(info))
    (header,) = read_rank_file(tmp_path / "y.pt").tensors
    raw = (tmp_path / "y.pt").read_bytes()
    assert struct.unpack("<6f", raw[header.offset : header.offset + 24]) == (0, 1, 2, 3, 4, 5)


def test_a_payload_whose_end_is_not_at_hand_must_end_where_what_follows_begins(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4096)}, tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    struct.pack_into("<H", raw, raw.index(b"x/data/0") - 2, 0)  # of its padding, which payload begins behind
    (tmp_path / "x.pt").write_bytes(raw)
    with local_file(tmp_path / "x.pt").open() as opened:
        opened.at_hand = lambda start, end: end <= 2048  # as of an object, whose begin was fetched
        with pytest.raises(EngineError, match="E301"):
            read_torch_file(opened, "x.pt")


@BOTH
def test_every_truncation_of_a_rank_file_is_refused_cleanly(zipped: bool, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"a.weight": torch.arange(8.0), "b.bias": torch.ones(2)}, whole, _use_new_zipfile_serialization=zipped)
    raw = whole.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(EngineError) as caught:
            read_rank_file(path)
        assert caught.value.code in ("E301", "E303")


def _small(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"a.weight": torch.arange(8.0), "b.bias": torch.ones(2)}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SMALL = {zipped: _small(zipped) for zipped in (True, False)}  # storage keys differ from save to save


@BOTH
@settings(max_examples=examples(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_flipped_byte_gives_tensors_or_one_of_our_errors(
    zipped: bool, tmp_path_factory: Any, data: st.DataObject
) -> None:
    raw = bytearray(SMALL[zipped])
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "model.pt"
    path.write_bytes(raw)
    try:
        header = read_rank_file(path)
    except EngineError as error:
        assert error.code in ("E301", "E302", "E303")
    else:
        for tensor in header.tensors:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
            assert tensor.offset >= 0
            assert 0 in tensor.shape or tensor.offset + (last + 1) * ITEM_SIZES[tensor.dtype] <= len(raw)


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "os.system": Call(os.system, "true"),
    "eval": Call(eval, "1 + 1"),
    "exec": Call(exec, "x = 1"),
    "getattr": Call(getattr, os, "system"),
    "open": Call(open, os.devnull, "w"),
    "compile": Call(compile, "1", "x", "eval"),
    "import": Call(__import__, "os"),
    "memoryview": Call(memoryview, b""),
    "torch.load": Call(torch.load, "other.pt"),
    "hub": Call(torch.hub.load, "somebody/something", "model"),
}


@BOTH
@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_that_a_pickle_asks_to_call_is_called(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model_tp0_pp0.pt"
    if name in ("torch.load", "hub", "getattr"):
        path.write_bytes(
            _pickled_by_name(HOSTILE[name]) if name != "getattr" else pickle.dumps(Call(getattr, "x", "upper"))
        )
    else:
        torch.save({"x": HOSTILE[name]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(EngineError) as caught:
        read_rank_file(path)
    assert caught.value.code in ("E302", "E301")
    assert "Nothing" in str(caught.value) or caught.value.code == "E301"


def _pickled_by_name(call: Call) -> bytes:
    function, arguments = call.call
    module, name = function.__module__, function.__name__
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + pickle.dumps(arguments[0], 2)[2:-1] + b"tR."


def test_a_deeply_nested_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".")
        archive.writestr("model/byteorder", b"little")
    with pytest.raises(EngineError):
        read_rank_file(path)


def forged(tmp_path: Path, shape: str, offset: int, strides: str) -> Path:
    """A rank file of one storage of 8 floats with a tensor as told."""
    path = tmp_path / "model.pt"
    body = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ" + f"I{offset}\n".encode() + shape.encode() + strides.encode()
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", body)
        archive.writestr("model/byteorder", b"little")
        archive.writestr("model/data/0", b"\0" * 32)
    return path


def test_a_forged_tensor_inside_its_storage_is_read(tmp_path: Path) -> None:
    (tensor,) = read_rank_file(forged(tmp_path, "(I2\nI3\nt", 2, "(I3\nI1\nt")).tensors
    assert (tensor.shape, tensor.strides) == ((2, 3), (3, 1))


SHARED = torch.arange(24.0)


@BOTH
@pytest.mark.parametrize(
    ("one", "two", "crosses"),
    [
        (SHARED[:12].view(3, 4), SHARED[12:], False),
        (SHARED[:12].view(3, 4), SHARED[11:], True),  # as a flipped bit of its offset makes of it
        (SHARED[4:], SHARED[:5], True),
        (SHARED, SHARED[4:8], False),  # a fused tensor, and a part of it
        (SHARED, SHARED, False),
        (SHARED[:4], SHARED[:8], False),
        (SHARED.view(4, 6)[:, :3], SHARED.view(4, 6)[:, 3:], False),
        (SHARED[:0], SHARED[:8], False),
    ],
)
def test_two_tensors_share_all_bytes_of_one_or_none(
    one: torch.Tensor, two: torch.Tensor, crosses: bool, zipped: bool, tmp_path: Path
) -> None:
    torch.save({"one": one, "two": two}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(EngineError, match=r"E301(?s:.*) are also the last of `") if crosses else nullcontext():
        assert len(read_rank_file(tmp_path / "a.pt").tensors) == 2


@pytest.mark.parametrize(
    ("shape", "offset", "strides"),
    [
        ("(I2\nI3\nt", 3, "(I3\nI1\nt"),
        ("(I2\nI3\nt", -1, "(I3\nI1\nt"),
        ("(I2\nI3\nt", 0, "(I-3\nI1\nt"),
        ("(I-2\nI3\nt", 0, "(I3\nI1\nt"),
        ("(I2\nI3\nt", 0, "(I1\nt"),
        (f"(I2\nI{1 << 40}\nt", 0, f"(I{1 << 40}\nI1\nt"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(shape: str, offset: int, strides: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        read_rank_file(forged(tmp_path, shape, offset, strides))
    assert caught.value.code == "E301"


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (b"first.weight", b"other.weight", "member x/data.pkl has other bytes than were saved"),
        (b"x/data/0", b"x/data/1", "member x/data/0 differs between its local header and the directory"),
    ],
)
def test_a_zip_whose_records_and_contents_disagree_is_refused(
    was: bytes, now: bytes, words: str, tmp_path: Path
) -> None:
    source = tmp_path / "x.pt"
    torch.save({"first.weight": torch.zeros(4)}, source)
    source.write_bytes(source.read_bytes().replace(was, now, 1))
    with pytest.raises(EngineError, match=words) as caught:
        read_rank_file(source)
    assert caught.value.code == "E301"


def test_bytes_between_tensors_that_no_header_names_are_refused(tmp_path: Path) -> None:
    ends = {"a": [0, 4], "b": [8, 12]}
    header = json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": at} for name, at in ends.items()}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(EngineError, match=r"E301 .*starts at 8, the one before ends at 4"):
        read_safetensors(tmp_path / "x.safetensors")


def test_compressed_and_doubled_members_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1000)}, source)
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as write:
        for info in read.infolist():
            write.writestr(info.filename, read.read(info))
    with pytest.raises(EngineError) as caught:
        read_rank_file(tmp_path / "c.pt")
    assert "compressed" in str(caught.value)
    with pytest.warns(UserWarning), zipfile.ZipFile(source, "a") as archive:
        archive.writestr("x/data/0", b"\1" * 4000)
    with pytest.raises(EngineError) as caught:
        read_rank_file(source)
    assert "twice" in str(caught.value)


def test_a_folder_a_fifo_and_a_missing_file_are_told_apart_from_damage(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("folder.pt", "fifo.pt", "missing.pt"):
        with pytest.raises(EngineError) as caught:
            read_rank_file(tmp_path / name)
        assert caught.value.code == "E305"


def test_a_state_dict_inside_another_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(EngineError) as caught:
        read_rank_file(tmp_path / "x.pt")
    assert caught.value.code == "E303"
    assert "state_dict" in str(caught.value)


def test_a_training_config_is_read_as_far_as_it_is_literal(tmp_path: Path) -> None:
    source = (
        'model_type = "INTERNLM"\nN = 4 * 2\nHIDDEN = 2**12\nimport os\nSECRET = os.environ\n'
        "model = dict(num_layers=N, rope=dict(base=1e6), call=f(), names=['a', N])\n"
        "parallel = {'tensor': {'size': N}}\n"
        "huge = 9**9**9\n"
    )
    torch.save(source, tmp_path / "config_file.pt")
    assert read_python_source(tmp_path / "config_file.pt") == {
        "model_type": "INTERNLM",
        "N": 8,
        "HIDDEN": 4096,
        "model": {"num_layers": 8, "rope": {"base": 1e6}, "names": ["a", 8]},
        "parallel": {"tensor": {"size": 8}},
        "untold": {"SECRET": True, "huge": True, "model.call": True, "os": True},
    }


@given(st.text(max_size=200))
def test_any_text_can_stand_where_a_training_config_is_expected(text: str) -> None:
    assert isinstance(literals(text), dict)


def test_json_configs_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text('{"dim": 4}')
    assert read_config(path, "json") == {"dim": 4}
    path.write_text("{")
    with pytest.raises(EngineError):
        read_config(path, "json")


@pytest.mark.parametrize("name", ["a" * length for length in range(8)])
def test_tensors_of_a_safetensors_file_are_aligned_whatever_their_names(name: str) -> None:
    header, offsets = encode_header([(name, "F64", (1,))], {})
    assert len(header) == offsets[0] and len(header) % 8 == 0


def test_an_empty_tensor_may_be_listed_after_the_one_that_begins_where_it_does(tmp_path: Path) -> None:
    entries = {"a": [0, 4], "b": [4, 8], "empty": [4, 4]}
    listed = {n: {"dtype": "F32", "shape": [(e - b) // 4], "data_offsets": [b, e]} for n, (b, e) in entries.items()}
    text = json.dumps(listed).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert [one.name for one in read_safetensors(tmp_path / "a.safetensors").tensors] == [*entries]


@pytest.mark.parametrize("spelt", [str.lower, str.upper])
def test_a_file_is_checked_by_what_is_recorded_of_it(spelt: Callable[[str], str], tmp_path: Path) -> None:
    """By checksums in it, even if a member without bytes has none, or beside it, in either spelling."""
    for name, zipped in (("zip.pt", True), ("old.pt", False)):
        torch.save({"a": torch.ones(4), "empty": torch.ones(0)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    files = [local_file(tmp_path / name) for name in ("zip.pt", "old.pt")]
    assert check_files(files, lambda _: None) == ["old.pt"]
    beside = tmp_path / "old.pt.md5"
    beside.write_text(spelt(hashlib.md5((tmp_path / "old.pt").read_bytes()).hexdigest()))
    assert check_files(files, lambda _: None) == []
    beside.write_text(spelt("MD5 d41d8cd98f00b204e9800998ecf842"))
    assert check_files(files, lambda _: None) == ["old.pt.md5", "old.pt"]
    beside.write_text(spelt("d41d8cd98f00b204e9800998ecf8427e"))
    with pytest.raises(EngineError, match="E301"):
        check_files(files, lambda _: None)


def test_a_file_is_checked_by_a_list_of_checksums_beside_it(tmp_path: Path) -> None:
    """As Meta's releases have it; files of Meta's that exchanged names show it nowhere else."""
    names = ("consolidated.00.pth", "consolidated.01.pth")
    for number, name in enumerate(names):
        torch.save({"a": torch.full((4,), number)}, tmp_path / name, _use_new_zipfile_serialization=False)
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in names}
    files, beside = [local_file(tmp_path / name) for name in names], tmp_path / "checklist.chk"
    beside.write_text(f"{sums[names[1]]}  {names[1]}\n{'0' * 32}  params.json\n")
    assert check_files(files, lambda _: None) == [names[0]]
    beside.write_text(f"{sums[names[1]]} *{names[0]}\n{sums[names[0]]} *{names[1]}\n")
    with pytest.raises(EngineError, match=r"(?s)E301.*checklist.chk"):
        check_files(files, lambda _: None)


def boxes_file(path: Path, tensor: torch.Tensor, info: dict[str, list[int]]) -> None:
    told = {name: {"saved_offsets": starts} for name, starts in info.items()}
    save_file({"w": tensor}, path, {"DCP_SHARDING_INFO": json.dumps(told)})


@pytest.mark.parametrize(
    ("tensor", "info", "told"),
    [
        (torch.ones(2, 2), {"w": [2, 0]}, None),
        (torch.ones(2, 2), {"w": [2, 0], "v": [0, 0]}, "not of the tensors that the file holds"),
        (torch.ones(4), {"w": [4]}, "1 dimensions, elsewhere 2"),
    ],
)
def test_files_of_boxes_agree_on_tensors_and_dimensions(
    tensor: torch.Tensor, info: dict[str, list[int]], told: str | None, tmp_path: Path
) -> None:
    boxes_file(tmp_path / "1.safetensors", torch.ones(2, 2), {"w": [0, 0]})
    boxes_file(tmp_path / "2.safetensors", tensor, info)
    with nullcontext() if told is None else pytest.raises(EngineError, match=told):
        headers = read_sharded_safetensors(LocalStore(tmp_path), ["1.safetensors", "2.safetensors"])
        assert [one.tensors[0].whole for one in headers] == [(4, 2), (4, 2)]


@pytest.mark.parametrize(
    "number",
    [b"\x8b" + struct.pack("<i", 600) + bytes(599) + b"\x01", b"I" + b"7" * 1300 + b"\n", b"L" + b"7" * 1300 + b"L\n"],
    ids=["LONG4", "INT", "LONG"],
)
def test_a_number_of_thousands_of_bits_is_refused_however_it_is_written(number: bytes) -> None:
    with pytest.raises(EngineError, match=r"E301(?s:.*)a number of \d+ bits"):
        load_pickle(number + b".", "a.pt")


def test_a_pickle_is_known_by_all_of_its_bytes() -> None:
    """Those of two ranks may differ in their last bytes alone."""
    same = "x" * _SHORT
    load = Pickles(4)
    assert [load(pickle.dumps([same, number], 2), "a.pt")[1] for number in (1, 2, 1)] == [1, 2, 1]


def test_mappings_that_hold_tensors_are_named_though_one_lies_deep_in_another(tmp_path: Path) -> None:
    shared = {"r": {"t": torch.ones(1)}}
    torch.save({"model": {"w": torch.ones(2)}, "deep": {"p": {"q": shared}}, "near": shared}, tmp_path / "a.pt")
    found = rank_file(local_file(tmp_path / "a.pt"), nested=[re.compile("model")])
    assert found.left == ("near",)


def test_a_file_without_checksums_is_known_by_its_pickle(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.pt", "two.pt")]
    known = set()
    try:
        torch.serialization.set_crc32_options(False)
        for path, name in zip(paths, "ab", strict=True):
            torch.save({name: torch.ones(2)}, path)
            path.write_bytes(path.read_bytes().replace(b"two/", b"one/"))
            with path.open("rb"), local_file(path).open() as file:
                known.add(read_torch_file(file, "a.pt").identity)
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(known) == 2


def test_a_pickle_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(zipdir, "MAX_PICKLE", 100)
    with pytest.raises(EngineError, match=r"E301(?s:.*)data.pkl of [0-9]+ bytes"):
        read_rank_file(tmp_path / "a.pt")


def test_a_safetensors_header_is_literally_these_bytes() -> None:
    header, offsets = encode_header([("b", "BF16", (3,)), ("a", "F32", (2, 2)), ("é", "BF16", ())], {"format": "pt"})
    text = (
        '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        '"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},"é":{"dtype":"BF16","shape":[],"data_offsets":[22,24]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert header == struct.pack("<Q", len(padded)) + padded
    assert offsets == [len(header) + 16, len(header), len(header) + 22]


def test_the_safetensors_library_accepts_what_the_header_describes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    header, _ = encode_header([("b", "BF16", (3,)), ("a", "F32", (2, 2))], {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + struct.pack("<4f", 1, 2, 3, 4) + b"\x80\x3f" * 3)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["a"].tolist() == [[1, 2], [3, 4]]
    assert loaded["b"].tolist() == [1, 1, 1]
    read = read_safetensors(tmp_path / "x.safetensors")
    assert {t.name: (t.dtype, t.shape, t.strides) for t in read.tensors} == {
        "a": ("F32", (2, 2), (2, 1)),
        "b": ("BF16", (3,), (1,)),
    }


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        [],
    ],
)
def test_a_safetensors_header_that_is_not_exactly_right_is_refused(entries: Any, tmp_path: Path) -> None:
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(EngineError) as caught:
        read_safetensors(path)
    assert caught.value.code == "E301"


@example([4, 8, 4], 12)  # two fill a file to the last byte
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_shards_keep_order_and_size_and_are_as_few_as_possible(sizes: list[int], limit: int) -> None:
    tensors = [(f"t{i}", size) for i, size in enumerate(sizes)]
    files = split_shards(tensors, limit)
    assert [name for file in files for name in file] == [name for name, _ in tensors]
    by_name = dict(tensors)
    for file in files:
        assert sum(by_name[n] for n in file) <= limit or len(file) == 1
    greedy, room = 0, 0
    for size in sizes:
        if greedy == 0 or size > room:
            greedy, room = greedy + 1, limit
        room -= size
    assert len(files) == greedy


def test_file_names_and_the_index_are_what_transformers_expects() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(12)[11] == "model-00012-of-00012.safetensors"
    assert index_json({"b": "y", "a": "x"}, 7) == (
        b'{\n  "metadata": {\n    "total_size": 7\n  },\n  "weight_map": {\n    "a": "x",\n    "b": "y"\n  }\n}\n'
    )


def test_threads_parse_python_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 ended in SystemError now and then, when a server planned several steps at once."""
    parse, at_once, most = ast.parse, [0], [0]

    def parses(*given: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.005)
        found = parse(*given)
        at_once[0] -= 1
        return found

    monkeypatch.setattr(ast, "parse", parses)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(literals, ["a = 1"] * 8)) == [{"a": 1}] * 8
    assert most == [1]


def test_a_payload_with_its_checksum_behind_it_has_its_sizes_there_too_as_torch_writes_it() -> None:
    buffer, made = io.BytesIO(), torch_file([("w", "F32", (40,))], "archive")
    torch.save({"w": torch.ones(40)}, buffer)
    own = dict(made.start())[made.tensors[0].header]
    theirs = zipfile.ZipFile(buffer).getinfo("archive/data/0").header_offset
    flags_and_sizes = struct.Struct("<6xH6xIII")
    assert flags_and_sizes.unpack_from(own) == flags_and_sizes.unpack_from(buffer.getvalue(), theirs)


def test_members_beyond_4_gib_are_written_as_torch_and_others_read_them(tmp_path: Path) -> None:
    """Large ones are holes in the file, and are not read."""
    size, path = (1 << 32) + 3, tmp_path / "model.pt"
    made = torch_file(
        [("large", "U8", (size,)), ("after", "F32", (2,)), ("again", "U8", (size,)), ("last", "U8", (1,))], "model"
    )
    held = {1: struct.pack("<2f", 1.5, -2), 3: b"7"}
    sums = [zlib.crc32(held.get(number, b"")) for number in range(4)]
    records = [one for tensor, checksum in enumerate(sums) for one in made.after(tensor, checksum)]
    with path.open("wb") as file:
        for at, data in [*made.start(), *records, *made.finish(sums), *((made.offsets[n], held[n]) for n in held)]:
            file.seek(at)
            file.write(data)
    assert path.stat().st_size == made.size
    state = torch.load(path, mmap=True, weights_only=True)
    assert state["large"].shape == state["again"].shape == (size,)
    assert state["after"].tolist() == [1.5, -2] and state["last"].tolist() == [55]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("model/data/0").file_size == archive.getinfo("model/data/2").file_size == size
        assert [archive.read(f"model/data/{number}") for number in held] == list(held.values())
    found = read_rank_file(path)
    assert tuple(one.offset for one in found.tensors) == made.offsets
    assert [one.shape for one in found.tensors] == [(size,), (2,), (size,), (1,)]
