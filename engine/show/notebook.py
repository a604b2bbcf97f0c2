"""Plans and reports as a notebook shows them: one table for each thing they tell, nothing loaded, nothing run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from engine.show.text import shown

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST = 200  # characters of a `repr` that is a title
_MOST_ROWS = 200  # of one table; the terminal and `as_dict` have all


def as_html(title: str, facts: Mapping[str, Any]) -> str:
    """Facts as HTML: simple ones in one table, each list of things in one of its own."""
    from engine.show.page import TEMPLATES, template

    facts = shown(facts)
    tables = {key: rows for key, value in facts.items() if (rows := _rows(value))}
    simple = {k: value for k, value in facts.items() if k not in tables and value not in (None, "", [], {})}
    page = template(TEMPLATES / "notebook.html.j2")
    return page.render(title=title, simple=simple, tables=tables, most=_MOST_ROWS)


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """The rows of a table, if all that is listed, or named, is a mapping."""
    if isinstance(value, Mapping):
        value = [{"": name, **row} if isinstance(row, Mapping) else row for name, row in value.items()]
    return list(value) if isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value) else []


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
