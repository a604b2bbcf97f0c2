"""Mapping files: from resolved YAML data to a checked, frozen `Mapping`."""

from __future__ import annotations

import hashlib
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.language.axes import parse_axes
from engine.language.documents import Document
from engine.language.expressions import names_in
from engine.language.merging import load_resolved
from engine.language.model import Exclusion, Expression, Mapping, Option, Rule, Target, Variant
from engine.language.names import pattern
from engine.language.search import find_file
from engine.language.validation import check_schema

_BRACES = re.compile(r"\{\{(.*)\}\}\Z", re.DOTALL)


def load_mapping(name: str | Path) -> Mapping:
    """Load a mapping by path or bundled name, resolved over its parents and checked.

    Raises:
        EngineError: E002, E1xx with file, line and column.
    """
    path = find_file(str(name))
    document, files = load_resolved(path)
    check_schema(document, "mapping")
    return build_mapping(document, files)


def build_mapping(document: Document, files: tuple[str, ...]) -> Mapping:
    data, place = document.data, document.place
    variants = {name: read_variant(document, name, body, ("variants", name)) for name, body in (data.get("variants") or {}).items()}
    rules = tuple(_rule(document, name, body, variants) for name, body in data["rules"].items())
    source, target = data["source"], data["target"]
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return Mapping(
        name=data["name"],
        version=str(data["version"]),
        description=data.get("description", ""),
        place=place("name"),
        layout=source["layout"],
        model_types=tuple(source.get("model_types", ())),
        model_type=target["model_type"],
        architecture=target["architecture"],
        options={name: read_option(document, name, body, ("options", name)) for name, body in (data.get("options") or {}).items()},
        variants=variants,
        dims={name: expression(document, ("dims", name), text) for name, text in (data.get("dims") or {}).items()},
        rules=rules,
        ignore=tuple(_exclusion(document, "ignore", i, e) for i, e in enumerate(data.get("ignore") or [])),
        refuse=tuple(_exclusion(document, "refuse", i, e) for i, e in enumerate(data.get("refuse") or [])),
        config=_tree(document, ("config",), data.get("config") or {}),
        training_config=_tree(document, ("training_config",), data.get("training_config") or {}),
        tokenizer=data.get("tokenizer"),
        generation=data.get("generation"),
        chat_template=data.get("chat_template"),
        expect=data.get("expect") or {},
        files=files,
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
        resolved=data,
        expect_place=place("expect"),
    )


def expression(document: Document, path: tuple[str | int, ...], text: Any) -> Expression:
    """An expression at its place, compiled once so that mistakes show at loading."""
    result = Expression(str(text).lower() if isinstance(text, bool) else str(text), document.place(*path))
    names_in(result)
    return result


def read_variant(document: Document, name: str, body: dict[str, Any], path: tuple[str | int, ...]) -> Variant:
    raw = body["choices"]
    choices: dict[str, Expression | None]
    if isinstance(raw, list):
        choices = {str(choice): None for choice in raw}
    else:
        choices = {
            choice: None if text == "otherwise" else expression(document, (*path, "choices", choice), text)
            for choice, text in raw.items()
        }
    decide = body.get("decide", "expression")
    if decide == "expression" and isinstance(raw, list):
        raise EngineError("E102", f"variant `{name}` has choices without expressions", place=document.place(*path),
                          fix="Write an expression per choice, or `decide: shapes`.")  # fmt: skip
    default = body.get("default")
    if default is not None and default not in choices:
        raise EngineError("E108", f"variant `{name}` has no choice `{default}`", place=document.place(*path, "default"),
                          expected=", ".join(choices), fix="Name one of its choices.")  # fmt: skip
    return Variant(name, body.get("help", ""), choices, decide, default, document.place(*path))


def read_option(document: Document, name: str, body: dict[str, Any], path: tuple[str | int, ...]) -> Option:
    choices = body.get("choices")
    return Option(name, body["type"], body.get("default"), body.get("help", ""),
                  None if choices is None else tuple(choices), document.place(*path))  # fmt: skip


