"""Lint of names: keys, models, tensors and choices that a mapping writes or asks for and nothing knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from jinja2 import nodes

from engine.errors import Place, meant
from engine.language.allowed import dotted
from engine.language.declared import every_expression
from engine.language.documents import At, Document, leaves, values_in
from engine.language.expressions import compile_expression
from engine.language.keys import find_key
from engine.language.model import Expression, Layout, MappingFile
from engine.language.names import pattern, spelled_out
from engine.planning.config_keys import declared
from engine.proving import targets
from engine.proving.proof import Finding

_NEAR = 0.8
_TOKENIZER = frozenset(("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "add_bos_token"))


def check_keys(mapping: MappingFile, layout: Layout) -> Iterator[Finding]:
    """L010: unknown keys that are written."""
    yield from _config_keys(mapping)
    yield from _training_keys(mapping, layout)
    yield from _generation_keys(mapping)


def _unknown(name: str, where: str, known: Iterable[str], place: Place, why: str) -> Finding:
    """An error if the name is almost a known one, else a warning."""
    near = meant(name, sorted(known), least=_NEAR)
    told = f"`{name}` of `{where}` is not read by any known program"
    return Finding(place, told, near or why, "warning" if near is None else "error")


def _config_keys(mapping: MappingFile) -> Iterator[Finding]:
    """In `config`: keys that neither the target's class nor the mapping itself knows, nor any other class."""
    known = targets.known_of(mapping.model_type)
    own = mapping.keys.get("target", {})
    every = {*targets.common_keys(), *own, *(known.keys if known is not None else ())}
    for name in mapping.config:
        below = any(path.startswith(f"{name}.") for path in own)
        if name not in every and name not in targets.every_key() and not below and find_key(own, name) is None:
            why = f"Neither transformers' configuration of {mapping.model_type} nor `keys.target` has it."
            yield _unknown(name, "config", every, place_of(mapping, "config", name), why)


def _training_keys(mapping: MappingFile, layout: Layout) -> Iterator[Finding]:
    """In `training_config`: undeclared keys; a pattern that matches anything does not declare one."""
    keys = {name: key for name, key in declared(mapping, layout, "source").items() if name != "*"}
    for path, _ in leaves(mapping.training_config) if keys else ():
        if find_key(keys, path) is None and not any(name.startswith(f"{path}.") for name in keys):
            place = place_of(mapping, "training_config", path.split(".")[0])
            yield _unknown(path, "training_config", keys, place, "Correct it, or declare it under `keys.source`.")


def _generation_keys(mapping: MappingFile) -> Iterator[Finding]:
    """In `generation`: unknown keys, with a note if a key belongs to the tokenizer."""
    known = targets.listed("generation")
    for name in mapping.generation or ():
        if name in known:
            continue
        place = place_of(mapping, "generation", name)
        found = _unknown(name, "generation", known, place, "transformers' GenerationConfig does not have it.")
        if name in _TOKENIZER:
            told = f"It is the tokenizer's; a token is named by its number here, as in `{name}_id`."
            found.severity, found.fix = "error", told
        yield found


def check_models(mapping: MappingFile) -> Iterator[Finding]:
    """L011: models, model types and activations that do not exist or contradict each other."""
    if mapping.as_model:
        return
    types, kind = targets.listed("model types"), mapping.model_type
    near = get_close_matches(kind, types, 1, _NEAR) if kind not in types else []
    if near and mapping.remote_code is None and not _same_word(kind, near[0]):
        yield Finding(
            place_of(mapping, "target", "model_type"),
            f"there is no model type `{kind}` in transformers",
            f"Did you mean `{near[0]}`?",
        )
    written = mapping.config.get("model_type")
    if isinstance(written, str) and written != kind:
        told = f"`config` writes the model type `{written}`, `target` says `{kind}`"
        yield Finding(place_of(mapping, "config", "model_type"), told, "Write the same in both.")
    known = targets.known_of(kind)
    classes = known.classes if known is not None else frozenset()
    listed = list(_texts(mapping.config.get("architectures")))
    at = place_of(mapping, "config", "architectures")
    missing: set[str] = set()
    for name in dict.fromkeys([mapping.architecture, *listed]):
        if name not in {*classes, *_texts(mapping.remote_code)} and not _is_class(name, mapping.architecture, classes):
            others = sorted({*classes, mapping.architecture} - {name})
            fix = meant(name, others, "Name a class that computes the target.", _NEAR)
            place = place_of(mapping, "target", "architecture") if name == mapping.architecture else at
            yield Finding(place, f"there is no model `{name}`", fix)
            missing.add(name)
    if listed and mapping.architecture not in {*listed, *missing}:
        told = f"`config` writes the architectures {', '.join(listed)}, `target` says `{mapping.architecture}`"
        yield Finding(at, told, "Write the same in both.")
    for name in ("hidden_act", "hidden_activation"):
        value = mapping.config.get(name)
        if isinstance(value, str) and value not in targets.listed("activations"):
            fix = meant(value, targets.listed("activations"), "Name one that transformers has.")
            yield Finding(place_of(mapping, "config", name), f"there is no activation `{value}` in transformers", fix)


