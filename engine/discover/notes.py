"""What a draft says of the family that it extends, and how it says anything: as lines of YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import yaml

from engine.language.documents import prefixes
from engine.language.expressions import compile_expression, names_in
from engine.language.model import MappingFile
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan

_EXPECT = ("layer", "hidden", "heads", "groups", "ffn", "vocab", "expert")


def extends(reference: str, mapping: MappingFile, checkpoint: Checkpoint) -> list[str]:
    """The family that is extended, and what of it the checkpoint's configuration leaves open."""
    lines = block("extends", reference)
    for name, variant in mapping.variants.items():
        expressions = [e for e in variant.choices.values() if e is not None]
        read = {key for e in expressions for key in names_in(e)}
        present = any("present(" in e.text for e in expressions)
        if variant.default and read and not present and not read & checkpoint.config.keys():
            keys = list_of(sorted(read))
            text = f"{name} is the family's default; the config has none of {keys}: {variant.help}."
            lines += comment(f"decide: {text}")
    return lines


def expect(mapping: MappingFile, plan: Plan, asked: Iterable[str] = ()) -> list[str]:
    """The sizes of a plan, but for those that somebody must give yet, in answers of these names."""
    given = {"given" if name == "config" else f"options.{name}" for name in asked}
    known = {
        axis: plan.sizes[axis]
        for axis in _EXPECT
        if axis in plan.sizes
        and axis in mapping.dims
        and given.isdisjoint(p for path in compile_expression(mapping.dims[axis]).paths for p in prefixes(path))
    }
    return block("expect", known) if known else []


def size_in_words(sizes: Mapping[str, int]) -> str:
    return ", ".join(
        f"{sizes[axis]} {word}" for axis, word in (("layer", "layers"), ("hidden", "wide")) if axis in sizes
    )


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_PROSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,._/-]* [A-Za-z0-9_-]+")
_AXES = re.compile(r"[a-z(][a-z0-9_ ()|+]* [a-z0-9_()]+")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "otherwise"))
_WIDTH = 108


class _Line(yaml.SafeDumper):
    """YAML in one line of ASCII; text is quoted unless it is a plain word."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: _Line, text: str) -> yaml.Node:
    plain = (_PLAIN.fullmatch(text) and text.lower() not in _WORDS) or _AXES.fullmatch(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


_Line.add_representer(str, _represent)


def flow(value: Any) -> str:
    r"""A value in flow style.

    >>> print(flow({"mlp_letters": ["a b", "c: d\n# e"], "source": "layers.{layer}.w1.{param}", "of": [3, None]}))
    {mlp_letters: [a b, "c: d\n# e"], source: "layers.{layer}.w1.{param}", of: [3, null]}
    >>> flow([axes := ["heads", "hidden"], axes])  # mappings know no anchors
    '[[heads, hidden], [heads, hidden]]'
    """
    text: str = yaml.dump(value, Dumper=_Line, default_flow_style=True, sort_keys=False, width=1 << 30)
    return text.removesuffix("...\n").removesuffix("\n")


def shown(text: str) -> str:
    r"""A name as a comment may show it: one line, nothing that a terminal would act on.

    >>> print(shown("evil\nmapping: 2"))
    evil\nmapping: 2
    """
    escaped = text.encode("unicode_escape").decode().replace("\\\\", "\\")
    return escaped if len(escaped) <= 200 else escaped[:199] + "…"


def block(key: str, value: Any, indent: str = "") -> list[str]:
    """`key: value`, in flow style where it is short, else as a block."""
    if isinstance(value, str) and _PROSE.fullmatch(value):
        return [f"{indent}{flow(key)}: {value}"]
    line = f"{indent}{flow(key)}: {flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, (Mapping, list, tuple)):
        return [line]
    lines = [f"{indent}{flow(key)}:"]
    if isinstance(value, Mapping):
        for name, item in value.items():
            lines += block(name, item, indent + "  ")
    else:
        lines += [f"{indent}  - {flow(item)}" for item in value]
    return lines


def comment(text: str, indent: str = "") -> list[str]:
    """Comment lines of bounded width; the words must be safe already."""
    width = _WIDTH + 1 - len(indent)
    first, *rest = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {first}", *(f"{indent}#   {line}" for line in rest)]


def list_of(names: Sequence[str]) -> str:
    """
    >>> list_of(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{shown(name)}`" for name in names)