def _tree(document: Document, path: tuple[str | int, ...], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tree(document, (*path, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tree(document, (*path, i), item) for i, item in enumerate(value))
    if isinstance(value, str) and ("{{" in value or "}}" in value):
        found = _BRACES.match(value.strip())
        if found is None or "{{" in found[1]:
            raise EngineError("E105", "an expression stands alone between {{ and }}", place=document.place(*path), got=value,
                              fix="Write text and expression as one expression.")  # fmt: skip
        return expression(document, path, found[1].strip())
    return value


def _exclusion(document: Document, key: str, index: int, entry: dict[str, Any]) -> Exclusion:
    side = "source" if "source" in entry else "target"
    place = document.place(key, index)
    pattern(entry[side], place)
    return Exclusion(side, entry[side], entry["why"], place)  # type: ignore[arg-type]


def _rule(document: Document, name: str, body: dict[str, Any], variants: dict[str, Variant]) -> Rule:
    base: tuple[str | int, ...] = ("rules", name)
    place = document.place(*base)
    for key in ("source", "axes"):
        if key not in body:
            raise EngineError("E102", f"rule `{name}` has no `{key}`", place=place, expected="source, axes and target or targets",
                              fix="A child's rule takes what it does not write from the parent's rule of the same name: is the name right?")  # fmt: skip
    sources = tuple(body["source"]) if isinstance(body["source"], list) else (body["source"],)
    axes = parse_axes(body["axes"], document.place(*base, "axes"))
    targets: list[Target] = []
    if "target" in body:
        targets.append(Target(body["target"], axes, document.place(*base, "target")))
    for index, entry in enumerate(body.get("targets") or []):
        at = (*base, "targets", index)
        targets.append(Target(entry["name"], parse_axes(entry["axes"], document.place(*at, "axes")), document.place(*at)))
    if not targets and not body.get("drop"):
        raise EngineError("E102", f"rule `{name}` has no target", place=place, fix="Give `target`, `targets`, or `drop`.")
    compiled = [pattern(s, document.place(*base, "source")) for s in sources]
    for target in targets:
        compiled.append(pattern(target.name, target.place))
    if len({c.has_param for c in compiled}) > 1:
        raise EngineError("E104", f"rule `{name}`: `{{param}}` stands on one side only", place=place,
                          fix="Write {param} in source and target, or in neither.")  # fmt: skip
    if len({frozenset(c.placeholders) for c in compiled[: len(sources)]}) > 1:
        raise EngineError("E104", f"rule `{name}`: its historical names have different placeholders", place=place, fix="Split the rule.")
    split = body.get("split", [])
    split = tuple(split) if isinstance(split, list) else (split,)
    for axis in split:
        if axis not in axes.names():
            raise _undeclared(f"rule `{name}` is split on `{axis}`, which is not among its axes", axis, axes.names(),
                              document.place(*base, "split"))  # fmt: skip
    stage = body.get("stage")
    layered = "layer" in compiled[0].placeholders
    if layered == (stage is not None):
        raise EngineError("E102", f"rule `{name}` " + ("must not" if layered else "must") + " say its `stage`", place=place,
                          fix="`stage: first` or `last` is for tensors without {layer}.")  # fmt: skip
    when = {v: tuple(c) if isinstance(c, list) else (c,) for v, c in (body.get("when") or {}).items()}
    for variant, choices in when.items():
        at_when = document.place(*base, "when", variant)
        if variant not in variants:
            raise _undeclared(f"rule `{name}` names an undeclared variant `{variant}`", variant, variants, at_when)
        for choice in choices:
            if choice not in variants[variant].choices:
                raise _undeclared(f"variant `{variant}` has no choice `{choice}`", choice, variants[variant].choices, at_when)
    transform = body.get("transform")
    if transform is not None:
        operation, axis = next(iter(transform.items()))
        if axis not in axes.names():
            raise _undeclared(f"rule `{name}` transforms along `{axis}`, which is not among its axes", axis, axes.names(), place)
        transform = (operation, axis)
    return Rule(
        name, sources, axes, tuple(targets), place, split, stage, when, bool(body.get("optional", False)), transform,
        body.get("keep") == "dtype", dict(body.get("drop") or {}), body.get("tied_to"),
    )  # fmt: skip


def _undeclared(message: str, name: str, known: Any, place: Place) -> EngineError:
    near = get_close_matches(str(name), [str(k) for k in known], 1)
    return EngineError("E108", message, place=place, expected=", ".join(map(str, known)),
                       fix=f"Did you mean `{near[0]}`?" if near else "Declare it, or correct the name.")  # fmt: skip
