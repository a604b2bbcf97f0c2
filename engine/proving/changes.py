"""The differences between two meanings, for a reviewer: which tensors and values are different.

Tensors are compared under every combination of variant choices, so a rule that was split in two by `when`,
renamed or moved to a family shows only if its result differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.language.documents import changed, grouped, leaves, same, text_of
from engine.language.model import MappingFile
from engine.proving.holdings import parts_of
from engine.proving.matrix import choices_named
from engine.proving.meaning import Meaning, meaning_of

KINDS = {
    "added": "newly mapped",
    "removed": "no longer mapped",
    "renamed": "renamed",
    "rerouted": "read from elsewhere",
    "laid out": "laid out differently",
    "cut": "cut differently over ranks",
    "valued": "changed in value",
    "treated": "treated differently",
}
_ASPECTS = {
    "rerouted": ("source", "also read as"),
    "laid out": ("shape", "order"),
    "valued": ("changed", "dropped"),
    "cut": ("split", "stage", "ranks"),
    "treated": ("own dtype", "optional", "tied to", "written as zeros"),
}
_MANY = 4  # items; of longer lists only additions and removals are shown
_PARAMS = (".weight", ".bias")
_THERE = "tensors there"
# Parts of a meaning whose values say what is written, accepted and refused.
VALUED = (
    "reading", "writing", _THERE, "tokenizer", "generation_config.json", "chat", "options", "variants",
    "divided evenly", "ignored", "values of ignored", "refused", "keys", "about",
)  # fmt: skip
_Key = tuple[str, ...]  # kind, target, sources before and after


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A target tensor that is mapped differently.

    Attributes:
        kind: a key of `KINDS`.
        target: its name pattern; the new one if it was renamed.
        old, new: where it comes from, for people; None if it is not mapped.
        when: the choices under which it differs, such as `rotary=pairs`; empty for all.
    """

    kind: str
    target: str
    old: str | None
    new: str | None
    when: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A value of a written file that is different.

    Attributes:
        file: `config.json`, `tokenizer` and so on.
        name: the key.
        given: the input that shows it, such as `rope_base: (absent)`; empty for the usual values.
        others: the number of further inputs that show it.
    """

    file: str
    name: str
    given: str
    old: str | None
    new: str | None
    others: int = 0


def compare_meanings(
    old: MappingFile | None, new: MappingFile | None
) -> tuple[tuple[TensorChange, ...], tuple[ValueChange, ...]]:
    """Tensors and values that differ between two mappings; None for a mapping that does not exist."""
    before, after = ({} if one is None else meaning_of(one) for one in (old, new))
    tensors = tensor_changes(before, after, [one for one in (old, new) if one is not None])
    return tensors, () if old is None or new is None else value_changes(before, after)


# -- values


def value_changes(before: Meaning, after: Meaning) -> tuple[ValueChange, ...]:
    """Values that are written differently: each key once, with the first input that shows it."""
    found = grouped(
        (name.partition(" ")[::2] if part in ("reading", "writing", _THERE) else (part, name), (given, old, new))
        for part in VALUED
        for name, given, old, new in _values(part, before.get(part, {}), after.get(part, {}))
        if not same(old, new)
    )
    return tuple(
        ValueChange(file, key, given, _told_value(old), _told_value(new), len(held))
        for (file, key), [(given, old, new), *held] in found.items()
    )


def _told_value(value: Any) -> str | None:
    return None if value is None else text_of(value)


def _values(part: str, before: Any, after: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """(key, input, value before, value after), including all that differ."""
    sides = [one if isinstance(one, Mapping) else {} for one in (before, after)]
    if part == _THERE:
        for given in dict.fromkeys(name for side in sides for name in side):
            # A mapping that does not ask for a tensor decides without it as with all.
            usual = "all" if given.startswith("without ") else given
            for name, old, new in changed(*(side.get(given, side.get(usual, {})) for side in sides)):
                yield f"choice {name}", f"{_THERE}: {given}", old, new
        return
    if part not in ("reading", "writing"):
        both = [one if isinstance(one, Mapping) else {"": one} for one in (before, after)]
        for name, old, new in changed(*(dict(leaves(one)) for one in both)):
            if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > _MANY:
                old, new = [one for one in old if one not in new], [one for one in new if one not in old]
            yield name, "", old, new
        return
    usual = [side.get("gives", {}) for side in sides]
    rows = [side.get("otherwise", {}) for side in sides]
    # Inputs that only one mapping reads leave the other's usual values.
    for given in ["", *dict.fromkeys([*rows[0], *rows[1]])]:
        both = [{**usual[i], **(rows[i].get(given, {}) if given else {})} for i in (0, 1)]
        differ = list(changed(*both))
        # Sizes are reported only if nothing else differs: they affect how tensors are read.
        for name, old, new in [one for one in differ if not one[0].startswith("size ")] or differ:
            yield name, given, old, new


# -- tensors


Route = tuple[dict[str, Any], ...]  # the entries that fill one target


def tensor_changes(before: Meaning, after: Meaning, mappings: Sequence[MappingFile]) -> tuple[TensorChange, ...]:
    """Tensors that are mapped differently, under the choices of any of the mappings."""
    combinations = choices_named(mappings)
    found: dict[_Key, dict[str, list[Mapping[str, str]]]] = {}
    texts: dict[tuple[_Key, str], tuple[str | None, str | None]] = {}
    listed = [list(_entries(one)) for one in (before, after)]
    for choices in combinations:
        for param, key, told in _under(_routes(listed[0], choices), _routes(listed[1], choices)):
            found.setdefault(key, {}).setdefault(param, []).append(choices)
            texts.setdefault((key, param), told)
    order = list(KINDS)
    changes: list[TensorChange] = []
    for key, held in found.items():
        weight = held.get(".weight")
        if weight is not None and weight == held.get(".bias"):
            texts[key, ".{param}"] = texts[key, ".weight"]
            held = {".{param}": weight}
        for param, under in held.items():
            old, new = (None if t is None else t.replace("*", param) for t in texts[key, param])
            for when in _conditions(under, combinations):
                changes.append(TensorChange(key[0], key[1].replace("*", param), old, new, when))
    return tuple(sorted(changes, key=lambda c: (order.index(c.kind), c.target, c.when)))


def _entries(meaning: Meaning) -> Iterator[dict[str, Any]]:
    ranks = meaning.get("ranks")
    ranks = ranks if isinstance(ranks, Mapping) else {}
    for key, entry in meaning.get("tensors", {}).items():
        target, source, when = parts_of(key)
        allowed = dict(one.split("=") for one in when.split(", ")) if when else {}
        held = ranks.get(key)
        yield {
            **entry,
            "ranks": held,
            "target": target,
            "source": source,
            "when": {n: c.split("|") for n, c in allowed.items()},
        }


def _routes(entries: Sequence[dict[str, Any]], choices: Mapping[str, str]) -> dict[str, Route]:
    found: dict[str, Route] = {}
    for one in entries:
        if all(choices.get(name) in allowed for name, allowed in one["when"].items()):
            found[one["target"]] = (*found.get(one["target"], ()), one)
    return {target: tuple(sorted(route, key=lambda one: str(one["source"]))) for target, route in found.items()}


def _under(
    before: Mapping[str, Route], after: Mapping[str, Route]
) -> Iterator[tuple[str, _Key, tuple[str | None, str | None]]]:
    """The differences under one combination: (parameter, shown as `*` in texts; key; texts before and after)."""
    gone = {target: route for target, route in before.items() if target not in after}

    def change(kind: str, target: str, old: Route, new: Route, told: tuple[str | None, str | None]) -> Any:
        param = _param(target)
        sources = [_stem(one["source"], param) for one in (*old, *new)]
        return param, (kind, _stem(target, param), *sources), told

    for target, route in after.items():
        param = _param(target)
        known = before.get(target)
        if known is None:
            moved = next((t for t, one in gone.items() if _kind(one, route) is None), None)
            if moved is None:
                yield change("added", target, (), route, (None, _told(route, param)))
            else:
                names = (_stem(moved, param), _stem(target, param))
                yield change("renamed", target, gone.pop(moved), route, names)
        elif (kind := _kind(known, route)) is not None:
            yield change(kind, target, known, route, (_told(known, param, route), _told(route, param, known)))
    for target, route in gone.items():
        yield change("removed", target, route, (), (_told(route, _param(target)), None))


def _param(name: str) -> str:
    return next((param for param in _PARAMS if name.endswith(param)), "")


def _stem(name: str, param: str) -> str:
    return name.removesuffix(param) + "*" if param and name.endswith(param) else name


def _kind(old: Route, new: Route) -> str | None:
    for kind, names in _ASPECTS.items():
        if len(old) != len(new) or any(_unlike(a, b, names) for a, b in zip(old, new, strict=True)):
            return kind
    return None


def _unlike(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether two entries differ; ranks are compared only if both entries are in some plan."""
    known = all(isinstance(one.get("ranks"), Mapping) for one in (old, new))
    return any(old.get(name) != new.get(name) for name in names if name != "ranks" or known)


