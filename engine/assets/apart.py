"""Calls functions in a separate process: converts the tokenizer there, while tensors are being copied.

Converting takes seconds of Python. A thread would compete for the interpreter with the copying, which needs
it between any two blocks; a process runs on another core. The memory of a process is free again when it ends.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from engine.assets.tokenizer import convert_tokenizer
from engine.errors import EngineError

T = TypeVar("T")

APART = 256 << 10  # bytes of a model: converting a smaller one is faster than starting a process
_LOOK = 0.1  # seconds between checks of the stop flag
_PROCESS = 64 << 20  # bytes of the process before it reads a model
_PER_BYTE = 160  # bytes more for each byte of the model
_ANSWER = b"\0answer\0"  # before it, Python's own start may print: sitecustomize, .pth files


def predicted_memory(model_file: Path) -> int:
    """Peak resident bytes of `convert_apart`, in this process and its own."""
    return _PROCESS + _PER_BYTE * model_file.stat().st_size


def convert_apart(model_file: Path, spec: Mapping[str, Any], stopped: threading.Event) -> dict[str, bytes]:
    """As `convert_tokenizer`, in another process, or in this one if none can be started; nothing if it is stopped."""
    files = call_apart(convert_tokenizer, model_file, spec, stopped=stopped)
    if stopped.is_set():
        return {}
    return convert_tokenizer(model_file, spec) if files is None else files


def call_apart(function: Callable[..., T], *given: Any, stopped: threading.Event | None = None) -> T | None:
    """What a function returns in another process, or its `EngineError`; None if that process fails or is stopped."""
    # -P: never import modules from the current folder, which may be a checkpoint's.
    command = [sys.executable or "", "-P", "-c", "from engine.assets.apart import main; main()"]
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # we pass on an interrupt from the keyboard ourselves
            env={**os.environ, "PYTHONPATH": path},
        )
    except OSError:
        return None
    with process:
        asked: bytes | None = pickle.dumps((function, given))
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    answer, _ = process.communicate(asked, timeout=_LOOK)
                    break
                asked = None
                if stopped is not None and stopped.is_set():
                    process.kill()
        except BaseException:
            process.kill()
            raise
    _, mark, answer = answer.partition(_ANSWER)
    if process.returncode or not mark:
        return None
    found: T | EngineError = pickle.loads(answer)  # from this engine's own process
    if isinstance(found, EngineError):
        raise found
    return found


def main() -> None:
    """Read a question from standard input and write the answer to standard output."""
    answer, sys.stdout = sys.stdout.buffer, sys.stderr  # what libraries print must not mix with the answer
    function, given = pickle.load(sys.stdin.buffer)
    try:
        found = function(*given)
    except EngineError as error:
        found = error
    answer.write(_ANSWER + pickle.dumps(found))
