"""Two mappings compared: what their files say, and separately what that comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.language.documents import changed, grouped, plain, text_of
from engine.language.loader import load_text
from engine.language.model import MappingFile
from engine.proving.changes import TensorChange, ValueChange, compare_meanings
from engine.proving.committed import file_facts

# Section → what readers call it. `rules` by rule and key, the others by dotted path.
SECTIONS = {
    "about": "name, version and architecture",
    "rules": "rules",
    "variants": "variants",
    "dims": "dims",
    "options": "options",
    "keys": "configuration keys",
    "ignore": "ignored tensors",
    "refuse": "refused tensors",
    "config": "config.json",
    "training_config": "training configuration",
    "tokenizer": "tokenizer",
    "generation": "generation config",
    "chat_template": "chat template",
    "expect": "expected sizes",
}
_ABOUT = ("name", "version", "source", "target")


@dataclass(frozen=True, slots=True)
class Change:
    """One key of a resolved mapping; `old` or `new` is None where it is not there."""

    section: str
    name: str
    old: str | None
    new: str | None

    @property
    def kind(self) -> str:
        return "added" if self.old is None else "removed" if self.new is None else "changed"


@dataclass(frozen=True, slots=True)
class MappingDiff:
    """What changes between two mappings: in their files, in where tensors go, and in what is written.

    `old` or `new` is None where there is none.

    `same_in` names other mappings that change in just this way, as releases do with their family. `parent` is what
    a new mapping extends and is compared with.
    """

    name: str
    old: str | None
    new: str | None
    changes: tuple[Change, ...]
    tensors: tuple[TensorChange, ...]
    values: tuple[ValueChange, ...] = ()
    same_in: tuple[str, ...] = ()
    parent: str | None = None

    @property
    def equal(self) -> bool:
        return not self.changes and not self.tensors and not self.values

    def as_dict(self) -> dict[str, object]:
        changes = [{**asdict(one), "kind": one.kind} for one in self.changes]
        return {**asdict(self), "changes": changes, "equal": self.equal}


def diff_mappings(
    name: str, old: MappingFile | None, new: MappingFile | None, parent: MappingFile | None = None
) -> MappingDiff:
    """Compare two resolved mappings; None stands for one that does not exist.

    Args:
        parent: what a new mapping extends: it is compared with that.
    """
    if old is None and parent is not None:
        found = diff_mappings(name, parent, new)
        return replace(found, old=None, parent=f"{parent.name} {parent.version}")
    changes: list[Change] = []
    for section in SECTIONS:
        before = {} if old is None else dict(_entries(old.resolved, section))
        after = {} if new is None else dict(_entries(new.resolved, section))
        changes += [Change(section, key, was, now) for key, was, now in changed(before, after)]
    told = [None if one is None else f"{one.name} {one.version}" for one in (old, new)]
    alike = old is not None and new is not None and old.resolved == new.resolved
    tensors, values = ((), ()) if alike else compare_meanings(old, new)
    return MappingDiff(name, told[0], told[1], _whole_rules(changes), tensors, values)


def diff_layouts(name: str, old: str | None, new: str | None) -> MappingDiff:
    """Compare two texts of a layout file; None stands for one that does not exist.

    Raises:
        EngineError: E101 for a text that is no YAML.
    """
    said = [{} if text is None else plain(load_text(text, name).data) for text in (old, new)]
    facts = [file_facts(one) if one else {} for one in said]
    before, after = ({path: text_of(value) for path, value in one.items()} for one in facts)
    told = [f"{one.get('name')} {one.get('version')}" if one else None for one in said]
    values = [ValueChange("layout", ".".join(path), "", was, now) for path, was, now in changed(before, after)]
    return MappingDiff(name, told[0], told[1], (), (), tuple(values))


def gather(diffs: Sequence[MappingDiff]) -> list[MappingDiff]:
    """Diffs that say something, those that say the same as one; equal mappings are left out.

    A release that only follows its family says what the family says, whatever its own name is.
    """
    found = grouped(
        ((one.old is None, one.new is None, one.parent, one.changes, one.tensors, one.values), one)
        for one in diffs
        if not one.equal
    )
    return [
        replace(first, same_in=tuple(one.name for one in rest))
        for first, *rest in found.values()
    ]  # fmt: skip


def _entries(data: Mapping[str, Any], section: str) -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of everything a section says."""
    if section == "about":
        for key in _ABOUT:
            yield from _flat(data.get(key), key)
        return
    value = data.get(section)
    if section == "rules":
        for name, rule in (value or {}).items():
            for key, item in rule.items():
                if key != "name":
                    yield f"{name}: {key}", text_of(item)
    elif section in ("ignore", "refuse"):
        for entry in value or []:
            side = "source" if "source" in entry else "target"
            yield f"{side} {entry[side]}", text_of(entry["why"])
    elif value is not None:
        yield from _flat(value, "" if isinstance(value, dict) else section)


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key == "choices" and isinstance(item, dict):  # their order is their meaning
                yield f"{name}.{key}", text_of(item)
            else:
                yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, text_of(value)


def _whole_rules(changes: Sequence[Change]) -> tuple[Change, ...]:
    """A rule all of whose keys came or went is one change."""
    result: list[Change] = []
    rules: dict[str, list[Change]] = {}
    for one in changes:
        if one.section == "rules":
            rules.setdefault(one.name.rpartition(": ")[0], []).append(one)
        else:
            result.append(one)
    at = next((i for i, one in enumerate(result) if list(SECTIONS).index(one.section) > 1), len(result))
    listed: list[Change] = []
    for name, keys in rules.items():
        kinds = {key.kind for key in keys}
        said = {key.name.rpartition(": ")[2]: key for key in keys}
        if "source" in said and len(kinds) == 1 and kinds != {"changed"}:  # every rule has a source
            text = [
                None if all(getattr(k, side) is None for k in keys)
                else ", ".join(f"{n}: {getattr(k, side)}" for n, k in said.items())
                for side in ("old", "new")
            ]  # fmt: skip
            listed.append(Change("rules", name, text[0], text[1]))
        else:
            listed += keys
    return (*result[:at], *listed, *result[at:])
