"""The current revisions of a served model: the steps of a run folder, or one checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from time import monotonic

from engine.checkpoint.grid import NoWeights, OnlyConfiguration
from engine.discover.steps import folders_of
from engine.errors import EngineError, Place
from engine.serve.readers import Once
from engine.serve.virtual import VirtualFolder
from engine.storage.store import Store, walk

MAIN = "main"
_STEP = re.compile(r"(?:.*[^0-9])?0*([0-9]{1,12})")  # a folder whose name ends with the number of a step
_OPEN = 8  # checkpoints whose plans are kept
_REMEMBERED = 256  # refusals
_AGAIN = 5.0  # seconds after which a refused state is planned again: a disk or network may have failed for a moment
_MOST_FILES = 100_000  # files of one step that are examined


@dataclass(frozen=True, slots=True)
class Revision:
    """A step in one state.

    Attributes:
        commit: 40 hexadecimal digits, which change when any of its files does. A copy under another name has others,
            since its files are read from another place.
    """

    name: str
    store: Store
    commit: str


class NoRevision(Exception):
    """Raised when there is no such revision, or its step is not complete; the text says why."""


class Revisions:
    """The steps of a run, listed anew on every call. For any number of threads."""

    def __init__(
        self,
        src: Store,
        make: Callable[[Store], VirtualFolder],
        salt: Callable[[], str],
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Find out whether `src` is a checkpoint or a folder of them.

        Args:
            make: plans a checkpoint; called once for each state of a step, and after a while again if that was refused.
            salt: tells what else determines the bytes now: mapping, settings, versions, files that were given.
            told: called once with a line of text about each state of a step.

        Raises:
            EngineError: when `src` is not a checkpoint and holds no steps.
        """
        self._src, self._make, self._salt = src, make, salt
        self._told: Callable[[str], None] = lambda _: None  # silent if the first look fails
        self._lock = threading.Lock()
        self._folders: OrderedDict[str, tuple[Revision, VirtualFolder]] = OrderedDict()  # by commit
        self._refused: OrderedDict[str, tuple[EngineError, float]] = OrderedDict()  # by commit, and until when
        self._once = Once(self._plan)
        self._last: dict[str, str] = {}  # the last report about each step
        self._steps = False
        try:
            self._open(self._revision(*self._all()[0]))
        except (EngineError, OSError) as error:
            # any other error is what is wrong with a checkpoint
            self._steps = isinstance(error, OSError | NoWeights | OnlyConfiguration)
            if not self._steps or not self._all():
                make(src)  # raises what is wrong
                raise
        self._told = told

    def names(self) -> list[str]:
        """The names of the steps, newest first, complete or not."""
        return [name for name, _ in self._all()]

    def all(self) -> Iterator[Revision]:
        """Every step in its current state, newest first, complete or not."""
        for name, store in self._all():
            with suppress(OSError):  # it is being removed
                yield self._revision(name, store)

    def find(self, name: str) -> tuple[Revision, VirtualFolder]:
        """A revision by its step's name or number, by its commit, or `main`, the newest complete one.

        Raises:
            NoRevision: when there is none.
        """
        with self._lock:
            if name in self._folders:
                return self._folders[name]
        reasons: list[str] = []
        steps = self._all()
        named = [step for step in steps if step[0] == name] or [step for step in steps if _number(step[0]) == name]
        if len(named) > 1:
            raise _shared(name, named)
        for step in named or steps:
            try:
                one = self._revision(*step)
                if named or name in (MAIN, one.commit):
                    found = self._open(one)
                    alike = [other for other in steps if _number(other[0]) == _number(step[0])]
                    if name == MAIN and len(alike) > 1:
                        raise _shared(_number(step[0]), alike)
                    return found
            except (EngineError, OSError) as error:
                reasons.append(f"{step[0]}: {_first_line(error)}")
        if name == MAIN and not reasons:
            raise NoRevision("there is no step yet")
        raise NoRevision("; ".join(reasons[:4]) if reasons else f"there is no revision {name}")

    def _all(self) -> list[tuple[str, Store]]:
        """The steps and their places, newest first; or the one checkpoint."""
        if self._steps:
            return [(n, self._src.inside(n)) for n in reversed(folders_of(self._src)) if _number(n) is not None]
        folder = self._src.folder
        return [(self._src.place().rpartition("/")[2] if folder is None else folder.resolve().name, self._src)]

    def _revision(self, name: str, store: Store) -> Revision:
        states = [(path, state.size, dict(state.told())) for path, state in islice(walk(store), _MOST_FILES)]
        told = json.dumps([self._salt(), name if self._steps else "", states])
        found = hashlib.sha256(told.encode()).hexdigest()[:40]
        return Revision(name, store, found)

    def _open(self, one: Revision) -> tuple[Revision, VirtualFolder]:
        with self._lock:
            known, (refused, until) = self._folders.get(one.commit), self._refused.get(one.commit, (None, 0.0))
            if known is not None:
                self._folders.move_to_end(one.commit)
                return known
        if refused is not None and monotonic() < until:
            raise refused.with_traceback(None)
        folder = self._once(one)
        with self._lock:
            self._folders[one.commit] = one, folder
            while len(self._folders) > _OPEN:
                self._folders.popitem(last=False)  # its readers may finish; then its files are closed
        self._once.forget(one)
        return one, folder

    def _plan(self, one: Revision) -> VirtualFolder:
        try:
            folder = self._make(one.store)
            if self._revision(one.name, one.store) != one:
                raise EngineError(
                    "E405", "the step changed while it was planned", place=Place(one.store.place()),
                    fix="Ask again when training has finished writing it.",
                )  # fmt: skip
        except EngineError as error:
            self._tell(one.name, f"is not served: {_first_line(error)}")
            with self._lock:
                self._refused[one.commit] = error, monotonic() + _AGAIN
                while len(self._refused) > _REMEMBERED:
                    self._refused.popitem(last=False)
            raise
        self._tell(one.name, f"is served as {one.commit[:12]}", folder.notices)
        return folder

    def _tell(self, name: str, what: str, notices: Sequence[str] = ()) -> None:
        """Report the state of a step and the notices of a run, unless the last report was the same."""
        with self._lock:
            last, self._last[name] = self._last.get(name), what
        if last != what:
            self._told(f"{name} {what}")
            for notice in notices:
                self._told(f"  note {notice}")


def _shared(number: str | None, steps: Sequence[tuple[str, Store]]) -> NoRevision:
    return NoRevision(f"{number} is the number of several steps: {', '.join(name for name, _ in steps[:4])}")


def _first_line(error: EngineError | OSError) -> str:
    return f"{error.code} {error.message}" if isinstance(error, EngineError) else str(error.strerror)


def _number(name: str) -> str | None:
    """The number of a step's folder.

    >>> _number("iter_0000500"), _number("20000"), _number("latest")
    ('500', '20000', None)
    """
    match = _STEP.fullmatch(name)
    return None if match is None else match[1]
