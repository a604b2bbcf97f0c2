"""Mapping and layout files that would reach out of their folder, run code, or take all memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.attacks import add, attack, canary


def change(name: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Replace texts of a file; each must be there."""

    def make(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in pairs:
            if old not in text:
                raise LookupError(old)
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")

    return make


def append(text: str, name: str = "mapping.yaml") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text(encoding="utf-8") + text)


def whole(raw: bytes, name: str = "mapping.yaml") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


# YAML.
for _name, _raw in {
    "a call": b"name: !!python/object/apply:os.system ['touch ran']\n",
    "an object": b"name: !!python/object/new:os.system ['touch ran']\n",
    "a module": b"name: !!python/module:os\n",
    "a tag of its own": b"name: !x y\n",
    "aliases in aliases": b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (n, n) for n in range(40)),
    "an alias of itself": b"a: &a [*a]\n",
    "merge keys": b"a: {b: 1}\n<<: {c: 2}\n",
    "100,000 brackets": b"a: " + b"[" * 100_000,
    "100,000 braces": b"{" * 100_000,
    "100,000 dashes": b"- " * 100_000,
    "100,000 question marks": b"? " * 100_000,
    "deep indentation": b"".join(b" " * n + b"a:\n" for n in range(1000)),
    "a million letters": b"a: " + b"x" * (1 << 20),
    "many keys": b"".join(b"k%d: 1\n" % n for n in range(20_000)),
    "a key twice": b"name: a\nname: b\n",
    "a zero byte": b"name: a\0b\n",
    "half a character": b'name: "\xed\xa0\x80"\n',
    "half a character escaped": b'mapping: 1\nname: "\\ud800"\n',
    "bytes that are not UTF-8": b"name: \xff\n",
    "UTF-16": "name: x\n".encode("utf-16"),
    "two documents": b"a: 1\n---\nb: 2\n",
    "a directive": b"%YAML 9.9\n---\na: 1\n",
    "a reserved directive": b"%EVIL x\n---\na: 1\n",
    "a version of 5000 digits": b"mapping: " + b"9" * 5000 + b"\n",
    "nothing": b"",
    "a list": b"[]\n",
    "a text": b"x\n",
    "a number that is infinite": b"mapping: .inf\n",
    "a number of the future": b"mapping: 99\nname: x\n",
}.items():
    for _file in ("mapping.yaml", "layout.yaml"):
        add(f"a {_file} of {_name}", "mapping", whole(_raw, _file), "E101 E102")

# Expressions, where a size is computed. What cannot be computed may be read off the tensors.
for _expression in (
    "9 ** 9 ** 9", "2 ** 4096 ** 2", "10 ** 10 ** 10 % 7", "(2 ** 4000) * (2 ** 4000)", "'a' * 10 ** 9",
    "[0] * 10 ** 9",
    "'%0999999999d' % 1", "1.0e308 ** 9", "'x'.join('y')", "''.__class__", "''.__class__.__mro__[1].__subclasses__()",
    "[].__class__", "num_layers.__class__", "present.__globals__", "gcd.__globals__['os']", "gcd.__self__",
    "self.__init__", "self", "super()", "cycler.__init__.__globals__.os", "lipsum.__globals__", "namespace(a=1)",
    "joiner()", "dict(a=1)", "range(10 ** 9) | sum", "range(9)", "config.__class__", "request", "omit.__class__",
    "num_layers | attr('__class__')", "num_layers | map(attribute='x')", "'x' | format", "'x' | safe", "'a' | upper",
    "'x' | xmlattr", "'x' | tojson", "[1] | random", "'x' | pprint", "'x' | wordwrap(1)", "'x' | center(10 ** 9)",
    "'x' | urlize", "'x' | replace('x', 'y' * 9)", "(1, 2) | batch(1)", "gcd(*[1, 2])", "gcd(a=1)", "max([])",
    "[1][10 ** 30]", "{'a': 1}['b']", "num_layers[num_layers]", "num_layers[1:2]", "1 if true", "1 ~ 2", "1 }} {{ 2",
    "{% if 1 %}", "{# x #}", "lambda: 1", "(x for x in y)", "import os", "__import__('os')", "eval('1')",
    "open('/etc/passwd')", "layer", "missing", "1 / 0", "1 % 0", "-1", "'four'", "[4]", "{}", "true", "none", "1e999",
    "1e999 - 1e999", "4.5", "(" * 300 + "1" + ")" * 300, "-" * 300 + "1", "not " * 300 + "1", "1 + " * 900 + "1",
    "[" * 60 + "]" * 60, "9" * 3000, "9" * 1900, "0x" + "f" * 1500, "'" + "a" * 3000 + "'", "4 is divisibleby(0)",
    "4 is sameas(4)", "4 is filter('x')", "\"\\ud800\"", "", " ",
):  # fmt: skip
    _quoted = "'" + _expression.replace("'", "''") + "'"
    add(f"a size computed as {_expression[:40]!r} ({len(_expression)})", "mapping",
        change("mapping.yaml", ("layer: num_layers", f"layer: {_quoted}")),
        "ok E105 E102 E203 E108 E204 E218")  # fmt: skip

