"""A family under other names: its rules with other sources, and all that asks for tensors by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.discover.near import Nearness, Pairing, Slot
from engine.language.documents import plain
from engine.language.names import PARAMS, pattern


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
    other: dict[str, Any] = {}
    for key in ("variants", "dims", "config", "training_config"):
        changed = _rewritten(resolved.get(key) or {}, renamed)
        if changed:
            other[key] = changed
    return rules, other


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
