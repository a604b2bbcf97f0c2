"""Variants and options: decided by `--set`, else by expressions; last by shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from engine.errors import EngineError, Lines
from engine.language.documents import grouped, value_at
from engine.language.expressions import compile_expression, evaluate, names_in
from engine.language.model import Expression, MappingFile, Option, Variant
from engine.language.validation import short

_LONGEST = 60  # characters of a value in a message
_WRITTEN = "the weights give"  # in place of "there is": tensors that are written are not there yet
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Decision:
    """A variant's choice, how it was made and on what evidence.

    Attributes:
        evidence: the evidence, in words.
        expression: the mapping's expression that decided.
        instead_of: the configuration's choice, if a setting overrides it.
    """

    variant: str
    choice: str
    how: Literal["set", "expression", "shapes", "like", "default"]
    evidence: str
    instead_of: str | None = None
    expression: str = ""


def check_settings(mapping: MappingFile, settings: Mapping[str, Any], theirs: Iterable[str] = ()) -> None:
    """E001 for a setting that neither the mapping has nor, among `theirs`, the layout that is written."""
    known = [*dict.fromkeys((*mapping.variants, *mapping.options, *theirs))]
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
    """Every option's value, with defaults and checked types."""
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
        raise _no_choice("option", option, value, option.choices)
    return option.limits.written(value)


def _no_choice(kind: str, of: Variant | Option, value: Any, choices: Iterable[Any]) -> EngineError:
    told, known = f"{kind} `{of.name}` has no choice `{value}`", ", ".join(map(str, choices))
    return EngineError("E001", told, place=of.place, got=str(value), expected=known, fix=of.help or None)


def decide(
    variants: Mapping[str, Variant],
    settings: Mapping[str, Any],
    names: Mapping[str, Any],
    called: str = "the configuration",
    like: Mapping[str, str] | None = None,
) -> dict[str, Decision]:
    """Decide every variant that `--set` or an expression decides; those that shapes decide stay open.

    Args:
        called: the file name of the configuration, for messages.
        like: choices of another checkpoint, if variants are chosen rather than detected. Then the order is `--set`,
            what the checkpoint shows, `like`, the default, and none stays open.
    """
    decided: dict[str, Decision] = {}
    for variant in variants.values():
        if variant.name in settings:
            choice = str(settings[variant.name])
            if choice not in variant.choices:
                raise _no_choice("variant", variant, choice, variant.choices)
            decided[variant.name] = _by_setting(variant, choice, names, called, known=like is None)
        elif like is not None:
            decided[variant.name] = _chosen(variant, names, like)
        elif variant.decide == "expression":
            decided[variant.name] = _by_expression(variant, names, called)
    return decided


def untold(variant: Variant, names: Mapping[str, Any]) -> bool:
    """Whether nothing that a variant's expressions read has a value."""
    read = {path for one in variant.choices.values() if one is not None for path in compile_expression(one).paths}
    return all(value_at(names, path, _MISSING) is _MISSING for path in read)


def _by_setting(variant: Variant, choice: str, names: Mapping[str, Any], called: str, *, known: bool) -> Decision:
    """A setting may override a configuration, which can be wrong, but not the files.

    If expressions read only `present(...)`, the files decide the choice.

    Args:
        known: whether every name that expressions read is known.
    """
    said = Decision(variant.name, choice, "set", f"--set {variant.name}={choice}")
    if variant.decide != "expression":
        return said
    decided_by_names = not any(names_in(e) for e in variant.choices.values() if e is not None)
    try:
        found = _by_expression(variant, names, called) if known else _shown(variant, names)
    except EngineError:
        if decided_by_names:
            raise
        return said  # the configuration is silent: the setting decides
    if found is None or found.choice == choice:
        return said
    if decided_by_names:
        raise EngineError(
            "E202",
            f"`{said.evidence}` contradicts the files",
            place=variant.place,
            got=choice,
            expected=f"{found.choice}: {found.evidence}",
            fix="Leave it out: the tensors' names decide this.",
        )
    return replace(said, instead_of=f"{found.choice}: {found.evidence}") if known else said


def _chosen(variant: Variant, names: Mapping[str, Any], like: Mapping[str, str]) -> Decision:
    """The choice that the checkpoint shows, else that of another, else the default, else the first that holds."""
    shown = _shown(variant, names)
    if shown is not None:
        return shown
    if variant.name in like:
        return Decision(variant.name, like[variant.name], "like", "as in the checkpoint of --like")
    if variant.default is not None:
        return Decision(variant.name, variant.default, "default", "what is written by default")
    return _first_holding(variant, names)


def _shown(variant: Variant, names: Mapping[str, Any]) -> Decision | None:
    """The one choice whose expression holds on known names; defaults prove nothing."""
    holding: list[Decision] = []
    for choice, expression in variant.choices.items():
        if expression is None:
            continue
        read = names_in(expression)
        if read and not any(names.get(name, {}) != {} for name in read):  # a missing training configuration
            continue
        try:
            if evaluate(expression, names):
                told = because([expression], names, there=_WRITTEN)
                holding.append(Decision(variant.name, choice, "expression", told, expression=expression.text))
        except EngineError:
            continue
    return holding[0] if len(holding) == 1 else None


