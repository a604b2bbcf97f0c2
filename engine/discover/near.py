"""Matches tensors with a family's tensors of other names, by likeness of names and by shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from engine.checkpoint.ranks import Stage
from engine.discover.names import Observed, tail
from engine.errors import EngineError
from engine.language.documents import grouped
from engine.language.model import Layout, MappingFile, Rule
from engine.language.names import pattern
from engine.planning.attempts import Checkpoint, claims
from engine.planning.facts import present_in
from engine.planning.groups import group_shards
from engine.planning.sizes import Fact, solve
from engine.planning.stored import Instance, instances
from engine.planning.variants import options_of

_CLEAR = 0.5  # likeness of names that is enough together with an equal shape
_ALONE = 0.3  # the same if no other tensor has the shape
_MARGIN = 0.05
_COMPARED = 100  # characters of a name: the time grows with their square
_SAFE = re.compile(r"[A-Za-z0-9_.{}-]+")


@dataclass(frozen=True, slots=True)
class Slot:
    """The rules of a family that read one tensor, whatever the variants."""

    sources: tuple[str, ...]
    rules: tuple[Rule, ...]
    known_as: tuple[str, ...] = ()  # the target's name, if the usual rule writes one tensor

    def reads(self, name: str) -> bool:
        return any(pattern(source).match(name) is not None for source in self.sources)

    def instead_of(self, other: Slot) -> bool:
        """Whether the two are never read together: no variant choices make rules of both active."""
        return not any(one.together(two) for one in self.rules for two in other.rules)

    @property
    def fused(self) -> bool:
        return any(len(rule.targets) > 1 or "+" in str(rule.axes) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Pairing:
    """A tensor taken for a family's: the likeness of the names, and other tensors of the same shape."""

    slot: Slot
    stem: str
    score: float
    rivals: tuple[str, ...]


@dataclass(slots=True)
class Nearness:
    """A family compared with a checkpoint.

    Attributes:
        matched: the number of patterns with the family's own names.
        others: the other patterns, by stem.
        left: patterns without a rule, with the nearest slots.
        empty: rules without a tensor.
    """

    mapping: MappingFile
    reference: str
    slots: list[Slot]
    fits: _Fits
    matched: int
    others: dict[str, list[Observed]]
    pairings: list[Pairing]
    left: list[tuple[Observed, tuple[tuple[Slot, float], ...]]]
    empty: list[Slot]

    def share(self) -> float:
        """The share of patterns that the family explains."""
        explained = self.matched + sum(len(self.others[pairing.stem]) for pairing in self.pairings)
        return explained / max(1, self.matched + sum(map(len, self.others.values())))


def compare_family(
    mapping: MappingFile, reference: str, layout: Layout, checkpoint: Checkpoint, observed: Sequence[Observed]
) -> Nearness:
    """Match patterns that have the family's names, then pair the rest as long as a pair is clear."""
    slots, fits = _slots(mapping), _Fits(mapping, layout, checkpoint)
    skipped = [pattern(e.pattern) for e in (*mapping.ignore, *mapping.refuse) if e.side == "source"]
    hits = [[slot for slot in slots if slot.reads(one.stored[0].name)] for one in observed]
    taken = {slot.sources for hit in hits for slot in hit}
    rest = grouped(
        (one.stem, one)
        for one, hit in zip(observed, hits, strict=True)
        if not hit and not any(p.match(one.stored[0].name) is not None for p in skipped)
    )
    free = {slot.sources: slot for slot in slots if slot.sources not in taken}
    pairs = {
        (stem, slot.sources): similarity(stem, slot)
        for stem, listed in rest.items()
        for slot in free.values()
        if _SAFE.fullmatch(stem) and fits(slot, listed)
    }
    pairings: list[Pairing] = []
    while (best := _clearest(pairs, free)) is not None:
        (stem, sources), rivals = best
        rivals += tuple(named.sources[0] for named in slots if named.sources in taken and fits(named, rest[stem]))
        pairings.append(Pairing(free[sources], stem, pairs[best[0]], rivals))
        gone = {s for s, slot in free.items() if s == sources or slot.instead_of(free[sources])}
        pairs = {key: score for key, score in pairs.items() if key[0] != stem and key[1] not in gone}
    filled = [pairing.slot for pairing in pairings] + [slot for slot in slots if slot.sources in taken]
    empty = [s for s in free.values() if s not in filled and not any(s.instead_of(other) for other in filled)]
    left = []
    for stem in (one for one in rest if all(one != pairing.stem for pairing in pairings)):
        near = sorted((k for k in pairs if k[0] == stem), key=lambda k: -pairs[k])[:3]
        left += [(one, tuple((free[s], pairs[stem, s]) for _, s in near)) for one in rest[stem]]
    matched = len(observed) - sum(map(len, rest.values()))
    return Nearness(mapping, reference, slots, fits, matched, rest, pairings, left, empty)


def _slots(mapping: MappingFile) -> list[Slot]:
    def usual(rule: Rule) -> bool:
        """Whether the rule is active under the default choices."""
        defaults = {name: mapping.variants[name].default for name in rule.when}
        return all(defaults[name] in (None, *allowed) for name, allowed in rule.when.items())

    return [
        Slot(sources, tuple(rules), tuple(r.targets[0].name for r in rules if len(r.targets) == 1 and usual(r)))
        for sources, rules in grouped((rule.sources, rule) for rule in mapping.rules).items()
    ]


