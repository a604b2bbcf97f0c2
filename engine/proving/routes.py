"""What two mappings do with every tensor, compared without a checkpoint: rules × variant choices.

A route is one target tensor and everything that is written into it. Routes are compared under every
combination of choices, so that a rule that was split in two by `when`, renamed or moved to a family
shows only where it comes to something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from engine.language.axes import Axes
from engine.language.model import Mapping as MappingFile
from engine.language.model import Rule, Target
from engine.language.names import PARAMS, pattern

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
_MAX_COMBINATIONS = 4096
_Told = tuple[str, str, str | None, str | None]  # kind, target, old, new


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A target tensor that comes out differently.

    Attributes:
        kind: a key of `KINDS`.
        target: its name pattern; the new one where it was renamed.
        old, new: where it comes from, for people; None when it is not mapped.
        when: the choices under which it is so, `rotary=pairs`; empty for all of them.
    """

    kind: str
    target: str
    old: str | None
    new: str | None
    when: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "target": self.target, "old": self.old, "new": self.new, "when": list(self.when)}


@dataclass(frozen=True, slots=True)
class _Route:
    """A target and its sources. The tuples are compared; `told` is what people read."""

    sources: tuple[tuple[str, ...], ...]
    axes: tuple[tuple[str, str], ...]
    cuts: tuple[object, ...]
    values: tuple[object, ...]
    treatment: tuple[object, ...]
    told: str
    target: str
    param: str | None

    def same(self, other: _Route) -> bool:
        return self.key() == other.key()

    def key(self) -> tuple[object, ...]:
        return (self.sources, self.axes, self.cuts, self.values, self.treatment)


def compare_routes(old: MappingFile | None, new: MappingFile | None) -> list[TensorChange]:
    """Targets that come out differently under some combination of variant choices."""
    combinations = list(_combinations([m for m in (old, new) if m is not None]))
    found: dict[_Told, dict[str | None, list[Mapping[str, str]]]] = {}
    for choices in combinations:
        for param, told in _under(old, new, choices):
            found.setdefault(told, {}).setdefault(param, []).append(choices)
    order = list(KINDS)
    changes: list[TensorChange] = []
    for told, held in found.items():
        weight = held.get("weight")
        if weight is not None and weight == held.get("bias"):  # {param} says both
            held = {None: weight}
        for param, under in held.items():
            texts = [t if t is None or param is None else t.replace("{param}", param) for t in told[1:]]
            for when in _conditions(under, combinations):
                changes.append(TensorChange(told[0], texts[0] or "", texts[1], texts[2], when))
    return sorted(changes, key=lambda c: (order.index(c.kind), c.target, c.when))


def _combinations(mappings: Sequence[MappingFile]) -> Iterator[dict[str, str]]:
    """Choices of the variants that rules of either mapping name."""
    choices: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name in dict.fromkeys(name for rule in mapping.rules for name in rule.when):
            choices.setdefault(name, {}).update(dict.fromkeys(mapping.variants[name].choices))
    for count, combination in enumerate(product(*choices.values())):
        if count >= _MAX_COMBINATIONS:
            return
        yield dict(zip(choices, combination, strict=True))


def _under(
    old: MappingFile | None, new: MappingFile | None, choices: Mapping[str, str]
) -> Iterator[tuple[str | None, _Told]]:
    """What differs under one combination, and for which parameter."""
    before = _routes(old, choices)
    after = _routes(new, choices)
    gone = {target: route for target, route in before.items() if target not in after}
    for target, route in after.items():
        known = before.get(target)
        if known is None:
            moved = next((t for t, one in gone.items() if one.same(route)), None)
            if moved is None:
                yield route.param, ("added", route.target, None, route.told)
            else:
                other = gone.pop(moved)
                both = other.param == route.param  # else {param} would say more than is so
                names = (other.target, route.target) if both else (moved, target)
                yield route.param if both else None, ("renamed", names[1], *names)
        elif not known.same(route):
            yield route.param, (_kind(known, route), route.target, known.told, route.told)
    for route in gone.values():
        yield route.param, ("removed", route.target, route.told, None)


def _kind(old: _Route, new: _Route) -> str:
    for kind, name in (("rerouted", "sources"), ("laid out", "axes"), ("cut", "cuts"), ("valued", "values")):
        if getattr(old, name) != getattr(new, name):
            return kind
    return "treated"


