"""Safetensors headers, indices and configurations that say what cannot be."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks import add, attack

SHARD = "model-00002-of-00003.safetensors"
OTHER = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a shard's header as data; a returned value replaces it."""

    def make(folder: Path) -> None:
        entries, payload = split((folder / SHARD).read_bytes())
        other = change(entries)
        (folder / SHARD).write_bytes(join(json.dumps(entries if other is None else other).encode(), payload))

    return make


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def text(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        (folder / SHARD).write_bytes(join(change(raw[8 : 8 + length]), raw[8 + length :]))

    return make


for _length in (0, 1, 7, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 8, 1 << 63, (1 << 64) - 1):
    add(f"a header of {_length} bytes", "hf", lambda folder, n=_length: (folder / SHARD).write_bytes(
        struct.pack("<Q", n) + (folder / SHARD).read_bytes()[8:]), "E301", "damaged")  # fmt: skip

for _name, _change in {
    "data that starts before the payload": lambda e: first(e).update(data_offsets=[-2, first(e)["data_offsets"][1]]),
    "data that ends before it starts": lambda e: first(e).update(data_offsets=first(e)["data_offsets"][::-1]),
    "data beyond the file": lambda e: first(e).update(data_offsets=[1 << 62, (1 << 62) + 2]),
    "offsets that are fractions": lambda e: first(e).update(data_offsets=[0.0, 2.0]),
    "offsets that are true and false": lambda e: first(e).update(data_offsets=[False, True]),
    "three offsets": lambda e: first(e).update(data_offsets=[0, 1, 2]),
    "offsets of 5000 digits": lambda e: first(e).update(data_offsets=[0, 10**4000]),
    "two tensors at one place": lambda e: e.update(twin=first(e)),
    "two empty tensors at one place and a hole": lambda e: first(e).update(shape=[0], data_offsets=[0, 0]),
    "a size below zero": lambda e: first(e).update(shape=[-1, -16]),
    "a shape whose product is 2 ** 64": lambda e: first(e).update(shape=[1 << 32, 1 << 32]),
    "a shape whose product overflows to what fits": lambda e: first(e).update(shape=[1 << 63, 2, 16]),
    "a shape that is text": lambda e: first(e).update(shape="16"),
    "a shape of 100,000 dimensions": lambda e: first(e).update(shape=[1] * 100_000 + [7]),
    "a type that is none": lambda e: first(e).update(dtype="BF17"),
    "a type in small letters": lambda e: first(e).update(dtype="bf16"),
    "a type that is null": lambda e: first(e).update(dtype=None),
    "a type of another width": lambda e: first(e).update(dtype="F32"),
    "an entry that is a list": lambda e: e.update(x=[]),
    "an entry that is null": lambda e: e.update(x=None),
    "metadata that is a list": lambda e: e.update(__metadata__=[]),
    "metadata that is nested": lambda e: e.update(__metadata__={"x": {"y": "z"}}),
    "a list for a header": lambda e: [e],
    "null for a header": lambda e: [None],
}.items():
    add(f"a safetensors file with {_name}", "hf", header(_change), "E301", "damaged")

for _type in ("F6_E2M3", "F8_E8M0", "C64"):
    add(f"a safetensors file of {_type}", "hf", header(lambda e, t=_type: first(e).update(dtype=t)), "E303", _type)

for _name, _edit in {
    "a key that occurs twice": lambda raw: raw.rstrip()[:-1] + b',"__metadata__":{}}',
    "a tensor that occurs twice": lambda raw: raw.rstrip()[:-1] + b"," + raw.rstrip()[raw.index(b'"model') :],
    "a header of brackets": lambda raw: b"[" * 200_000,
    "a header of open braces": lambda raw: b'{"a":' * 100_000,
    "a header of zeros": lambda raw: b"\0" * len(raw),
    "a header that is not UTF-8": lambda raw: raw.replace(b"model", b"m\xff\xfeel", 1),
    "a header of UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "a header with a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "not-a-number for an offset": lambda raw: raw.replace(b'"data_offsets":[0', b'"data_offsets":[NaN', 1),
    "an infinite size": lambda raw: raw.replace(b'"shape":[', b'"shape":[1e999,', 1),
    "a number of 100,000 digits": lambda raw: raw.replace(b'"shape":[', b'"shape":[' + b"9" * 100_000 + b",", 1),
    "bytes behind its header": lambda raw: raw + b"x",
    "half a character in a name": lambda raw: raw.replace(b'"model', b'"\\ud800model', 1),
}.items():
    add(f"a safetensors file with {_name}", "hf", text(_edit), "E301", "damaged")


@attack("hf", "E205 E207", "")
def a_tensor_of_another_name(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes().replace(b"mlp.gate_proj", b"mlp.gite_proj", 1))


@attack("hf", "E207", "")
def two_shards_swapped(folder: Path) -> None:
    (folder / SHARD).rename(folder / "aside")
    (folder / OTHER).rename(folder / SHARD)
    (folder / "aside").rename(folder / OTHER)


@attack("hf", "E208 E207", "")
def one_shard_twice(folder: Path) -> None:
    (folder / OTHER).write_bytes((folder / SHARD).read_bytes())


@attack("hf", "E301", "")
def a_shard_cut_short(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


@attack("hf", "E301", "")
def a_shard_with_bytes_behind_its_end(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"\0")


@attack("hf", "E201", SHARD)
def a_shard_that_is_missing(folder: Path) -> None:
    (folder / SHARD).unlink()


@attack("hf", "E304", "two sets")
def a_second_set_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / SHARD).read_bytes())


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        change(data)
        (folder / INDEX).write_text(json.dumps(data))

    return make


