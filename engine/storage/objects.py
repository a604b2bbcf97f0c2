"""Bucket prefixes, and folders behind HTTP, as stores; through obstore, which the extra `store` installs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from engine.errors import EngineError, Place
from engine.storage.client import T, asked, client_of, library, refused, requests
from engine.storage.object_files import ObjectBytes, ObjectRanges
from engine.storage.sources import WINDOW
from engine.storage.store import (
    OpenFile,
    Positioned,
    Ranges,
    State,
    Store,
    check_state,
    ends_early,
    has_changed,
    no_pointer,
    unreadable,
)

SCHEMES = ("s3", "gs", "az", "http", "https")
LOCK = ".engine-lock"  # a run keeps this object at its output while it writes; no listing shows it
MARK = "enginework"  # the attribute of objects that the engine wrote; says what they were made from


@dataclass(frozen=True, slots=True)
class ObjectState:
    """The state of an object as a server reports it; `modified` if it gives no ETag."""

    size: int
    etag: str | None
    version: str | None = None
    modified: str | None = None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> ObjectState:
        etag = meta["e_tag"]
        if etag and not etag.endswith('"'):  # as in Azure's listings, unlike its other responses
            etag = f'"{etag}"'
        return cls(meta["size"], etag, meta["version"], None if etag else meta["last_modified"].isoformat())

    @property
    def links(self) -> None:
        return None

    def told(self) -> Mapping[str, Any]:
        told = {"etag": self.etag, "version": self.version, "last_modified": self.modified}
        return {name: value for name, value in told.items() if value is not None}

    def unlike(self, other: ObjectState) -> tuple[str, str]:
        def shown(one: ObjectState) -> str:
            return ", ".join((f"{one.size} bytes", *(f"{name} {value}" for name, value in one.told().items())))

        return shown(self), shown(other)


@dataclass(frozen=True, slots=True)
class ObjectStore(Store):
    """Objects whose names begin with a prefix, or files below a URL.

    Attributes:
        options: obstore options, as name and value; they may hold secrets and are never shown.
        block: bytes that are read ahead at once.
    """

    url: str
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    block: int = WINDOW
    _listed: dict[str, dict[str, State]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def client(self) -> Any:
        return client_of(self.url, self.options)

    @property
    def listable(self) -> bool:
        return not self.url.startswith("http")

    def place(self, name: str = "") -> str:
        shown = self.url
        if not self.listable:
            parts = urlsplit(self.url)
            shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return f"{shown.rstrip('/')}/{name}" if name else shown

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        below = f"{inside}/" if inside else ""
        if not self.listable:
            linked = self._linked(inside)
            files = [name for name in linked if not name.endswith("/")]
            states = self.states([below + name for name in files])
            return {name.rstrip("/"): states.get(below + name) for name in linked}
        found = self._asked(inside, lambda: library().list_with_delimiter(self.client, inside or None))
        listed = self._listed[inside] = {one["path"]: ObjectState.of(one) for one in found["objects"]}
        entries: dict[str, State | None] = dict.fromkeys(one.rpartition("/")[2] for one in found["common_prefixes"])
        entries |= {name.removeprefix(below): state for name, state in listed.items()}
        for hidden in ("", LOCK):
            entries.pop(hidden, None)
        if not entries:
            raise FileNotFoundError(errno.ENOENT, "nothing is there", self.place(inside))
        return entries

    def names(self, inside: str = "") -> list[str]:
        if self.listable:
            return sorted(self.entries(inside))
        return sorted(name.rstrip("/") for name in self._linked(inside))

    def inside(self, name: str) -> ObjectStore:
        return replace(self, url=f"{self.url}/{name}", _listed={})

    def _linked(self, inside: str) -> list[str]:
        """The links on a web server's page of a folder; folders end with a slash."""
        page = self._asked(inside, lambda: library().get(self.client, inside).bytes().to_bytes())
        return linked_names(page, self.place(inside))

    def _look(self, name: str) -> State | None:
        """The state of an object, from the listing if there was one; None when it does not exist."""
        inside = name.rpartition("/")[0]
        listed = self._listed.get(inside, {})
        try:
            if self.listable and inside not in self._listed:
                self.names(inside)
                listed = self._listed[inside]
            elif not self.listable and name not in listed:
                found = self._asked(name, lambda: library().head(self.client, name))
                listed = self._listed.setdefault(inside, {})
                listed[name] = ObjectState.of(found)
        except FileNotFoundError:
            return None
        return listed.get(name)

    def has(self, name: str) -> bool:
        return self._look(name) is not None

    def open(self, name: str) -> OpenFile:
        state = self._found(name, self._look(name))
        found = ObjectBytes(partial(self.get, name, state), state.size)
        return no_pointer(OpenFile(Positioned(state.size, found.read), state, found.at_hand), self.place(name))

    def ranges(self, name: str, state: State | None) -> Ranges:
        found = self._found(name, state or self._look(name))
        return ObjectRanges(partial(self.get, name, found), found.size)

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        fresh = ObjectStore(self.url, self.options)
        looks = map(fresh._look, names) if self.listable else requests().map(fresh._look, names)
        return {name: self._found(name, state) for name, state in zip(names, looks, strict=True)}

    def _found(self, name: str, state: State | None) -> State:
        if state is None:
            raise unreadable(self.place(name), "no such object")
        return state

    def write(self, name: str, data: bytes, work: str = "", *, new: bool = False) -> bool:
        """Put an object; False when it should be new and another exists, E403 when it cannot be put.

        One that should be new and has these bytes then is taken for its own: the response may have been lost.
        """
        from obstore.exceptions import AlreadyExistsError

        try:
            kept = {MARK: work} if work else None
            library().put(self.client, name, data, attributes=kept, mode="create" if new else "overwrite")
            return True
        except (AlreadyExistsError, FileExistsError):
            return self.content(name) == data
        except Exception as error:  # obstore's own kinds, and OSError
            with suppress(EngineError):
                if new and self.content(name) == data:
                    return True
            raise refused(self.place(name), str(error), writing=True) from error

    def delete(self, name: str) -> None:
        try:
            library().delete(self.client, name)
        except FileNotFoundError:
            return
        except Exception as error:  # obstore's own kinds, and OSError
            raise refused(self.place(name), str(error), writing=True) from error

    def content(self, name: str) -> bytes | None:
        """The current bytes of a small object; None when it does not exist."""
        try:
            data: bytes = self._asked(name, lambda: library().get(self.client, name).bytes().to_bytes())
        except FileNotFoundError:
            return None
        return data

    def attribute(self, name: str, key: str) -> str | None:
        """An attribute of an object, by name."""
        options: dict[str, Any] = {"head": True}
        try:
            found: Any = self._asked(name, lambda: library().get(self.client, name, options=options).attributes)
        except FileNotFoundError:
            return None
        value: str | None = found.get(key)
        return value

    def get(self, name: str, state: State, start: int, end: int) -> memoryview:
        """Some bytes of an object; E405 when its state has changed."""
        wanted = state if isinstance(state, ObjectState) else None
        options: dict[str, Any] = {"range": (start, end)}
        if wanted is not None and wanted.etag and not wanted.etag.startswith("W/"):
            options["if_match"] = wanted.etag

        def ask() -> tuple[Any, memoryview]:
            found = library().get(self.client, name, options=options)
            return found.meta, memoryview(found.bytes())

        try:
            meta, data = self._asked(name, ask)
        except FileNotFoundError as error:
            raise unreadable(self.place(name), "no such object") from error
        except PermissionError:
            told = ", ".join(f"{fact} {value}" for fact, value in state.told().items())
            raise has_changed(self.place(name), "another ETag", told) from None
        check_state(name, ObjectState.of(meta), wanted)
        if len(data) > end - start:
            raise unreadable(self.place(name), f"the server sent more bytes than asked for: {len(data)}")
        if len(data) < end - start:
            raise ends_early(name, start + len(data), end)
        return data

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        return asked(self.place(name), ask)


