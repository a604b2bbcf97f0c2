"""Prefixes of buckets, and folders behind HTTP, as stores; through obstore, which the extra `store` installs."""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from engine.errors import EngineError, Place
from engine.storage.coalesce import Range, split
from engine.storage.listing import linked_names
from engine.storage.replacing import exists
from engine.storage.store import Fetched, OpenFile, Ranges, Sinks, State, check_state, ends_early, unreadable

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "http", "https")
WINDOW = 16 << 20  # bytes of a tensor that are read ahead at once
ENDS = 128 << 10  # bytes at either end of a file, which hold the headers of most
_REQUESTS = 16  # at the same time
_LARGEST = 8 << 20  # bytes of a request
_FORWARD = 8 << 20  # bytes read at once of a file that is read from begin to end
_LEAST_MORE, _MOST_MORE = 64 << 10, 1 << 20  # bytes that are read ahead where nobody said what comes next
_TRIES = 4  # of a request whose answer was cut off; obstore itself tries again what failed before
_CLIENT = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout", "user_agent")


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What a server tells of an object; `modified` where it gives no ETag."""

    size: int
    etag: str | None
    version: str | None = None
    modified: str | None = None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> ObjectState:
        etag = meta["e_tag"]
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
class ObjectStore:
    """Objects whose names begin with a prefix, or files below a URL.

    Attributes:
        options: of obstore, as name and value; they may hold secrets and are never shown.
        block: bytes that are read ahead at once.
    """

    url: str
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    block: int = WINDOW
    _listed: dict[str, dict[str, State]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path | None:
        return None

    @property
    def positioned(self) -> bool:
        return False

    @property
    def buffer(self) -> int:
        return 0

    @property
    def client(self) -> Any:
        return client_of(self.url, self.options)

    @property
    def listable(self) -> bool:
        return not self.url.startswith("http")

    def place(self, name: str = "") -> str:
        parts = urlsplit(self.url)
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        return f"{shown.rstrip('/')}/{name}" if name else shown

    def names(self, inside: str = "") -> list[str]:
        obstore = library()

        if not self.listable:
            page = self._asked(inside, lambda: obstore.get(self.client, inside).bytes().to_bytes())
            return linked_names(page, self.place(inside))
        found = self._asked(inside, lambda: obstore.list_with_delimiter(self.client, inside or None))
        listed = self._listed[inside] = {one["path"]: ObjectState.of(one) for one in found["objects"]}
        names = sorted({name.rpartition("/")[2] for name in (*listed, *found["common_prefixes"])} - {""})
        if not names:
            raise FileNotFoundError(errno.ENOENT, "nothing is there", self.place(inside))
        return names

    def _look(self, name: str) -> State | None:
        """The state of an object, as it was listed; None when it is not there."""
        obstore = library()

        inside = name.rpartition("/")[0]
        listed = self._listed.get(inside, {})
        try:
            if self.listable and inside not in self._listed:
                self.names(inside)
                listed = self._listed[inside]
            elif not self.listable and name not in listed:
                found = self._asked(name, lambda: obstore.head(self.client, name))
                listed = self._listed.setdefault(inside, {})
                listed[name] = ObjectState.of(found)
        except FileNotFoundError:
            return None
        return listed.get(name)

    def has(self, name: str) -> bool:
        return self._look(name) is not None

    def open(self, name: str) -> OpenFile:
        state = self._look(name)
        if state is None:
            raise unreadable(self.place(name), "no such object")
        raw = _Object(self, name, state)
        return OpenFile(raw, state, raw.at_hand)

    def ranges(self, name: str, state: State | None) -> Ranges:
        found = state or self._look(name)
        if found is None:
            raise unreadable(self.place(name), "no such object")
        return ObjectRanges(self, name, found)

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        fresh = ObjectStore(self.url, self.options)
        looks = map(fresh._look, names) if self.listable else requests().map(fresh._look, names)
        found = dict(zip(names, looks, strict=True))
        for name, state in found.items():
            if state is None:
                raise unreadable(self.place(name), "no such object")
        return {name: state for name, state in found.items() if state is not None}

    def sinks(self, names: Sequence[str]) -> Sinks:
        raise NotImplementedError("files are written through `uploads`")

    def put(self, name: str, data: bytes) -> None:
        self.write(name, data)

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Put an object; E401 when it should be new and is there, E403 when it cannot be put."""
        obstore = library()
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self.client, name, data, mode="create" if new else "overwrite")
        except (AlreadyExistsError, FileExistsError) as error:
            raise exists(self.place(name), "Choose another --out.", "another run's, written in the meantime") from error
        except Exception as error:  # obstore's own kinds, and OSError
            raise refused(self.place(name), str(error), writing=True) from error

    def delete(self, name: str) -> None:
        obstore = library()

        try:
            obstore.delete(self.client, name)
        except FileNotFoundError:
            return
        except Exception as error:  # obstore's own kinds, and OSError
            raise refused(self.place(name), str(error), writing=True) from error

    def attribute(self, name: str, key: str) -> str | None:
        """What was kept with an object under a name."""
        obstore = library()

        options: dict[str, Any] = {"head": True}
        found: Any = self._asked(name, lambda: obstore.get(self.client, name, options=options).attributes)
        return None if found is None else found.get(key)

    def get(self, name: str, start: int, end: int, state: State) -> memoryview:
        """Some bytes of an object; E405 when it is not in that state any more."""
        obstore = library()

        wanted = state if isinstance(state, ObjectState) else None
        options: dict[str, Any] = {"range": (start, end)}
        if wanted is not None and wanted.etag and not wanted.etag.startswith("W/"):
            options["if_match"] = wanted.etag

        def ask() -> tuple[Any, memoryview]:
            found = obstore.get(self.client, name, options=options)
            return found.meta, memoryview(found.bytes())

        try:
            meta, data = self._asked(name, ask)
        except FileNotFoundError as error:
            raise unreadable(self.place(name), "no such object") from error
        except PermissionError:
            raise _changed(self.place(name), state) from None
        check_state(name, ObjectState.of(meta), wanted)
        if len(data) != end - start:
            raise ends_early(name, start + len(data), end)
        return data

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        """What a request gives; FileNotFoundError and PermissionError (a state that is gone) are the caller's.

        A request whose answer is cut off is made again, a few times.
        """
        from obstore import exceptions as known

        for left in reversed(range(_TRIES)):
            try:
                return ask()
            except (FileNotFoundError, PermissionError):
                raise
            except known.PreconditionError as error:
                raise PermissionError from error
            except known.NotFoundError as error:
                raise FileNotFoundError(str(error)) from error
            except known.BaseError as error:
                told = str(error)
                if left and _cut_off(told):
                    time.sleep(0.2 * 2 ** (_TRIES - left))
                    continue
                raise refused(self.place(name), told) from error
        raise AssertionError("unreachable")


