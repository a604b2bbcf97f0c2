"""Lint: errors in a mapping that can be found without a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import translate

from engine.assets.chat import chat_template
from engine.checkpoint.ranks import layout_dims
from engine.errors import EngineError, distinct, meant
from engine.language.declared import axes_of, every_expression, expressions_of, paths_in
from engine.language.documents import grouped, prefixes
from engine.language.expressions import compile_expression, names_in
from engine.language.keys import Key
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Expression, Layout, MappingFile, Rule
from engine.language.names import pattern, spelled_out
from engine.language.search import find_file, kind_of
from engine.planning.config_keys import declared
from engine.planning.pieces import match_pieces
from engine.planning.stored import instances
from engine.proving.known_names import check_comparisons, check_keys, check_models, check_patterns, place_of
from engine.proving.matrix import choices_named
from engine.proving.proof import Finding
from engine.proving.values import check_declared, check_options, check_spellings, check_tokens

_Check = Callable[[MappingFile], Iterator[EngineError]]
_KEPT = 64  # rules whose findings are remembered


def lint_file(name: str) -> list[EngineError]:
    """Load and lint one mapping or layout; an error in loading is a finding too."""
    try:
        if kind_of(find_file(name)) == "layout":
            load_layout(name)
            return []
        mapping = load_mapping(name)
    except EngineError as error:
        return error.errors
    return lint(mapping)


def lint(mapping: MappingFile) -> list[EngineError]:
    """All findings of a loaded mapping, by place."""
    found = [one for code, check in _ALONE.items() for one in _coded(code, check(mapping))]
    try:
        layout = load_layout(mapping.layout, mapping.layout_place)
    except EngineError as error:
        found += error.errors
    else:
        found += [one for code, check in _IN_LAYOUT.items() for one in _coded(code, check(mapping, layout))]
    if mapping.chat_template is not None:
        try:
            chat_template(mapping.chat_template)
        except EngineError as error:
            error.place = error.place or place_of(mapping, "chat_template")
            found.append(error)
    return sorted(distinct(found), key=lambda f: (f.place.line or 0 if f.place else 0, f.code, f.message))


def _coded(code: str, found: Iterable[EngineError]) -> Iterator[EngineError]:
    for one in found:
        one.code = code
        yield one


def _of_rules(check: _Check) -> _Check:
    """A check of nothing but rules and choices: done once for a family and all releases that change neither."""
    known: dict[object, list[EngineError]] = {}

    def checked(mapping: MappingFile) -> Iterator[EngineError]:
        key = mapping.rules, tuple((one.name, *one.choices) for one in mapping.variants.values())
        if key not in known:
            if len(known) == _KEPT:
                known.clear()
            known[key] = list(check(mapping))
        return iter(known[key])

    return checked


@_of_rules
def _overlaps(mapping: MappingFile) -> Iterator[Finding]:
    """L001: two rules that can match the same name and can be active together."""
    named = [(rule, name) for rule in mapping.rules for name in sorted(spelled_out(rule.sources))]
    for index, (rule, name) in enumerate(named):
        sample = pattern(name).sample()
        for position, (other, other_name) in enumerate(named):
            if other is rule or not rule.together(other) or (name == other_name and position > index):
                continue
            if pattern(other_name).match(sample) is not None:
                yield Finding(
                    rule.place,
                    f"rules `{other.name}` and `{rule.name}` both read `{name}`",
                    f"Give them different `when`, or remove one; the other is at {other.place}.",
                )


@_of_rules
def _unmatched(mapping: MappingFile) -> Iterator[EngineError]:
    """L005, under every combination of choices."""
    every = instances(mapping)
    for choices in choices_named([mapping]):
        try:
            match_pieces([one for one in every if one.rule.active(choices)])
        except EngineError as error:
            yield error


@_of_rules
def _gaps(mapping: MappingFile) -> Iterator[Finding]:
    """L002: under another choice of one variant, a tensor is no longer read and another is no longer written.

    Then one of two twin rules is probably missing, as for two generations of names. Each alone can be right: a tensor
    that is not read may be absent under that choice, and one that is not written may be replaced by another.
    """
    every = choices_named([mapping])
    held = {tuple(one.values()): [rule for rule in mapping.rules if rule.active(one)] for one in every}
    ends = {key: _ends(rules) for key, rules in held.items()}
    for choices, (key, here) in zip(every, ends.items(), strict=True):
        for position, name in enumerate(choices):
            for other in mapping.variants[name].choices:
                beside = (*key[:position], other, *key[position + 1 :])
                lost = [there - kept for there, kept in zip(ends.get(beside, ()), here, strict=False)]
                for rule in held.get(beside, ()) if all(lost) else ():
                    if lost[0] & set(rule.sources):
                        yield Finding(
                            rule.place,
                            f"`{rule.sources[0]}` is read by no rule under {name}: {choices[name]}, and nothing writes "
                            f"`{min(lost[1])}` then",
                            "Add a rule for that choice, or widen this rule's `when`.",
                        )


def _ends(rules: Sequence[Rule]) -> tuple[set[str], set[str]]:
    """The tensors that rules read, and those that they write; a tied tensor may be absent."""
    written = {t.name for rule in rules if rule.tied_to is None for t in rule.targets}
    return {name for rule in rules for name in rule.sources}, written


def _unused(mapping: MappingFile) -> Iterator[Finding]:
    """L003."""
    read: set[str] = set()
    for expression in every_expression(mapping):
        read |= names_in(expression)
    axes = axes_of(mapping)
    for name, expression in mapping.dims.items():
        if name not in axes and name not in read:
            yield Finding(expression.place, f"dim `{name}` is never used", "Remove it, or use it in axes.", "warning")
    used = {name for rule in mapping.rules for name in rule.when}
    for variant in mapping.variants.values():
        if variant.name not in used and variant.name not in read and len(variant.choices) > 1:  # one is a question
            yield Finding(variant.place, f"variant `{variant.name}` is never used", "Remove it.", "warning")
    paths = paths_in(every_expression(mapping))
    for option in mapping.options.values():
        if not any(path == f"options.{option.name}" or path.startswith(f"options.{option.name}.") for path in paths):
            yield Finding(option.place, f"option `{option.name}` is never used", "Remove it.", "warning")


def _shadowed(mapping: MappingFile) -> Iterator[Finding]:
    """L004: rules whose names a pattern of `ignore` or `refuse` takes."""
    for entry in (one for one in (*mapping.ignore, *mapping.refuse) if one.side == "source"):
        yield from _unseen(mapping, pattern(entry.pattern).regex, f"`{entry.pattern}` at {entry.place}", "entry")


def _skipped(mapping: MappingFile, layout: Layout) -> Iterator[Finding]:
    """L004: rules whose names `skip_tensors` of the layout takes, with any prefix of it."""
    starts = [pattern(one.prefix).sample() if one.prefix else "" for one in layout.prefixes]
    for glob in layout.skip_tensors:
        what = f"`{glob}` in `skip_tensors` of {layout.files[0]}"
        yield from _unseen(mapping, re.compile(translate(glob)), what, "pattern", starts)


def _unseen(
    mapping: MappingFile, taken: re.Pattern[str], what: str, noun: str, starts: Sequence[str] = ("",)
) -> Iterator[Finding]:
    """Rules with names that something else takes; tried with sample names, after any of these starts."""
    for rule in mapping.rules:
        samples = {name: pattern(name).sample() for name in sorted(spelled_out(rule.sources))}
        names = [f"`{name}`" for name, sample in samples.items() if any(taken.fullmatch(s + sample) for s in starts)]
        if names:
            told = f"rule `{rule.name}` never sees {' and '.join(names)}: {what} takes it"
            yield Finding(rule.place, told, f"Narrow the {noun}, or remove the rule.")


def _lonely_axes(mapping: MappingFile) -> Iterator[Finding]:
    """L007: probably a misspelt axis."""
    for name, rules in grouped((name, rule) for rule in mapping.rules for name in rule.axes.names()).items():
        if len(rules) == 1 and name not in mapping.dims and name in rules[0].split:
            yield Finding(
                rules[0].place,
                f"axis `{name}` occurs only in rule `{rules[0].name}` and has no size in `dims`",
                "Is it misspelt? Only tensors give its size.",
                "warning",
            )


def _unreachable(mapping: MappingFile) -> Iterator[Finding]:
    """L008: choices after `otherwise`, and rules that need one of them."""
    for variant in mapping.variants.values():
        if variant.decide != "expression":
            continue
        names = list(variant.choices)
        last = next((i for i, name in enumerate(names) if variant.choices[name] is None), len(names))
        for choice in names[last + 1 :]:
            idle = [f"`{rule.name}`" for rule in mapping.rules if set(rule.when.get(variant.name, ())) == {choice}]
            told = f"choice `{choice}` of variant `{variant.name}` comes after `otherwise`, so only --set reaches it"
            told += f", and {', '.join(idle)} is never active" if len(idle) == 1 else ""
            told += f", and rules {', '.join(idle)} are never active" if len(idle) > 1 else ""
            yield Finding(variant.place, told, "Put `otherwise` last.")


def _undeclared(mapping: MappingFile, layout: Layout) -> Iterator[Finding]:
    """L009: undeclared keys. Nothing checks them, so a text or a negative number would be taken for a size."""
    own = [*mapping.dims, *mapping.variants, *(f"options.{name}" for name in mapping.options)]
    for expression, side, path, known in _unknown_keys(mapping, layout):
        told = "read, but"
        fix = meant(path, [*known, *own], "Declare its type and range: `{type: integer, min: 1}`.")
        if path in mapping.dims:
            told, fix = "read before it is computed, and", f"Dims are computed in order: move `{path}` up."
        yield Finding(expression.place, f"`{path}` is {told} `keys.{side}` does not declare it", fix)


def _unknown_keys(mapping: MappingFile, layout: Layout) -> Iterator[tuple[Expression, str, str, dict[str, Key]]]:
    """Keys that expressions read and nothing declares: (expression, side, path, declarations of that side)."""
    own = {*axes_of(mapping), *mapping.dims, *mapping.variants, "options", "training", "given"}
    grid = {"dtype", "chunks", "mode", "layers", "model_type", *layout.layers.variants}
    grid |= {f"{dim}s" for dim in layout_dims(layout)}
    variants = [v.choices for v in mapping.variants.values()]
    forth = [mapping.config, mapping.remote_code, mapping.transformers]
    names = list(mapping.dims)
    source, target = declared(mapping, layout, "source"), dict(mapping.keys.get("target", {}))
    training = declared(mapping, layout, "training")
    for side, tree, known, keys in (
        *(("source", one, own - {*names[at:]}, source) for at, one in enumerate(mapping.dims.values())),
        ("source", forth, own, source),
        ("source", variants, own | grid, source),
        ("target", mapping.training_config, own | grid, target),
    ):
        for expression in expressions_of(tree):
            for path in sorted(compile_expression(expression).paths):
                root, _, rest = path.partition(".")
                if root == "training" and rest:
                    if not any(p in training for p in prefixes(rest)):
                        yield expression, "training", rest, training
                elif root not in known and not any(path in prefixes(name) for name in keys):
                    yield expression, side, path, keys


_ALONE: dict[str, _Check] = {
    "L001": _overlaps,
    "L002": _gaps,
    "L003": _unused,
    "L004": _shadowed,
    "L005": _unmatched,
    "L007": _lonely_axes,
    "L008": _unreachable,
    "L011": check_models,
    "L012": check_patterns,
    "L013": check_comparisons,
    "L015": check_tokens,
    "L016": check_options,
    "L017": check_spellings,
}
_IN_LAYOUT: dict[str, Callable[[MappingFile, Layout], Iterator[Finding]]] = {
    "L004": _skipped,
    "L009": _undeclared,
    "L010": check_keys,
    "L014": check_declared,
}