_MOST = 16 << 20  # bytes of a page


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def linked_names(page: bytes, place: str) -> list[str]:
    """Names in a folder, from a web server's page of it: HTTP has no other listing. Folders end with a slash.

    >>> linked_names(b'<a href="../">up</a> <a href="model_tp0_pp0.pt">x</a> <a href="a/">a</a>', "")
    ['a/', 'model_tp0_pp0.pt']

    Raises:
        EngineError: E304 when the page links to nothing in it.
    """
    links = _Links()
    links.feed(page[:_MOST].decode("utf-8", "replace"))
    base = place.rstrip("/") + "/"
    here = urlsplit(base)
    names: set[str] = set()
    for link in links.found:
        try:
            parts = urlsplit(urljoin(base, link))
        except ValueError:  # such as half an address
            continue
        name = unquote(parts.path).removeprefix(unquote(here.path))
        plain = name.removesuffix("/")
        same = (parts.scheme, parts.netloc, parts.query) == (here.scheme, here.netloc, "")
        if same and plain not in ("", ".", "..") and "/" not in plain:
            names.add(name)
    names -= {f"{name}/" for name in names}  # as in a bucket, where a name may be both
    if not names:
        raise EngineError(
            "E304",
            "the server does not list this folder",
            place=Place(place),
            expected="a page with links to the files in it, as most file servers have",
            fix="Give a weights file or its index instead, copy the folder, or use a server that lists it.",
        )
    return sorted(names)
