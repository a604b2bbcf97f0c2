"""The sandbox that expressions run in: our functions and filters, bounded arithmetic, no attributes.

Attribute and index access read keys of mappings and nothing else, and stay undefined along a
missing path, so that `training.parallel.mode | default('x')` works when `training` is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from jinja2.exceptions import SecurityError
from jinja2.runtime import StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BITS = 4096
MAX_ITEMS = 4096


class Omit:
    """The value `omit`: leave this key out."""

    def __repr__(self) -> str:
        return "omit"

    def __reduce__(self) -> str:
        return "OMIT"


OMIT: Final = Omit()


class _Missing(StrictUndefined):
    """An undefined name; knows its whole dotted path, which is its message."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        return str(self._undefined_name)


def defined(value: Any) -> Any:
    if isinstance(value, Undefined):
        str(value)  # raises UndefinedError with the name
    return value


def _number(value: Any, word: str) -> Any:
    if type(value) in (int, float):
        return value
    if isinstance(defined(value), bool) or not isinstance(value, int | float):
        raise TypeError(f"`{word}` takes a number, not {kind_of(value)}")
    return value


def _to_int(value: Any) -> int:
    if isinstance(defined(value), str) and len(value) <= 40:
        return int(value)
    return int(value) if isinstance(value, bool) else int(_number(value, "int"))


def _to_float(value: Any) -> float:
    if isinstance(defined(value), str) and len(value) <= 40:
        return float(value)
    return float(_number(value, "float"))


def _length(value: Any) -> int:
    if not isinstance(defined(value), str | list | tuple | Mapping):
        raise TypeError(f"`length` takes a text or a list, not {kind_of(value)}")
    return len(value)


def _default(value: Any, instead: Any, or_false: bool = False) -> Any:
    return instead if isinstance(value, Undefined) or (or_false and not value) else value


def _extreme(function: Callable[..., Any], word: str) -> Callable[..., Any]:
    def of(*values: Any) -> Any:
        items = values[0] if len(values) == 1 and isinstance(defined(values[0]), list | tuple) else values
        return function([_number(item, word) for item in items])

    return of


def _gcd(*values: int) -> int:
    if any(not isinstance(_number(v, "gcd"), int) for v in values):
        raise TypeError("`gcd` takes whole numbers")
    return math.gcd(*values)


FUNCTIONS: dict[str, Any] = {
    "gcd": _gcd,
    "min": _extreme(min, "min"),
    "max": _extreme(max, "max"),
    "default": _default,
    "omit": OMIT,
}
FILTERS: dict[str, Callable[..., Any]] = {
    "default": _default,
    "int": _to_int,
    "float": _to_float,
    "string": lambda value: value if isinstance(defined(value), str) else str(_number(value, "string")),
    "abs": lambda value: abs(_number(value, "abs")),
    "min": _extreme(min, "min"),
    "max": _extreme(max, "max"),
    "length": _length,
    "round": lambda value, to=0: value if isinstance(_number(value, "round"), int) else round(value, to),
}
TESTS = frozenset((
    "defined", "undefined", "none", "boolean", "integer", "float", "number", "string", "mapping", "sequence",
    "true", "false", "odd", "even", "divisibleby", "in", "eq", "ne", "lt", "le", "gt", "ge",
))  # fmt: skip


def _repeated(items: Any, times: int) -> Any:
    """A list again and again; not one of lists, which a few repetitions would make too large."""
    if any(isinstance(item, list | tuple | Mapping) for item in items):
        raise TypeError("`*` repeats a list of single values, not of lists or mappings")
    if len(items) * times > MAX_ITEMS:
        raise OverflowError(f"a list of more than {MAX_ITEMS} values")
    return items * times


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers of bounded size, `+` on texts and lists, and a list times a whole number."""
        defined(left), defined(right)
        if operator == "*" and isinstance(left, list | tuple) and type(right) is int:
            return _repeated(left, right)
        if operator == "+" and type(left) is type(right) and isinstance(left, str | list | tuple):
            return left + right
        _number(left, operator), _number(right, operator)
        bits = [v.bit_length() if isinstance(v, int) else 64 for v in (left, right)]
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and bits[0] * abs(right) > MAX_BITS:
            raise OverflowError(f"a power of more than {MAX_BITS} bits")
        if sum(bits) > MAX_BITS:
            raise OverflowError(f"a number of more than {MAX_BITS} bits")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, complex):
            raise ValueError("a root of a negative number")
        return result

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            return _Missing(name=f"{obj._undefined_name}.{argument}")
        if isinstance(obj, Mapping):
            return obj[argument] if argument in obj else _Missing(name=str(argument))
        if isinstance(obj, list | tuple | str) and isinstance(argument, int):
            return obj[argument] if -len(obj) <= argument < len(obj) else _Missing(name=f"[{argument}]")
        if obj is None:
            return _Missing(name=str(argument))
        raise SecurityError(f"`.{argument}` of {kind_of(obj)}: only keys of mappings can be read")

    def is_safe_callable(self, obj: Any) -> bool:
        return True  # only names of the allow-list can be called, and they are ours


_REMAINDERS: dict[str, Callable[..., bool]] = {  # Jinja's own would format a text with `%`
    "odd": lambda value: _number(value, "odd") % 2 == 1,
    "even": lambda value: _number(value, "even") % 2 == 0,
    "divisibleby": lambda value, by: _number(value, "divisibleby") % _number(by, "divisibleby") == 0,
}


def _environment() -> _Environment:
    environment = _Environment(undefined=_Missing, autoescape=False, cache_size=0, optimized=False)
    environment.globals.clear()
    environment.filters = dict(FILTERS)
    environment.tests = {name: test for name, test in environment.tests.items() if name in TESTS} | _REMAINDERS
    return environment


ENVIRONMENT = _environment()


_KINDS = {
    bool: "true or false",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    type(None): "null",
}


def kind_of(value: Any) -> str:
    return _KINDS.get(type(value), "omit" if value is OMIT else f"a value of type {type(value).__name__}")