def points(name: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["weight_map"].update(dict.fromkeys(list(data["weight_map"])[:1], name))


for _target in ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb", 5, None, ["x"], {"x": 1}):
    add(f"an index that points to {_target!r}", "hf", index(points(_target)), "E301", "name of a file beside it")
add("an index that names a tensor of no file", "hf",
    index(lambda data: data["weight_map"].update(x=SHARD)), "E207", "`x`")  # fmt: skip
add("an index that leaves a tensor out", "hf", index(lambda data: data["weight_map"].popitem()), "E301", "leaves out")
add("an index that leaves a file out", "hf", index(
    lambda data: data.update(weight_map={k: file for k, file in data["weight_map"].items() if file != SHARD})
), "E207", f"not read, as the index does not name them: {SHARD}")  # fmt: skip
add("an index without tensors", "hf", index(lambda data: data.update(weight_map={})), "E301", "weight_map")
add("an index whose map is a list", "hf", index(lambda data: data.update(weight_map=[])), "E301", "weight_map")
add("an index that claims another total", "hf", index(lambda data: data["metadata"].update(total_size=-1)), None)


def written(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


for _file in (INDEX, "config.json"):
    for _name, _raw in {
        "empty": b"",
        "cut short": b'{"weight_map": {"a"',
        "of 100,000 brackets": b"[" * 100_000,
        "not UTF-8": b'{"a": "\xff"}',
        "of zeros": b"\0" * 100,
    }.items():
        add(f"{_file} {_name}", "hf", written(_file, _raw), "E301")
add("an index that is a list", "hf", written(INDEX, b"[]"), "E301")
add("an index with a key twice", "hf", written(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'), "E301", "twice")
add("a config.json that is a list", "hf", written("config.json", b"[]"), "E303")
add("a config.json of no keys", "hf", written("config.json", b"{}"), "E304")
add("a config.json of two megabytes", "hf", written("config.json", b'{"a": "' + b"x" * (2 << 20) + b'"}'), "E301 E303")


def config(**changes: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | changes))

    return make


for _key, _value, _codes in (
    ("num_hidden_layers", 0, "E218"),
    ("num_hidden_layers", -1, "E218"),
    ("num_hidden_layers", 1 << 60, "E203 E207"),
    ("num_hidden_layers", 10**4000, "E203 E301 E105 E218"),
    ("num_hidden_layers", float("nan"), "E218"),
    ("num_hidden_layers", float("inf"), "E218"),
    ("num_hidden_layers", "4", "E218"),
    ("num_hidden_layers", [4], "E218"),
    ("num_hidden_layers", None, "E218"),
    ("hidden_size", 0, "E218"),
    ("num_attention_heads", 0, "E218"),
    ("num_attention_heads", 5, "E203 E105 E204"),
    ("intermediate_size", 1e308, "E218"),
    ("intermediate_size", "9**9**9", "E218"),
    ("rms_norm_eps", "\ud800", "E218"),
    ("rms_norm_eps", {"a": {"b": ["c"] * 1000}}, "E218"),
    ("vocab_size", 31, "E203"),
    ("architectures", "x" * 100_000, "E218"),
    ("architectures", [None], "E209"),
    ("auto_map", {"AutoModel": "evil.Model"}, "E209"),
):
    _shown = repr(_value) if not isinstance(_value, int) or abs(_value) < 1 << 64 else "long"
    add(f"a config.json with {_key} {_shown[:20]!r}", "hf", config(**{_key: _value}), _codes)


@attack("hf", "E304", "adapter")
def an_adapter_beside_the_weights(folder: Path) -> None:
    """transformers adds it to the weights, and other programs may not."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


@attack("hf", "E304", "adapter")
def an_adapter_without_a_model(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
