"""Mapping files: from resolved YAML data to a checked, frozen `Mapping`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2.nodes import Div

from engine.errors import EngineError, Errors
from engine.language.declared import check_mapping, undeclared
from engine.language.documents import Document
from engine.language.expressions import compile_expression
from engine.language.keys import read_keys, read_limits
from engine.language.merging import Kept, chain_of, family_in, merged
from engine.language.model import Exclusion, Expression, MappingFile, Option, Variant
from engine.language.names import check_file_name, pattern
from engine.language.rules import read_rule
from engine.language.search import find_file
from engine.language.validation import check_schema

_BRACES = re.compile(r"\{\{(.*)\}\}\Z", re.DOTALL)


def load_mapping(name: str | Path, named: Path | None = None) -> MappingFile:
    """Load a mapping by path or bundled name, resolved over its parents and checked.

    Args:
        named: a folder to search first for parents that are given by name.

    >>> load_mapping("internlm2-7b").expect["hidden"]
    4096

    Raises:
        EngineError: E002, E1xx with file, line and column.
    """
    if not isinstance(name, str | Path):
        raise EngineError(
            "E001",
            "this is not a mapping",
            got=f"{name!r:.80}, of type {type(name).__name__}",
            expected="a name, a path, or a loaded mapping",
            fix="Give the name of a bundled mapping, like internlm2-7b, or the path of a file.",
        )
    return _built(chain_of(find_file(str(name)), named))


@lru_cache(maxsize=256)
def _built(chain: tuple[Kept, ...]) -> MappingFile:
    """The mapping of some files, cached until one of them changes."""
    document = merged(chain)
    check_schema(document, "mapping", merged=True)
    return replace(build_mapping(document, tuple(one.name for one in chain)), family=family_in(chain))


def build_mapping(document: Document, files: tuple[str, ...]) -> MappingFile:
    """A mapping from checked data; reports all that is wrong with it at once.

    Raises:
        EngineError: E1xx; `EngineErrors` if there are several.
    """
    data, place = document.data, document.place
    errors = Errors()

    def each(part: str, read: Callable[..., Any], *more: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, one in document.parts(part).items():
            with errors.caught():
                found[key] = read(key, one, *more)
        return found

    def tree(*path: str) -> Any:
        found: list[Any] = []
        with errors.caught():
            found.append(read_tree(document.part(*path)))
        return found[0] if found else None

    source, target = data["source"], data["target"]
    variants = {
        # Rules that name choices of an invalid variant can still be checked.
        name: Variant(name, "", dict.fromkeys(map(str, body["choices"])), "shapes", None, place("variants", name))
        for name, body in (data.get("variants") or {}).items()
    } | each("variants", read_variant)
    if "file" in (data.get("tokenizer") or {}):
        with errors.caught():
            check_file_name(data["tokenizer"]["file"], document.value_place("tokenizer", "file"))
    mapping = MappingFile(
        name=data["name"],
        version=str(data["version"]),
        description=data.get("description", ""),
        place=place("name"),
        layout=source["layout"],
        model_types=tuple(source.get("model_types", ())),
        model_type=target["model_type"],
        architecture=target["architecture"],
        options=each("options", read_option),
        variants=variants,
        dims=each("dims", _dim),
        even=tuple(data.get("even") or ()),
        rules=tuple(each("rules", read_rule, variants).values()),
        ignore=tuple(each("ignore", _exclusion).values()),
        refuse=tuple(each("refuse", _exclusion).values()),
        config=tree("config") or {},
        training_config=tree("training_config") or {},
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
        classes=data.get("classes") or {},
        remote_code=tree("target", "remote_code", "auto_map"),
        transformers=tree("target", "transformers"),
        also=target.get("also") or {},
    )
    with errors.caught():
        check_mapping(mapping, document, whole=not errors.found)
    errors.check()
    return mapping


def digest_of(data: Any) -> str:
    """The SHA-256 of data as canonical JSON; the order of choices counts, that of other keys does not."""

    def ordered(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            pairs = [(str(k), ordered(v, str(k))) for k, v in value.items()]
            return pairs if key == "choices" else dict(pairs)
        return [ordered(item) for item in value] if isinstance(value, list) else value

    canonical = json.dumps(ordered(data), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def expression(part: Document) -> Expression:
    """An expression with its place, compiled once so that errors are found when the file is loaded."""
    text = str(part.data).lower() if isinstance(part.data, bool) else str(part.data)
    result = Expression(text, part.value_place())
    compile_expression(result)
    return result


def _dim(name: str, part: Document) -> Expression:
    """The expression of a size; E105 for a quotient, which is not a whole number even if it divides evenly."""
    found = expression(part)
    if isinstance(compile_expression(found).tree, Div):  # the outermost operation
        raise EngineError(
            "E105",
            f"dim `{name}` is a quotient, which is not a whole number even if it divides evenly",
            place=found.place,
            got=found.text,
            expected="a whole number",
            fix="Divide with `//`, or append `| int`.",
        )
    return found


def read_variant(name: str, variant: Document) -> Variant:
    body, raw = variant.data, variant.data["choices"]
    choices: dict[str, Expression | None]
    if isinstance(raw, list):
        choices = {str(choice): None for choice in raw}
    else:
        listed = variant.parts("choices").items()
        choices = {choice: None if one.data == "otherwise" else expression(one) for choice, one in listed}
    decide = body.get("decide", "expression")
    if (decide == "shapes") != isinstance(raw, list):
        told, expected, fix = (
            ("has choices without expressions", "an expression for each choice, or `decide: shapes`",
             "Write when each choice holds; the last may be `otherwise`."),
            ("is decided by shapes, but its choices have expressions", "a list of choices, or no `decide: shapes`",
             "List the choices: [a, b]."),
        )[decide == "shapes"]  # fmt: skip
        place = variant.place("choices")
        raise EngineError("E102", f"variant `{name}` {told}", place=place, expected=expected, fix=fix)
    default = body.get("default")
    if default is not None and default not in choices:
        at = variant.value_place("default")
        raise undeclared(f"variant `{name}` has no choice `{default}`", default, choices, at)
    return Variant(name, body.get("help", ""), choices, decide, default, variant.place(), body.get("answers", {}))


def read_option(name: str, option: Document) -> Option:
    body, choices = option.data, option.data.get("choices")
    return Option(
        name,
        body["type"],
        body.get("default"),
        body.get("help", ""),
        None if choices is None else tuple(choices),
        option.place(),
        read_limits(body),
    )


def read_tree(part: Document) -> Any:
    """A tree of literals with its expressions parsed; reports every one that cannot be."""
    value = part.data
    if isinstance(value, dict | list):
        errors = Errors()
        items: dict[Any, Any] = {}
        for key, one in part.parts().items():
            with errors.caught():
                items[key] = read_tree(one)
        errors.check()
        return items if isinstance(value, dict) else tuple(items.values())
    if isinstance(value, str) and ("{{" in value or "}}" in value):
        found = _BRACES.match(value.strip())
        if found is None or "{{" in found[1]:
            raise EngineError(
                "E105",
                "an expression between {{ and }} has other text around it",
                place=part.value_place(),
                got=value,
                expected="{{ expression }} and nothing around it",
                fix="Write text and value as one expression: {{ 'v' + (layers | string) }}.",
            )
        return expression(replace(part, data=found[1].strip()))
    return value


def _exclusion(number: int, entry: Document) -> Exclusion:
    side: Literal["source", "target"] = "source" if "source" in entry.data else "target"
    pattern(entry.data[side], entry.value_place(side))
    values = expression(entry.part("values")) if "values" in entry.data else None
    return Exclusion(side, entry.data[side], entry.data["why"], entry.place(), values)