def _cut_off(told: str) -> bool:
    return any(word in told for word in ("kind: Body", "kind: Decode", "IncompleteMessage", "UnexpectedEof"))


def refused(place: str, told: str, *, writing: bool = False) -> EngineError:
    """What a server, or the way to it, says, as an error: E304 for no such bucket, else E305, or E403 when writing."""
    code, message, fix = (
        "E305",
        "a store cannot be read or written",
        "Check the address and the network.",
    )
    if "NoSuchBucket" in told or "ContainerNotFound" in told:
        code, message, fix = "E304", "there is no such bucket", "Check its name, and the endpoint."
    elif any(word in told for word in ("403 Forbidden", "401 Unauthorized", "PermissionDenied", "Unauthenticated")):
        message = "a store refuses access"
        fix = "Check the credentials: those of the environment, or --store-option NAME=VALUE."
    elif "credential" in told.lower() or "metadata" in told.lower():
        message = "there are no credentials for a store"
        fix = "Set them as its provider says, like AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in --store-option."
    code = "E403" if writing else code
    return EngineError(code, message, place=Place(place), got=_short(told), fix=fix)


def _short(told: str) -> str:
    """What a server says, in a line: its code and message if it gives them."""
    found = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", told, re.DOTALL)
    return f"{found[1]}: {found[2]}"[:300] if found else " ".join(told.split("Debug source")[0].split())[:300]


def _changed(place: str, state: State) -> EngineError:
    return EngineError(
        "E405",
        "a source file changed since it was planned",
        place=Place(place),
        got="another ETag",
        expected=", ".join(f"{name} {value}" for name, value in state.told().items()),
        fix="Wait until training has finished writing the checkpoint and nothing else touches it, then run again.",
    )


def library() -> Any:
    """The module obstore; E001 without the extra that brings it."""
    try:
        import obstore
    except ImportError:
        raise EngineError(
            "E001",
            "URLs need the extra `store`",
            got="no module obstore",
            fix="Install it: pip install 'internlm-engine[store]'.",
        ) from None
    return obstore


