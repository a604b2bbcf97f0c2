"""Mutants: everything that a mapping says changed in one place, and what would have shown it.

A mapping alone cannot tell gate from up: exchanged, the rules are as total, as invertible and of the same shapes as
before. Only the meaning that is committed beside it can, or, where there is none, what it meant before. A mutant
that nothing shows is reported so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from engine.errors import EngineError, EngineErrors
from engine.language.axes import Axes, Axis, Node, Product, Sum, parse_axes
from engine.language.documents import Document
from engine.language.mapping_file import build_mapping
from engine.language.model import Mapping as MappingFile
from engine.language.validation import check_schema
from engine.proving.committed import committed, differences, read_meaning
from engine.proving.lint import lint
from engine.proving.meaning import flat, meaning_of, parts_of_meaning
from engine.proving.proof import Mutant

_EXPRESSIONS = {"dim": "dims", "config expression": "config", "training-config expression": "training_config"}
LOADING, LINT = "loading", "lint"
COMMITTED, BEFORE = "the committed meaning", "its meaning before"

Data = dict[str, Any]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One edit of a mapping's data: its kind, where, what is done, and the data afterwards."""

    kind: str
    where: str
    what: str
    data: Data


def mutants_of(mapping: MappingFile) -> Iterator[Change]:
    """Every edit that changes one thing: moving an axis of size 1 is none."""
    data = _plain(mapping.resolved)
    ones = frozenset(name for name, e in mapping.dims.items() if e.text.strip() == "1")
    yield from _rules(data, ones)
    for kind, part in (
        ("dim", "dims"),
        ("config expression", "config"),
        ("training-config expression", "training_config"),
    ):
        yield from _tree(data, kind, (part,))
    for name, variant in (data.get("variants") or {}).items():
        yield from _variant(data, name, variant)
    for name, option in (data.get("options") or {}).items():
        yield from _option(data, name, option)
    yield from _tree(data, "tokenizer", ("tokenizer",))
    yield from _tree(data, "generation", ("generation",))
    for part in ("even", "ignore", "refuse"):
        for number, entry in enumerate(data.get(part) or ()):
            yield Change(part, part, f"without {_shown(entry)}", _without(data, (part, number)))
    for side, keys in (data.get("keys") or {}).items():
        yield from _keys(data, side, keys)
    yield from _about(data)


# -- rules


def _rules(data: Data, ones: frozenset[str]) -> Iterator[Change]:
    rules: dict[str, Data] = data["rules"]
    for name, rule in rules.items():
        at: Key = ("rules", name)
        yield Change("rule", name, "removed", _without(data, at))
        for key in ("optional", "keep", "transform", "drop", "tied_to", "when"):
            if key in rule:
                yield Change("rule", name, f"without `{key}`", _without(data, (*at, key)))
        for variant, chosen in (rule.get("when") or {}).items():
            for choice in data["variants"][variant]["choices"]:
                if choice != chosen:
                    yield Change("rule", name, f"when {variant}: {choice}", _put(data, (*at, "when", variant), choice))
        yield from _names(data, name, rule)
        axes = parse_axes(rule["axes"])
        split = _texts(rule.get("split", []))
        for axis in axes.names():
            if [axis] != split:
                yield Change("split", name, f"split on `{axis}`", _put(data, (*at, "split"), axis))
        if split:
            yield Change("split", name, "not split", _without(data, (*at, "split")))
        if "stage" in rule:
            other = "first" if rule["stage"] == "last" else "last"
            yield Change("stage", name, f"stage {other}", _put(data, (*at, "stage"), other))
        for changed in reordered(axes, ones):
            yield Change("axis order", name, f"source as `{changed}`", _axes(data, name, str(changed), rule))
        for number, target in enumerate(_targets(rule)):
            own = parse_axes(target["axes"])
            for changed in [*reordered(own, ones), *turned(own)]:
                listed = copy.deepcopy(_targets(rule))
                listed[number]["axes"] = str(changed)
                yield Change("axis order", name, f"`{_last(target['name'])}` as `{changed}`", _aim(data, name, listed))
    yield from _exchanges(data)