# Axes.
for _axes in (
    "(" * 900 + ")" * 50, "(" * 20 + "a" + ")" * 20, "((a + b) (c + d) (e + f) (g + h) (i + j) (k + l) (m + n)) | x",
    "(" + " + ".join(f"a{n}" for n in range(200)) + ") | hidden", "a a", "(a + a) b", "", "|", "| a", "a | b | c",
    "a +", "(a", "a)", "a * b", "a/b", "a.b", "a ; b", "{a}", "hidden | ffn", "ffn", "ffn | hidden hidden",
    "nowhere | hidden", "ｆｆｎ | hidden", "ffn\0| hidden", " ".join(f"a{n}" for n in range(150)),
):  # fmt: skip
    _quoted = '"' + _axes.replace("\0", "\\0") + '"'
    add(f"axes {_axes[:40]!r}", "mapping", change("mapping.yaml", ("axes: ffn | hidden", f"axes: {_quoted}")),
        "E101 E102 E103 E107 E108 E203 E204 E205 E207 E209 E208 E106")  # fmt: skip

# Names that leave the folder, or that cannot be matched in bounded time. A file of a subfolder is part of it.
for _bad in (
    "../out/{x}.pt",
    "/evil/ran",
    "a/../../b.pt",
    "a//b.pt",
    "./b.pt",
    "a/",
    "..",
    ".",
    "a\\\\b",
    ".journal",
    "x\\0y",
    "x\\ny",
    "",
):
    for _where, _old in (
        ("a rank file's name", "name: model_tp{tp}_pp{pp}.pt"),
        ("a neighbour's name", 'file: "topo_tp{tp}_pp{pp}.json"'),
        ("the configuration's name", "file: model_config.pt"),
        ("the training configuration's name", "file: config_file.pt"),
    ):
        _made = _bad.replace("{x}", "{tp}_{pp}") if "tp" in _old else _bad.replace("{x}", "x")
        _key = _old.partition(":")[0]
        add(f"{_made!r} as {_where}", "mapping", change("layout.yaml", (_old, f'{_key}: "{_made}"')),
            "E104" if _bad else "E102")  # fmt: skip
for _bad in ("../../../../../etc/hostname", "/etc/hostname"):
    add(f"a tokenizer at {_bad}", "mapping",
        change("mapping.yaml", ("file: tokenizer.model", f"file: {_bad}")), "E104")  # fmt: skip
    add(f"a chat template at {_bad}", "mapping", append(f"\nchat_template: {_bad}\n"), "E101 E102 E002")
    add(f"a parent at {_bad}", "mapping",
        whole(f"mapping: 1\nname: x\nversion: 1.0.0\nextends: {_bad}\n".encode()), "E101 E102 E106 E002")  # fmt: skip
add("a parent that is itself", "mapping",
    whole(b"mapping: 1\nname: x\nversion: 1.0.0\nextends: mapping.yaml\n"), "E106 E002")  # fmt: skip
add("a parent that is a pipe", "mapping",
    whole(b"mapping: 1\nname: x\nversion: 1.0.0\nextends: /proc/self/fd/0\n"), "E101 E106 E002 E102")  # fmt: skip
for _bad in ("/dev/zero", "/dev/stdin", "/proc/self/mem", "."):
    add(f"a layout at {_bad}", "mapping",
        lambda folder, bad=_bad: change("mapping.yaml", (str(folder / "layout.yaml"), bad))(folder),
        "E101 E102 E002")  # fmt: skip
for _bad in ("{a}{b}", "{layer", "layer}", "{layer:x}", "{layer:099}", "{}", "{layer} {layer}", "{0}", "{a.b}",
             "{a!r}", "{__class__}", "(x+x+)+y{layer}", "{layer}" + "x" * 100_000,
             "blocks.{layer}.mlp.w1.{param}\\0"):  # fmt: skip
    add(f"a name pattern {_bad[:30]!r}", "mapping",
        change("mapping.yaml", ("blocks.{layer}.mlp.w1.{param}", _bad)),
        "E101 E102 E104 E107 E108 E205 E207 E106 E206")  # fmt: skip


@attack("mapping", "E002", "")
def a_mapping_that_is_a_folder(folder: Path) -> None:
    (folder / "mapping.yaml").unlink()
    (folder / "mapping.yaml").mkdir()


@attack("mapping", "E002", "")
def a_layout_that_is_a_link_to_nothing(folder: Path) -> None:
    (folder / "layout.yaml").unlink()
    (folder / "layout.yaml").symlink_to("nothing")


@attack("mapping", "E101 E102 E105 E205", "")
def a_name_that_is_a_command(folder: Path) -> None:
    change("mapping.yaml", ("name: internlm\n", f'name: "$(touch {canary(folder)})"\n'))(folder)