@cache
def client_of(url: str, options: tuple[tuple[str, str], ...]) -> Any:
    """The client of a store; E001 without the extra, and for an address or option that it does not know."""
    from datetime import timedelta

    library()
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    given: dict[str, Any] = {name: value for name, value in options if name not in _CLIENT}
    client: dict[str, Any] = {"timeout": "60s", "connect_timeout": "10s"}
    client |= {name: value for name, value in options if name in _CLIENT}
    endpoints = [value for name, value in options if "endpoint" in name]
    endpoints += [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")]
    if any(one.startswith("http://") for one in (url, *endpoints)):  # which only the user can have said
        client.setdefault("allow_http", "true")
    client = {name: value == "true" if name.startswith("allow") else value for name, value in client.items()}
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=8), "base": 2}
    retry = {"max_retries": 6, "backoff": backoff, "retry_timeout": timedelta(seconds=120)}
    try:
        return from_url(url, client_options=client, retry_config=retry, **given)
    except (BaseError, ValueError, TypeError) as error:
        raise EngineError(
            "E001",
            "this URL is not a store",
            place=Place(url.partition("?")[0]),
            got=_short(str(error)),
            fix="Write it like s3://bucket/prefix, and options as obstore names them, such as region=eu-west-1.",
        ) from None


@cache
def requests() -> ThreadPoolExecutor:
    """The threads that wait for answers."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="request")


class _Object(io.RawIOBase):
    """An object read from any position: its ends at once, the rest as it is asked for."""

    def __init__(self, store: ObjectStore, name: str, state: State) -> None:
        self._store, self._name, self._state, self._size = store, name, state, state.size
        self._at = self._end = 0  # where reading is, and where the last bytes that were fetched end
        self._ahead = ENDS
        tail = max(self._size - ENDS, 0)
        wanted = [(0, self._size)] if tail <= ENDS else [(0, ENDS), (tail, self._size)]
        asked = [requests().submit(store.get, name, start, end, state) for start, end in wanted if end > start]
        self._kept = [(start, one.result()) for (start, _), one in zip(wanted, asked, strict=False)]

    def at_hand(self, start: int, end: int) -> bool:
        return any(at <= start and end <= at + len(data) for at, data in self._kept)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError("a position before the file's begin")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), max(self._size - self._at, 0))
        if not wanted:
            return 0
        found = next(((at, data) for at, data in self._kept if at <= self._at < at + len(data)), None)
        if found is None:
            found = self._fetch(wanted)
        at, data = found
        some = data[self._at - at : self._at - at + wanted]
        target[: len(some)] = some
        self._at += len(some)
        return len(some)

    def _fetch(self, wanted: int) -> tuple[int, memoryview]:
        self._ahead = min(2 * self._ahead, _FORWARD) if self._at == self._end else ENDS
        self._end = min(self._at + max(wanted, self._ahead), self._size)
        found = self._at, self._store.get(self._name, self._at, self._end, self._state)
        self._kept = [*self._kept[:2], found]
        return found


class ObjectRanges:
    """An object read by position, of which some bytes may have been fetched before. Belongs to one thread."""

    descriptor = None

    def __init__(self, store: ObjectStore, name: str, state: State) -> None:
        self._store, self._name, self._state = store, name, state
        self._held: list[tuple[int, memoryview]] = []
        self._more = 0  # bytes to read beyond what is asked for, while reading goes on in order

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        return [
            (start, requests().submit(self._store.get, self._name, start, end, self._state))
            for start, end in split(ranges, _LARGEST)
        ]

    def hold(self, fetched: Fetched) -> None:
        self._held = [(start, one.result()) for start, one in fetched]

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            self._fill(offset, part)
            offset += len(part)

    def _fill(self, offset: int, part: memoryview) -> None:
        done = 0
        for start, data in self._held:  # in order
            at = offset + done - start
            if 0 <= at < len(data):
                some = data[at : at + len(part) - done]
                part[done : done + len(some)] = some
                done += len(some)
                if done == len(part):
                    return
        if done < len(part):
            begin, end = offset + done, offset + len(part)
            in_order = bool(self._held) and begin == self._held[-1][0] + len(self._held[-1][1])
            self._more = min(max(4 * self._more, _LEAST_MORE), _MOST_MORE) if in_order else 0
            data = self._store.get(self._name, begin, max(end, min(end + self._more, self._state.size)), self._state)
            part[done:] = data[: end - begin]
            self._held = [(begin, data)]

    def close(self) -> None:
        self._held = []