def _first_holding(variant: Variant, names: Mapping[str, Any]) -> Decision:
    """The first choice that holds, including values from `default(...)`, as when reading."""
    for choice, expression in variant.choices.items() if variant.decide == "expression" else ():
        if expression is None:
            return Decision(variant.name, choice, "expression", "no other choice holds")
        try:
            if evaluate(expression, names):
                told = because([expression], names, there=_WRITTEN)
                return Decision(variant.name, choice, "expression", told, expression=expression.text)
        except EngineError:
            continue
    which = " or ".join(f"--set {variant.name}={choice}" for choice in variant.choices)
    raise _undecided(variant, "nothing says which to write", f"Say which: {which}.")


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
    # if the help says what to answer, the mapping's expressions do not help
    named = () if variant.answers else zip(variant.choices, tried, strict=True)
    otherwise = (
        "None of its choices describes this checkpoint: what they read is missing, or the mapping is not the one for "
        "it, and `engine inspect` shows which fit."
    )
    got = Lines.of([because(tried, names, called), *(f"not {c}: {e.text}" for c, e in named)])
    raise _undecided(variant, "no choice holds", otherwise, got)


def _undecided(variant: Variant, why: str, otherwise: str, got: Lines | None = None) -> EngineError:
    """E202 that asks with the variant's help; it says `otherwise` what to do unless the help has the answers."""
    told = variant.help  # a key at its beginning stays as it is
    told = f"{told[:1].upper() + told[1:] if told.split(' ', 1)[0].isalpha() else told}."
    return EngineError(
        "E202",
        f"variant `{variant.name}` cannot be decided: {why}",
        place=variant.place,
        got=got,
        expected="one of " + ", ".join(variant.choices) if len(variant.choices) > 1 else None,
        fix=told if variant.answers else f"{told} {otherwise}",
        answers=variant.answers,
    )


def because(
    expressions: Sequence[Expression],
    names: Mapping[str, Any],
    called: str = "the configuration",
    computed: Collection[str] = (),
    there: str = "there is",
) -> str:
    """What expressions read: the keys that exist, with their values, those that do not, and tensors.

    Args:
        computed: names that are no keys, and not told.
        there: how to say that there are tensors.

    >>> from engine.errors import Place
    >>> rotary = Expression("qk_interleaved | default(not (adapt_hf | default(true)))", Place("x.yaml"))
    >>> because([rotary], {}, "model_config.pt")
    'model_config.pt has neither adapt_hf nor qk_interleaved'
    >>> because([rotary], {"adapt_hf": False}, "model_config.pt")
    'model_config.pt has adapt_hf false, and no qk_interleaved'
    >>> because([Expression("given.vocab_size", Place("x.yaml"))], {}, "model_config.pt")
    'no config.json is given'
    >>> because([Expression("given.vocab_size", Place("x.yaml"))], {"given": {"eos_token_id": 2}}, "model_config.pt")
    'the given configuration has no vocab_size'
    >>> because([Expression("options.vocab_size", Place("x.yaml"))], {"options": {"vocab_size": None}})
    'the options have no vocab_size'
    """
    compiled = [compile_expression(one) for one in expressions]
    told: list[str] = []
    paths, placed = sorted({path for one in compiled for path in one.paths} - {*computed}), names.get("placed", ())
    for (whose, above), listed in grouped((_whose(p, called, placed=p in placed), p) for p in paths).items():
        found = {path.removeprefix(above): value_at(names, path, _MISSING) for path in listed}
        lacks = [path for path, value in found.items() if value is _MISSING or (value is None and above == "options.")]
        has = [f"{path} {short(value, _LONGEST)}" for path, value in found.items() if path not in lacks]
        if above == "given." and not names.get("given"):
            told.append("no config.json is given")
        elif has and lacks:
            told.append(f"{whose} {_list(has)}, and no {_list(lacks, 'or')}")
        elif has:
            told.append(f"{whose} {_list(has)}")
        else:
            told.append(f"{whose} no {lacks[0]}" if len(lacks) == 1 else f"{whose} neither {_list(lacks, 'nor')}")
    patterns = sorted({text for one in compiled for text in one.patterns})
    if patterns and "present" in names:
        held = [text for text in patterns if names["present"](text)]
        absent = [text for text in patterns if text not in held]
        told += [f"{there} {_list(held)}"] if held else []
        told += [f"{there} no {_list(absent, 'or')}"] if absent else []
    return "; ".join(told)


_OTHERS = {
    "given": "the given configuration has",
    "training": "the training configuration has",
    "options": "the options have",
}


def _whose(path: str, called: str, *, placed: bool) -> tuple[str, str]:
    """The owner of a path's value, in words, and how the path begins there."""
    of, dot, _ = path.partition(".")
    called = "the rank files have" if path == "mode" else "the places of tensors show" if placed else f"{called} has"
    return (_OTHERS[of], of + dot) if dot and of in _OTHERS else (called, "")


def _list(parts: Sequence[str], word: str = "and") -> str:
    """
    >>> _list(["a", "b", "c"]), _list(["a", "b"], "nor")
    ('a, b and c', 'a nor b')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
