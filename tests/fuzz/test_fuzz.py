"""Random and nearly right input for every reader: a result or an EngineError, soon and in little memory."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, Place
from engine.explaining.codes import list_codes
from engine.formats.checksums import check_files
from engine.formats.dcp import read_dcp
from engine.formats.python_source import literals
from engine.formats.safetensors import read_sharded_safetensors
from engine.formats.unpickle import load_pickle
from engine.language.axes import parse_axes
from engine.language.expressions import evaluate, render_tree
from engine.language.format import format_mapping
from engine.language.layout_file import load_layout
from engine.language.loader import load_text
from engine.language.mapping_file import load_mapping
from engine.language.model import Expression
from engine.language.names import pattern
from engine.language.sandbox import FILTERS, TESTS
from engine.storage.local import local_file
from engine.storage.virtual import VirtualFile, VirtualStore
from tests.support.depth import SOAK
from tests.support.readers import (
    read_hf_folder,
    read_json,
    read_pickled_mapping,
    read_python_source,
    read_rank_file,
    read_safetensors,
)

ROOT = Path(__file__).parent.parent.parent
SEEDS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "seeds").iterdir())}
CODES = list_codes()
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40" if SOAK else "15"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=5),
    derandomize=EXAMPLES <= 40,  # `make test` tries the same each time, `make fuzz` others
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
pytestmark = pytest.mark.timeout(0 if EXAMPLES > 40 else 120)


@contextmanager
def refusal() -> Iterator[None]:
    """Nothing but our errors, which can be printed."""
    try:
        yield
    except EngineError as error:
        assert error.code in CODES
        assert error.code != "E901"
        assert len(str(error).encode()) < 40_000


def read(data: bytes, *readers: Callable[[Path], Any], suffix: str = ".pt") -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(data)
        for reader in readers:
            with refusal():
                reader(path)
        assert sorted(os.listdir(folder)) == [path.name]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with bytes flipped, cut out, doubled, put in from another seed, or made a large number."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        end = min(len(data), at + draw(st.integers(1, 40)))
        match draw(st.integers(0, 7)):
            case 0:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[at:end] = other[start : start + draw(st.integers(0, 60))]
            case 5:
                del data[at:]
            case 6:
                data[at:at] = draw(st.binary(max_size=20))
            case _:
                kind = draw(st.sampled_from("BHIQ"))
                number = draw(
                    st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, -1, 1 << 15, 1 << 31, 1 << 32, 1 << 62, 1 << 63))
                )
                size = struct.calcsize(kind)
                data[at : at + size] = struct.pack(f"<{kind}", number % (1 << 8 * size))
    return bytes(data)


# Checkpoint files.


@fuzzed
@given(mutated([data for name, data in SEEDS.items() if name.endswith(".pt")]))
def test_a_nearly_right_rank_file_is_read_or_refused(data: bytes) -> None:
    def check(path: Path) -> None:
        check_files([local_file(path)], lambda _: None)

    read(data, read_rank_file, read_pickled_mapping, read_python_source, check)


def zipped(pickled: bytes) -> bytes:
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", pickled)
            archive.writestr("x/data/0", b"\0" * 64)
        file.seek(0)
        return file.read()


def _pickles() -> list[bytes]:
    import io

    found = [data for name, data in SEEDS.items() if name.endswith(".pkl")]
    for data in SEEDS.values():
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                found.append(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    return found


PICKLES = _pickles()


@fuzzed
@given(mutated(PICKLES))
def test_a_nearly_right_pickle_in_a_right_zip_is_read_or_refused(data: bytes) -> None:
    read(zipped(data), read_rank_file, read_pickled_mapping)


GLOBALS = (
    b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_tensor_v3\n", b"torch._utils\n_rebuild_parameter\n",
    b"torch._tensor\n_rebuild_from_type_v2\n", b"torch\nFloatStorage\n", b"torch.storage\nUntypedStorage\n",
    b"torch\nbfloat16\n", b"torch\nSize\n", b"torch\nTensor\n", b"collections\nOrderedDict\n", b"builtins\nset\n",
    b"x\nConfig\n", b"os\nsystem\n", b"argparse\nNamespace\n", b"megatron.core\nX\n", b"_codecs\nencode\n",
    b"torch.distributed.tensor\nDTensor\n", b"torch.distributed.checkpoint.metadata\nMetadata\n",
    b"torch._utils\n_rebuild_wrapper_subclass\n",
)  # fmt: skip
CONSTANTS = [getattr(pickle, name) for name in dir(pickle) if name.isupper()]
OPCODES = [value[0] for value in CONSTANTS if isinstance(value, bytes) and len(value) == 1]
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"
piece = st.one_of(
    st.sampled_from(OPCODES).map(lambda opcode: bytes((opcode,))),
    st.sampled_from(GLOBALS).map(lambda named: b"c" + named),
    st.integers(0, 255).map(lambda n: b"K" + bytes((n,))),
    st.integers(0, 8).map(lambda n: b"h" + bytes((n,))),
    st.integers(0, 8).map(lambda n: b"q" + bytes((n,))),
    st.integers(-(1 << 70), 1 << 70).map(lambda n: b"I%d\n" % n),
    st.text(max_size=8).map(lambda text: b"X" + struct.pack("<I", len(text.encode())) + text.encode()),
    st.sampled_from((b"(", b"t", b")", b"}", b"]", b"R", b"b", b"s", b"u", b"e", b"a", b"\x85", b"\x86", b"\x81", b"Q",
                     STORAGE, b"0", b"2", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94")),
    st.binary(max_size=6),
)  # fmt: skip


@fuzzed
@given(st.lists(piece, max_size=60).map(b"".join), st.booleans())
def test_random_opcodes_are_read_or_refused(body: bytes, inside: bool) -> None:
    pickled = b"\x80\x02" + (b"}X\x01\x00\x00\x00a" + body + b"s." if inside else body + b".")
    with refusal():
        load_pickle(pickled, "x")
    read(zipped(pickled), read_rank_file, read_pickled_mapping)
    read(pickled, read_rank_file, read_pickled_mapping)


# Safetensors and JSON.

json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(("F32", "BF16", "U8", "F8_E4M3", "x")) | json_like,
        "shape": st.lists(st.integers(-2, 1 << 65), max_size=4) | json_like,
        "data_offsets": st.lists(st.integers(-9, 1 << 65), min_size=2, max_size=2) | json_like,
    },
)


@fuzzed
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entry | json_like, max_size=4),
    st.binary(max_size=40),
)
def test_random_safetensors_headers_are_read_or_refused(header: dict[str, Any], payload: bytes) -> None:
    import json

    text = json.dumps(header).encode()
    read(struct.pack("<Q", len(text)) + text + payload, read_safetensors, read_hf_folder, suffix=".safetensors")


@fuzzed
@given(mutated([SEEDS["three.safetensors"]]))
def test_a_nearly_right_safetensors_file_is_read_or_refused(data: bytes) -> None:
    read(data, read_safetensors, read_hf_folder, suffix=".safetensors")


@fuzzed
@given(json_like, mutated([b'{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": 1e9}}']))
def test_random_json_is_read_or_refused(value: Any, damaged: bytes) -> None:
    import json

    for data in (json.dumps(value).encode(), json.dumps({"weight_map": value}).encode(), damaged):
        read(data, read_json, suffix=".json")
        read(data, read_hf_folder, suffix=".safetensors.index.json")


# Torch's distributed checkpoints.

STEP = ROOT / "tests" / "fixtures" / "dcp" / "odd4" / "step-10"
FILES = {path.name: path.read_bytes() for path in sorted(STEP.iterdir())}
SHARDS = {path.name: path.read_bytes() for path in sorted((STEP.parents[1] / "fsdp4-f32-hf" / "step-10").iterdir())[:2]}


def memory_store(files: Mapping[str, bytes | bytearray]) -> VirtualStore:
    return VirtualStore("m", {name: VirtualFile.of(name, data) for name, data in files.items()})


@fuzzed
@given(mutated([FILES[".metadata"]]))
def test_a_nearly_right_directory_is_read_or_refused(data: bytes) -> None:
    store = memory_store(FILES | {".metadata": data})
    with refusal():
        for file in read_dcp(store, [name for name in FILES if name != ".metadata"]):
            assert all(0 <= t.offset <= file.size and t.offset + t.nbytes <= file.size for t in file.tensors)


@fuzzed
@given(st.sampled_from([name for name in FILES if name != ".metadata"]), st.data())
def test_a_nearly_right_file_of_entries_is_read_or_refused(name: str, data: st.DataObject) -> None:
    changed = data.draw(mutated([FILES[name]]))
    store = memory_store(FILES | {name: changed})
    with refusal():
        for file in read_dcp(store, [other for other in FILES if other != ".metadata"]):
            assert all(t.offset + t.nbytes <= file.size for t in file.tensors)


@fuzzed
@given(mutated(list(SHARDS.values())))
def test_a_nearly_right_file_of_boxes_is_read_or_refused(data: bytes) -> None:
    first, second = SHARDS
    store = memory_store({first: bytearray(data), second: bytearray(SHARDS[second])})
    with refusal():
        for file in read_sharded_safetensors(store, [first, second]):
            for tensor in file.tensors:
                assert tensor.recorded is not None
                box = zip(tensor.recorded.starts, tensor.shape, tensor.recorded.whole, strict=True)
                assert all(low + size <= whole for low, size, whole in box)


# The language.

axis_name = st.sampled_from(("heads", "k", "v", "hidden", "a", "b", "c", "d", "_x1"))
node = st.recursive(
    axis_name,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map(lambda parts: f"({' '.join(parts)})")
        | st.lists(inner, min_size=1, max_size=4).map(lambda parts: f"({' + '.join(parts)})")
    ),
    max_leaves=10,
)


@fuzzed
@given(st.lists(node | st.just("|"), max_size=6).map(" ".join))
def test_axes_that_are_read_are_written_as_they_were(text: str) -> None:
    with refusal():
        axes = parse_axes(text)
        again = parse_axes(str(axes))  # groups in groups may be written flat
        assert (str(again), again.bar, again.pieces()) == (str(axes), axes.bar, axes.pieces())
        assert len(axes.pieces()) <= 64
        assert [set(piece) for piece in axes.bias().pieces()]


@fuzzed
@given(st.text(alphabet="()+| ab_1é\0\n", max_size=60) | st.text(max_size=60))
def test_any_text_is_read_as_axes_or_refused(text: str) -> None:
    with refusal():
        assert str(parse_axes(str(parse_axes(text)))) == str(parse_axes(text))


literal = st.text(alphabet="abc.*+?[](|)^$\\-_09 é", min_size=1, max_size=5)
placeholder = st.sampled_from(("{layer}", "{tp}", "{tp:02}", "{pp:09}", "{param}", "{x}"))


@fuzzed
@given(st.lists(literal | placeholder, max_size=8).map("".join), st.data())
def test_a_name_that_a_pattern_writes_is_read_back(text: str, data: st.DataObject) -> None:
    with refusal():
        compiled = pattern(text)
        values: dict[str, Any] = {name: data.draw(st.integers(0, 10**17)) for name in compiled.placeholders}
        param = data.draw(st.sampled_from(("weight", "bias")))
        name = compiled.format({**values, "param": param})
        read_back = compiled.match(name)
        assert read_back is not None
        assert compiled.format({**read_back, "param": param}) == name


@fuzzed
@given(st.text(alphabet="{}:0123ab_. ", max_size=40) | st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_read_as_a_pattern_or_refused(text: str, name: str) -> None:
    with refusal():
        pattern(text).match(name)


NAMES: dict[str, Any] = {
    "n": 4096, "f": 2.5, "t": "text", "yes": True, "nothing": None, "m": {"a": {"b": 7}}, "l": [1, 2, [3]],
    "big": 10**40,
}  # fmt: skip
atom = st.one_of(
    st.sampled_from(
        (*NAMES, "missing", "omit", "true", "none", "m.a.b", "m.x.y", "l[0]", "l[2][0]", "l[9]", "t[0]", "m['a']")
    ),
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(("1e308", "1e999", "9" * 60, "''", "'a'", '"\\n"', "[]", "{}", "()")),
)


def _operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    operators = st.sampled_from(
        ("+", "-", "*", "/", "//", "%", "**", "<", "==", ">=", "and", "or", "in", "not in", "~")
    )
    filters, tests = st.sampled_from(sorted(FILTERS)), st.sampled_from(sorted(TESTS))
    return st.one_of(
        st.tuples(inner, operators, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, filters).map(lambda t: f"({t[0]} | {t[1]})"),
        st.tuples(inner, filters, inner).map(lambda t: f"({t[0]} | {t[1]}({t[2]}))"),
        st.tuples(inner, tests).map(lambda t: f"({t[0]} is {t[1]})"),
        st.tuples(inner, tests, inner).map(lambda t: f"({t[0]} is {t[1]}({t[2]}))"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(st.sampled_from(("gcd", "min", "max", "default", "present")), two).map(
            lambda t: f"{t[0]}({t[1][0]}, {t[1][1]})"
        ),
        inner.map(lambda one: f"(not {one})"),
        inner.map(lambda one: f"-{one}"),
        two.map(lambda t: f"[{t[0]}, {t[1]}]"),
        two.map(lambda t: f"{{{t[0]}: {t[1]}}}"),
        st.tuples(inner, st.sampled_from(("__class__", "real", "keys", "a"))).map(lambda t: f"{t[0]}.{t[1]}"),
    )


def value_of(text: str) -> None:
    with refusal():
        value = evaluate(Expression(text, Place("x.yaml")), {**NAMES, "present": lambda name: name == "x"})
        assert len(repr(value)) < 1 << 20
    with refusal():
        render_tree({"a": [Expression(text, Place("x.yaml"))]}, NAMES)


@fuzzed
@given(st.recursive(atom, _operations, max_leaves=12))
@example("1e999")
@example("('1e999' | float)")
@example("-(1e308 * 10)")
def test_a_random_expression_has_a_value_or_is_refused(text: str) -> None:
    value_of(text)


@fuzzed
@given(st.text(alphabet="ntml019.+-*/%()[]{}'\"|,: \\ifelsnodar_~<=>é\0\n", max_size=60) | st.text(max_size=60))
def test_any_text_as_expression_has_a_value_or_is_refused(text: str) -> None:
    value_of(text)


YAML = [
    (ROOT / "mappings" / "internlm2-7b.yaml").read_bytes(),
    b"a: 1\nb: [x, {c: 'd', e: \"\\u00e9\"}]\nf: |\n  text\n  more\ng: >-\n  folded\n? h\n: - i\n  - j # comment\n",
    b"a: &x {b: *x}\n<<: !!python/object:os.x {}\n%YAML 1.1\n--- ...\nc: 0x1F\nd: 012\ne: 12:30\nf: .inf\n",
]


@fuzzed
@given(mutated(YAML))
def test_nearly_right_yaml_is_read_or_refused(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with refusal():
        document = load_text(text)
        assert isinstance(document.data, dict)
    with refusal():
        format_mapping(text)


@fuzzed
@given(st.text(alphabet="ab:-[]{}?&*!|>'\"%@`#, \n\t\0\ufeff\x85é~<1.e", max_size=80) | st.text(max_size=80))
def test_any_text_as_yaml_is_read_or_refused(text: str) -> None:
    with refusal():
        load_text(text)
    with refusal():
        format_mapping(text)


MAPPING = (ROOT / "mappings" / "families" / "internlm2.yaml").read_bytes()
LAYOUT = (ROOT / "mappings" / "layouts" / "internevo.yaml").read_bytes()


@settings(fuzzed, max_examples=max(8, EXAMPLES // 4))
@given(mutated([MAPPING]), mutated([LAYOUT]))
def test_a_nearly_right_mapping_or_layout_is_loaded_or_refused(mapping: bytes, layout: bytes) -> None:
    read(mapping, lambda path: load_mapping(str(path)), suffix=".yaml")
    read(layout, lambda path: load_layout(str(path)), suffix=".yaml")


# Training configurations that are Python.

SOURCE = [
    b"import os\nparallel = dict(zero1=8, tensor=dict(size=2, mode='mtp'), pipeline=dict(size=N, interleaved=True))\n"
    b"N = 2 ** 3 // 4\nif os.environ.get('X'):\n    N += 1\n"
    b"model = {**base, 'x': [1, 2.5, None, -3], f'{N}': 'a' + 'b'}\n"
    b"model['y']['z'] = model\na, (b, *c) = 1, (2, 3)\n",
    b"x = [[]]\nx[0] = x\ny = x == x\nz = {1: 2}[1]\nw = 'a' in 'abc' and 1 < 2 < 3\nv = 1 if x else 2\n",
]
python = st.recursive(
    st.sampled_from(("a", "b", "x", "1", "2.5", "'s'", "None", "True", "[]", "{}", "()", "10**9", "1e308", "-1")),
    lambda inner: st.one_of(
        st.tuples(
            inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<", "==", "in", "is", "and", "or"]), inner
        ).map(lambda t: f"({' '.join(t)})"),
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.tuples(inner, inner).map(lambda t: f"{{{t[0]}: {t[1]}}}"),
        st.tuples(inner, inner).map(lambda t: f"dict({t[0]}, x={t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"{t[0]}[{t[1]}]"),
        st.tuples(inner, inner).map(lambda t: f"{t[0]}.f({t[1]})"),
        inner.map(lambda one: f"f'{{{one}}}'" if "'" not in one and "{" not in one else one),
        inner.map(lambda one: f"-{one}"),
    ),
    max_leaves=8,
)
line = st.tuples(
    st.sampled_from(("a = ", "b = ", "x = a = ", "a['x'] = ", "a[0] = ", "a += ", "a **= ", "del a; b = ", "")), python
)


@fuzzed
@given(st.lists(line.map("".join), max_size=12).map("\n".join))
def test_random_python_gives_plain_values(source: str) -> None:
    plain(literals(source), 0)


@fuzzed
@given(mutated(SOURCE))
def test_nearly_right_python_gives_plain_values(data: bytes) -> None:
    plain(literals(data.decode("utf-8", "surrogateescape")), 0)
    read(data, read_python_source, suffix=".py")


def plain(value: Any, depth: int) -> None:
    assert depth < 60
    assert isinstance(value, dict | list | str | int | float | None)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        plain(item, depth + 1)