def _names(data: Data, name: str, rule: Data) -> Iterator[Change]:
    """Sources and targets misnamed, historical names forgotten."""
    sources = _texts(rule["source"])
    for number, source in enumerate(sources):
        if len(sources) > 1:
            left = [one for one in sources if one != source]
            yield Change("rule", name, f"without the name {source}", _put(data, ("rules", name, "source"), left))
        named = [*sources[:number], _misspelt(source), *sources[number + 1 :]]
        yield Change("rule", name, f"source {_misspelt(source)}", _put(data, ("rules", name, "source"), named))
    for number, target in enumerate(_targets(rule)):
        listed = copy.deepcopy(_targets(rule))
        listed[number]["name"] = _misspelt(target["name"])
        yield Change("rule", name, f"target {listed[number]['name']}", _aim(data, name, listed))


def _exchanges(data: Data) -> Iterator[Change]:
    """Two targets of the same axes exchanged wherever they are written: gate and up, two norms."""
    written: dict[str, tuple[str, str]] = {}
    for name, rule in data["rules"].items():
        for target in _targets(rule):
            written.setdefault(target["name"], (name, target["axes"]))
    for (one, (rule_name, first)), (two, (_, second)) in combinations(written.items(), 2):
        alike = parse_axes(first).dims == parse_axes(second).dims and _places(one) == _places(two)
        if not alike and rule_name != written[two][0]:
            continue
        changed = copy.deepcopy(data)
        renamed = {one: two, two: one}
        for rule in changed["rules"].values():
            listed = _targets(rule)
            for target in listed:
                target["name"] = renamed.get(target["name"], target["name"])
            _aimed(rule, listed)
        yield Change("rule", rule_name, f"`{_last(one)}` and `{_last(two)}` exchanged", changed)


def _targets(rule: Data) -> list[Data]:
    if rule.get("target") is not None:
        return [{"name": rule["target"], "axes": rule["axes"]}]
    return list(rule.get("targets") or ())


def _aim(data: Data, name: str, targets: Sequence[Data]) -> Data:
    changed = copy.deepcopy(data)
    _aimed(changed["rules"][name], targets)
    return changed


def _aimed(rule: Data, targets: Sequence[Data]) -> None:
    rule.pop("target", None)
    rule["targets"] = list(targets)


def _axes(data: Data, name: str, axes: str, rule: Data) -> Data:
    """Other axes of the source alone."""
    changed = _aim(data, name, copy.deepcopy(_targets(rule)))
    changed["rules"][name]["axes"] = axes
    return changed


def _places(name: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)", name))


def _last(name: str) -> str:
    """The part of a name that says most: `q_proj`."""
    parts = [part for part in name.split(".") if part not in ("weight", "{param}")]
    return parts[-1] if parts else name


def _misspelt(name: str) -> str:
    """A name with its longest word spelt wrongly.

    >>> _misspelt("layers.{layer}.attention.wo.{param}")
    'layers.{layer}.attetnion.wo.{param}'
    """
    word = max(re.findall(r"(?<![{\w])[A-Za-z_0-9]+(?![}\w])", name), key=len)
    middle = len(word) // 2 + 1
    other = word[: middle - 1] + word[middle - 1 : middle + 1][::-1] + word[middle + 1 :]
    return name.replace(word, other if other != word else f"{word}x", 1)


def reordered(axes: Axes, ones: frozenset[str] = frozenset()) -> Iterator[Axes]:
    """Two neighbours of a sum or of a product exchanged: another order of q, k and v, a permutation lost.

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
    """The last two storage dimensions exchanged."""
    if len(axes.dims) >= 2:
        yield Axes((*axes.dims[:-2], axes.dims[-1], axes.dims[-2]), axes.bar)


# -- values and expressions


def _tree(data: Data, kind: str, at: Key) -> Iterator[Change]:
    """Every value of a tree changed, and every key left out."""
    value = _get(data, at)
    where = ".".join(map(str, at))
    if isinstance(value, dict):
        for key in value:
            yield Change(kind, f"{where}.{key}", "left out", _without(data, (*at, key)))
            yield from _tree(data, kind, (*at, key))
        return
    if isinstance(value, list):
        for number, _ in enumerate(value):
            if len(value) > 1:
                yield Change(kind, where, f"without {_shown(value[number])}", _without(data, (*at, number)))
            yield from _tree(data, kind, (*at, number))
        return
    expression = isinstance(value, str) and ("{{" in value or at[0] in ("dims", "variants"))
    for other in _expressions(value, _siblings(data, at)) if expression else _others(value):
        yield Change(kind, where, f"{_shown(other)} instead of {_shown(value)}", _put(data, at, other))


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value * 2
    elif isinstance(value, str) and value:
        yield _misspelt(value) if re.search(r"[A-Za-z_0-9]", value) else value + "x"


_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|\d+\.?\d*(?:e[-+]?\d+)?|[A-Za-z_][\w.]*|==|!=|<=|>=|//|[-+*/<>|]""")
_OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "==": "!=", "!=": "==", "<": ">=", ">": "<=", "<=": ">",
    ">=": "<", "and": "or", "or": "and", "true": "false", "false": "true", "not": "", "max": "min", "min": "max",
}  # fmt: skip
_WORDS = frozenset(
    ("if", "else", "is", "in", "defined", "none", "omit", "default", "int", "float", "string", "abs", "length", "round",
     "gcd", "present", "mapping", "sequence", "number", "integer", "boolean", "otherwise")
)  # fmt: skip


