"""Every error a user can see: a stable code, a place, got against expected, and what to do.

Each code is explained only on its page in `docs/codes`. Codes are grouped by where the problem lies: E0 usage, E1
mapping and layout files, E2 planning (ranks, sizes, coverage), E3 checkpoint files, E4 running and writing, E5 assets,
E9 the engine itself; L0 findings of `engine lint`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

# After these a run can be resumed once the cause is gone: a disk is at fault, not the input.
RESUMABLE = ("E305", "E403", "E405")
KEPT = (*RESUMABLE, "E407", "E409")  # after these the work of an interrupted run is kept

_LONGEST = 2000  # characters of one part of a message

_SECRET = re.compile(r"(?<=://)[^\s/@\"']+@")  # user and password in a URL


def holds_secret(text: str) -> bool:
    """Whether the text has a URL with a user or password."""
    return _SECRET.search(text) is not None


def visible(text: str, keep: str = "") -> str:
    """Text that cannot control a terminal, change its writing direction, fake another line, or fail to be written.

    Names of tensors and files, and text in a mapping, may hold anything. Everything that is shown in a
    terminal, a card, a page or a message passes through here. `keep`: characters to leave as they are, like newlines.

    >>> visible("two\\nlines"), visible("\\x1b[31mred\\u202e"), visible("http://me:secret@host/a")
    ('two\\\\nlines', '\\\\x1b[31mred\\\\u202e', 'http://***@host/a')
    """
    return _escaped(text, keep, lambda c: c.encode("unicode_escape").decode())


def escaped_json(text: str) -> str:
    """JSON with all invisible characters as JSON escapes; the same data, except that passwords are masked."""
    return _escaped(text, "\n", lambda c: json.dumps(c)[1:-1].replace("\x7f", "\\u007f"))


def _escaped(text: str, keep: str, escape: Callable[[str], str]) -> str:
    text = _SECRET.sub("***@", text)
    if text.isprintable():
        return text
    return text.translate({ord(c): escape(c) for c in set(text) if not _shows(c) and c not in keep})


def _shows(c: str) -> bool:
    return c.isprintable() or unicodedata.category(c) == "Zs"  # wide and narrow spaces do no harm


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "file"), counted(1200, "file")
    ('1 file', '1,200 files')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """A number of parameters in words.

    >>> rounded(7_737_708_544), rounded(297_056), rounded(512)
    ('7.74 billion', '297,056', '512')
    """
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def shape_text(shape: Sequence[int]) -> str:
    """
    >>> shape_text((4096, 64)), shape_text(())
    ('4096 × 64', 'a scalar')
    """
    return " × ".join(map(str, shape)) or "a scalar"


def first_of(names: Sequence[object], most: int) -> str:
    """
    >>> first_of(["a", "b", "c"], 2), first_of([1, 2], 2)
    ('a, b, …', '1, 2')
    """
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")


def span(interval: tuple[int, int]) -> str:
    """
    >>> span((4, 7)), span((3, 4))
    ('4…6', '3')
    """
    low, high = interval
    return str(low) if high == low + 1 else f"{low}…{high - 1}"


def meant(name: str, known: Iterable[str], otherwise: str | None = None, least: float = 0.6) -> str | None:
    """A question that suggests the closest known name; `otherwise` when none is close.

    >>> meant("hiden", ["hidden", "layer"]), meant("x", [], "Declare it.")
    ('Did you mean `hidden`?', 'Declare it.')
    """
    near = get_close_matches(name, list(known), 1, least)
    return f"Did you mean `{near[0]}`?" if near else otherwise


def printable(text: str) -> str:
    """`visible` text on one line, cut to a length that fits a message."""
    return visible(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


class Lines(str):
    """Several lines of a message; a newline in any other text of a message is shown as an escape."""

    @classmethod
    def of(cls, lines: Iterable[str]) -> Lines:
        return cls("\n".join(map(visible, lines)))


def _lines(text: str) -> str:
    return "\n".join(map(printable, text[:_LONGEST].split("\n") if isinstance(text, Lines) else [text]))


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text file, 1-based, or a tensor in a checkpoint file.

    >>> str(Place("mappings/x.yaml", 12, 5))
    'mappings/x.yaml:12:5'
    >>> str(Place("model_tp0_pp0.pt", tensor="norm.weight"))
    'model_tp0_pp0.pt:norm.weight'
    """

    file: str
    line: int | None = None
    column: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column, self.tensor) if part is not None)

    def as_dict(self) -> dict[str, object]:
        """The same as data, for `--json`, without unknown parts."""
        parts = {"file": printable(self.file), "line": self.line, "column": self.column, "tensor": self.tensor}
        return {name: printable(p) if isinstance(p, str) else p for name, p in parts.items() if p is not None}


