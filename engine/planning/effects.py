"""Settings without effect: options that nothing reads, and choices that contradict what is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from engine.checkpoint.ranks import RankGrid
from engine.errors import EngineError
from engine.language.declared import expressions_of
from engine.language.documents import leaves, same, value_at
from engine.language.expressions import compile_expression, evaluate
from engine.language.keys import find_key
from engine.language.model import Expression, Option
from engine.planning.destination import Destination
from engine.planning.model import Plan
from engine.planning.rank_outputs import training_text

# Arbitrary values, to test whether an option matters.
_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "integer": (2, 3),
    "number": (2.5, 3.5),
    "boolean": (False, True),
    "string": ("a", "b"),
}


def check_effects(plan: Plan, settings: Collection[str]) -> None:
    """E001 for the first setting of an option that changes nothing in the output, whatever its value.

    A setting may repeat what a configuration says; if it contradicts it, the error names both. A reshard leaves the
    configuration as it is, so there a choice that contradicts it is an error too.
    """
    theirs = plan.layout.options if plan.written is not None else {}
    options = {**plan.mapping.options, **theirs}
    read = list(_read(plan)) if settings else []
    for name in settings:
        choice = plan.decisions.get(name)
        if plan.reads == "training" and plan.written is not None and choice is not None and choice.instead_of:
            raise EngineError(
                "E001",
                f"--set {name} has no effect: the configuration is written as it was read",
                place=plan.mapping.variants[name].place,
                got=f"{name}={choice.choice}",
                expected=choice.instead_of,
                fix="Leave it out: tensors only move to other ranks. If the configuration is wrong, correct it.",
            )
        if name not in options or any(_changes(one, options[name], plan) for one in read):
            continue
        if name in theirs and plan.written is not None and _lays_out(options[name], plan, plan.written):
            continue
        value = plan.names["options"][name]
        said = [one for one in _said(name, plan, read) if one is not None]
        if any(same(value, one) for one in said):
            continue
        if said:
            raise EngineError(
                "E001",
                f"--set {name} contradicts the configuration",
                place=options[name].place,
                got=f"{name}={value}",
                expected=f"{said[0]}, as the configuration says",
                fix="Leave it out. If the configuration is wrong, correct it.",
            )
        raise EngineError(
            "E001",
            f"--set {name} has no effect: nothing that is written reads it",
            place=options[name].place,
            got=f"{name}={value}",
            expected="options that change what is written",
            fix=f"Leave it out, or also set what it goes with. Its help says: {options[name].help}.",
        )


def _read(plan: Plan) -> Iterator[Expression]:
    """The expressions with which a plan decides, writes a configuration, or compares it with the one that was read."""
    mapping = plan.mapping
    held: list[Any] = [mapping.dims, *(variant.choices for variant in mapping.variants.values())]
    if plan.written is None:
        held += [mapping.config, mapping.remote_code, mapping.transformers]
    elif plan.reads == "whole":  # options are compared with config.json
        lines = dict(leaves(mapping.config))
        said = [path for path in lines if value_at(plan.names, path) is not None]
        keys = {path: find_key(mapping.keys.get("target", {}), path) for path in said}
        counts = [lines[path] for path, key in keys.items() if key is None or not key.ignores(plan.names)]
        held += [mapping.training_config, counts]
    return expressions_of(held)


def _said(name: str, plan: Plan, read: Iterable[Expression]) -> Iterator[Any]:
    """The value that a configuration has for an option, if any."""
    at: list[tuple[str | None, Expression]] = [(None, one) for one in read]
    if plan.reads == "whole":
        at += [(path, one) for path, one in leaves(plan.mapping.config) if isinstance(one, Expression)]
    alone = {**_names(plan), "given": {}, "training": {}, "options": plan.options}
    for path, one in at:
        if f"options.{name}" not in compile_expression(one).paths:
            continue
        try:
            if same(evaluate(one, alone), plan.options[name]):
                yield evaluate(one, _names(plan)) if path is None else value_at(plan.names, path)
        except EngineError:
            continue


def _names(plan: Plan) -> dict[str, Any]:
    names = {**plan.config, **plan.names}
    names.setdefault("given", names)  # a Hugging Face checkpoint's own configuration
    return names


def _lays_out(option: Option, plan: Plan, grid: RankGrid) -> bool:
    """Whether another value of a layout's option changes names, files or the training configuration, or is refused."""
    options = plan.names["options"]
    used = [one for one in grid.mode.files if any(file.pattern == one for file in grid.files)]

    def written(value: Any) -> tuple[object, ...]:
        names = {**plan.names, "options": {**options, option.name: value}}
        made = Destination(plan.layout, grid.mode, grid.sizes, plan.stages, names)
        prefixes = [made.prefix(chunk) for chunk in range(plan.stages.chunks)]
        return prefixes, [made.ranks(one) for one in used], training_text(made)

    try:
        now = written(options[option.name])
        return any(written(other) != now for other in _others(option))
    except EngineError:
        return True


def _others(option: Option) -> tuple[Any, ...]:
    return option.choices or (*_OTHERS[option.type], option.default)


def _changes(expression: Expression, option: Option, plan: Plan) -> bool:
    """Whether another value of an option changes the result of an expression, or the result is not known."""
    if f"options.{option.name}" not in compile_expression(expression).paths:
        return False
    names, value = _names(plan), plan.options[option.name]
    try:
        found = [
            evaluate(expression, {**names, "options": {**plan.options, option.name: other}})
            for other in (value, *_others(option))
        ]
    except EngineError:
        return True
    return any(one != found[0] for one in found)
