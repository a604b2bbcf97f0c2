"""What is computed once for each key, however many threads ask for it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Once(Generic[Key, Value]):
    """Results by key. What fails is not kept: whoever asks next tries again."""

    def __init__(self, compute: Callable[[Key], Value]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._known: dict[Key, Future[Value]] = {}

    def __call__(self, key: Key) -> Value:
        """The result for a key; whoever asks while it is computed waits for it, and gets its error too."""
        with self._lock:
            found = self._known.get(key)
            mine = found is None
            if found is None:
                found = self._known[key] = Future()
        if mine:
            try:
                found.set_result(self._compute(key))
            except BaseException as error:
                with self._lock:
                    self._known.pop(key, None)
                found.set_exception(error)
                raise
        return found.result()

    def forget(self, key: Key) -> None:
        """Keep a result no longer; whoever asks next computes it again."""
        with self._lock:
            self._known.pop(key, None)
