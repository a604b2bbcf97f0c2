"""YAML text → plain data in which every key and value knows its file, line and column.

The C parser delivers events; our own code walks them, to avoid the traps of YAML 1.1:
`on`, `yes` and `12:30` are strings, `1e-5` is a number, `012` is refused, duplicate keys are
errors, and anchors, merge keys and tags do not exist. Depth is limited as the events arrive:
the parser's own composer crashes the process at 200,000 brackets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from engine.errors import EngineError, Errors, Place
from engine.language.documents import At, Document, Items, Table
from engine.language.yaml_words import in_rule, unreadable, wrong_entries

MAX_BYTES = 1 << 20
MAX_DEPTH = 64

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "": None}


def content_of(path: Path, name: str) -> bytes:
    """The current content of a file, at most one byte more than is allowed; E101 when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EngineError(
            "E101",
            "the file cannot be read",
            place=Place(name),
            got=error.strerror or str(error),
            fix="Check the path and its permissions.",
        ) from None


def load_yaml(path: Path) -> Document:
    """Read one YAML file, by a path relative to the current folder; E101 as for `load_bytes`."""
    try:
        name = str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        name = str(path)
    return load_bytes(content_of(path, name), name)


def load_bytes(raw: bytes, name: str) -> Document:
    """The data of a YAML file's content; E101 with file, line and column when it cannot be read."""
    if len(raw) > MAX_BYTES:
        raise _too_large(name)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise EngineError(
            "E101",
            "the file is not UTF-8 text",
            place=place,
            got=f"byte 0x{raw[error.start]:02x}",
            expected="UTF-8",
            fix="Save the file as UTF-8; in Python: open(path, encoding='utf-8').",
        ) from None
    return _parse(text, name)


def load_text(text: str, name: str = "text.yaml") -> Document:
    """As `load_bytes`, for text.

    >>> document = load_text("dims: {half: 2}", "x.yaml")
    >>> document.data, str(document.place("dims", "half")), str(document.value_place("dims", "half"))
    ({'dims': {'half': 2}}, 'x.yaml:1:8', 'x.yaml:1:14')
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _too_large(name)
    return _parse(text, name)


def _too_large(name: str) -> EngineError:
    return EngineError(
        "E101",
        "the file is too large",
        place=Place(name),
        got=f"more than {MAX_BYTES} bytes",
        expected=f"at most {MAX_BYTES} bytes",
        fix="A mapping is a few hundred lines; is this another file?",
    )


def _parse(text: str, name: str) -> Document:
    """Parse a file's text; reports all errors in its entries at once, if the entries can be separated."""
    text = text.removeprefix("\ufeff")
    errors = Errors()
    try:
        return _Walk(text, text, name).document()
    except yaml.YAMLError as error:
        errors.found = wrong_entries(text, lambda part: _wrong(part, text, name))
        if len(errors.found) < 2:
            errors.found = [unreadable(error, text, name)]
    except EngineError as error:
        errors.found = [error, *wrong_entries(text, lambda part: _wrong(part, text, name))]
    errors.check()
    raise AssertionError("something is wrong with it")


def _wrong(part: str, text: str, name: str) -> EngineError | None:
    """What is wrong with some lines of a text."""
    try:
        _Walk(part, text, name).entry()
    except yaml.YAMLError as error:
        return unreadable(error, text, name)
    except EngineError as error:
        return error
    return None


def _line(text: str, line: int) -> str | None:
    lines = text.splitlines()
    return lines[line].strip()[:200] if line < len(lines) and lines[line].strip() else None