def in_words(
    code: str, message: str, place: Place | None, got: str | None, expected: str | None, fix: str | None
) -> str:
    """A problem as it is printed: what is wrong, where, got, expected, and what to do."""
    lines = [f"{code} {printable(message)}"]
    if place is not None:
        lines.append(f"  {printable(str(place))}")
    for label, text in (("got", got), ("expected", expected)):
        if text is not None:
            first, *rest = _lines(text).split("\n")
            lines.append(f"    {label:<9} {first}")
            lines.extend(f"    {'':<9} {line}" for line in rest)
    if fix is not None:
        lines.append(f"  {_lines(fix)}")
    return "\n".join(lines)


class EngineError(Exception):
    """Something a user must know, ready to print.

    Args:
        code: names a page in `docs/codes`; its meaning never changes.
        message: what is wrong, one lower-case line without a full stop.
        place: a file and line, or a file and tensor.
        got: what was found, one line or several (`Lines`).
        expected: what should have been there.
        fix: what to do, one or more sentences.
        answers: for a question: each setting that answers it, with possible values; `config` stands for --config FILE.
    """

    severity: Literal["error", "warning"] = "error"  # a warning, of lint, is never raised

    def __init__(
        self,
        code: str,
        message: str,
        *,
        place: Place | None = None,
        got: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
        answers: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.place = place
        self.got = got
        self.expected = expected
        self.fix = fix
        self.answers = answers or {}

    @property
    def errors(self) -> list[EngineError]:
        """The error itself, or all of several."""
        return [self]

    def __str__(self) -> str:
        return in_words(self.code, self.message, self.place, self.got, self.expected, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all attributes, so that another process can pass the error on."""
        return type(self).__new__, (type(self), self.message), self.__dict__

    def as_dict(self) -> dict[str, object]:
        """The same as data, for `--json`."""
        return {
            "code": self.code,
            "message": printable(self.message),
            "place": None if self.place is None else self.place.as_dict(),
            **{name: (told := getattr(self, name)) and _lines(told) for name in ("got", "expected", "fix")},
        }


class EngineErrors(EngineError):
    """Several independent errors found at once, in order of place; its own attributes are those of the first."""

    def __init__(self, errors: Sequence[EngineError]) -> None:
        first = errors[0]
        super().__init__(
            first.code, first.message, place=first.place, got=first.got, expected=first.expected, fix=first.fix
        )
        self._errors = list(errors)

    @property
    def errors(self) -> list[EngineError]:
        return self._errors

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """E001 when the library is missing that an extra of the package installs.

    Args:
        what: what needs it, with the verb: `URLs need`.
    """
    try:
        yield
    except ImportError as error:
        fix = f"Install it: pip install 'internlm-engine[{extra}]'."
        raise EngineError("E001", f"{what} the extra `{extra}`", got=f"no module {error.name}", fix=fix) from None


def distinct(errors: Iterable[EngineError]) -> list[EngineError]:
    """Errors, each once."""
    return list({(one.code, str(one.place), one.message): one for one in errors}.values())


_MOST_ERRORS = 20  # reported per file; a file may have a million


class Errors:
    """Collects independent errors, so that all errors of a file are reported at once.

    >>> errors = Errors()
    >>> with errors.caught():
    ...     raise EngineError("E102", "a")
    >>> with errors.caught():
    ...     raise EngineError("E102", "b")
    >>> len(errors.found)
    2
    """

    def __init__(self) -> None:
        self.found: list[EngineError] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Collect an `EngineError` raised inside, and go on."""
        try:
            yield
        except EngineError as error:
            self.found += error.errors

    def check(self) -> None:
        """Raise what was collected: one error as itself, several as `EngineErrors`."""
        found = distinct(self.found)
        listed = sorted(found, key=lambda e: (e.place.line or 0, e.place.column or 0) if e.place else (0, 0))
        if listed:
            raise listed[0] if len(listed) == 1 else EngineErrors(listed[:_MOST_ERRORS])