def _told(route: Route, param: str, other: Route = ()) -> str:
    """A route in one line, with details in which it differs from another."""
    lines: list[str] = []
    for number, one in enumerate(route):
        unlike = other[number] if number < len(other) else {}
        told = [" or ".join(_stem(name, param) for name in (one["source"], *one.get("also read as", ())))]
        told.append(f"`{one['axes']}`")
        told += [f"split {one['split']}"] if one["split"] != "no" else []
        told += [f"stage {one['stage']}"] if "stage" in one else []
        if "changed" in one:
            told.append(str(one["changed"]))
        told += [f"drop {axis}" for axis in one.get("dropped", ())]
        told += [f"{axis} written as zeros" for axis in one.get("written as zeros", ())]
        told += [word for word in ("own dtype", "optional") if one.get(word)]
        told += [f"tied to {one['tied to']}"] if one.get("tied to") else []
        if unlike and one["axes"] == unlike["axes"] and _unlike(unlike, one, ("order",)):
            told.append(str(one["order"]))
        elif unlike and not _unlike(unlike, one, ("split", "stage")) and _unlike(unlike, one, ("ranks",)):
            told.append(_grid(one["ranks"], unlike["ranks"]))
        lines.append(", ".join(told))
    return " + ".join(lines)


def _grid(ranks: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first grid whose ranks hold something different, in words."""
    mine, theirs = ({grid: held for grids, held in one.items() for grid in grids.split(", ")} for one in (ranks, other))
    return next((f"{grid}: {held}" for grid, held in mine.items() if theirs.get(grid) != held), str(ranks))


def _conditions(held: Sequence[Mapping[str, str]], every: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Combinations as few conditions: `a=x|y` for every variant that matters, if that is enough."""
    if len(held) == len(every):
        return [()]
    seen = {name: list(dict.fromkeys(one[name] for one in held)) for name in every[0]}
    full = {name: {one[name] for one in every} for name in every[0]}
    if prod(map(len, seen.values())) == len(held):
        return [tuple(f"{n}={'|'.join(c)}" for n, c in seen.items() if set(c) != full[n])]
    # Not a product: fix one variant that matters, and describe the rest for each of its choices.
    name = next(n for n in seen if not _indifferent(n, held, full[n]))
    result: list[tuple[str, ...]] = []
    for choice in seen[name]:
        below = [one for one in held if one[name] == choice]
        within = [one for one in every if one[name] == choice]
        result += [tuple(dict.fromkeys((f"{name}={choice}", *rest))) for rest in _conditions(below, within)]
    return result


def _indifferent(name: str, held: Sequence[Mapping[str, str]], choices: set[str]) -> bool:
    """Whether the same combinations are held for every choice of a variant."""
    rest = [[{**one, name: ""} for one in held if one[name] == choice] for choice in choices]
    return all(one == rest[0] for one in rest)
