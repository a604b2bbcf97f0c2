"""Plans and reports as a notebook shows them: one table for each thing they tell, nothing loaded, nothing run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, ParamSpec, TypeVar

from engine.show.text import amount, shown

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST = 200  # characters of a `repr` that is a title
_MOST_ROWS = 200  # of one table; the terminal and `as_dict` have all


def as_html(title: str, facts: Mapping[str, Any]) -> str:
    """Facts as HTML: simple ones in one table, each list of things in one of its own.

    >>> as_html("a <b>", {"tensors": 3, "rules": [{"name": "x", "n": 1}]})[:37]
    '<div><b>a &lt;b&gt;</b><table><tr><th'
    """
    facts = shown(facts)
    simple = {key: value for key, value in facts.items() if not _is_table(value) and value not in (None, "", [], {})}
    parts = [_table(("", ""), [(key, _told(key, value)) for key, value in simple.items()], heading=False)]
    for key, value in facts.items():
        if _is_table(value):
            rows = [{"": name, **row} for name, row in value.items()] if isinstance(value, Mapping) else list(value)
            names = list(dict.fromkeys(name for row in rows for name in row))
            cells = [[_told(name, row.get(name, "")) for name in names] for row in rows[:_MOST_ROWS]]
            more = f" ({_MOST_ROWS} of {len(rows):,})" if len(rows) > _MOST_ROWS else ""
            parts.append(f"<details><summary>{escape(key)}{more}</summary>{_table(names, cells)}</details>")
    return f"<div><b>{escape(title)}</b>{''.join(parts)}</div>"


def _is_table(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, Mapping) else value
    return isinstance(rows, Sequence) and not isinstance(rows, str) and bool(rows) and all(
        isinstance(row, Mapping) for row in rows
    )  # fmt: skip


def _told(key: str, value: Any) -> str:
    if key in ("bytes", "predicted_memory") and isinstance(value, int):
        return amount(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told('', item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " × ".join(map(str, value)) if key == "shape" else ", ".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, heading: bool = True) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)] if heading else []
    for first, *rest in rows:
        lines.append("".join([f'<th style="text-align:left">{escape(first)}</th>',
                              *(f'<td style="text-align:left">{escape(cell)}</td>' for cell in rest)]))  # fmt: skip
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def displayed(function: Callable[P, T]) -> Callable[P, T]:
    """Have notebooks show what a function returns as HTML; its type is told so when the first one is returned."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        found = function(*args, **kwargs)
        if not hasattr(type(found), "_repr_html_"):
            setattr(type(found), "_repr_html_", _repr_html_)  # noqa: B010  (what notebooks look for)
        return found

    return call


def _repr_html_(self: Any) -> str:
    from engine.explaining.describe import describe_plan

    facts = self.as_dict() if hasattr(self, "as_dict") else describe_plan(self)
    told = repr(self)
    return as_html(told.strip("<>") if len(told) < _LONGEST else type(self).__name__, facts)
