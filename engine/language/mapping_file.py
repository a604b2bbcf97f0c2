"""Mapping files: from resolved YAML data to a checked, frozen `Mapping`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from engine.errors import EngineError
from engine.language.declared import check_mapping, undeclared
from engine.language.documents import Document
from engine.language.expressions import check_expression
from engine.language.keys import read_keys, read_limits
from engine.language.merging import load_resolved
from engine.language.model import Exclusion, Expression, Mapping, Option, RemoteCode, Variant
from engine.language.names import check_file_name, pattern
from engine.language.rules import read_rule
from engine.language.search import find_file, list_names
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
    variants = {
        name: read_variant(document, name, body, ("variants", name))
        for name, body in (data.get("variants") or {}).items()
    }
    rules = tuple(read_rule(document, name, body, variants) for name, body in (data.get("rules") or {}).items())
    source, target = data["source"], data["target"]
    if "file" in (data.get("tokenizer") or {}):
        check_file_name(data["tokenizer"]["file"], document.value_place("tokenizer", "file"))
    mapping = Mapping(
        name=data["name"],
        version=str(data["version"]),
        description=data.get("description", ""),
        place=place("name"),
        layout=source["layout"],
        model_types=tuple(source.get("model_types", ())),
        model_type=target["model_type"],
        architecture=target["architecture"],
        options={
            name: read_option(document, name, body, ("options", name))
            for name, body in (data.get("options") or {}).items()
        },
        variants=variants,
        dims={name: expression(document, ("dims", name), text) for name, text in (data.get("dims") or {}).items()},
        even=tuple(data.get("even") or ()),
        rules=rules,
        ignore=tuple(_exclusion(document, "ignore", i, e) for i, e in enumerate(data.get("ignore") or [])),
        refuse=tuple(_exclusion(document, "refuse", i, e) for i, e in enumerate(data.get("refuse") or [])),
        config=read_tree(document, ("config",), data.get("config") or {}),
        training_config=read_tree(document, ("training_config",), data.get("training_config") or {}),
        tokenizer=data.get("tokenizer"),
        generation=data.get("generation"),
        chat_template=data.get("chat_template"),
        expect=data.get("expect") or {},
        files=files,
        digest=digest_of(data),
        resolved=data,
        layout_place=document.value_place("source", "layout"),
        keys=read_keys(document),
        expect_place=place("expect"),
        as_model=data.get("names") == "model",
        remote_code=_remote_code(document, target.get("remote_code")),
        transformers=read_tree(document, ("target", "transformers"), target.get("transformers")),
    )
    check_mapping(mapping, document)
    return mapping


def find_mapping(name: str | Path) -> Path:
    """The file a path or a bundled name (`internlm-7b`, `families/internlm2.yaml`) stands for; E002."""
    return find_file(str(name))


def bundled_mappings() -> list[str]:
    """The names that `load_mapping` takes: releases first, then families."""
    return list_names()


def digest_of(data: Any) -> str:
    """The sha256 of data as canonical JSON; the order of choices counts, that of other keys does not."""

    def ordered(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            pairs = [(str(k), ordered(v, str(k))) for k, v in value.items()]
            return pairs if key == "choices" else dict(pairs)
        return [ordered(item) for item in value] if isinstance(value, list) else value

    canonical = json.dumps(ordered(data), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def expression(document: Document, path: tuple[str | int, ...], text: Any) -> Expression:
    """An expression at its place, compiled once so that mistakes show at loading."""
    result = Expression(str(text).lower() if isinstance(text, bool) else str(text), document.value_place(*path))
    check_expression(result)
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
        raise EngineError(
            "E102",
            f"variant `{name}` has choices without expressions",
            place=document.place(*path, "choices"),
            expected="an expression for each choice, or `decide: shapes`",
            fix="Write when each choice holds; the last may be `otherwise`.",
        )
    if decide == "shapes" and isinstance(raw, dict):
        raise EngineError(
            "E102",
            f"variant `{name}` is decided by shapes, but its choices have expressions",
            place=document.place(*path, "choices"),
            expected="a list of choices, or no `decide: shapes`",
            fix="List the choices: [a, b].",
        )
    default = body.get("default")
    if default is not None and default not in choices:
        at = document.value_place(*path, "default")
        raise undeclared(f"variant `{name}` has no choice `{default}`", default, choices, at)
    return Variant(name, body.get("help", ""), choices, decide, default, document.place(*path))


def read_option(document: Document, name: str, body: dict[str, Any], path: tuple[str | int, ...]) -> Option:
    choices = body.get("choices")
    return Option(
        name,
        body["type"],
        body.get("default"),
        body.get("help", ""),
        None if choices is None else tuple(choices),
        document.place(*path),
        read_limits(body),
    )


def read_tree(document: Document, path: tuple[str | int, ...], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: read_tree(document, (*path, key), item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(read_tree(document, (*path, i), item) for i, item in enumerate(value))
    if isinstance(value, str) and ("{{" in value or "}}" in value):
        found = _BRACES.match(value.strip())
        if found is None or "{{" in found[1]:
            raise EngineError(
                "E105",
                "an expression does not stand alone between {{ and }}",
                place=document.value_place(*path),
                got=value,
                expected="{{ expression }} and nothing around it",
                fix="Write text and value as one expression: {{ 'v' + (layers | string) }}.",
            )
        return expression(document, path, found[1].strip())
    return value


def _remote_code(document: Document, body: dict[str, Any] | None) -> RemoteCode | None:
    if body is None:
        return None
    tree = read_tree(document, ("target", "remote_code", "auto_map"), body["auto_map"])
    return RemoteCode(tree)


def _exclusion(document: Document, key: str, index: int, entry: dict[str, Any]) -> Exclusion:
    side: Literal["source", "target"] = "source" if "source" in entry else "target"
    place = document.place(key, index)
    pattern(entry[side], document.value_place(key, index, side))
    return Exclusion(side, entry[side], entry["why"], place)