def _expressions(text: Any, names: Sequence[str]) -> Iterator[str]:
    """An expression with one token changed: another constant, operator or name, a default lost."""
    text = str(text)
    found = list(_TOKEN.finditer(text))
    for number, token in enumerate(found):
        word = token[0]
        for other in _tokens(word, found[number + 1][0] if number + 1 < len(found) else "", names):
            yield text[: token.start()] + other + text[token.end() :]
    for default in re.finditer(r"\s*\|\s*(default\((?:[^()]|\([^()]*\))*\)|int\b)", text):
        yield text[: default.start()] + text[default.end() :]


def _tokens(word: str, after: str, names: Sequence[str]) -> Iterator[str]:
    if word[0] in "'\"":
        yield f"{word[0]}{_misspelt(word[1:-1]) if word[1:-1] else 'x'}{word[0]}"
    elif word[0].isdigit():
        yield str(int(word) + 1) if word.isdigit() else repr(float(word) * 2)
    elif word in _OPERATORS:
        yield _OPERATORS[word]
    elif word[0].isalpha() and word not in _WORDS:
        yield _misspelt(word)
        others = [name for name in names if name != word]
        if others:
            yield others[sum(map(ord, word)) % len(others)]


def _siblings(data: Data, at: Key) -> list[str]:
    """Names that the expressions of the same part read."""
    found: dict[str, None] = {}
    for text in _strings(_get(data, at[:1])):
        if "{{" in text or at[0] in ("dims", "variants"):
            words = (token[0] for token in _TOKEN.finditer(text))
            found.update(dict.fromkeys(w for w in words if w[0].isalpha() and w not in _WORDS and w not in _OPERATORS))
    return sorted(found)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(child)


def _variant(data: Data, name: str, variant: Data) -> Iterator[Change]:
    at: Key = ("variants", name)
    choices = variant["choices"]
    if "default" in variant:
        for choice in choices:
            if choice != variant["default"]:
                yield Change("variant", name, f"default {choice}", _put(data, (*at, "default"), choice))
        yield Change("variant", name, "without a default", _without(data, (*at, "default")))
    if isinstance(choices, dict):
        for choice, text in choices.items():
            if text == "otherwise":
                continue
            for other in _expressions(text, _siblings(data, at)):
                yield Change("variant", name, f"{choice}: {other}", _put(data, (*at, "choices", choice), other))
        if len(choices) > 1:
            turned_ = dict(reversed(list(choices.items())))
            yield Change("variant", name, "its choices in another order", _put(data, (*at, "choices"), turned_))


def _option(data: Data, name: str, option: Data) -> Iterator[Change]:
    at: Key = ("options", name)
    yield Change("option", name, "removed", _without(data, at))
    for key, value in option.items():
        if key == "help":
            continue
        if key == "type":
            others: list[Any] = [one for one in ("integer", "number", "string", "boolean") if one != value]
        elif key == "choices":
            others = [[one for one in value if one != left] for left in value]
        elif key == "default" and option.get("choices"):
            others = [one for one in option["choices"] if one != value]
        else:
            others = [*_others(value), *([str(value)] if not isinstance(value, str) else [])]
        for other in others:
            yield Change("option", name, f"{key} {_shown(other)}", _put(data, (*at, key), other))


