"""Variants and options: what `--set` says, else what expressions say; shapes come last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from engine.errors import EngineError
from engine.language.expressions import evaluate, names_in
from engine.language.model import Expression, Option, Variant
from engine.language.model import Mapping as MappingFile
from engine.planning.evidence import because


@dataclass(frozen=True, slots=True)
class Decision:
    """A variant's choice, how it was made and what was seen.

    Attributes:
        evidence: what was seen, in words.
        expression: what decided, as the mapping has it.
        instead_of: what the configuration says where a setting says otherwise.
    """

    variant: str
    choice: str
    how: Literal["set", "expression", "shapes", "like", "default"]
    evidence: str
    instead_of: str | None = None
    expression: str = ""


def check_settings(mapping: MappingFile, settings: Mapping[str, Any]) -> None:
    known = [*mapping.variants, *mapping.options]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise EngineError(
                "E001",
                f"mapping `{mapping.name}` has no variant or option `{name}`",
                place=mapping.place,
                expected=", ".join(known) or "none",
                fix=f"Did you mean `--set {near[0]}={settings[name]}`?"
                if near
                else "See `engine show` for their meaning.",
            )


def options_of(mapping: MappingFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every option's value, defaults filled in, types checked."""
    return {name: option_value(option, settings.get(name, option.default)) for name, option in mapping.options.items()}


def option_value(option: Option, value: Any) -> Any:
    fits = option.limits.fits(value) and (isinstance(value, bool) or option.type != "boolean")
    if not fits and value is not None:
        raise EngineError(
            "E001",
            f"option `{option.name}` takes {option.limits}",
            place=option.place,
            got=repr(value)[:100],
            expected=str(option.limits),
            fix=option.help or None,
        )
    if option.choices is not None and value not in option.choices:
        raise EngineError(
            "E001",
            f"option `{option.name}` has no choice `{value}`",
            place=option.place,
            got=str(value),
            expected=", ".join(map(str, option.choices)),
            fix=option.help or None,
        )
    return option.limits.written(value)


def choice_of(variant: Variant, value: Any) -> str:
    """What `--set` says of a variant; E001 when it is none of its choices."""
    choice = str(value)
    if choice not in variant.choices:
        raise EngineError(
            "E001",
            f"variant `{variant.name}` has no choice `{choice}`",
            place=variant.place,
            got=choice,
            expected=", ".join(variant.choices),
            fix=variant.help or None,
        )
    return choice


def decide(
    variants: Mapping[str, Variant],
    settings: Mapping[str, Any],
    names: Mapping[str, Any],
    called: str = "the configuration",
) -> dict[str, Decision]:
    """Decide every variant that `--set` or an expression decides; those by shapes stay open.

    Args:
        called: the file of the configuration, for what is told.
    """
    decided: dict[str, Decision] = {}
    for variant in variants.values():
        if variant.name in settings:
            choice = choice_of(variant, settings[variant.name])
            decided[variant.name] = _by_setting(variant, choice, names, called)
        elif variant.decide == "expression":
            decided[variant.name] = _by_expression(variant, names, called)
    return decided


def _by_setting(variant: Variant, choice: str, names: Mapping[str, Any], called: str) -> Decision:
    """A setting may overrule a configuration, which can be wrong, but not the files.

    Where expressions read nothing but `present(...)`, the choice is what the files hold.
    """
    said = f"--set {variant.name}={choice}"
    if variant.decide != "expression":
        return Decision(variant.name, choice, "set", said)
    of_files = not any(names_in(e) for e in variant.choices.values() if e is not None)
    try:
        found = _by_expression(variant, names, called)
    except EngineError:
        if of_files:
            raise
        return Decision(variant.name, choice, "set", said)  # the configuration does not say: the setting does
    if found.choice == choice:
        return Decision(variant.name, choice, "set", said)
    if of_files:
        raise EngineError(
            "E202",
            f"`{said}` contradicts the files",
            place=variant.place,
            got=choice,
            expected=f"{found.choice}: {found.evidence}",
            fix="Leave it out: this is read off the tensors' names.",
        )
    return Decision(variant.name, choice, "set", said, f"{found.choice}: {found.evidence}")


def _by_expression(variant: Variant, names: Mapping[str, Any], called: str) -> Decision:
    tried: list[Expression] = []
    for choice, expression in variant.choices.items():
        if expression is None:
            said = " and ".join(f"not ({one.text})" for one in tried)
            evidence = because(tried, names, called) if tried else "the only choice"
            return Decision(variant.name, choice, "expression", evidence, expression=said)
        tried.append(expression)
        if evaluate(expression, names):
            return Decision(
                variant.name, choice, "expression", because(tried[-1:], names, called), expression=expression.text
            )
    named = zip(variant.choices, tried, strict=True)
    raise EngineError(
        "E202",
        f"variant `{variant.name}` cannot be decided: no choice holds",
        place=variant.place,
        got="\n".join([because(tried, names, called), *(f"not {c}: {e.text}" for c, e in named)]),
        expected="one of " + ", ".join(variant.choices),
        fix=f"{variant.help[:1].upper()}{variant.help[1:]}. None of its choices describes this checkpoint: what they "
        "read is missing, or the mapping is not the one for it, and `engine inspect` tells which fit.",
    )
