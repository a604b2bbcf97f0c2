"""Files made to mislead the readers: each is refused by one of our errors, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import resource
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.formats import rank_files
from engine.formats.configs import read_config
from engine.formats.python_source import UNTOLD, literals
from engine.formats.rank_files import Pickles
from engine.formats.unpickle import load_pickle
from engine.formats.zipdir import TorchZip
from engine.storage.local import local_file
from tests.support.readers import read_pickled_mapping, read_rank_file, read_safetensors


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x08tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x08t(K\x01t\x89ccollections\nOrderedDict\n)RtR"
# 40 lists, each holding the one before twice: a short pickle of 2 ** 40 values.
LAUGHS = b"]q\x00" + b"".join(b"0]q\x01(h\x00h\x00eq\x00" for _ in range(40))


def state_dict(value: bytes = TENSOR, *, before: bytes = b"", after: bytes = b"") -> bytes:
    return b"\x80\x02" + before + b"}" + text(b"a") + value + b"s" + after + b"."


def rank_file(folder: Path, pickled: bytes, order: bytes = b"little") -> Path:
    path = folder / "model_tp0_pp0.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/byteorder", order)
        archive.writestr("model/data/0", b"\0" * 32)
    return path


def refusal(read: Callable[[Path], Any], path: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        read(path)
    assert len(str(caught.value)) < 2000
    return caught.value


def test_the_file_that_the_attacks_start_from_is_read(tmp_path: Path) -> None:
    (tensor,) = read_rank_file(rank_file(tmp_path, state_dict())).tensors
    assert (tensor.dtype, tensor.shape, tensor.strides) == ("F32", (8,), (1,))


@pytest.mark.parametrize(
    "attributes",
    [
        b"](" + STORAGE + b"I-1000\n(K\x08t(K\x01tNeb",  # an offset before the storage
        b"](" + STORAGE + b"K\x00(K\x08t(" + text(b"x") + b"tNeb",  # a stride that is text
        b"N}" + text(b"offset") + b"I-1000\ns\x86b",
    ],
)
def test_a_tensor_cannot_be_changed_after_it_was_checked(attributes: bytes, tmp_path: Path) -> None:
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(TENSOR + attributes))).code == "E301"


@pytest.mark.parametrize(
    "named",
    [b"ctorch\nFloatStorage\n", b"ctorch\nbfloat16\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cx\nConfig\n"],
)
@pytest.mark.parametrize("state", [b"](" + text(b"F16") + b"e", b"N}" + text(b"dtype") + text(b"F16") + b"s\x86"])
def test_one_file_cannot_change_how_the_next_is_read(named: bytes, state: bytes, tmp_path: Path) -> None:
    path = rank_file(tmp_path, state_dict(before=named + state + b"b0"))
    assert refusal(read_rank_file, path).code == "E301"
    (tensor,) = read_rank_file(rank_file(tmp_path, state_dict())).tensors
    assert tensor.dtype == "F32"


def test_attributes_of_a_state_dict_are_not_kept(tmp_path: Path) -> None:
    pickled = state_dict(after=b"}" + text(b"items") + b"K\x01sb").replace(
        b"\x80\x02}", b"\x80\x02ccollections\nOrderedDict\n)R"
    )
    assert [t.name for t in read_rank_file(rank_file(tmp_path, pickled)).tensors] == ["a"]


@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * 300_000,
        b")q\x000" + b"h\x00h\x00\x86q\x000" * 40 + b"h\x00",
        b"(K\x01K\x02t",
        b"ctorch\nbfloat16\n",
        b"C\x01a",
    ],
    ids=["deep", "shared", "tuple", "dtype", "bytes"],
)
def test_a_key_that_is_not_text_is_refused_before_it_is_hashed(key: bytes, tmp_path: Path) -> None:
    error = refusal(read_rank_file, rank_file(tmp_path, state_dict(after=key + b"K\x01s")))
    assert error.code == "E301"
    assert "not text" in str(error)


def test_a_name_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pickled = b"\x80\x02}" + text(b"\xed\xa0\x80") + TENSOR + b"s."
    assert "not text" in str(refusal(read_rank_file, rank_file(tmp_path, pickled)))


def test_a_short_pickle_of_many_values_is_refused_at_once(tmp_path: Path) -> None:
    assert refusal(read_pickled_mapping, rank_file(tmp_path, state_dict(LAUGHS))).code == "E301"
    shape = TENSOR.replace(b"(K\x08t", LAUGHS)
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(shape))).code == "E301"
    storage_key = TENSOR.replace(text(b"0"), LAUGHS)
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(storage_key))).code == "E301"


@pytest.mark.timeout(20)
def test_what_lies_beside_tensors_is_looked_at_once_however_often_it_is_held(tmp_path: Path) -> None:
    held: dict[int, Any] = dict.fromkeys(range(600), 1)
    for _ in range(3):
        held = dict.fromkeys(range(600), held)
    beside = text(b"extra") + pickle.dumps(held, 2)[2:-1] + b"s"
    assert read_rank_file(rank_file(tmp_path, state_dict(after=beside))).left == ()


@pytest.mark.parametrize("value", [b"]q\x00h\x00a", b"]" * 10_000 + b"a" * 9_999], ids=["in itself", "deep"])
def test_a_configuration_nested_without_end_is_refused(value: bytes, tmp_path: Path) -> None:
    error = refusal(read_pickled_mapping, rank_file(tmp_path, state_dict(value)))
    assert "nested too deeply" in str(error)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xf0\xff\xff\x0f.",
        b"\x80\x02}p4294967280\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
    ],
    ids=["memo", "text memo", "bytearray", "unicode", "frame", "long"],
)
def test_a_number_in_a_pickle_reserves_no_memory(pickled: bytes, tmp_path: Path) -> None:
    path = rank_file(tmp_path, pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    refusal(read_rank_file, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB


@pytest.mark.parametrize(
    "pickled",
    [b"(cos\nsystem\n" + text(b"true") + b"o", b"(" + text(b"true") + b"ios\nsystem\n", b"\x82\x01", b"Pos\n"],
    ids=["OBJ", "INST", "EXT1", "PERSID"],
)
def test_other_ways_to_name_or_call_something_are_refused(pickled: bytes, tmp_path: Path) -> None:
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(pickled))).code == "E302"


@pytest.mark.parametrize("called", [b"ctorch\nbfloat16\n", b"K\x01", b"ctorch\nTensor\n", b"}", text(b"upper")])
def test_only_functions_that_build_tensors_can_be_called(called: bytes, tmp_path: Path) -> None:
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(called + b")R"))).code == "E301"
    assert refusal(read_rank_file, rank_file(tmp_path, state_dict(called + b")\x81"))).code == "E301"


def test_a_sharded_tensor_is_told_from_an_attack(tmp_path: Path) -> None:
    sharded = b"ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n)\x81"
    error = refusal(read_rank_file, rank_file(tmp_path, state_dict(sharded)))
    assert error.code == "E303"
    assert "sharding library" in str(error)
    assert "ShardedTensor" in str(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_an_element_type_that_is_not_supported_is_told_from_an_attack(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    error = refusal(read_rank_file, tmp_path / "x.pt")
    assert error.code == "E303"
    assert "Complex" in str(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_with_attributes_are_tensors(zipped: bool, tmp_path: Path) -> None:
    marked, parameter = torch.arange(3.0), torch.nn.Parameter(torch.ones(2))
    marked.is_tensor_parallel = parameter.is_tensor_parallel = True
    unsigned = torch.ones(2, dtype=torch.uint16)
    state = {"marked": marked, "parameter": parameter, "unsigned": unsigned, "nested": {"x": torch.ones(1)}}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    header = read_rank_file(tmp_path / "x.pt")
    assert [(t.name, t.dtype) for t in header.tensors] == [("marked", "F32"), ("parameter", "F32"), ("unsigned", "U16")]
    raw, at = (tmp_path / "x.pt").read_bytes(), header.tensors[0].offset
    assert struct.unpack("<3f", raw[at : at + 12]) == (0, 1, 2)


def test_a_flipped_bit_beside_the_payload_never_moves_a_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(7.0), "b": torch.arange(5)}, tmp_path / "x.pt")
    raw = (tmp_path / "x.pt").read_bytes()
    offsets = [t.offset for t in read_rank_file(tmp_path / "x.pt").tensors]
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        starts = [archive.getinfo(f"x/data/{i}").header_offset for i in range(2)]
    refused = 0
    for start, offset in zip(starts, offsets, strict=True):
        for at in range(start, offset):
            for bit in range(8):
                flipped = bytearray(raw)
                flipped[at] ^= 1 << bit
                (tmp_path / "y.pt").write_bytes(flipped)
                try:
                    assert [t.offset for t in read_rank_file(tmp_path / "y.pt").tensors] == offsets
                except EngineError as error:
                    assert error.code == "E301"
                    refused += 1
    assert refused > 100


LOCAL, DIRECTORY = b"PK\x03\x04", b"PK\x01\x02"


@pytest.mark.parametrize(
    ("at", "form", "values", "told"),
    [
        ((LOCAL, 0), "4s", (b"PK\x03\x05",), "no local header"),
        ((LOCAL, 8), "<H", (8,), "differs between its local header"),
        ((LOCAL, 28), "<H", (1,), "of unclear length"),
        ((DIRECTORY, 0), "4s", (b"PK\x01\x03",), "begins with"),
        ((DIRECTORY, 8), "<H", (0x2000,), "encrypted"),
        ((DIRECTORY, 10), "<H", (8,), "is compressed"),
        ((DIRECTORY, 20), "<I", (7,), "is compressed"),
        ((DIRECTORY, 20), "<2I", (1 << 10, 1 << 10), "they overlap"),
        ((DIRECTORY, 34), "<H", (2,), "on disk 2"),
    ],
)
def test_a_zip_that_torch_would_not_write_is_refused(
    at: tuple[bytes, int], form: str, values: tuple[Any, ...], told: str, tmp_path: Path
) -> None:
    path = rank_file(tmp_path, state_dict())
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, raw.rindex(at[0]) + at[1], *values)
    path.write_bytes(raw)
    assert told in str(refusal(read_rank_file, path))


def test_a_zip_that_begins_with_something_that_it_does_not_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model_tp0_pp0.pt"
    path.write_bytes(LOCAL + bytes(60))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data.pkl", state_dict())
        archive.writestr("model/data/0", b"\0" * 32)
    assert "something else before" in str(refusal(read_rank_file, path))


def test_a_zip_of_which_two_members_are_at_one_place_is_refused(tmp_path: Path) -> None:
    path = rank_file(tmp_path, state_dict())
    raw = path.read_bytes()
    (first, second) = (one.start() for one in list(re.finditer(DIRECTORY, raw))[-2:])
    path.write_bytes(raw[: second + 42] + raw[first + 42 : first + 46] + raw[second + 46 :])
    assert "begin at one place" in str(refusal(read_rank_file, path))


def test_a_payload_is_found_by_its_alignment_only_where_a_record_after_it_says_that_torch_wrote_it(
    tmp_path: Path,
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", bytes(4142))  # 16 bytes before the next payload are at a multiple of 64
        with archive.open("x/data/0", "w", force_zip64=True) as member:
            member.write(bytes(range(64)))
    raw = (tmp_path / "x.pt").read_bytes()
    with local_file(tmp_path / "x.pt").open() as opened:
        opened.at_hand = lambda start, end: False  # as in a store, which reads little at once
        found = TorchZip(opened, "x.pt", 0, len(raw)).payload()
    assert found == {"0": (raw.index(bytes(range(64))), 64)}


def test_a_storage_smaller_than_its_tensors_say_is_refused(tmp_path: Path) -> None:
    pickled = state_dict(TENSOR.replace(b"K\x08tQ", b"K\x09tQ"))
    assert "36" in str(refusal(read_rank_file, rank_file(tmp_path, pickled)))


def test_a_storage_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    pickled = state_dict(after=text(b"b") + TENSOR.replace(b"FloatStorage", b"HalfStorage") + b"s")
    assert "two ways" in str(refusal(read_rank_file, rank_file(tmp_path, pickled)))


@pytest.mark.parametrize(
    "number",
    [
        b"I0x" + b"f" * 2000 + b"\n", b"I-0x" + b"f" * 2000 + b"\n", b"L0x" + b"f" * 2000 + b"L\n",
        pickle.dumps(1 << 9000, 2)[2:-1], pickle.dumps(-1 << 20_000, 2)[2:-1],
    ],
)  # fmt: skip
def test_a_number_too_large_to_be_shown_is_refused(number: bytes) -> None:
    """As a key, an item of a set or an offset it would be written into an error."""
    assert "bits" in str(refusal(lambda _: load_pickle(b"\x80\x02" + number + b".", "x"), Path()))
    assert load_pickle(pickle.dumps([1 << 4000, -1 << 4000, True], 2), "x") == [1 << 4000, -1 << 4000, True]


@pytest.mark.parametrize("at", [4, 16], ids=["this disk", "all disks"])
def test_a_zip_that_says_it_is_on_several_disks_is_refused(at: int, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.pt")
    data = bytearray((tmp_path / "model.pt").read_bytes())
    data[data.rindex(b"PK\x06\x07") + at] ^= 2
    (tmp_path / "model.pt").write_bytes(data)
    assert "a zip of several" in str(refusal(read_rank_file, tmp_path / "model.pt"))


def test_a_zip_whose_record_of_64_bit_numbers_is_elsewhere_than_it_says_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    raw = bytearray((tmp_path / "model.pt").read_bytes())
    raw[raw.rindex(b"PK\x06\x07") + 8] ^= 1  # as where something was put before, and other offsets were corrected
    (tmp_path / "model.pt").write_bytes(raw)
    assert "64-bit numbers" in str(refusal(read_rank_file, tmp_path / "model.pt"))


def test_a_number_too_large_to_be_shown_is_not_told_by_a_training_config() -> None:
    assert literals(f"n = 0x{'f' * 4000}\nm = -0x{'f' * 4000}\nk = {1 << 63}") == {
        "k": 1 << 63, UNTOLD: {"m": True, "n": True}
    }  # fmt: skip


def test_a_training_config_in_yaml_with_a_number_too_large_to_be_shown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"k: 1\nn: 0x{'f' * 4000}\n")
    with pytest.raises(EngineError, match="E301"):
        read_config(local_file(tmp_path / "config.yaml"), "yaml")


def test_a_tag_in_a_training_config_in_yaml_makes_nothing_of_its_values(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "a: !!python/object/apply:os.getcwd []\nb: !x {c: !y 1}\nd: !!python/tuple [2]\n"
    )
    assert read_config(local_file(tmp_path / "config.yaml"), "yaml") == {"a": [], "b": {"c": "1"}, "d": [2]}


@pytest.mark.parametrize("letter", ["#", "\u00e9"])
def test_of_a_training_config_that_is_too_long_nothing_is_told(letter: str, tmp_path: Path) -> None:
    """Not its first part either: what follows may set a name again."""
    (tmp_path / "config.py").write_text("N = 1\n#" + letter * (1 << 20) + "\nN = 2\n")
    assert read_config(local_file(tmp_path / "config.py"), "python_source") == {}


@pytest.mark.parametrize(
    "made", [{1, 2, "c"}, frozenset((1, None)), {"a": {1.5}}, set(), OrderedDict(a=1), Counter("aab")]
)
@pytest.mark.parametrize("protocol", range(2, 6))
def test_containers_are_what_they_were_in_every_protocol(made: Any, protocol: int) -> None:
    assert load_pickle(pickle.dumps(made, protocol), "x") == made


@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (b"\x80\x04](K\x01\x90.", "no set"),
        (b"\x80\x04\x8f(]\x90.", "a key is a list"),
        (b"\x80\x04(]\x91.", "a key is a list"),
        (b"\x80\x02ccollections\nCounter\n]\x85R.", "no mapping"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "with arguments"),
        (b"\x80\x02c__builtin__\nset\n}\x85R.", "a set of many items"),
        (b"\x80\x02]K\x01K\x02s.", "items for a list"),
        (b"\x80\x02}K\x01a.", "items for a dict"),
        (b"\x80\x02K\x01}b.", "attributes for a int"),
        (b"\x80\x02K\x01)R.", "a call of a int"),
        (b"\x80\x02K\x01)\x81.", "an object of a int"),
    ],
)
def test_a_pickle_that_builds_what_it_cannot_is_refused(pickled: bytes, told: str) -> None:
    assert told in str(refusal(lambda _: load_pickle(pickled, "x"), Path()))


@pytest.mark.parametrize(
    ("value", "told"),
    [({"model": 7}, "int under the key model"), ({"model": {3: torch.ones(2)}}, "not text: 3"),
     ({"other": {"a": torch.ones(2)}}, "keys other"), ({"model": {}}, "an empty mapping")],
)  # fmt: skip
def test_a_file_without_tensors_under_its_key_is_refused(value: Any, told: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    nested = [re.compile("model")]
    assert told in str(
        refusal(lambda path: rank_files.read_rank_file(local_file(path), nested=nested), tmp_path / "x.pt")
    )


@pytest.mark.parametrize("keys", [("a",), ["a", "a"], [1], "a"])
def test_an_old_file_with_another_list_of_storages_is_refused(keys: Any, tmp_path: Path) -> None:
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, keys)
    (tmp_path / "x.pt").write_bytes(b"".join(pickle.dumps(one, 2) for one in parts))
    assert "list of different keys" in str(refusal(read_rank_file, tmp_path / "x.pt"))


def test_the_digest_of_a_pickle_that_was_read_is_no_pickle() -> None:
    load, honest = Pickles(4), pickle.dumps("x" * 5000, 2)
    assert load(honest, "honest") == "x" * 5000
    with pytest.raises(EngineError):
        load(hashlib.sha256(honest).digest(), "forged")


def test_a_file_from_a_big_endian_machine_is_told(tmp_path: Path) -> None:
    path = rank_file(tmp_path, state_dict(), b"big")
    assert "big-endian" in str(refusal(read_rank_file, path))
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    honest = path.read_bytes()
    at = honest.index(b"\x88", honest.index(b"little_endian"))
    path.write_bytes(honest[:at] + b"\x89" + honest[at + 1 :])
    assert "big-endian" in str(refusal(read_rank_file, path))


def test_a_tar_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"))
    assert refusal(read_rank_file, tmp_path / "x.pt").code == "E303"


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=20,
    ),
    st.integers(2, 5),
)
def test_honest_data_of_any_protocol_is_what_it_was(value: Any, protocol: int) -> None:
    pickled = pickle.dumps(value, protocol)
    assume(protocol > 2 or (b"_codecs" not in pickled and b"__builtin__" not in pickled))  # bytes are calls there
    assert load_pickle(pickled, "x") == value


@given(st.binary(max_size=60))
def test_no_bytes_at_all_give_another_error(data: bytes) -> None:
    try:
        load_pickle(b"\x80\x02" + data + b".", "x")
    except EngineError as error:
        assert error.code in ("E301", "E302", "E303")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("n = 1\nif x:\n    n = 2", {}),
        ("n = 1\nfor n in f():\n    pass", {}),
        ("n = 1\nn += 1", {}),
        ("n = 1\nn += f()", {}),
        ("n = 3\ndel n", {}),
        ("n = 1\nfrom m import n", {}),
        ("n = 1\nm = 2\nimport n.m", {"m": 2}),
        ("n = 1\nm = 2\nimport n.m as m", {"n": 1}),
        ("n = 1\ndef n(): pass", {}),
        ("m = dict(a=1)\nm['a'] = 2", {"m": {"a": 2}}),
        ("m = dict(a=1)\nm['a'] = f()", {}),
        ("m = dict(a=1)\nm.update(a=2)", {}),
        ("m = dict(a=1)\nn = dict(m=m)\nm['a'] = 2", {"m": {"a": 2}, "n": {"m": {"a": 2}}}),
        ("m = {}\nm['m'] = m", {}),
        ("b = {'a': 1}\nm = {**b, 'c': 2}\nn = dict(b, a=3)", {"b": {"a": 1}, "m": {"a": 1, "c": 2}, "n": {"a": 3}}),
        ("m = {'a': 1, **f(), 'b': 2}", {"m": {"b": 2}}),
        ("m = {'a': 1, 'a': f()}", {"m": {}}),
        ("b = {**f(), 'c': 2}\nm = {'a': 1, **b}", {"b": {"c": 2}, "m": {"c": 2}}),  # b may have another `a`
        ("a, b = 1, 2\nc = (2, 3)", {"c": [2, 3]}),
        ("a = b = 3\nn: int = 4", {"a": 3, "b": 3, "n": 4}),
        ("s = 'x'\nt = s + 'z'\nu = f'{s}'", {"s": "x", "t": "xz"}),
        ("n = 8 if 2 > 1 else 4\nm = not 1", {"m": False}),
        ("n = (-1) ** 0.5\nm = 1 / 0\nk = 9 ** 9 ** 9\nb = b'x'\ne = ...", {}),
        ("n = 'a' * 10 ** 9", {}),
        # what is passed on may be changed, under whatever name, at any later time
        ("m = dict(a=1)\nn = m\nn.update(a=2)", {}),
        ("m = dict(a=1)\nf(m['a'])", {}),
        ("m = dict(a=1)\nf(m)\nk = 1", {"k": 1}),
        ("m = dict(a=1)\nn = dict(b=f(m))", {}),
        ("m = dict(a=1)\nn = [m]\nn[0]['a'] = f()", {}),
        ("m = dict(a=1)\nfor n in [m]:\n    n['a'] = 2", {}),
        ("m = dict(a=1)\ndef f():\n    m['a'] = 2\nf()", {}),
        ("def f():\n    global m\n    m = 2\nm = 1\nf()", {}),
        ("m = 1\nn = dict(a=(m := 2), b=m, c=3)", {"n": {"c": 3}}),
        ("def f():\n    m['a'] = 2\nn = dict(a=1)\nm = n\nf()\nm = 0", {}),
        ("n = (f(m) for _ in [1])\nm = dict(a=1)\nlist(n)", {}),
        ("m = {'a': 1, **dict(b=f())}", {"m": {"a": 1}}),
        ("m = dict(b=f())\nn = 'a' in m", {}),
        ("m = 1\nexec('m = 2')\nn = 2", {"n": 2}),
        ("m = 1\neval(f)\nn = 2", {"n": 2}),
        ("m = 1\nglobals()['m'] = 2", {}),
        ("m = 1\nlocals().update(m=2)", {}),
        ("m = 1\nvars()['m'] = 2", {}),
        ("m = 1\nsetattr(here, 'm', 2)", {}),
        ("m = 1\nhere.modules[f].m = 2", {}),
        ("m = 1\nfrom base import *\nn = 2", {"n": 2}),
        ("m = 1\nmatch f():\n    case m:\n        pass", {}),
        ("dict = f\nm = dict(a=1)", {}),
        ("n = open('/etc/passwd').read()\nm = __import__('os')\nk = (lambda: 1)()\nl = [i for i in range(9)]", {}),
    ],
)
def test_a_training_config_tells_only_what_is_certain(source: str, told: dict[str, Any]) -> None:
    assert {name: value for name, value in literals(source).items() if name != UNTOLD} == told


def test_a_short_training_config_of_many_values_is_left_out() -> None:
    source = "a = [1]\n" + "a = [a, a]\n" * 40
    assert set(literals(source)) == {UNTOLD}
    assert literals("x = " + "(" * 5000 + "1" + ")" * 5000) == {}
    assert literals("x = " + "-" * 100_000 + "1") == {}
    assert set(literals("x = 1\n" * 5000)) == {UNTOLD}


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F64","shape":{},"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":5}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"x":1}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.encode("utf-16"),
        b"[" * 100_000,
    ],
)
def test_a_safetensors_header_of_other_types_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    assert refusal(read_safetensors, path).code == "E301"


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    raw = struct.pack("<Q", len(header)) + header + b"\0" * 8
    path = tmp_path / "x.safetensors"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert refusal(read_safetensors, path).code == "E301"


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    assert refusal(read_safetensors, tmp_path / "x.safetensors").code == "E305"