class _Walk:
    """One pass over the parser's events."""

    def __init__(self, text: str, whole: str, name: str) -> None:
        """Parse a text, which may be a few lines of a file with all others left empty."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise EngineError("E101", "the text is not UTF-8", place=Place(name), got="a lone surrogate") from None
        self.loader = yaml.CSafeLoader(text)
        self.name = name
        self.text = whole

    def entry(self) -> tuple[Any, Place] | None:
        """A node that may be an entry of a file, and its place; None if there is none."""
        self._next(yaml.StreamStartEvent)
        if isinstance(self._peek(), yaml.StreamEndEvent):
            return None
        self._next(yaml.DocumentStartEvent)
        root = self._node(self._next(), 0)
        self._next(yaml.DocumentEndEvent)
        return root

    def document(self) -> Document:
        found = self.entry()
        if found is None:
            raise EngineError(
                "E101", "the file is empty", place=Place(self.name), expected="a mapping of keys to values"
            )
        if not isinstance(self._peek(), yaml.StreamEndEvent):
            self._refuse(self._peek(), "a second document starts here", "Keep one document per file.")
        root, place = found
        if not isinstance(root, dict):
            raise EngineError(
                "E101",
                "the file does not hold keys and values",
                place=place,
                got="a list" if isinstance(root, list) else repr(root)[:80],
                expected="a mapping of keys to values",
            )
        return Document(self.name, root, At(place, place))

    def _peek(self) -> Any:
        return self.loader.peek_event()

    def _next(self, kind: type | None = None) -> Any:
        event = self.loader.get_event()
        if kind is not None and not isinstance(event, kind):
            self._refuse(event, "unexpected content", "Keep one document per file.")
        return event

    def _place(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self.name, mark.line + 1, mark.column + 1)

    def _refuse(self, event: Any, message: str, fix: str) -> NoReturn:
        raise EngineError(
            "E101", message, place=self._place(event), got=_line(self.text, event.start_mark.line), fix=fix
        )

    def _node(self, event: Any, depth: int) -> tuple[Any, Place]:
        """The node that begins with an event, and its place."""
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"aliases (`*{event.anchor}`) are not part of the language", "Write the value out.")
        if event.anchor is not None:
            self._refuse(event, f"anchors (`&{event.anchor}`) are not part of the language", "Write values out.")
        if event.tag is not None:
            self._refuse(event, f"tags (`{event.tag}`) are not part of the language", "Quote the value instead.")
        place = self._place(event)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event), place
        if depth >= MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "A mapping needs about six levels.")
        if isinstance(event, yaml.SequenceStartEvent):
            items = Items()
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                item, at = self._node(event, depth + 1)
                items.at[len(items)] = At(at, at)
                items.append(item)
            return items, place
        entries = Table()
        seen: dict[str, Place] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            word, at = self._node(event, depth + 1)
            key = self._key(event, word)
            if str(key) in seen:
                raise EngineError(
                    "E101",
                    f"key `{key}` occurs twice" + in_rule(self.text.split("\n"), (at.line or 1) - 1),
                    place=at,
                    got=f"`{key}` in line {at.line} and in line {seen[str(key)].line}",
                    expected="each key once",
                    fix="Remove or rename one of them.",
                )
            seen[str(key)] = at
            value, value_at = self._node(self._next(), depth + 1)
            entries.put(key, value, At(at, value_at))
        return entries, place

    def _key(self, event: Any, word: Any) -> str | int:
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and not event.style:
            self._refuse(
                event,
                "merge keys (`<<`) are not part of the language",
                "Write the keys out, or use `extends`.",
            )
        if isinstance(word, dict | list):
            self._refuse(event, "a key is a list or a mapping", "Keys are words; quote a text that starts with { or [.")
        if isinstance(word, str) or type(word) is int:
            return word
        self._refuse(event, f"`{event.value}` is not a word", "Put the key in quotes.")

    def _scalar(self, event: Any) -> Any:
        """The value of a plain scalar; quoted and block scalars are strings."""
        text: str = event.value
        if event.style:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            return int(text)
        if _LEADING_ZERO.fullmatch(text):
            self._refuse(event, f"`{text}` has a leading zero: octal, decimal or text?", f'Write "{text}" for text.')
        if _FLOAT.fullmatch(text):
            return float(text)
        return text
