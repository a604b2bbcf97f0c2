"""What a draft says: sizes, doubts, what no rule reads, and a family's rules under other names; as lines of YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from engine.assets.model_card import environment
from engine.discover.near import Nearness, Pairing, Slot
from engine.language.documents import plain
from engine.language.expressions import names_in
from engine.language.model import MappingFile
from engine.language.names import PARAMS, pattern
from engine.language.search import spelled
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan

_EXPECT = ("layer", "hidden", "heads", "groups", "ffn", "vocab", "expert")
_COMPUTED = re.compile(r"(.*\.)?(inv_freq|rope\.freqs|freqs_cis|cos_cached|sin_cached)")


def written(kind: str, **facts: Any) -> str:
    """The text of a draft, by the template of its kind."""
    found = environment(Path(__file__).parent / "templates")
    found.globals.update(block=_lines(block), block_of=_lines(block_of), decide=_lines(decide))
    found.filters.update(doubt=doubt, flow=flow, list_of=list_of, shown=shown, spelled=spelled)
    return found.get_template("draft.yaml.j2").render(kind=kind, **facts)


def _lines(made: Callable[..., list[str]]) -> Callable[..., str]:
    return lambda *given: "\n".join(made(*given))


def extends(reference: str, mapping: MappingFile, checkpoint: Checkpoint) -> dict[str, Any]:
    """The family that is extended, and what of it the checkpoint's configuration leaves open."""
    unsaid = []
    for name, variant in mapping.variants.items():
        expressions = [e for e in variant.choices.values() if e is not None]
        read = {key for e in expressions for key in names_in(e)}
        present = any("present(" in e.text for e in expressions)
        if variant.default and read and not present and not read & checkpoint.config.keys():
            unsaid.append((name, sorted(read)))
    model_type = checkpoint.training.get("model_type")
    return {"reference": reference, "mapping": mapping, "model_type": model_type, "unsaid": unsaid}


def expect(mapping: MappingFile, plan: Plan) -> list[str]:
    known = {axis: plan.sizes[axis] for axis in _EXPECT if axis in plan.sizes and axis in mapping.dims}
    return block("expect", known) if known else []


def size_in_words(sizes: Mapping[str, int]) -> str:
    return ", ".join(
        f"{sizes[axis]} {word}" for axis, word in (("layer", "layers"), ("hidden", "wide")) if axis in sizes
    )


def doubt(pairing: Pairing) -> str:
    """What makes a pair a guess."""
    text = f"is this {pairing.slot.sources[0]}? The shape fits and the name is alike ({pairing.score:.2f})."
    if pairing.rivals:
        text += f" {list_of(pairing.rivals[:3])} {'has' if len(pairing.rivals) == 1 else 'have'} the same shape."
    if pairing.slot.fused:
        text += " Shapes do not tell the order of what is stored together."
    return text


def left_over(near: Nearness) -> dict[str, Any]:
    """Tensors of no rule, each pattern once: a run refuses them by name. Buffers that are computed stand apart."""
    computed = [one for one, _ in near.left if _COMPUTED.fullmatch(one.text)]
    left = list({one.stem: (one, nearest) for one, nearest in reversed(near.left) if one not in computed}.values())
    first_near = next((one for one, nearest in reversed(left) if nearest), None)
    return {"near": near, "left": left[::-1], "computed": computed, "first_near": first_near}


def renamed_rules(slot: Slot, stem: str) -> list[dict[str, Any]]:
    """The slot's rules, changed to read `stem`."""
    first = slot.sources[0]
    source = stem if pattern(first).has_param else stem.replace("{param}", first.rpartition(".")[2])
    return [{"name": rule.name, "source": source} for rule in slot.rules]


def overrides(near: Nearness) -> tuple[list[tuple[dict[str, Any], Pairing]], dict[str, Any]]:
    """Rules with other sources, and whatever else of the family asks for tensors by their old names."""
    renamed: dict[str, list[str]] = {}
    rules: list[tuple[dict[str, Any], Pairing]] = []
    for pairing in near.pairings:
        changed = renamed_rules(pairing.slot, pairing.stem)
        rules += [(rule, pairing) for rule in changed]
        _rename(renamed, pairing.slot, changed[0]["source"])
    for one, nearest in near.left:  # what a person may yet take
        for slot, _ in nearest:
            _rename(renamed, slot, renamed_rules(slot, one.stem)[0]["source"])
    resolved = plain(near.mapping.resolved)
    parts = ("variants", "dims", "config", "training_config")
    return rules, {key: _rewritten(resolved.get(key) or {}, renamed) for key in parts}


def _rename(renamed: dict[str, list[str]], slot: Slot, new: str) -> None:
    for source in slot.sources:
        for old, now in [(source, new)] + [(source.replace("{param}", p), new.replace("{param}", p)) for p in PARAMS]:
            if now not in renamed.setdefault(old, []):
                renamed[old].append(now)


def _rewritten(value: Any, renamed: Mapping[str, Sequence[str]]) -> Any:
    """Only what changes when `present('old')` is written with new names; choices and lists as a whole."""
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


def block_of(key: str, values: Mapping[str, Any]) -> list[str]:
    """`key:` and its values, each as a block of its own."""
    return [f"{key}:", *(line for name, value in values.items() for line in block(name, value, "  "))]


def comment(text: str, indent: str = "") -> list[str]:
    """Comment lines of bounded width; the words must be safe already."""
    width = _WIDTH + 1 - len(indent)
    first, *rest = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {first}", *(f"{indent}#   {line}" for line in rest)]


def decide(text: str, indent: str = "") -> list[str]:
    return comment(f"decide: {text}", indent)


def list_of(names: Sequence[str]) -> str:
    """
    >>> list_of(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{shown(name)}`" for name in names)
