"""Mutants: copies of a mapping, each with one change; and what detects them.

A mapping alone does not distinguish gate from up: if they are exchanged, the rules are still total and invertible,
with the same shapes. Only the meaning that is committed beside it shows it, or, if there is none, its meaning before
the change. A mutant that nothing detects is reported as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

from engine.errors import EngineError
from engine.language.axes import Axes, Axis, Node, Product, Sum, parse_axes
from engine.language.documents import Document, flat, grouped, plain, same
from engine.language.mapping_file import build_mapping
from engine.language.model import MappingFile
from engine.language.validation import check_schema
from engine.proving.committed import committed, differences, read_meaning
from engine.proving.lint import lint
from engine.proving.meaning import Path, facts_of, meaning_of
from engine.proving.neighbour import GONE
from engine.proving.proof import Failure, Mutant
from engine.proving.value_mutants import Change, Data, Key, get, misspelt, of_values, put, texts, without

LOADING, LINT = "loading", "lint"
_ROWS = ("reading", "writing")  # parts whose rows are independent of each other
COMMITTED, BEFORE = "the committed meaning", "its meaning before"

Facts = dict[str, dict[Path, Any]]  # part → its facts


def mutants_of(mapping: MappingFile) -> Iterator[Change]:
    """Every edit that changes one thing; moving an axis of size 1 does not."""
    data = plain(mapping.resolved)
    data["rules"] = {name: _whole(rule) for name, rule in data["rules"].items()}
    ones = frozenset(name for name, e in mapping.dims.items() if e.text.strip() == "1")
    yield from _rules(data, ones)
    yield from of_values(data)


def _whole(rule: Data) -> Data:
    """A rule with the short form `target` (one target with the source's axes) written out."""
    if rule.get("target") is None:
        return rule
    rest = {key: value for key, value in rule.items() if key != "target"}
    return {**rest, "targets": [{"name": rule["target"], "axes": rule["axes"]}]}


def _rules(data: Data, ones: frozenset[str]) -> Iterator[Change]:
    rules: dict[str, Data] = data["rules"]
    for name, rule in rules.items():
        at: Key = ("rules", name)
        yield Change("rule", name, "removed", without(data, at))
        for key in ("optional", "keep", "transform", "drop", "zeros", "tied_to", "when"):
            if key in rule:
                yield Change("rule", name, f"without `{key}`", without(data, (*at, key)))
        for when in (("when",), ("transform", "when")):
            for variant, chosen in (get(data, (*at, *when)) or {}).items():
                for choice in data["variants"][variant]["choices"]:
                    if choice != chosen:
                        told = f"{' '.join(when)} {variant}: {choice}"
                        yield Change("rule", name, told, put(data, (*at, *when, variant), choice))
        if "add" in rule.get("transform", {}):
            more = rule["transform"]["add"] + 1
            yield Change("rule", name, f"adds {more}", put(data, (*at, "transform", "add"), more))
        yield from _names(data, name, rule)
        axes = parse_axes(rule["axes"])
        split = texts(rule.get("split", []))
        for axis in axes.names():
            if [axis] != split:
                yield Change("split", name, f"split on `{axis}`", put(data, (*at, "split"), axis))
        if split:
            yield Change("split", name, "not split", without(data, (*at, "split")))
        if "stage" in rule:
            other = "first" if rule["stage"] == "last" else "last"
            yield Change("stage", name, f"stage {other}", put(data, (*at, "stage"), other))
        for changed in reordered(axes, ones):
            yield Change("axis order", name, f"source as `{changed}`", put(data, (*at, "axes"), str(changed)))
        for number, target in enumerate(rule["targets"]):
            own = parse_axes(target["axes"])
            for changed in [*reordered(own, ones), *turned(own)]:
                edited = put(data, (*at, "targets", number, "axes"), str(changed))
                yield Change("axis order", name, f"`{_last(target['name'])}` as `{changed}`", edited)
    yield from _exchanges(data)


def _names(data: Data, name: str, rule: Data) -> Iterator[Change]:
    """Edits that misspell sources and targets, or drop historical names."""
    sources = texts(rule["source"])
    for number, source in enumerate(sources):
        if len(sources) > 1:
            left = [one for one in sources if one != source]
            yield Change("rule", name, f"without the name {source}", put(data, ("rules", name, "source"), left))
        named = [*sources[:number], misspelt(source), *sources[number + 1 :]]
        yield Change("rule", name, f"source {misspelt(source)}", put(data, ("rules", name, "source"), named))
    for number, target in enumerate(rule["targets"]):
        wrong = misspelt(target["name"])
        yield Change("rule", name, f"target {wrong}", put(data, ("rules", name, "targets", number, "name"), wrong))


def _exchanges(data: Data) -> Iterator[Change]:
    """Edits that exchange two targets of the same axes everywhere: gate and up, two norms."""
    written = grouped(
        (target["name"], (name, parse_axes(target["axes"]).dims))
        for name, rule in data["rules"].items()
        for target in rule["targets"]
    )
    for (one, ours), (two, theirs) in combinations(written.items(), 2):
        rule_name, shared = ours[0][0], {name for name, _ in ours} & {name for name, _ in theirs}
        alike = {axes for _, axes in ours} & {axes for _, axes in theirs} and _places(one) == _places(two)
        if not alike and not shared:
            continue
        renamed = {one: two, two: one}
        rules = {
            name: {**rule, "targets": [{**t, "name": renamed.get(t["name"], t["name"])} for t in rule["targets"]]}
            for name, rule in data["rules"].items()
        }
        exchanged = f"`{_last(one)}` and `{_last(two)}` exchanged"
        yield Change("rule", rule_name, exchanged, put(data, ("rules",), rules))


def _places(name: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)", name))


def _last(name: str) -> str:
    """The most specific part of a name: `q_proj`."""
    parts = [part for part in name.split(".") if part not in ("weight", "{param}")]
    return parts[-1] if parts else name


def reordered(axes: Axes, ones: frozenset[str] = frozenset()) -> Iterator[Axes]:
    """Axes with two neighbours of a sum or product exchanged: another order of q, k and v, or a lost permutation.

    >>> [str(axes) for axes in reordered(parse_axes("(heads (q + k)) | hidden"))]
    ['((q + k) heads) | hidden', '(heads (k + q)) | hidden']
    """
    for position, dim in enumerate(axes.dims):
        for node in _exchanged(dim, ones):
            yield Axes((*axes.dims[:position], node, *axes.dims[position + 1 :]), axes.bar)


def _exchanged(node: Node, ones: frozenset[str]) -> Iterator[Node]:
    if isinstance(node, Axis):
        return
    kind: type[Product] | type[Sum] = type(node)
    terms = node.terms
    for i in range(len(terms) - 1):
        if kind is Product and any(isinstance(t, Axis) and t.name in ones for t in terms[i : i + 2]):
            continue
        yield kind((*terms[:i], terms[i + 1], terms[i], *terms[i + 2 :]))
    for i, term in enumerate(terms):
        for changed in _exchanged(term, ones):
            yield kind((*terms[:i], changed, *terms[i + 1 :]))


def turned(axes: Axes) -> Iterator[Axes]:
    """Axes with the last two storage dimensions exchanged."""
    if len(axes.dims) >= 2:
        yield Axes((*axes.dims[:-2], axes.dims[-1], axes.dims[-2]), axes.bar)


# -- what detects them


def try_mutants(mapping: MappingFile, changes: Sequence[Change] | None = None) -> list[Mutant]:
    """Every mutant, and the first check that detects it.

    Args:
        changes: the changes to try; default: all.

    Raises:
        EngineError: if the unchanged mapping does not load, as then loading shows nothing about mutants.
    """
    whole = rebuilt(mapping, plain(mapping.resolved))  # as mutants are: what its parents need counts as its own
    then: Facts = {}
    for path, value in facts_of(mapping):
        then.setdefault(path[0], {})[path] = value
    known = committed(mapping)
    try:
        is_of = known is not None and read_meaning(known[1]) == dict(flat(meaning_of(mapping)))
    except EngineError:
        is_of = False
    before = {(f.code, f.message) for one in (mapping, whole) for f in lint(one)}
    found: list[Mutant] = []
    for change in changes if changes is not None else mutants_of(mapping):
        caught, told = _caught(mapping, change, then, before)
        if caught == BEFORE and is_of:
            caught = COMMITTED
        found.append(Mutant(change.where, change.what, caught, told, change.kind))
    return found


def _caught(mapping: MappingFile, change: Change, then: Facts, before: set[tuple[str, str]]) -> tuple[str | None, str]:
    """The first check that detects a mutant, weakest evidence first, and its message."""
    try:
        mutant = rebuilt(mapping, change.data)
    except EngineError as error:
        return LOADING, f"{error.code} {error.message}"
    for finding in lint(mutant):
        if finding.severity == "error" and (finding.code, finding.message) not in before:
            return LINT, f"{finding.code} {finding.message}"
    found = first_difference(mutant, then)
    return (None, "") if found is None else (BEFORE, found.message)


def first_difference(mapping: MappingFile, then: Facts) -> Failure | None:
    """The first difference of a mapping's meaning from `then`; parts and rows that are fast to compute come first."""
    left = dict(then)
    for part, facts in groupby(facts_of(mapping), key=lambda fact: fact[0][0]):
        was = left.pop(part, {})
        now: dict[Path, Any] = {}
        for path, value in facts:
            now[path] = value
            if part in _ROWS and not same(was.get(path, GONE), value):
                return _told(mapping, {path: was[path]} if path in was else {}, {path: value})
        if not same(now, was):
            return _told(mapping, was, now)
    lost = {path: value for part in left.values() for path, value in part.items()}
    return _told(mapping, lost, {}) if lost else None


def _told(mapping: MappingFile, was: Mapping[Path, Any], now: Mapping[Path, Any]) -> Failure:
    found = differences(mapping, was, now)
    return found[0] if found else Failure(f"its {next(iter({**now, **was}))[0]} differ", str(mapping.place))


def rebuilt(mapping: MappingFile, data: Data) -> MappingFile:
    """A mapping from changed data, checked like its file.

    Raises:
        EngineError: the errors of loading it from a file.
    """
    document = Document(mapping.files[-1], data)
    check_schema(document, "mapping", merged=True)
    return build_mapping(document, mapping.files)
