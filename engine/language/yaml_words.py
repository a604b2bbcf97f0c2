"""What is wrong with text that is not YAML, in words for its author: the parser's own words are about parsing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import yaml

from engine.errors import EngineError, Place

_KEY = re.compile(r"(\s*(?:- +)?\{?\s*)([\w.\"'*-]+)\s*:(?:\s+(.*))?")
_RULE = re.compile(r"\s*- +(?:\{\s*)?(?:name|source): *[\"']?([^\"',}\s#]+)")
_OPENS = "{[*&!%@`|>"  # a text that begins with one of these is read as something else
_CLOSES = {"[": "]", "{": "}"}
_MOST_READ, _LONGEST_TEXT = 400, 100_000  # entries that are read one by one, and characters of a file whose entries are
_LONGEST = 200  # characters of a line


def unreadable(error: yaml.YAMLError, text: str, name: str) -> EngineError:
    """E101 for what the parser could not read, at the line to correct."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return _not_allowed(error, text, name)
    lines = text.split("\n")
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return EngineError("E101", f"the YAML cannot be read: {error.problem or 'not YAML'}", place=Place(name))
    row, column = min(mark.line, len(lines) - 1), mark.column
    words, expected, fix = "", None, ""
    context = [] if error.context_mark is None else [error.context_mark.line]
    before = _before(lines, row)
    if before is not None and lines[before].lstrip().startswith("//"):
        context.append(before)
    for line in dict.fromkeys([row, *context]):
        found = _of_line(lines, min(line, len(lines) - 1))
        if found is not None:
            (words, expected, fix), row, column = found, line, len(lines[line]) - len(lines[line].lstrip())
            break
    else:
        if "could not find expected ':'" in str(error.problem) and error.context_mark is not None:
            row, column = error.context_mark.line, error.context_mark.column
            words, expected, fix = "a line has no `:` between key and value", "key: value", "Write the `:` and a space."
        elif "nesting depth" in str(error.problem):  # libyaml since 0.2.6 looks ahead, a thousand levels at most
            words, fix = "nested deeper than a thousand levels", "A mapping needs about six levels."
        elif (bracket := _bracket(lines, error.context_mark)) in _CLOSES and error.context_mark is not None:
            row, column = error.context_mark.line, error.context_mark.column
            words = f"the YAML cannot be read: a bracket `{bracket}` is not closed, or a comma is missing after it"
            fix = f"Close it with {_CLOSES[bracket]}; put a text with brackets in quotes."
        elif before is not None and _is_indented_otherwise(lines, row, before):
            depth, wanted = _depth(lines[row]), _depth(lines[before])
            words = f"the line is indented by {depth} spaces, the key above it by {wanted}"
            expected = f"{wanted} spaces"
            fix = "Keys that belong together begin in the same column."
        else:
            words = f"the YAML cannot be read here: {error.problem or error.context}"
            fix = (
                "Check brackets and quotes in this line and the one above; a text with `: ` or ` #` in it needs quotes."
            )
    return EngineError(
        "E101",
        words + in_rule(lines, row),
        place=Place(name, row + 1, column + 1),
        got=lines[row].strip().replace("\t", " ")[:_LONGEST] or None,
        expected=expected,
        fix=fix,
    )


def _bracket(lines: list[str], mark: yaml.Mark | None) -> str:
    """The bracket inside which an error is, as far as the parser says."""
    return lines[mark.line][mark.column : mark.column + 1] if mark is not None and mark.line < len(lines) else ""


def _not_allowed(error: yaml.YAMLError, text: str, name: str) -> EngineError:
    position = getattr(error, "position", None)
    place = Place(name)
    if isinstance(position, int):
        before = text[:position]
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
    return EngineError(
        "E101",
        "the YAML cannot be read: a character that YAML does not allow",
        place=place,
        got=str(error).split("\n")[0],
        fix="Remove control characters; write them as escapes inside double quotes.",
    )


def _of_line(lines: list[str], row: int) -> tuple[str, str | None, str] | None:
    """What is wrong with a line that shows in the line itself: message, what was expected, what to do."""
    line = lines[row]
    if "\t" in line[: len(line) - len(line.lstrip())]:
        before = None if line.lstrip().startswith("- ") else _before(lines, row)
        depth = 0 if before is None else _depth(lines[before])
        told = f"Write {depth} spaces in its place, as the line above has." if depth else "Write spaces in its place."
        return "the line is indented with a tab", "spaces", told
    if line.lstrip().startswith("//"):
        return "a comment begins with `#`, not with `//`", None, "Write `#`."
    found = _KEY.fullmatch(line)
    value = (found[3] or "").strip() if found is not None else ""
    if value[:1] in ("{", "[") and not value.startswith("{{"):
        return _of_flow(value)
    if value[:1] and value[0] in _OPENS and not re.fullmatch("[|>].?", value):  # not a text in the next lines
        quoted = value.split(" #")[0].strip().replace("\\", "\\\\").replace('"', '\\"')
        return (
            f"the text begins with `{value[0]}`, which means something else in YAML",
            f'{found[2] if found else ""}: "{quoted}"',
            "Put the text in quotes.",
        )
    if ": " in value and value[0] not in "\"'#":
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return (
            "the text has a `:` in it, which ends a key in YAML",
            f'{found[2] if found else ""}: "{quoted}"',
            "Put the text in quotes.",
        )
    for quote in "\"'":
        if value.startswith(quote) and value.count(quote) % 2:
            return f"a quote `{quote}` is not closed", None, f"Close it with {quote} at the end of the text."
    return None