def _is_class(name: str, target: str, classes: frozenset[str]) -> bool:
    """Whether a class that transformers does not list may exist: named like the target, with a known kind of head.

    >>> _is_class("LlamaForCausalLn", "LlamaForCausalLM", frozenset(["LlamaForCausalLM"]))
    False
    >>> _is_class("InternLM3ForCausalLM", "InternLM3ForCausalLM", frozenset(["LlamaForCausalLM"]))
    True
    """
    head = next((one for one in targets.listed("heads") if name.endswith(one)), None)
    if head is None or get_close_matches(name, sorted(classes), 1, 0.9):
        return False
    return name == target or any(target == name.removesuffix(head) + other for other in targets.listed("heads"))


def _same_word(one: str, other: str) -> bool:
    """Whether two types differ only in a number or an added part, as types of one family do.

    >>> _same_word("internlm_moe", "internlm3"), _same_word("lama", "llama")
    (True, False)
    """
    return one.rstrip("0123456789").split("_")[0] == other.rstrip("0123456789").split("_")[0] and one != other


def check_patterns(mapping: MappingFile) -> Iterator[Finding]:
    """L012: `present('…')` with a name that no rule or entry matches."""
    names = {source for rule in mapping.rules for source in rule.sources}
    names |= {e.pattern for e in (*mapping.ignore, *mapping.refuse) if e.side == "source"}
    written = spelled_out(names)
    for expression in () if mapping.as_model else _own(mapping):  # its rules are made from the checkpoint
        for asked in compile_expression(expression).patterns:
            sample = pattern(asked).sample()
            if asked not in written and not any(pattern(name).match(sample) is not None for name in written):
                fix = meant(asked, sorted(written), "Ask for a tensor that some rule reads.")
                yield Finding(expression.place, f"no rule has a tensor `{asked}`", fix)


def check_comparisons(mapping: MappingFile) -> Iterator[Finding]:
    """L013: a variant or option compared with a text that is not one of its choices."""
    choices: dict[str, Sequence[Any]] = {name: list(v.choices) for name, v in mapping.variants.items()}
    choices |= {f"options.{name}": o.choices for name, o in mapping.options.items() if o.choices is not None}
    for expression in _own(mapping):
        for compare in compile_expression(expression).every(nodes.Compare):
            sides = [compare.expr, *(operand.expr for operand in compare.ops)]
            for name in (path for side in sides if (path := dotted(side)) in choices):
                for value in [c.value for side in sides for c in _constants(side) if isinstance(c.value, str)]:
                    if value not in choices[name]:
                        known = list(map(str, choices[name]))
                        yield Finding(
                            expression.place,
                            f"`{name}` is compared with `{value}`, which is none of its choices",
                            meant(value, known, f"It is one of {', '.join(known)}."),
                        )


def _own(mapping: MappingFile) -> list[Expression]:
    """Expressions of the file itself; those of its parents may ask for rules that it removed."""
    return [one for one in every_expression(mapping) if one.place.file == mapping.files[-1]]


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    if isinstance(node, nodes.Const):
        yield node
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _constants(item)


def _texts(tree: Any) -> Iterator[str]:
    """Texts that a value may have: literals, and the results of an expression's branches."""
    for value in values_in(tree):
        if isinstance(value, Expression):
            yield from _results(compile_expression(value).tree)
        elif isinstance(value, str):
            yield value


def _results(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, nodes.CondExpr):
        yield from _results(node.expr1)
        if node.expr2 is not None:
            yield from _results(node.expr2)
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _results(item)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value


def place_of(mapping: MappingFile, *path: str) -> Place:
    """The place of a part, or of a key in it."""
    return Document(mapping.place.file, mapping.resolved, At(mapping.place, mapping.place)).place(*path)
