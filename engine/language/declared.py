"""Names that must be declared somewhere else in the file: options, axes, targets, rank dimensions (E108)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from engine.errors import EngineError, Errors, Place
from engine.language.documents import Document, values_in
from engine.language.expressions import compile_expression
from engine.language.model import Expression, FilePattern, Layout, MappingFile, Mode, Variant
from engine.language.names import pattern

# Names in a layout's expressions, besides ranks (`pp`), their numbers (`pps`) and the layout's own variants.
_SEEN = ("chunk", "chunks", "layers", "nth", "rank", "mode", "options", "training")


def undeclared(message: str, name: str, known: Iterable[str], place: Place) -> EngineError:
    """E108 with the names that exist, and the most similar one as the fix."""
    names = list(dict.fromkeys(str(k) for k in known))
    near = get_close_matches(str(name), names, 3)
    shown = names if len(names) <= 12 else [*(near or names[:12]), "…"]
    return EngineError(
        "E108",
        message,
        place=place,
        got=str(name),
        expected=", ".join(shown) or "none is declared",
        fix=f"Did you mean `{near[0]}`?" if near else "Declare it, or correct the name.",
    )


def expressions_of(tree: Any) -> Iterator[Expression]:
    """Every expression in a tree of literals."""
    return (value for value in values_in(tree) if isinstance(value, Expression))


def paths_in(tree: Any) -> frozenset[str]:
    """The dotted paths that expressions in a tree of literals read."""
    return frozenset(path for one in expressions_of(tree) for path in compile_expression(one).paths)


def every_expression(mapping: MappingFile) -> list[Expression]:
    """All expressions of a mapping."""
    choices = [v.choices for v in mapping.variants.values()]
    written = [mapping.config, mapping.training_config, mapping.remote_code, mapping.transformers]
    return list(expressions_of([mapping.dims, choices, *written, [entry.values for entry in mapping.ignore]]))


def axes_of(mapping: MappingFile) -> list[str]:
    """Every axis of a mapping's rules once, including placeholders; those of the sources first."""
    sources = [(*pattern(rule.sources[0]).placeholders, *rule.axes.names()) for rule in mapping.rules]
    targets = [(*pattern(t.name).placeholders, *t.axes.names()) for rule in mapping.rules for t in rule.targets]
    return list(dict.fromkeys(name for names in (*sources, *targets) for name in names))


def check_mapping(mapping: MappingFile, document: Document, *, whole: bool = True) -> None:
    """Check options, dropped and expected axes, tied targets and answers of a mapping: report all that do not exist.

    If some rule could not be read, so that the mapping is not `whole`, names that it may declare are not checked.
    """
    errors = Errors()
    for expression in every_expression(mapping):
        with errors.caught():
            _check_options(expression, mapping.options)
    targets = [target.name for rule in mapping.rules for target in rule.targets]
    changed = [target.name for rule in mapping.rules if rule.transform is not None for target in rule.targets]
    axes = dict.fromkeys(mapping.dims)
    for rule in mapping.rules:
        own = rule.axes.names()
        axes.update(dict.fromkeys((*own, *pattern(rule.sources[0]).placeholders)))
        for axis in rule.drop:
            if axis not in own:
                told = f"rule `{rule.name}` drops `{axis}`, which is not among its axes"
                errors.found.append(undeclared(told, axis, own, document.place("rules", rule.name, "drop", axis)))
        for axis in rule.zeros:
            if axis not in rule.drop:
                told = f"rule `{rule.name}` writes `{axis}` as zeros, which it does not drop"
                place = document.place("rules", rule.name, "zeros")
                errors.found.append(undeclared(told, axis, rule.drop, place))
        stored = ["zeros"] * bool(rule.zeros and rule.transform)
        stored += ["tied_to"] * bool(rule.tied_to is not None and (rule.transform or rule.tied_to in changed))
        errors.found += [_unstored(rule.name, word, document.place("rules", rule.name, word)) for word in stored]
        if whole and rule.tied_to is not None and rule.tied_to not in targets:
            told = f"rule `{rule.name}` is tied to `{rule.tied_to}`, which no rule writes"
            errors.found.append(undeclared(told, rule.tied_to, targets, document.place("rules", rule.name, "tied_to")))
    for variant in mapping.variants.values():
        errors.found += _check_answers(variant, mapping, document.place("variants", variant.name, "answers"))
    named = [("even", axis, document.place("even")) for axis in mapping.even]
    named += [("expect", axis, document.place("expect", axis)) for axis in mapping.expect]
    for part, axis, at in named if whole else ():
        if axis not in axes:
            errors.found.append(undeclared(f"`{part}` names `{axis}`, which is no axis", axis, axes, at))
    errors.check()


def _unstored(name: str, word: str, place: Place) -> EngineError:
    return EngineError(
        "E102",
        f"rule `{name}` has `{word}`, which needs values as they are stored, but a `transform` changes them",
        place=place,
        expected="zeros that are written, and tensors that are tied, without `transform`",
        fix="Write a separate rule for each of the two, under choices of a variant.",
    )


