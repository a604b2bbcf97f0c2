"""Pickles that run code under `pickle.load` or `torch.load`, or that exhaust the reader.

Each value is put into a good file as one more item, in four carriers: a rank file as torch saves
it, a rank file as torch saved it before 2020, the model's configuration, and the training one.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.attacks import add, attack, canary

RANK = "model_tp1_pp0.pt"


def u(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return b"X" + struct.pack("<I", len(raw)) + raw


def g(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def sg(module: str, name: str) -> bytes:
    return u(module) + u(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def i(number: int) -> bytes:
    return b"I%d\n" % number


def shape(*sizes: int) -> bytes:
    return b"(" + b"".join(map(i, sizes)) + b"t"


def storage(kind: bytes = g("torch", "BFloat16Storage"), key: bytes = u("0"), count: bytes = i(8)) -> bytes:
    return b"(" + u("storage") + kind + key + u("cpu") + count + b"tQ"


ORDERED = g("collections", "OrderedDict") + b")R"
REBUILD = g("torch._utils", "_rebuild_tensor_v2")


def tensor(*arguments: bytes) -> bytes:
    return call(REBUILD, *arguments)


def with_members(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a zip again with other members' contents; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    with_members(path, lambda name, data: change(data) if name.endswith("/data.pkl") else data)


def item(value: bytes, key: bytes = u("extra")) -> Callable[[bytes], bytes]:
    """One more item of the mapping that a pickle ends with."""
    return lambda pickled: pickled[:-1] + key + value + b"s."


def into_zip(name: str, value: bytes) -> Callable[[Path], None]:
    return lambda folder: with_pickle(folder / name, item(value))


def into_legacy(value: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        state = torch.load(folder / RANK, weights_only=True)
        torch.save(state, folder / RANK, _use_new_zipfile_serialization=False)
        raw = (folder / RANK).read_bytes()
        file, ends = io.BytesIO(raw), []
        for _ in range(4):  # magic number, version, system, value
            for _ in pickletools.genops(file):
                pass
            ends.append(file.tell())
        changed = item(value)(raw[ends[2] : ends[3]])
        (folder / RANK).write_bytes(raw[: ends[2]] + changed + raw[ends[3] :])

    return make


def value(name: str, made: bytes | Callable[[Path], bytes], code: str | None, word: str = "", **other: str) -> None:
    """Register a value in every carrier; `other` gives those where another error is right."""

    def carrier(put: Callable[[bytes], Callable[[Path], None]]) -> Callable[[Path], None]:
        return lambda folder: put(made if isinstance(made, bytes) else made(folder))(folder)

    codes = {where: other.get(where, code) for where in ("rank", "legacy", "config", "training")}
    add(f"{name} in a rank file", "training", carrier(lambda v: into_zip(RANK, v)), codes["rank"], word)
    add(f"{name} in an old rank file", "training", carrier(into_legacy), codes["legacy"], word)
    word = word if codes["config"] == code else ""
    add(f"{name} in a config", "training", carrier(lambda v: into_zip("model_config.pt", v)), codes["config"], word)
    add(f"{name} in a training config", "training", carrier(as_training_config), codes["training"], word)


def as_training_config(made: bytes) -> Callable[[Path], None]:
    return lambda folder: with_pickle(folder / "config_file.pt", lambda old: b"\x80\x02}" + item(made)(b"."))


def touch(folder: Path) -> bytes:
    return u(f"touch '{canary(folder)}'")


# Every name that scanners for hostile checkpoints list, and those by which they were passed.
SHELL = (
    "os.system", "posix.system", "nt.system", "os.popen", "os.execv", "commands.getoutput", "subprocess.Popen",
    "subprocess.call", "subprocess.check_output", "subprocess.getoutput", "pty.spawn", "platform.popen",
    "distutils.spawn.spawn", "asyncio.create_subprocess_shell", "webbrowser.open", "shutil.rmtree",
    "torch.utils.collect_env.run", "torch._inductor.codecache.compile_file", "numpy.f2py.crackfortran.getlincoef",
)  # fmt: skip
PYTHON = (
    "builtins.eval", "builtins.exec", "__builtin__.eval", "__builtin__.execfile", "builtins.compile",
    "builtins.__import__", "builtins.getattr", "builtins.setattr", "builtins.open", "builtins.globals",
    "builtins.type", "builtins.map", "builtins.apply", "importlib.import_module", "runpy.run_path",
    "runpy._run_code", "types.CodeType", "types.FunctionType", "marshal.loads", "pickle.loads", "_pickle.loads",
    "dill.loads", "joblib.load", "cloudpickle.loads", "copyreg._reconstructor", "copyreg.add_extension",
    "operator.attrgetter", "operator.methodcaller", "functools.partial", "functools.reduce", "itertools.starmap",
    "code.InteractiveInterpreter", "timeit.timeit", "profile.run", "cProfile.run", "cProfile.runctx", "bdb.Bdb",
    "pdb.run", "trace.Trace", "doctest.debug_script", "ensurepip._run_pip", "pip.main", "venv.create",
    "lib2to3.pgen2.grammar.Grammar", "idlelib.pyshell.ModifiedInterpreter", "logging.config.dictConfig",
    "ctypes.CDLL", "socket.create_connection", "urllib.request.urlopen", "http.client.HTTPSConnection",
    "ssl.get_server_certificate", "_io.FileIO", "io.open", "pathlib.Path.write_text", "pathlib.PosixPath",
    "zipimport.zipimporter", "sys.settrace", "site.main", "test.support.script_helper.assert_python_ok",
)  # fmt: skip
FRAMEWORKS = (
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.serialization.load", "torch.storage._load_from_bytes",
    "torch._utils._rebuild_device_tensor_from_numpy", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._tensor._rebuild_from_type",
    "torch._utils._get_obj_state", "torch._utils._set_obj_state", "torch._utils._import_dotted_name",
    "torch.utils._config_module.load_config", "torch.utils.bottleneck.__main__.run_cprofile",
    "torch.utils.data.datapipes.utils.decoder.basichandlers", "torch.distributed.rpc.rpc_sync",
    "torch._dynamo.guards.GuardBuilder.get", "torch.fx._symbolic_trace.Tracer", "torch.ops.load_library",
    "torch.package.PackageImporter", "torch.nn.modules.linear.Linear", "torch.from_file", "torch.classes.load_library",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.load", "numpy.memmap",
    "numpy.testing._private.utils.runstring", "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "keras.models.load_model", "tensorflow.io.write_file", "pandas.read_pickle", "sklearn.externals.joblib.load",
)  # fmt: skip

# What frameworks keep beside their weights: read as something that is never looked at, and never called.
OPAQUE = ("pathlib.PosixPath", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar")

for _full in (*SHELL, *PYTHON, *FRAMEWORKS):
    _named = g(*_full.rpartition(".")[::2])
    add(
        f"{_full} called",
        "training",
        lambda folder, named=_named: with_pickle(folder / RANK, item(call(named, touch(folder)))),
        "ok" if _full in OPAQUE else "E302",
        "" if _full in OPAQUE else _full,
    )

value("os.system", lambda f: call(g("os", "system"), touch(f)), "E302", "os.system")
value("os.system by STACK_GLOBAL", lambda f: call(sg("os", "system"), touch(f)), "E302", "os.system")
value("os.system by NEWOBJ", lambda f: g("os", "system") + touch(f) + b"\x85\x81", "E302", "os.system")
value("os.system by NEWOBJ_EX", lambda f: ORDERED + touch(f) + b"\x85}\x92", "E302", "NEWOBJ_EX")
value("os.system by OBJ", lambda f: b"(" + g("os", "system") + touch(f) + b"o", "E302", "os.system")
value("os.system by INST", lambda f: b"(" + touch(f) + b"ios\nsystem\n", "E302", "INST")
value("a class by OBJ", b"(" + g("collections", "OrderedDict") + b"o", "E302", "OBJ")
value("a getattr chain", call(g("builtins", "getattr"), g("os", "path"), u("os")), "E302", "os.path")
_API = "torch.distributed._shard.sharded_tensor.api"
for _attribute in ("__class__", "__init__", "ProcessGroupState.__init__", "__reduce_ex__"):
    value(f"getattr of a known class and {_attribute}",
          call(g("builtins", "getattr"), g(_API, "ShardedTensor"), u(_attribute)),
          "E302", "builtins.getattr")  # fmt: skip
value("a sharded tensor of a command", lambda f: call(g("torch._utils", "_rebuild_wrapper_subclass"), touch(f)), "E301")
value("getattr of text", call(g("builtins", "getattr"), u("x"), u("format")), "E302", "builtins.getattr")
for _number, _op in enumerate((b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00")):
    value(f"EXT{1 << _number}", _op, "E302", f"EXT{1 << _number}")
value("text as persistent id", b"Pos.system\n", "E302", "PERSID")
value("a buffer from outside", b"\x97", "E302", "NEXT_BUFFER")
for _number in (9, (1 << 62), (1 << 64) - 1):
    value(f"a bytearray of {_number} bytes, cut off", b"\x96" + struct.pack("<Q", _number) + b"x", "E301")

# Names that look like a known one.
for _module, _name, _code in (
    ("os", "path.os.system", "E302"),
    ("torch", "os.system", "E302"),
    ("torch", "_utils._rebuild_tensor_v2.__globals__", "E302"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__", "E302"),
    ("torch._utils", "_rebuild_tensor_v2\0", "E302"),
    ("torch._utils", " _rebuild_tensor_v2", "E302"),
    ("torch._utils ", "_rebuild_tensor_v2", "E302"),
    ("Torch._utils", "_rebuild_tensor_v2", "E302"),
    ("torch._utils", "_REBUILD_TENSOR_V2", "E302"),
    ("torch._utіls", "_rebuild_tensor_v2", "E302"),  # a Cyrillic letter
    ("torch._utils", "_rebuild_tensor_v２", "E302"),  # a wide digit, which NFKC makes a plain one
    ("ｏｓ", "system", "E302"),
    ("os", "sуstem", "E302"),
    ("", "eval", "E302"),
    ("builtins", "", "E302"),
    ("collections", "OrderedDict.__class__.__base__.__subclasses__", "E302"),
    ("collections", "OrderedDict.__reduce_ex__", "E302"),
    ("x", "y.Config", "E302"),
    ("os\r", "system\r", "E302"),
    ("os\nsystem", "x", "E302"),
    ("torch" * 20_000, "x", "E302"),
    ("\ud800", "x", "E302"),
    ("\x1b[2J\x1b]0;owned\x07", "x", "E302"),
):
    value(f"the name {_module[:30]!r} {_name!r}", sg(_module, _name) + b")R", _code)
value("a name that is a number", i(1) + i(2) + b"\x93", "E301")
value("a name that is a list", b"]]\x93", "E301")
value("a harmless module's Config that is only a name", sg("os", "Config") + b")R", None)

# Attributes: what `__setstate__`, `__dict__` and slots could do.
_STATE = b"}" + u("__setstate__") + g("torch._utils", "_rebuild_tensor_v2") + b"s"
value("attributes of a mapping", ORDERED + _STATE + b"b", None)
value("slots of a mapping", ORDERED + b"N}" + u("__class__") + u("x") + b"s\x86b", None)
value("attributes of a function", REBUILD + _STATE + b"b", "E301", "attributes")
value("attributes of a type", g("torch", "bfloat16") + b"}" + u("name") + u("float64") + b"sb", "E301", "attributes")
value("attributes of a list", b"]" + _STATE + b"b", "E301", "attributes")
value("a state that is a call", lambda f: ORDERED + call(g("os", "system"), touch(f)) + b"b", "E302", "os.system")
value("a method by name", call(g("collections", "OrderedDict.update"), b"}"), "E302")
value("a call of text", u("system") + b")R", "E301", "a call of a str")
value("a call with a list", g("collections", "OrderedDict") + b"]R", "E301")
value("a call with a mapping", g("collections", "OrderedDict") + b"}R", "E301")

# Torch's own functions, given what they are not made for.
value("a tensor without arguments", REBUILD + b")R", "E301")
value("a tensor of text", tensor(u("0"), i(0), shape(8), shape(1), b"\x89", ORDERED), "E301", "offset")
value("a tensor of a call", lambda f: tensor(call(g("os", "system"), touch(f))), "E302", "os.system")
for _what, _offset, _shape, _strides in (
    ("negative offset", i(-8), shape(8), shape(1)),
    ("negative stride", i(7), shape(8), shape(-1)),
    ("negative size", i(0), shape(-8), shape(1)),
    ("size of 2 ** 62", i(0), shape(1 << 62), shape(0)),
    ("stride of 2 ** 63", i(0), shape(2), shape(1 << 63)),
    ("offset of 2 ** 64", i(1 << 64), shape(2), shape(1)),
    ("65 dimensions", i(0), shape(*[1] * 65), shape(*[1] * 65)),
    ("more strides than sizes", i(0), shape(8), shape(1, 1)),
    ("size that is a fraction", i(0), b"(G" + struct.pack(">d", 8.0) + b"t", shape(1)),
    ("size that is true", i(0), b"(\x88t", shape(1)),
    ("shape that is text", i(0), u("8"), shape(1)),
    ("shape that is a list", i(0), b"](" + i(8) + b"e", shape(1)),
    ("shape that holds itself", i(0), b"]q\xf0h\xf0a", shape(1)),
    ("offset that is a long of 9000 digits", b"\x8b" + struct.pack("<I", 4000) + b"\x7f" * 4000, shape(8), shape(1)),
):
    value(f"a tensor with a {_what}", tensor(storage(), _offset, _shape, _strides, b"\x89", ORDERED), "E301")
value("a tensor beyond its storage", tensor(storage(), i(0), shape(9), shape(1), b"\x89", ORDERED),
      "E301", config="", training="")  # fmt: skip
value("a tensor of 2 ** 61 elements", tensor(storage(), i(0), shape(1 << 61), shape(1), b"\x89", ORDERED),
      "E301", config="", training="")  # fmt: skip
value("a tensor that repeats one element 2 ** 61 times",
      tensor(storage(), i(0), shape(1 << 61), shape(0), b"\x89", ORDERED),
      "E301 E205", config="", training="")  # fmt: skip
value("a tensor of another function", call(g("torch._tensor", "_rebuild_from_type_v2"), g("collections", "OrderedDict"),
      g("torch", "Tensor"), b")", b"}"), "E301", "built by something else")  # fmt: skip
value("a tensor of os.system", call(g("torch._tensor", "_rebuild_from_type_v2"), g("os", "system"),
      g("torch", "Tensor"), b")", b"}"), "E302", "os.system")  # fmt: skip
value("a tensor made by making tensors", call(g("torch._tensor", "_rebuild_from_type_v2"),
      g("torch._tensor", "_rebuild_from_type_v2"), g("torch", "Tensor"), b")", b"}"), "E301")  # fmt: skip
value("a parameter of a mapping", call(g("torch._utils", "_rebuild_parameter"), b"}", b"\x89", ORDERED), "E301")
value("a tensor whose type is text", call(g("torch._utils", "_rebuild_tensor_v3"), storage(), i(0), shape(8), shape(1),
      b"\x89", ORDERED, u("bfloat16")), "E301")  # fmt: skip
value("a size of a size", call(g("torch", "Size"), u("x" * 100)), "E301")
value("a set of sets", call(g("builtins", "set"), b"](" + b"]" * 3 + b"e"), "E301")
value("a set of many", call(g("builtins", "set"), b"](" + b"N" * 100 + b"e"), "E301", "many items")
value("a quantised tensor", g("torch._utils", "_rebuild_qtensor") + b")R", "E303", "only code can rebuild")
value("a sparse tensor", g("torch._utils", "_rebuild_sparse_tensor") + b")R", "E303", "only code can rebuild")
value("a nested tensor", g("torch._utils", "_rebuild_nested_tensor") + b")R", "E303", "only code can rebuild")
value("a meta tensor", g("torch._utils", "_rebuild_meta_tensor_no_storage") + b")R", "E303", "only code can rebuild")

# Persistent ids.
value("a persistent id that is a pickle", b"C\x04\x80\x02N." + b"Q", "E301", "persistent id")
value("a persistent id that is a call", lambda f: call(g("os", "system"), touch(f)) + b"Q", "E302", "os.system")
value("a persistent id of another kind", b"(" + u("module") + g("torch", "FloatStorage") + u("0") * 3 + b"tQ", "E301")
value("a storage of a type that is text", storage(kind=u("FloatStorage")), "E301", "persistent id")
value("a storage of -1 elements", storage(count=i(-1)), "E301", "-1 elements")
value("a storage of 2 ** 64 elements", storage(count=i(1 << 64)), "E301")
value("a storage that is a path", tensor(storage(key=u("../../../../etc/passwd")), i(0), shape(8), shape(1), b"\x89",
      ORDERED), "E301", "passwd", config="", training="")  # fmt: skip
value("a storage that is a view", b"(" + u("storage") + g("torch", "FloatStorage") + u("0") + u("cpu") + i(8)
      + b"(" + u("1") + i(0) + i(8) + b"ttQ", "E303", "view")  # fmt: skip

# Pickles that are no pickles, and those that take long.
value("an unknown opcode", b"\xff", "E301")
value("a mark without end", b"(" * 50_000, "E301")
value("an empty stack", b"00000", "E301")
value("a memo entry that is not there", b"h\xfe", "E301")
value("a stop in the middle", b"N.", "E301 E303 E207 E211", training="")
value("a memo at 2 ** 32 - 1", b"Nr\xff\xff\xff\xff", None)
value("a memo number of 60,000 digits", b"Np" + b"9" * 60_000 + b"\n", "E301")
value("a memo number below zero", b"Np-1\n", "E301")
value("a million opcodes", b"N0" * 500_000 + b"N", None)
value("a million memo entries", b"".join(b"Nr" + struct.pack("<I", n) + b"0" for n in range(250_000)) + b"N", None)
value("a tuple in a tuple, 300,000 deep", b")" + b"\x85" * 300_000, None, config="E301")
value("lists in lists, each twice", b"]q\xf0" + b"0](h\xf0h\xf0eq\xf0" * 40, None, config="E301")
value("a mapping that holds itself", b"}q\xf0" + u("x") + b"h\xf0s", None, config="E301")
value("a number of 5000 digits", b"I" + b"7" * 5000 + b"\n", "E301")
value("a long number of 100,000 digits", b"L" + b"7" * 100_000 + b"L\n", "E301")
value("a long number of two million bytes", b"\x8b" + struct.pack("<i", 1 << 21) + b"\x7f" * (1 << 21), "E301")
value("a long number of less than no bytes", b"\x8b" + struct.pack("<i", -1), "E301")
value("text of 2 ** 60 bytes", b"\x8d" + struct.pack("<Q", 1 << 60), "E301")
value("bytes of 2 ** 60 bytes", b"\x8e" + struct.pack("<Q", 1 << 60), "E301")
value("text that is no text", u(b"\xff\xfe"), "E301")
value("a string that is an expression", b"S'a'*10**9\n", "E301")
value("a fraction that is none", b"Fx\n", "E301")
value("a protocol of the future", b"\x80\xff", "E301")
value("a frame across the end", b"\x95" + struct.pack("<Q", 1 << 40) + b"N", None)


@attack("training", "E301", "not text")
def half_a_character_in_a_tensor_name(folder: Path) -> None:
    with_pickle(folder / RANK, item(b"N", u("\ud800")))


@attack("training", "E301", "not text")
def a_tensor_name_that_is_a_number(folder: Path) -> None:
    with_pickle(folder / RANK, item(b"N", i(1)))


@attack("training", "E205", "")
def a_tensor_name_that_moves_the_cursor(folder: Path) -> None:
    state = torch.load(folder / RANK, weights_only=True)
    state["\x1b[2J\x1b]0;owned\x07\r\nE000 all is well"] = torch.ones(2)
    torch.save(state, folder / RANK)


@attack("training", "E205", "")
def a_tensor_name_of_a_million_letters(folder: Path) -> None:
    state = torch.load(folder / RANK, weights_only=True)
    state["x" * 1_000_000] = torch.ones(2)
    torch.save(state, folder / RANK)


@attack("training", "E303", "state dict")
def a_state_dict_that_is_a_list(folder: Path) -> None:
    torch.save([torch.ones(2)], folder / RANK)


@attack("training", "E303", "state dict")
def a_state_dict_inside_another(folder: Path) -> None:
    torch.save({"state_dict": torch.load(folder / RANK, weights_only=True)}, folder / RANK)


@attack("training", "E303", "state dict")
def a_rank_file_without_tensors(folder: Path) -> None:
    torch.save({}, folder / RANK)


@attack("training", "E302", "Linear")
def a_whole_module_instead_of_a_state_dict(folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), folder / RANK)


@attack("training", "E301", "")
def a_pickle_of_65_mebibytes(folder: Path) -> None:
    with_pickle(folder / RANK, lambda old: old[:-1] + u("x") + u(b"y" * (65 << 20)) + b"s.")


@attack("training", None)
def a_bare_pickle_of_protocol_5_as_configuration(folder: Path) -> None:
    config = dict(torch.load(folder / "plain_config.pt", weights_only=True))
    (folder / "model_config.pt").write_bytes(pickle.dumps(config, 5))
