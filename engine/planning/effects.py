"""Settings without effect: options that nothing reads, and choices that what is written contradicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.errors import EngineError
from engine.language.declared import expressions_of
from engine.language.documents import leaves, same, value_at
from engine.language.expressions import compile_expression, evaluate
from engine.language.keys import find_key
from engine.language.model import Expression, Option
from engine.planning.model import Plan

# Values that are as good as any other to see whether one matters.
_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "integer": (2, 3),
    "number": (2.5, 3.5),
    "boolean": (False, True),
    "string": ("a", "b"),
}


def check_effects(plan: Plan, settings: Iterable[str]) -> None:
    """E001 for the first option among settings that changes nothing that is written, whatever its value.

    Where a configuration says the same, it may be said again; where it says something else, both are told. So is a
    choice against the configuration, where ranks become other ranks: the configuration stays as it is.
    """
    options, read = plan.mapping.options, list(_read(plan))
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
        said = [one for one in _said(name, plan, read) if one is not None]
        if any(same(plan.options[name], one) for one in said):
            continue
        if said:
            raise EngineError(
                "E001",
                f"--set {name} contradicts the configuration",
                place=options[name].place,
                got=f"{name}={plan.options[name]}",
                expected=f"{said[0]}, as the configuration says",
                fix="Leave it out. If the configuration is wrong, correct it.",
            )
        raise EngineError(
            "E001",
            f"--set {name} has no effect: nothing that is written reads it",
            place=options[name].place,
            got=f"{name}={plan.options[name]}",
            expected="options that change what is written",
            fix=f"Leave it out, or also set what it goes with. It says: {options[name].help}.",
        )


def _read(plan: Plan) -> Iterator[Expression]:
    """The expressions by which a plan decides, and writes a configuration or holds it against what was read."""
    mapping = plan.mapping
    held: list[Any] = [mapping.dims, *(variant.choices for variant in mapping.variants.values())]
    if plan.written is None:
        held += [mapping.config, mapping.remote_code, mapping.transformers]
    elif plan.reads == "whole":  # of what config.json says, the options are held against it
        lines = dict(leaves(mapping.config))
        said = [path for path in lines if value_at(plan.names, path) is not None]
        keys = {path: find_key(mapping.keys.get("target", {}), path) for path in said}
        counts = [lines[path] for path, key in keys.items() if key is None or not key.ignores(plan.names)]
        held += [mapping.training_config, counts]
    return expressions_of(held)


def _said(name: str, plan: Plan, read: Iterable[Expression]) -> Iterator[Any]:
    """What a configuration says in the place of an option, where it says anything."""
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
    names.setdefault("given", names)  # of a Hugging Face checkpoint its own configuration
    return names


def _changes(expression: Expression, option: Option, plan: Plan) -> bool:
    """Whether another value of an option changes what an expression comes to, or none can be told."""
    if f"options.{option.name}" not in compile_expression(expression).paths:
        return False
    names, value = _names(plan), plan.options[option.name]
    others = option.choices or (*_OTHERS[option.type], option.default)
    try:
        found = [
            evaluate(expression, {**names, "options": {**plan.options, option.name: other}})
            for other in (value, *others)
        ]
    except EngineError:
        return True
    return any(one != found[0] for one in found)
