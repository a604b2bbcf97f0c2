"""Converts the tokenizer in a separate process, while tensors are being copied.

Converting takes seconds of Python. A thread would compete for the interpreter with the copying, which needs
it between any two blocks; a process runs on another core.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.assets.tokenizer import convert_tokenizer

APART = 256 << 10  # bytes of a model: converting a smaller one is faster than starting a process
_LOOK = 0.1  # seconds between checks of the stop flag
_PROCESS = 64 << 20  # bytes of the process before it reads a model
_PER_BYTE = 160  # bytes more for each byte of the model


def predicted_memory(model_file: Path) -> int:
    """Peak resident bytes of `convert_apart`, in this process and its own."""
    return _PROCESS + _PER_BYTE * model_file.stat().st_size


def convert_apart(model_file: Path, spec: Mapping[str, Any], stopped: threading.Event) -> dict[str, bytes]:
    """As `convert_tokenizer`, in another process; in this one if no process can be started.

    Args:
        stopped: ends the process early; the result is then meaningless.
    """
    asked = json.dumps({"file": os.fspath(model_file), "spec": spec}).encode()
    files = _ask(asked, stopped) if sys.executable else None
    if stopped.is_set():
        return {}
    if files is None:  # convert here, which raises the error if there is one
        return convert_tokenizer(model_file, spec)
    return {name: base64.b64decode(text) for name, text in files.items()}


def _ask(question: bytes, stopped: threading.Event) -> dict[str, str] | None:
    """The answer of the process; None when it is not valid."""
    # -P: never import modules from the current folder, which may be a checkpoint's.
    command = [sys.executable, "-P", "-m", "engine.assets.apart"]
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
        given: bytes | None = question
        while True:
            with suppress(subprocess.TimeoutExpired):
                answer, _ = process.communicate(given, timeout=_LOOK)
                break
            given = None
            if stopped.is_set():
                process.kill()
    if process.returncode != 0:
        return None
    try:
        files: dict[str, str] = json.loads(answer)
    except ValueError:
        return None
    return files


def main() -> None:
    """Read a question from standard input and write the answer to standard output."""
    asked = json.load(sys.stdin)
    files = convert_tokenizer(Path(asked["file"]), asked["spec"])
    json.dump({name: base64.b64encode(data).decode() for name, data in files.items()}, sys.stdout)


if __name__ == "__main__":
    main()