def _clearest(
    pairs: Mapping[tuple[str, tuple[str, ...]], float], slots: Mapping[tuple[str, ...], Slot]
) -> tuple[tuple[str, tuple[str, ...]], tuple[str, ...]] | None:
    """The best pair, and its rivals, that stands out among all pairs of its tensor or its slot; None if none does."""
    for key in sorted(pairs, key=lambda k: (-pairs[k], k)):
        stem, sources = key
        score, slot = pairs[key], slots[sources]
        others = {
            other: s
            for other, s in pairs.items()
            if other != key and ((other[0] == stem and not slots[other[1]].instead_of(slot)) or other[1] == sources)
        }
        rivals = tuple(dict.fromkeys(o[1][0] if o[0] == stem else o[0] for o in others))
        if score >= (_CLEAR if others else _ALONE) and all(s <= score - _MARGIN for s in others.values()):
            return key, rivals
    return None


def similarity(stem: str, slot: Slot) -> float:
    """The likeness of the last parts of names, 0 to 1; a target's name counts a little less than a source's.

    >>> similarity("layers.{layer}.ffn.w1.{param}", Slot(("layers.{layer}.feed_forward.w1.{param}",), ())) > 0.7
    True
    """
    own = tail(stem)
    names = [(source, 1.0) for source in slot.sources]
    names += [(target, 0.95) for target in slot.known_as]
    return max(weight * _alike(own, tail(name)) for name, weight in names)


@lru_cache(maxsize=1 << 14)  # names repeat over families and layers
def _alike(one: tuple[str, ...], two: tuple[str, ...]) -> float:
    def ratio(a: str, b: str) -> float:
        return SequenceMatcher(None, a[:_COMPARED].lower(), b[:_COMPARED].lower(), autojunk=False).ratio()

    last = ratio(one[-1], two[-1])
    if len(one) == 1 and len(two) == 1:
        return last
    return 0.65 * last + 0.35 * ratio(".".join(one[:-1]), ".".join(two[:-1]))


class _Fits:
    """Tests whether the shapes of a tensor agree with a slot and the configuration, as planning does."""

    def __init__(self, mapping: MappingFile, layout: Layout, checkpoint: Checkpoint) -> None:
        self.layout, self.checkpoint = layout, checkpoint
        self.instances = grouped((instance.rule.sources, instance) for instance in instances(mapping))
        names: dict[str, Any] = {
            **checkpoint.config,
            "training": checkpoint.training,
            "given": checkpoint.target_config,
            "present": present_in(()),
        }
        self.facts: Mapping[str, Fact] = {}
        try:
            names["options"] = options_of(mapping, {})
            self.facts = claims(mapping, names, checkpoint.config_name)[0]
        except EngineError:
            pass

    def __call__(self, slot: Slot, listed: Sequence[Observed]) -> bool:
        """Whether some variant's rule agrees. Only weights count: a bias that the rule cannot read is left over."""
        files = self.checkpoint.grid.files
        tested = [one for one in listed if one.param != "bias"] or list(listed)
        return all(any(self._agrees(i, one, files) for i in self.instances[slot.sources]) for one in tested)

    def _agrees(self, instance: Instance, one: Observed, files: Sequence[Any]) -> bool:
        own = instance.sources[0]
        if set(own.placeholders) != set(one.placeholders) or (instance.param or one.param) != one.param:
            return False
        if instance.param is None and one.param is not None and not own.text.endswith("." + one.param):
            return False
        if instance.rule.stage is not None and not self._in_stage(instance.rule.stage, one):
            return False
        compiled = pattern(one.text)
        matched = []
        places: dict[Stage, int] = {}
        some = {one.stored[0].name, one.stored[-1].name}  # planning checks all of them later
        for stored in (stored for stored in one.stored if stored.name in some):
            values = dict(compiled.match(stored.name) or {})
            if "layer" in values:
                stage = self.checkpoint.grid.stage(stored.file, stored.chunk)
                values["layer"] += places.setdefault(stage, len(places)) * 1_000_000
            matched.append((stored, instance, values))
        return not solve(list(group_shards(matched, files, self.layout).values()), self.facts, files).contradictions

    def _in_stage(self, stage: str, one: Observed) -> bool:
        """Whether the tensor is on the stage's pipeline ranks: only on the first, or only on others."""
        grid = self.checkpoint.grid
        if not grid.pipelined:
            return True
        places = [grid.stage(stored.file, stored.chunk) for stored in one.stored]
        return not any(map(any, places)) if stage == "first" else all(map(any, places))


def drop_contested(near: Nearness, others: Sequence[Nearness]) -> None:
    """Unpair fused tensors if another family orders their contents differently.

    Both orders have the same shape, and the wrong one gives a model that generates nonsense, so neither is active.
    """
    for pairing in [p for p in near.pairings if p.slot.fused]:
        own = {str(rule.axes) for rule in pairing.slot.rules}
        contested: list[tuple[Slot, float]] = []
        for other in others:
            for slot in other.slots:
                unlike = slot.fused and not own & {str(rule.axes) for rule in slot.rules}
                if unlike and other.fits(slot, near.others[pairing.stem]):
                    contested.append((slot, similarity(pairing.stem, slot)))
        if contested:
            near.pairings.remove(pairing)
            near.left += [(one, ((pairing.slot, pairing.score), *contested[:2])) for one in near.others[pairing.stem]]