def _of_flow(value: str) -> tuple[str, str | None, str] | None:
    """What is wrong with a value in brackets."""
    try:
        list(yaml.parse(value))
        return None
    except yaml.YAMLError:
        pass
    if value.count('"') % 2:
        return 'a quote `"` is not closed', None, 'Close it with " at the end of the text.'
    for opening, closing in ("{}", "[]"):
        if value.count(opening) > value.count(closing):
            return f"a `{opening}` is not closed", None, f"Close it with `{closing}`."
        if value.count(opening) < value.count(closing):
            return f"there is a `{closing}` too many", None, "Remove it, or put the text that it belongs to in quotes."
    for key, text in re.findall(r"""([\w.-]+): +([^\s,"'{}\[\]][^,"'{}\[\]]*)""", value):
        for sign, does in ((": ", "ends a key"), (" #", "begins a comment")):
            if sign in text:
                told = f"the text of `{key}` has a `{sign.strip()}` in it, which {does} in YAML"
                return told, f'{key}: "{text}"', "Put it in quotes."
    return None


def _is_indented_otherwise(lines: list[str], row: int, before: int) -> bool:
    """Whether a key begins in another column than the key above it, which does not contain it."""
    if not _KEY.fullmatch(lines[row]):
        return False
    depth = _depth(lines[row])
    found = _KEY.fullmatch(lines[before])
    opens = found is not None and not (found[3] or "").split("#")[0].strip()
    return depth != _depth(lines[before]) and not (opens and depth > _depth(lines[before]))


def _depth(line: str) -> int:
    """The column of a line's key; in a list it begins after the dash."""
    found = _KEY.match(line)
    return len(found[1]) if found is not None else len(line) - len(line.lstrip())


def _before(lines: list[str], row: int) -> int | None:
    """The line above that says something."""
    return next((i for i in range(row - 1, -1, -1) if lines[i].strip() and not lines[i].lstrip().startswith("#")), None)


def wrong_entries(text: str, wrong: Callable[[str], EngineError | None]) -> list[EngineError]:
    """What is wrong in each entry of a file, read by itself, and in the entries inside such an entry.

    `wrong` says what is wrong with some lines of the text, in which those above are empty lines.
    """
    lines = text.split("\n") if len(text) <= _LONGEST_TEXT else []
    left = iter(range(_MOST_READ))

    def wrong_in(start: int, stop: int) -> EngineError | None:
        return None if next(left, None) is None else wrong("\n" * start + "\n".join(lines[start:stop]))

    def of(start: int, stop: int, *, below: bool) -> Iterator[EngineError]:
        listed = [*_entries(lines, start, stop), stop]
        read = start
        for number, (first, end) in enumerate(pairwise(listed)):
            error = wrong_in(first, end) if first >= read else None
            if error is None:
                continue
            longer = listed[min(number + 2, len(listed) - 1)]
            if wrong_in(first, longer) is None:
                read = longer  # brackets or a text that continue on the next line
            else:
                yield from ([*of(first + 1, end, below=False)] if below else []) or [error]

    return list(of(0, len(lines), below=True))


def _entries(lines: list[str], start: int, stop: int) -> list[int]:
    """The lines where entries begin, by the column of the first.

    >>> _entries(["dims:", "  a: 1", "", "  b: [1,", "    2]", "rules: []"], 0, 6)
    [0, 5]
    >>> _entries(["dims:", "  a: 1", "", "  b: [1,", "    2]", "rules: []"], 1, 5)
    [1, 3]
    """
    said = [i for i in range(start, stop) if lines[i].strip() and not lines[i].lstrip().startswith("#")]
    columns = [len(lines[i]) - len(lines[i].lstrip(" ")) for i in said]
    return [i for i, column in zip(said, columns, strict=True) if column == columns[0]]


def in_rule(lines: list[str], row: int) -> str:
    """The rule that a line stands in, as words to append; nothing elsewhere.

    >>> in_rule(["rules:", "  - name: qkv", "    split: heads"], 2)
    ', in rule `qkv`'
    """
    for i in range(row, -1, -1):
        found = _RULE.match(lines[i])
        if found is not None:
            return f", in rule `{found[1]}`"
        if i < row and re.match(r"\w", lines[i]):
            break  # a key of the file itself
    return ""
