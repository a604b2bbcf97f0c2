"""What a mount keeps of files, and what it lets programs do, without a mount."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future
from typing import Any

import pytest

from engine.serve.mount import _KEPT, WINDOW, Ahead, Files, _Window
from engine.storage.virtual import VirtualFile


@pytest.mark.parametrize(
    ("users", "comes", "reused"), [(0, True, True), (1, True, False), (0, False, False)], ids=["free", "read", "coming"]
)
def test_a_buffer_is_reused_once_it_is_filled_and_nobody_reads_it(users: int, comes: bool, reused: bool) -> None:
    with Ahead() as ahead:
        for number in range(_KEPT):
            coming: Future[None] = Future()
            if comes or number:
                coming.set_result(None)
            ahead._windows["f", number] = _Window(memoryview(bytearray(WINDOW)), coming, 0 if number else users)
        oldest = ahead._windows["f", 0].buffer
        assert (ahead._buffer().obj is oldest.obj) == reused


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND])
def test_no_file_is_opened_to_be_written(flags: int) -> None:
    folder: Any = {"a": VirtualFile.of("a", b"1")}
    with Ahead() as ahead:
        files = Files(folder, ahead, print, lambda: None)
        assert files.open("/a", os.O_RDONLY) == 0
        with pytest.raises(OSError, match="/a") as caught:
            files.open("/a", flags)
    assert caught.value.errno == errno.EROFS