def _routes(mapping: MappingFile | None, choices: Mapping[str, str]) -> dict[str, _Route]:
    """Target name, `{param}` written out → its route."""
    held: dict[str, list[tuple[Rule, Target, str | None]]] = {}
    for rule in mapping.rules if mapping is not None else ():
        if any(choices.get(name) not in allowed for name, allowed in rule.when.items()):
            continue
        for target in rule.targets:
            for param in PARAMS if pattern(target.name).has_param else (None,):
                name = target.name if param is None else target.name.replace("{param}", param)
                held.setdefault(name, []).append((rule, target, param))
    return {name: _route(entries) for name, entries in held.items()}


def _route(entries: Sequence[tuple[Rule, Target, str | None]]) -> _Route:
    sources, axes, cuts, values, treatment = [], [], [], [], []
    for rule, target, param in sorted(entries, key=lambda entry: entry[0].sources):
        side = Axes.bias if param == "bias" else Axes.weight
        put = [s if param is None else s.replace("{param}", param) for s in rule.sources]
        words: dict[str, str] = {name: name for name in pattern(rule.sources[0]).placeholders}
        words |= {name: name for name in pattern(target.name).placeholders}
        sources.append(tuple(put))
        axes.append((_renamed(side(rule.axes), words), _renamed(side(target.axes), words)))
        cuts.append((tuple(words.get(axis, axis) for axis in rule.split), rule.stage))
        changed = None if rule.transform is None else (rule.transform[0], words.get(rule.transform[1]))
        values.append((changed, tuple(sorted(words.get(axis, axis) for axis in rule.drop))))
        treatment.append((rule.keep_dtype, rule.optional, rule.tied_to))
    told = " + ".join(_told(rule, target) for rule, target, _ in entries)
    _, target, param = entries[0]
    return _Route(tuple(sources), tuple(axes), tuple(cuts), tuple(values), tuple(treatment), told, target.name, param)


def _renamed(axes: Axes, words: dict[str, str]) -> str:
    """Axes with names by order of appearance, since what they are called means nothing."""
    for name in axes.names():
        words.setdefault(name, f"axis{len(words)}")
    text = str(axes)
    return "".join(words.get(word, word) for word in _words(text))


def _words(text: str) -> Iterator[str]:
    word = ""
    for letter in text:
        if letter.isalnum() or letter == "_":
            word += letter
            continue
        if word:
            yield word
        word = ""
        yield letter
    if word:
        yield word


def _told(rule: Rule, target: Target) -> str:
    """A rule's part in a target, in one line."""
    told = [" or ".join(rule.sources)]
    told.append(f"`{rule.axes}`" if rule.axes == target.axes else f"`{rule.axes}` as `{target.axes}`")
    if rule.split:
        told.append(f"split {', '.join(rule.split)}")
    if rule.stage:
        told.append(f"stage {rule.stage}")
    if rule.transform:
        told.append(f"{rule.transform[0]} along {rule.transform[1]}")
    told += [f"drop {axis}" for axis in rule.drop]
    told += ["own dtype"] if rule.keep_dtype else []
    told += ["optional"] if rule.optional else []
    told += [f"tied to {rule.tied_to}"] if rule.tied_to else []
    return ", ".join(told)


def _conditions(held: Sequence[Mapping[str, str]], every: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Combinations as few conditions: `a=x|y` for every variant that matters, if that says them all."""
    if len(held) == len(every):
        return [()]
    seen = {name: list(dict.fromkeys(one[name] for one in held)) for name in every[0]}
    full = {name: {one[name] for one in every} for name in every[0]}
    size = 1
    for choices in seen.values():
        size *= len(choices)
    if size == len(held):
        return [tuple(f"{n}={'|'.join(c)}" for n, c in seen.items() if set(c) != full[n])]
    # Not a product: fix one variant and say the rest for each of its choices.
    name = next(n for n, choices in seen.items() if len(choices) > 1)
    result: list[tuple[str, ...]] = []
    for choice in seen[name]:
        below = [one for one in held if one[name] == choice]
        within = [one for one in every if one[name] == choice]
        result += [tuple(dict.fromkeys((f"{name}={choice}", *rest))) for rest in _conditions(below, within)]
    return result