def _keys(data: Data, side: str, keys: Mapping[str, Data]) -> Iterator[Change]:
    for name, body in keys.items():
        at: Key = ("keys", side, name)
        yield Change("configuration key", f"keys.{side}.{name}", "removed", _without(data, at))
        for key, value in body.items():
            if key in ("why", "noted") or (key == "ignored" and len(body) == 1):
                continue
            changed = [None] if key == "ignored" else _limits(key, value)
            for other in changed:
                new = _without(data, (*at, key)) if other is None else _put(data, (*at, key), other)
                yield Change("configuration key", f"keys.{side}.{name}", f"{key} {_shown(other)}", new)


def _limits(key: str, value: Any) -> list[Any]:
    if key == "type":
        listed = _texts(value)
        return [[one for one in listed if one != left] for left in listed] if len(listed) > 1 else ["list", "null"]
    if key == "only":
        return [[*value, "another"]]
    return list(_others(value))


def _about(data: Data) -> Iterator[Change]:
    yield from _tree(data, "about", ("target", "model_type"))
    yield from _tree(data, "about", ("target", "architecture"))
    yield from _tree(data, "about", ("source", "layout"))
    yield from _tree(data, "about", ("source", "model_types"))
    yield from _tree(data, "about", ("target", "remote_code"))
    yield from _tree(data, "chat template", ("chat_template",))
    yield from _tree(data, "expected size", ("expect",))


# -- data


def _texts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _get(data: Any, at: Key) -> Any:
    for key in at:
        if isinstance(data, dict) and key not in data:
            return None
        data = data[key]
    return data


def _changed(data: Data, at: Key, change: Callable[[Any, Any], None]) -> Data:
    """A copy along the path, with its end changed."""
    result = dict(data)
    here: Any = result
    for key in at[:-1]:
        here[key] = dict(here[key]) if isinstance(here[key], dict) else list(here[key])
        here = here[key]
    change(here, at[-1])
    return result


def _put(data: Data, at: Key, value: Any) -> Data:
    def put(here: Any, key: Any) -> None:
        here[key] = value

    return _changed(data, at, put)


def _without(data: Data, at: Key) -> Data:
    def drop(here: Any, key: Any) -> None:
        del here[key]

    return _changed(data, at, drop)


def _shown(value: Any) -> str:
    text = str(value)
    return f"`{text if len(text) <= 120 else text[:119] + '…'}`"


# -- trying them


def try_mutants(mapping: MappingFile, changes: Sequence[Change] | None = None) -> list[Mutant]:
    """Every mutant, and the first thing that shows it.

    Args:
        changes: those to try; default: all.
    """
    then = dict(flat({name: part for name, part in parts_of_meaning(mapping)}))
    known = committed(mapping)
    try:
        is_of = known is not None and read_meaning(known[1]) == dict(flat(meaning_of(mapping)))
    except EngineError:
        is_of = False
    before = {(f.code, f.message) for f in lint(mapping)}
    found: list[Mutant] = []
    for change in changes if changes is not None else mutants_of(mapping):
        caught, told = _caught(mapping, change, then, before)
        if caught == BEFORE and is_of:
            caught = COMMITTED
        found.append(Mutant(change.where, change.what, caught, told, change.kind))
    return found


def _caught(
    mapping: MappingFile, change: Change, then: Mapping[tuple[str, ...], Any], before: set[tuple[str, str]]
) -> tuple[str | None, str]:
    """The first thing that shows a mutant, weakest evidence first, and its words."""
    try:
        mutant = rebuilt(mapping, change.data)
    except (EngineError, EngineErrors) as error:
        first = error.errors[0] if isinstance(error, EngineErrors) else error
        return LOADING, f"{first.code} {first.message}"
    for finding in lint(mutant):
        if finding.severity == "error" and (finding.code, finding.message) not in before:
            return LINT, f"{finding.code} {finding.message}"
    # Parts of the meaning one after another: most mutants show in one that is quickly known.
    for name, part in parts_of_meaning(mutant):
        now = dict(flat({name: part}))
        was = {path: value for path, value in then.items() if path[0] == name}
        if now != was:
            return BEFORE, next(iter(differences(mutant, was, now))).message
    return None, ""


def rebuilt(mapping: MappingFile, data: Data) -> MappingFile:
    """A mapping of changed data, checked as its file would be.

    Raises:
        EngineError: what loading it would raise.
    """
    document = Document(mapping.files[-1], data, {})
    check_schema(document, "mapping", merged=True)
    return build_mapping(document, mapping.files)
