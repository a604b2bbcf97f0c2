"""The text of a draft, as lines of YAML: sizes, doubts, unread tensors, and a family's rules under other names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

import yaml

from engine.discover.near import Nearness, Pairing, Slot
from engine.language.documents import grouped, plain, prefixes
from engine.language.expressions import compile_expression, names_in
from engine.language.model import MappingFile
from engine.language.names import PARAMS, pattern
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan

_EXPECT = ("layer", "hidden", "heads", "groups", "ffn", "vocab", "expert")


def extends(reference: str, mapping: MappingFile, checkpoint: Checkpoint) -> list[str]:
    """The family that is extended, and its variants that the checkpoint's configuration leaves open."""
    lines, kind = block("extends", reference), checkpoint.training.get("model_type")
    if isinstance(kind, str) and kind and mapping.model_types and kind not in mapping.model_types:
        text = f"the training config says model_type {shown(kind)}, which {mapping.name} is not for."
        lines += [*comment(f"decide: {text}"), *block("source", {"model_types": [kind]})]
    for name, variant in mapping.variants.items():
        expressions = [e for e in variant.choices.values() if e is not None]
        read = {key for e in expressions for key in names_in(e)}
        present = any("present(" in e.text for e in expressions)
        known = {*checkpoint.config, "mode"}  # its files show the mode
        if variant.default and read and not present and not read & known:
            keys = list_of(sorted(read))
            text = f"{name} is the family's default; the configuration has none of {keys}: {variant.help}."
            lines += comment(f"decide: {text}")
    return lines


def expect(mapping: MappingFile, plan: Plan, asked: Iterable[str] = ()) -> list[str]:
    """The sizes of a plan, except those that depend on options or a configuration still to be given."""
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
    words = {"layer": "layers", "hidden": "wide"}
    return ", ".join(f"{sizes[axis]} {word}" for axis, word in words.items() if axis in sizes)


def doubt(pairing: Pairing) -> str:
    """Why a pair is only a guess."""
    text = f"is this {pairing.slot.sources[0]}? The shape fits and the name is similar ({pairing.score:.2f})."
    if pairing.rivals:
        text += f" {list_of(pairing.rivals[:3])} {'has' if len(pairing.rivals) == 1 else 'have'} the same shape."
    if pairing.slot.fused:
        text += " Shapes do not show the order of what is stored together."
    return text


def left_over(near: Nearness) -> list[str]:
    """Tensors without a rule and rules without a tensor, as comments: a run refuses them by name."""
    lines: list[str] = []
    seen: set[str] = set()
    for one, nearest in near.left:
        if one.stem in seen:
            continue
        seen.add(one.stem)
        fits = ", ".join(f"{slot.sources[0]} ({score:.2f})" for slot, score in nearest)
        fits = f"Its shape would fit {fits}." if fits else "No free rule of the family has its shape."
        lines += comment(f"decide: no rule reads {shown(one.stem)}, so a run refuses. {fits}", "  ")
        if nearest:  # deleting the # makes it active
            if not near.pairings and "#rules:" not in lines:
                lines += ["#rules:"]
            lines += [f"#  - {flow(rule)}" for rule in renamed_rules(nearest[0][0], one.stem)]
    for slot in near.empty:
        lines += comment(f"decide: no tensor was found for {slot.sources[0]}.", "  ")
    return lines


def renamed_rules(slot: Slot, stem: str) -> list[dict[str, Any]]:
    """The slot's rules, changed to read `stem`."""
    first = slot.sources[0]
    source = stem if pattern(first).has_param else stem.replace("{param}", first.rpartition(".")[2])
    return [{"name": rule.name, "source": source} for rule in slot.rules]


def overrides(near: Nearness) -> dict[str, Any]:
    """The family's expressions, outside of rules, that ask for tensors by their old names; with the new names."""
    taken = [(pairing.slot, pairing.stem) for pairing in near.pairings]
    taken += [(slot, one.stem) for one, nearest in near.left for slot, _ in nearest]  # a person may still choose these
    renamed = grouped(dict.fromkeys(pair for slot, stem in taken for pair in _renamed(slot, stem)))
    parts = {key: near.mapping.resolved.get(key) or {} for key in ("variants", "dims", "config", "training_config")}
    return {key: new for key, part in parts.items() if (new := _rewritten(plain(part), renamed))}


def _renamed(slot: Slot, stem: str) -> Iterator[tuple[str, str]]:
    """The names of a slot's tensors, with the new ones."""
    new = renamed_rules(slot, stem)[0]["source"]
    for source in slot.sources:
        yield source, new
        yield from ((source.replace("{param}", p), new.replace("{param}", p)) for p in PARAMS)


def _rewritten(value: Any, renamed: Mapping[str, Sequence[str]]) -> Any:
    """The parts of `value` that change when `present('old')` gets new names; choices and lists are kept whole."""
    if isinstance(value, dict):
        changed = {key: new for key, item in value.items() if (new := _rewritten(item, renamed)) is not None}
        if "choices" in changed:
            changed["choices"] = {**value["choices"], **changed["choices"]}
        return changed or None
    if isinstance(value, list):
        changes = [_rewritten(item, renamed) for item in value]
        if all(change is None for change in changes):
            return None
        return [item if change is None else change for item, change in zip(value, changes, strict=True)]
    if not isinstance(value, str) or "present(" not in value:
        return None

    def replaced(found: re.Match[str]) -> str:
        asked = [f"present({found[1]}{name}{found[1]})" for name in renamed.get(found[2], [found[2]])]
        return asked[0] if len(asked) == 1 else f"({' or '.join(asked)})"

    new = re.sub(r"present\(\s*(['\"])(.*?)\1\s*\)", replaced, value)
    return None if new == value else new


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_PROSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,._/-]* [A-Za-z0-9_-]+")
_AXES = re.compile(r"[a-z(][a-z0-9_ ()|+]* [a-z0-9_()]+")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "otherwise"))
_WIDTH = 108


class _Line(yaml.SafeDumper):
    """YAML in one line of ASCII; text is quoted unless it is a plain word or axes."""

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
    >>> flow([axes := ["heads", "hidden"], axes])  # mappings have no anchors
    '[[heads, hidden], [heads, hidden]]'
    """
    text: str = yaml.dump(value, Dumper=_Line, default_flow_style=True, sort_keys=False, width=1 << 30)
    return text.removesuffix("...\n").removesuffix("\n")


def shown(text: str) -> str:
    r"""A name for a comment: one line, without characters that a terminal would act on.

    >>> print(shown("evil\nmapping: 2"))
    evil\nmapping: 2
    """
    escaped = text.encode("unicode_escape").decode().replace("\\\\", "\\")
    return escaped if len(escaped) <= 200 else escaped[:199] + "…"


def block(key: str, value: Any, indent: str = "") -> list[str]:
    """`key: value`, in flow style if it is short, else as a block."""
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
    """Comment lines of bounded width; names in `text` must be escaped already."""
    width = _WIDTH + 1 - len(indent)
    first, *rest = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {first}", *(f"{indent}#   {line}" for line in rest)]


def list_of(names: Sequence[str]) -> str:
    """
    >>> list_of(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{shown(name)}`" for name in names)
