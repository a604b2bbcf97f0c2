"""Configurations beside the rank files, read as data: pickled mappings, JSON, YAML, Python source."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.headers import damaged
from engine.formats.pickling import with_dtypes
from engine.formats.python_source import MAX_SOURCE, literals
from engine.formats.rank_files import read_torch_file
from engine.formats.standins import DType, Instance, Opaque, OtherClass
from engine.formats.torch_files import encode_directory, encode_torch
from engine.formats.unpickle import MOST_BITS
from engine.storage.json_text import parse_json
from engine.storage.store import File

_DEEPEST = 64
_MOST_YAML = 1 << 18  # bytes
_MOST_VALUES = 100_000  # shared values are counted each time


def read_config(file: File, format: str) -> dict[str, Any]:
    """Read a configuration in one of the layout's formats; EngineError E30x."""
    return _FORMATS[format](file)


def read_pickled_mapping(file: File) -> dict[str, Any]:
    """A pickled dict, or a `Config` class that is one; dtypes become text such as `torch.bfloat16`."""
    value = plain(_unpickle(file), file.name)
    if not isinstance(value, dict):
        raise EngineError(
            "E303",
            "the configuration is not a dict of settings",
            place=Place(file.name),
            got=type(value).__name__,
            fix="Is it the model_config.pt of the training run?",
        )
    return value


def read_json(file: File) -> dict[str, Any]:
    with file.open() as opened:
        return json_object(opened.read(MAX_SOURCE + 1), file.name)


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """The settings in a JSON file of this name; E301 when it is not JSON, E303 when it is not an object."""
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise EngineError(
            "E301",
            "the file is not JSON",
            place=Place(name),
            got=str(error)[:100],
            fix="Copy the file again, or correct it if it was edited: JSON is UTF-8 without a byte order mark.",
        ) from None
    if not isinstance(value, dict):
        raise EngineError(
            "E303", "the file is not an object", place=Place(name), got=type(value).__name__,
            expected="keys and values, { … }", fix="Is it the right file?",
        )  # fmt: skip
    return value


def read_python_source(file: File) -> dict[str, Any]:
    """A training configuration's assignments, if they are literals. Never executed.

    What the text alone does not determine is left out. A configuration that cannot be parsed is empty,
    since it only adds facts.
    """
    if file.name.endswith(".py"):
        with file.open() as opened:
            raw = opened.read(MAX_SOURCE + 1)
        source: Any = raw.decode("utf-8", "replace") if len(raw) <= MAX_SOURCE else None
    else:
        source = _unpickle(file)
    if not isinstance(source, str) or len(source) > MAX_SOURCE:
        return {}
    found: dict[str, Any] = marshal.loads(_literals(source))
    return found


def read_yaml(file: File) -> dict[str, Any]:
    """A training configuration in YAML, as PyYAML's `safe_dump` writes it; a tag makes nothing of a value.

    E301 for a file that cannot be read as keys and values: what it says may decide what the tensors are.
    """
    import yaml

    class Shallow(yaml.SafeLoader):  # in Python: libyaml crashes on deep nesting
        def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
            """Refuse too deep nesting early: PyYAML scans it again for each enclosing bracket."""
            if self.flow_level > _DEEPEST:
                raise RecursionError
            super().fetch_flow_collection_start(token)

        def untagged(self, _: str, node: yaml.Node) -> Any:
            if isinstance(node, yaml.MappingNode):
                return self.construct_mapping(node, deep=True)
            return self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value

    Shallow.add_multi_constructor("", Shallow.untagged)
    with file.open() as opened:
        raw = opened.read(_MOST_YAML + 1)
    if len(raw) > _MOST_YAML:
        raise damaged(file.name, f"more than {_MOST_YAML} bytes in place of a configuration")
    try:
        found = plain(yaml.load(raw, Shallow), file.name)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise damaged(file.name, f"text that is not YAML: {why[:100]}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError):  # PyYAML stumbles over `!!bool maybe`
        raise damaged(file.name, "a value that is too large, or is not what its tag says") from None
    if not isinstance(found, dict):
        raise damaged(file.name, f"{'nothing' if found is None else type(found).__name__} in place of keys and values")
    return found


@lru_cache(maxsize=4)  # a run reads a configuration again, to check that it is unchanged
def _literals(source: str) -> bytes:
    return marshal.dumps(literals(source))


def _unpickle(file: File) -> Any:
    with file.open() as opened:
        return read_torch_file(opened, file.name).value


def plain(value: Any, name: str) -> Any:
    """The value as JSON-ready data. A pickle can contain itself, or the same list a million times."""
    left = _MOST_VALUES

    def told(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise damaged(name, "a configuration nested too deeply, or of too many values")
        if isinstance(value, Mapping):
            return {str(key): told(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [told(item, depth + 1) for item in value]
        if isinstance(value, set | frozenset):
            return [told(item, depth + 1) for item in sorted(value, key=repr)]
        if isinstance(value, Instance) and value.kind.name == "Namespace" and isinstance(value.state, dict):
            return told(value.state, depth)
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise damaged(name, f"a number of {value.bit_length()} bits")
        if isinstance(value, DType):
            return f"torch.{value.name}"
        if isinstance(value, Opaque):
            return value.kind
        if isinstance(value, Instance | OtherClass):
            return value.kind.name if isinstance(value, Instance) else value.name
        return value if isinstance(value, str | int | float | bool) or value is None else type(value).__name__

    return told(value, 0)


def encode_config(name: str, format: str, content: Any) -> bytes:
    """The bytes of a configuration file in one of the layout's formats, for its framework to read."""
    if format == "dcp":
        return encode_directory(content)
    stem = Path(name).stem
    if format == "json":
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    if format == "pickled_mapping":
        return encode_torch(with_dtypes(content), stem)
    source = "".join(f"{key} = {value!r}\n" for key, value in content.items())
    return source.encode() if name.endswith(".py") else encode_torch(source, stem)


_FORMATS: dict[str, Callable[[File], dict[str, Any]]] = {
    "pickled_mapping": read_pickled_mapping,
    "json": read_json,
    "python_source": read_python_source,
    "yaml": read_yaml,
}
