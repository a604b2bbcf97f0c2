"""How amounts, lists and tables are written, and how they fit a terminal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from engine.errors import escaped_json, visible
from engine.storage.json_text import as_data
from engine.storage.store import unreadable

T = TypeVar("T")

_INDENT = "  "  # before a row of a table
_NARROWEST = 40  # columns; a terminal that claims less is not one
_LEAST = 16  # columns that a wide column of a table keeps; with fewer, each row is told in lines of its own
_SPACES = re.compile(r"(?<=\s)(?=\S)")
# Where a word that is too long for the rest of a line may go on in the next one, and where it has none of these.
_INSIDE = (re.compile(r"(?<=[,;/.…×|&=:])(?=[^\s,;/.…×|&=:])"), re.compile(r"(?<=[_-])(?=[^\s_-])"))
_HANGING = re.compile(r"\s*(?:[-+~] |\S{1,12} {2,}|(?:note|means) )?")


class Styled(str):
    """Text in which every style is the engine's own: what it was made of was shown as visible lines before."""


def quoted(name: str | Path) -> str:
    r"""A name as bash and zsh take it in a command, in one visible line.

    >>> print(quoted("my model"), quoted("-o"), quoted("two\nlines\\"), quoted("\udcff"), quoted("\udbff"))
    'my model' ./-o $'two\x0alines\\' $'\xff' $'\xed\xaf\xbf'
    """
    text = f"./{name}" if str(name).startswith("-") else str(name)
    hidden = {c for c in text if visible(c) != c}
    if not hidden:
        return shlex.quote(visible(text))
    raw = {c: c.encode(errors="surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass") for c in hidden}
    escapes = {c: "".join(f"\\x{byte:02x}" for byte in raw[c]) for c in hidden} | {"\\": r"\\", "'": r"\'"}
    return visible(f"$'{text.translate({ord(c): escape for c, escape in escapes.items()})}'")


def as_json(data: Any) -> str:
    """JSON that any terminal can show: what is not to be seen is an escape, so are bytes of a path that are no text.

    >>> as_json({"rope_base": float("inf")})  # which JSON does not have
    '{\\n  "rope_base": null\\n}'
    """
    return escaped_json(json.dumps(as_data(data), indent=2, ensure_ascii=False))


def shown(value: Any) -> Any:
    """Data in which every text is one visible line, whatever a checkpoint, a mapping or a file's name holds."""
    if isinstance(value, str | Path):
        return visible(str(value))
    if isinstance(value, Mapping):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(shown, value)) if type(value) in (list, tuple) else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: shown(getattr(value, one.name)) for one in fields(value) if one.init})
    return value


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise unreadable(path, reason) from error


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(75), duration(3700)
    ('0.4 s', '1 min 15 s', '1 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def times(shape: Sequence[int]) -> str:
    """
    >>> times([2, 3]), times([])
    ('2 × 3', 'scalar')
    """
    return " × ".join(map(str, shape)) or "scalar"


def title(text: str) -> str:
    return click.style(text, bold=True)


def note(text: str) -> str:
    return f"{click.style('note', fg='yellow')} {text}"


def terminal_width(err: bool = False) -> int | None:
    """Columns of the terminal that is printed to; None for a pipe or a file, where lines stay whole for `grep`.

    `COLUMNS` says another width, as for other programs.
    """
    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        return None
    return max(shutil.get_terminal_size((80, 24)).columns, _NARROWEST)


def fit(text: str, width: int | None) -> str:
    """Lines no wider than the terminal; what a line goes on with stands under its own first word.

    Lines are broken at spaces and after `,`, `/`, `.` and the like. Commands to copy stay whole.

    >>> print(fit("  note a tensor of no rule: layers.0.mixer.Wqkv.weight", 30))
      note a tensor of no rule:
           layers.0.mixer.Wqkv.
           weight
    """
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _fit_line(line, width))


def _fit_line(line: str, width: int) -> list[str]:
    plain = click.unstyle(line)
    if len(plain) <= width or plain.lstrip().startswith(("next: ", "$ ", "hf upload ")):
        return [line]
    found = _HANGING.match(plain)
    indent = min(found.end() if found else 0, width // 3)
    first, *rest = wrap(line, width, width - indent)
    return [first, *(" " * indent + part for part in rest)]


def wrap(text: str, first: int, rest: int | None = None) -> list[str]:
    """A text in lines of at most so many columns; styles take none.

    >>> wrap("model.layers.{layer}.mlp.gate_proj.weight", 24)
    ['model.layers.{layer}.', 'mlp.gate_proj.weight']
    """
    rest = first if rest is None else rest
    lines: list[str] = []
    line = ""
    words = _SPACES.split(text)
    for inside, most in zip(_INSIDE, (rest * 2 // 3, rest), strict=True):
        words = [part for word in words for part in (inside.split(word) if len(word.rstrip()) > most else [word])]
    for word in words:
        while _columns(line) + _columns(word.rstrip()) > (rest if lines else first):
            if not line.strip():  # no separator in sight: broken where the line ends
                room = (rest if lines else first) - _columns(line)
                line, word = line + word[:room], word[room:]
            lines.append(line.rstrip())
            line = ""
        line += word
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def _columns(text: str) -> int:
    return len(click.unstyle(text))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Aligned columns that fit the terminal; those whose cells are all numbers are aligned right, empty ones left out.

    The widest columns give way first, and their cells go on in further lines. Into a pipe or a file every row is
    one line.
    """
    every = [list(map(str, row)) for row in rows]
    columns = [one for one in zip(header, *every, strict=True) if any(one[1:]) or not every]
    header, *cells = zip(*columns, strict=True)
    widths = [max(map(_columns, column)) for column in columns]
    right = [len(column) > 1 and all(c.replace(",", "").isdecimal() for c in column[1:]) for column in columns]
    width = terminal_width()
    if width is not None:
        room = width - len(_INDENT) - 2 * (len(widths) - 1)
        widths = narrowed(widths, room)
        if sum(widths) > room:
            return [line for row in cells for line in _record(header, row, width)]

    def lines(row: Sequence[str]) -> list[str]:
        parts = [wrap(cell, w) if _columns(cell) > w else [cell] for cell, w in zip(row, widths, strict=True)]
        height = max(map(len, parts), default=0)
        return [
            (_INDENT + "  ".join(_padded(p[i] if i < len(p) else "", w, r)
                                for p, w, r in zip(parts, widths, right, strict=True))).rstrip()
            for i in range(height)
        ]  # fmt: skip

    return [*(click.style(line, dim=True) for line in lines(header)), *(line for row in cells for line in lines(row))]


def _record(header: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """A row of a table that is too wide: its first cell, and below it the others by name."""
    first, *rest = row
    told = "; ".join(f"{name} {cell}" for name, cell in zip(header[1:], rest, strict=True) if cell)
    lines = [_INDENT + line for line in wrap(first, width - len(_INDENT))]
    return [*lines, *(_INDENT + "    " + line for line in wrap(told, width - len(_INDENT) - 4))]


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if right else text + space


def narrowed(widths: Sequence[int], room: int) -> list[int]:
    """Widths of columns that fit so many columns of a terminal: the widest give way, names in the first one last.

    >>> narrowed([40, 5, 30], 55), narrowed([20, 5, 70], 55)
    ([27, 5, 23], [20, 5, 30])
    """
    found = list(widths)
    while sum(found) > room and max(found) > _LEAST:
        give = found[1:] if found[0] <= room // 2 and max(found[1:], default=0) > _LEAST else found
        found[len(found) - len(give) + give.index(max(give))] -= 1
    return found
