"""Configurations beside the rank files, read as data: pickled mappings, JSON, Python source."""

from __future__ import annotations

import ast
import json
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.rank_files import open_regular, read_torch_file
from engine.checkpoint.unpickle import DType
from engine.errors import EngineError, Place

_MAX_SOURCE = 1 << 20


def read_config(path: Path, format: str) -> dict[str, Any]:
    """Read a configuration in one of the layout's formats; EngineError E30x."""
    return _FORMATS[format](path)


def read_pickled_mapping(path: Path) -> dict[str, Any]:
    """A pickled dict, or a `Config` class that is one; dtypes become text such as `torch.bfloat16`."""
    value = _plain(_unpickle(path))
    if not isinstance(value, dict):
        raise EngineError(
            "E303",
            "the configuration is not a mapping",
            place=Place(path.name),
            got=type(value).__name__,
            fix="Is it the model_config.pt of the training run?",
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        raw = file.read(_MAX_SOURCE + 1)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            "E301",
            "the configuration is not JSON",
            place=Place(path.name),
            got=str(error)[:100],
            fix="Copy the file again.",
        ) from None
    if not isinstance(value, dict):
        raise EngineError(
            "E303", "the configuration is not an object", place=Place(path.name), fix="Is it the right file?"
        )
    return value


def read_python_source(path: Path) -> dict[str, Any]:
    """A training configuration's assignments, as far as they are literals. Never executed.

    What cannot be told from the text alone is left out; a configuration that cannot be parsed is
    empty, since it only adds facts.
    """
    if path.suffix == ".py":
        with open_regular(path) as file:
            source: Any = file.read(_MAX_SOURCE).decode("utf-8", "replace")
    else:
        source = _unpickle(path)
    if not isinstance(source, str) or len(source) > _MAX_SOURCE:
        return {}
    return literals(source)


def literals(source: str) -> dict[str, Any]:
    """
    >>> literals("N = 2\\nparallel = dict(tensor=dict(size=N * 2), other=f())")
    {'N': 2, 'parallel': {'tensor': {'size': 4}}}
    """
    names: dict[str, Any] = {}
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return names
    for statement in tree.body:
        if (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            try:
                names[statement.targets[0].id] = _literal(statement.value, names, 0)
            except (_Unknown, ArithmeticError, TypeError, ValueError, KeyError, IndexError):
                names.pop(statement.targets[0].id, None)
    return names


class _Unknown(Exception):
    """The value cannot be told from the text."""


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _literal(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    if depth > 50:
        raise _Unknown
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return [_literal(item, names, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
        return _known(pairs, names, depth)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return _known({k.arg: k.value for k in node.keywords if k.arg is not None}, names, depth)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand, names, depth + 1)
    if isinstance(node, ast.Subscript):
        return _literal(node.value, names, depth + 1)[_literal(node.slice, names, depth + 1)]
    if isinstance(node, ast.BinOp):
        left, right = _literal(node.left, names, depth + 1), _literal(node.right, names, depth + 1)
        if not all(isinstance(side, int | float) and abs(side) < 1 << 64 for side in (left, right)):
            raise _Unknown
        if isinstance(node.op, ast.Pow) and 0 <= right <= 64 and abs(left) <= 1024:
            return left**right
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    raise _Unknown


def _known(pairs: Mapping[Any, ast.expr], names: Mapping[str, Any], depth: int) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in pairs.items():
        try:
            result[key] = _literal(value, names, depth + 1)
        except (_Unknown, ArithmeticError, TypeError, ValueError, KeyError, IndexError):
            continue
    return result


def _unpickle(path: Path) -> Any:
    with open_regular(path) as file:
        return read_torch_file(file, path.name, os.fstat(file.fileno()).st_size)[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, DType):
        return f"torch.{value.name}"
    return value if isinstance(value, str | int | float | bool) or value is None else repr(value)


_FORMATS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "pickled_mapping": read_pickled_mapping,
    "json": read_json,
    "python_source": read_python_source,
}