def _check_answers(variant: Variant, mapping: MappingFile, place: Place) -> Iterator[EngineError]:
    known = ["config", *mapping.options, *mapping.variants]
    for name, values in variant.answers.items():
        if name not in known:
            yield undeclared(
                f"`answers` of variant `{variant.name}` names `{name}`, which is nothing to set", name, known, place
            )
        choices = mapping.variants[name].choices if name in mapping.variants else values
        for value in values:
            if value not in choices:
                yield undeclared(f"variant `{name}` has no choice `{value}`", value, choices, place)


def check_layout(layout: Layout, document: Document) -> None:
    """Check that options and rank dimensions of a layout exist."""
    choices = [v.choices for v in layout.layers.variants.values()]
    numbers = [file.number for mode in layout.modes for file in mode.files]
    for expression in expressions_of([[p.when for p in layout.prefixes], layout.layers.stage, choices, numbers]):
        _check_options(expression, layout.options)
    for index, prefix in enumerate(layout.prefixes):
        _check_filled(prefix.prefix, ["chunk"], "a prefix", document.value_place("prefixes", index, "prefix"))
    every: dict[str, None] = {}
    for mode in layout.modes:
        for index, file in enumerate(mode.files):
            _check_file(mode, index, document)
            every.update(dict.fromkeys(pattern(file.name).placeholders))
        for index, small in enumerate(mode.beside):
            place = document.value_place("modes", mode.name, "beside", index, "file")
            _check_filled(small.file, pattern(mode.files[0].name).placeholders, f"`{mode.files[0].name}`", place)
    for dim in layout.lone_rank:
        if dim not in every:
            raise undeclared(f"no file has a rank dimension `{dim}`", dim, every, document.place("lone_rank", dim))
    seen = {*every, *(f"{dim}s" for dim in every), *layout.layers.variants, *_SEEN}
    ranks = [file.ranks for mode in layout.modes for file in mode.files if file.ranks is not None]
    cut = [[one.count, *one.dims.values()] for one in ranks]
    layers = [layout.layers.stage, layout.layers.divides]
    for expression in expressions_of([[p.when for p in layout.prefixes], layers, numbers, cut, layout.training_write]):
        _check_names(expression, seen)


def _check_file(mode: Mode, index: int, document: Document) -> None:
    """Check that one file pattern of a mode says how its tensors are cut, over rank dimensions of its name."""
    file = mode.files[index]
    _check_number(file, document.value_place("modes", mode.name, "files", index, "name"), first=index == 0)
    if file.boxes == bool(file.cuts):
        raise EngineError(
            "E102",
            f"`{file.name}` must say how its tensors are cut, in one way",
            place=file.place,
            got="`cuts` and `boxes`" if file.boxes else "neither `cuts` nor `boxes`",
            expected="`cuts` over ranks, or `boxes: recorded`",
            fix="Use `boxes: recorded` if each tensor records which box it is: then ranks do not matter.",
        )
    if file.boxes and not file.mesh and mode.only_read is None:
        raise EngineError(
            "E102",
            f"mode `{mode.name}` cannot be written, as its tensors record boxes",
            place=file.place,
            expected="`mesh`, or `only_read` with the reason",
            fix="Say `mesh: {dp: rows}`, or `only_read: its tensors record which boxes they are`.",
        )
    known = pattern(file.name).placeholders
    named: list[tuple[str, ...]] = [("ranks", dim) for dim in (file.ranks.dims if file.ranks is not None else ())]
    named += [("cuts", stage, dim) for stage, cuts in file.cuts.items() for dim in cuts]
    for *above, dim in named:
        if dim not in known:
            place = document.place("modes", mode.name, "files", index, *above, dim)
            raise undeclared(f"`{file.name}` has no rank dimension `{dim}`", dim, known, place)


def _check_filled(name: str, known: Sequence[str], whose: str, place: Place) -> None:
    """E108 for a placeholder that nothing fills in when the name is written."""
    for placeholder in pattern(name, place).placeholders:
        if placeholder not in known:
            raise undeclared(f"{whose} has no `{placeholder}` to fill in", placeholder, known, place)


def _check_number(file: FilePattern, place: Place, *, first: bool) -> None:
    """E108 for a file with `{number}` in its name or a `number` alone; E102 if the first file of a mode has them."""
    if file.boxes:
        return
    named = "number" in pattern(file.name).placeholders
    if named != (file.number is not None):
        told = f"`{file.name}` has no `number`" if file.number is not None else f"`{file.name}` says no `number`"
        raise undeclared(f"{told} to fill in", "number", pattern(file.name).placeholders, place)
    if named and first:
        raise EngineError(
            "E102",
            "the first file of a mode has a number",
            place=place,
            got=file.name,
            expected="the file with most of the model, by whose ranks the mode is known",
            fix="Put the files of numbered tensors, such as experts, after it.",
        )


def _check_names(expression: Expression, seen: Iterable[str]) -> None:
    """E108 for a name in a layout's expression that is nearly a known one; other unknown names may be the trainer's."""
    for name in sorted(compile_expression(expression).names - set(seen)):
        if get_close_matches(name, seen, 1, 0.75):
            raise undeclared(f"there is no `{name}` to compute with", name, sorted(seen), expression.place)


def _check_options(expression: Expression, options: Iterable[str]) -> None:
    for path in sorted(compile_expression(expression).paths):
        root, _, rest = path.partition(".")
        name = rest.split(".")[0]
        if root == "options" and name and name not in options:
            raise undeclared(f"there is no option `{name}`", name, options, expression.place)
