"""Compares two mappings: the text of their files, and separately the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import ndiff
from pathlib import PurePosixPath
from typing import Any

from engine.language.documents import changed, flat, grouped, plain, text_of
from engine.language.loader import load_text
from engine.language.model import MappingFile
from engine.proving.changes import TensorChange, ValueChange, compare_meanings
from engine.proving.meaning import spoken
from engine.proving.neighbour import file_facts

# Section → its name for readers. `rules` are compared by rule and key, the others by dotted path.
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
    """One key of a resolved mapping; `old` or `new` is None if it is absent."""

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

    `old` or `new` is None if there is none.

    `same_in` names other mappings with the same change, like releases of a family. `parent` is the mapping that
    a new one extends and is compared with.
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
    """Compare two resolved mappings; None if one does not exist. A new one is compared with the `parent` it extends."""
    if old is None and parent is not None:
        found = diff_mappings(name, parent, new)
        return replace(found, old=None, parent=f"{parent.name} {parent.version}")
    both = [{} if one is None else one.resolved for one in (old, new)]
    changes = [change for section in SECTIONS for change in _changes(section, *both)]
    told = [None if one is None else f"{one.name} {one.version}" for one in (old, new)]
    alike = old is not None and new is not None and old.resolved == new.resolved
    tensors, values = ((), ()) if alike else compare_meanings(old, new)
    return MappingDiff(name, told[0], told[1], tuple(changes), tensors, values)


def diff_layouts(name: str, old: str | None, new: str | None) -> MappingDiff:
    """Compare two texts of a layout file; None stands for one that does not exist.

    Raises:
        EngineError: E101 for text that is not YAML.
    """
    said = [{} if text is None else plain(load_text(text, name).data) for text in (old, new)]
    facts = [file_facts(one) if one else {} for one in said]
    before, after = ({path: text_of(value) for path, value in one.items()} for one in facts)
    told = [f"{one.get('name')} {one.get('version')}" if one else None for one in said]
    values = [ValueChange("layout", ".".join(path), "", was, now) for path, was, now in changed(before, after)]
    return MappingDiff(name, told[0], told[1], (), (), tuple(values))


def diff_templates(name: str, old: str | None, new: str | None) -> MappingDiff:
    """Compare two texts of a chat template by how they render a conversation; None if one does not exist.

    If both render it equally, the lines that differ are reported.
    """
    both = [{} if text is None else spoken(text, {"bos_token": "<s>", "eos_token": "</s>"}) for text in (old, new)]
    if both[0] == both[1]:
        lines = [line for line in ndiff((old or "").split("\n"), (new or "").split("\n")) if line[0] in "-+"]
        both = [{"its text": [line[2:] for line in lines if line[0] == sign]} for sign in "-+"]
    told = [None if text is None else PurePosixPath(name).stem for text in (old, new)]
    values = [ValueChange("chat template", path, "", text_of(was), text_of(now)) for path, was, now in changed(*both)]
    return MappingDiff(name, told[0], told[1], (), (), tuple(values))


def gather(diffs: Sequence[MappingDiff]) -> list[MappingDiff]:
    """Diffs that are not empty, with equal ones merged; equal mappings are left out.

    A release that only follows its family is merged with it, whatever its name is.
    """
    found = grouped(
        ((one.old is None, one.new is None, one.parent, one.changes, one.tensors, one.values), one)
        for one in diffs
        if not one.equal
    )
    return [replace(first, same_in=tuple(one.name for one in rest)) for first, *rest in found.values()]


def _changes(section: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """The differences in a section, by key; an added or removed rule is one change."""
    if section != "rules":
        for key, was, now in changed(*(dict(_entries(data, section)) for data in (before, after))):
            yield Change(section, key, was, now)
        return
    for name, old, new in changed(*(data.get("rules") or {} for data in (before, after))):
        keys = [{k: text_of(item) for k, item in rule.items() if k != "name"} for rule in (old or {}, new or {})]
        if old is None or new is None:
            told = [", ".join(f"{key}: {text}" for key, text in one.items()) or None for one in keys]
            yield Change(section, name, *told)
        else:
            yield from (Change(section, f"{name}: {key}", was, now) for key, was, now in changed(*keys))


def _entries(data: Mapping[str, Any], section: str) -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of every entry of a section."""
    value: Any = {key: data.get(key) for key in _ABOUT} if section == "about" else data.get(section)
    if section in ("ignore", "refuse"):
        for entry in value or []:
            side = "source" if "source" in entry else "target"
            yield f"{side} {entry[side]}", text_of(entry["why"])
        return
    if section == "variants":  # the order of choices matters
        value = {name: {**body, "choices": text_of(body["choices"])} for name, body in (value or {}).items()}
    for path, item in flat(value if isinstance(value, Mapping) else {section: value}):
        if item is not None:
            yield ".".join(path), text_of(item)
