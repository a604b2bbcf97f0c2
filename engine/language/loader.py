"""YAML text → plain data in which every key and value knows file, line and column.

The C parser delivers events; the walk here is ours, so that the traps of YAML 1.1 stay closed:
`on`, `yes` and `12:30` are strings, `1e-5` is a number, `012` is refused, duplicate keys are
errors, and anchors, merge keys and tags do not exist. Depth is bounded as the events arrive:
the parser's own composer crashes the process at 200,000 brackets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml

from engine.errors import EngineError, Errors, Place
from engine.language.yaml_words import in_rule, unreadable, wrong_entries

MAX_BYTES = 1 << 20
MAX_DEPTH = 64

KeyPath = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "": None}


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place, and the place of the key it stands under."""

    value: Any  # a scalar, dict[str | int, Node] or list[Node]
    place: Place
    key_place: Place | None = None

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
        """Every node below this one with its path, this one first."""
        yield path, self
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.walk((*path, key))
        elif isinstance(self.value, list):
            for index, child in enumerate(self.value):
                yield from child.walk((*path, index))


@dataclass(frozen=True)
class Document:
    """A YAML file: its plain data, and the place of every value (and of every key) by path.

    >>> document = load_text("dims: {half: 2}", "x.yaml")
    >>> document.data, str(document.places["dims", "half"]), str(document.keys["dims", "half"])
    ({'dims': {'half': 2}}, 'x.yaml:1:14', 'x.yaml:1:8')
    """

    path: Path
    root: Node = field(repr=False)

    @cached_property
    def data(self) -> Any:
        return self.root.plain()

    @cached_property
    def places(self) -> dict[KeyPath, Place]:
        return {path: node.place for path, node in self.root.walk()}

    @cached_property
    def keys(self) -> dict[KeyPath, Place]:
        return {path: node.key_place or node.place for path, node in self.root.walk()}


def display(path: Path) -> str:
    """A path as messages show it: relative when it lies below the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(path)


def load_yaml(path: str | os.PathLike[str], shown: str | None = None) -> Document:
    """Read one YAML file; E101 with file (as `shown`), line and column when it cannot be read."""
    path = Path(path)
    name = display(path) if shown is None else shown
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EngineError(
            "E101",
            "the file cannot be read",
            place=Place(name),
            got=error.strerror or str(error),
            fix="Check the path and its permissions.",
        ) from None
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
    return Document(path, _parse(text, name))


def load_text(text: str, name: str = "text.yaml") -> Document:
    """The same for text that is in memory."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _too_large(name)
    return Document(Path(name), _parse(text, name))


def node_of(data: Any, place: Place, key_place: Place | None = None) -> Node:
    """Wrap plain data; every value has the same place."""
    if isinstance(data, dict):
        return Node({key: node_of(value, place, place) for key, value in data.items()}, place, key_place)
    if isinstance(data, list | tuple):
        return Node([node_of(value, place) for value in data], place, key_place)
    return Node(data, place, key_place)


def _too_large(name: str) -> EngineError:
    return EngineError(
        "E101",
        "the file is too large",
        place=Place(name),
        got=f"more than {MAX_BYTES} bytes",
        expected=f"at most {MAX_BYTES} bytes",
        fix="A mapping is a few hundred lines; is this another file?",
    )


def _parse(text: str, name: str) -> Node:
    """The root of a file; all that is wrong in its entries is told at once, where they can be told apart."""
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
        """Of a text, which may be some lines of a whole file, others left empty."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise EngineError("E101", "the text is not UTF-8", place=Place(name), got="a lone surrogate") from None
        self.loader = yaml.CSafeLoader(text)
        self.name = name
        self.text = whole

    def entry(self) -> None:
        """Read what may be an entry of a file."""
        self._next(yaml.StreamStartEvent)
        if not isinstance(self._peek(), yaml.StreamEndEvent):
            self._next(yaml.DocumentStartEvent)
            self._node(0, None)
            self._next(yaml.DocumentEndEvent)

    def document(self) -> Node:
        self._next(yaml.StreamStartEvent)
        if isinstance(self._peek(), yaml.StreamEndEvent):
            raise EngineError(
                "E101", "the file is empty", place=Place(self.name), expected="a mapping of keys to values"
            )
        self._next(yaml.DocumentStartEvent)
        root = self._node(0, None)
        self._next(yaml.DocumentEndEvent)
        if not isinstance(self._peek(), yaml.StreamEndEvent):
            self._refuse(self._peek(), "a second document starts here", "Keep one document per file.")
        if not isinstance(root.value, dict):
            raise EngineError(
                "E101",
                "the file does not hold keys and values",
                place=root.place,
                got="a list" if isinstance(root.value, list) else repr(root.value)[:80],
                expected="a mapping of keys to values",
            )
        return root

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

    def _node(self, depth: int, key_place: Place | None) -> Node:
        event = self._next()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"aliases (`*{event.anchor}`) are not part of the language", "Write the value out.")
        if event.anchor is not None:
            self._refuse(event, f"anchors (`&{event.anchor}`) are not part of the language", "Write values out.")
        if event.tag is not None:
            self._refuse(event, f"tags (`{event.tag}`) are not part of the language", "Quote the value instead.")
        place = self._place(event)
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event), place, key_place)
        if depth >= MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "A mapping needs about six levels.")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(self._peek(), yaml.SequenceEndEvent):
                items.append(self._node(depth + 1, None))
            self._next()
            return Node(items, place, key_place)
        entries: dict[str | int, Node] = {}
        seen: dict[str, Place] = {}
        while not isinstance(self._peek(), yaml.MappingEndEvent):
            key_event = self._peek()
            key_node = self._node(depth + 1, None)
            key = self._key(key_event, key_node)
            if str(key) in seen:
                raise EngineError(
                    "E101",
                    f"key `{key}` occurs twice" + in_rule(self.text.split("\n"), (key_node.place.line or 1) - 1),
                    place=key_node.place,
                    got=f"`{key}` in line {key_node.place.line} and in line {seen[str(key)].line}",
                    expected="each key once",
                    fix="Remove or rename one of them.",
                )
            seen[str(key)] = key_node.place
            entries[key] = self._node(depth + 1, key_node.place)
        self._next()
        return Node(entries, place, key_place)

    def _key(self, event: Any, node: Node) -> str | int:
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and not event.style:
            self._refuse(
                event,
                "merge keys (`<<`) are not part of the language",
                "Write the keys out, or use `extends`.",
            )
        if isinstance(node.value, dict | list):
            self._refuse(event, "a key is a list or a mapping", "Keys are words; quote a text that starts with { or [.")
        if isinstance(node.value, bool | float) or node.value is None:
            self._refuse(event, f"`{event.value}` is not a word", "Put the key in quotes.")
        word: str | int = node.value
        return word

    def _scalar(self, event: Any) -> Any:
        """A plain scalar's value; anything quoted or in block form is a string."""
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
