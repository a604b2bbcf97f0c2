"""Without converting: `engine.open`, `serve` and `mount` beside the real files read the same way.

    python -m benchmarks.virtual REPORT WHAT STEP MODEL WORK

runs one of `WAYS`: STEP is a checkpoint, MODEL what a run made of it, WORK a folder for what is left behind.
REPORT gets the seconds of reading, without what comes before it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.generate import generate
from benchmarks.measure import measure
from benchmarks.shapes import MAPPING, Ranks, Shape, Spec
from benchmarks.ways import Group, Way

NAME, ONE_FILE = "bench/model", 10**12
_BLOCK = 1 << 20  # bytes that a program reads at a time


def groups(work: Path, shape: Shape) -> Iterator[Group]:
    """Reading everything, and from a cold start to the first logits."""
    step, model = work / "step", work / "model"
    generate(step, Spec(shape, Ranks(4)))
    engine = (sys.executable, "-m", "engine", "run", "--quiet", "--mapping", MAPPING, "--max-shard-size", str(ONE_FILE))
    measure((*engine, "--src", str(step), "--out", str(model)))
    for title, found in (("reading all bytes", READING), ("cold start to first logits", LOGITS)):
        ways = []
        for name in found:
            report = work / "report.json"
            command = (sys.executable, "-m", "benchmarks.virtual", str(report), name, str(step), str(model), str(work))
            if "mount" not in name or os.path.exists("/dev/fuse"):
                ways.append(Way(name, command, work, shape.nbytes, work / "out", shape.nbytes, report))
        yield Group("read" if found is READING else "logits", title, tuple(ways))


def _file(path: Path) -> Callable[[], None]:
    def read() -> None:
        buffer = bytearray(_BLOCK)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return read


def _tensors(names: Iterable[str], get: Callable[[str], Any]) -> Callable[[], None]:
    """Every tensor in memory of its own, one after the other."""

    def read() -> None:
        for name in names:
            get(name)

    return read


def _curl(url: str) -> Callable[[], None]:
    command = ["curl", "--silent", "--fail", "--output", os.devnull, f"{url}/{NAME}/resolve/main/model.safetensors"]
    return lambda: subprocess.run(command, check=True) and None


@contextmanager
def _served(step: Path | None, model: Path) -> Iterator[str]:
    """A server of a checkpoint; without one, the same server of the real file."""
    from engine import api
    from engine.serve.hub import Hub, Served
    from engine.serve.server import Server
    from engine.storage.virtual import Stretch, VirtualFile

    if step is not None:
        server = api.serve([api.Model(NAME, MAPPING, step)], port=0, max_shard_size=ONE_FILE)
    else:
        path = model / "model.safetensors"
        opened, size = os.open(path, os.O_RDONLY), path.stat().st_size
        stretch = Stretch(0, size, lambda at, target: os.preadv(opened, [target], at) and None)
        folder = {path.name: VirtualFile(path.name, size, "tag", (stretch,))}
        found = SimpleNamespace(find=lambda _: (SimpleNamespace(commit="c" * 40, name="1"), folder))
        server = Server(Hub([Served(NAME, found)]), "127.0.0.1", 0)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


@contextmanager
def _mounted(step: Path, work: Path) -> Iterator[Path]:
    at = work / "mounted"
    command = [sys.executable, "-m", "engine", "mount", str(at), "-m", MAPPING, "-s", str(step)]
    started = subprocess.Popen([*command, "--max-shard-size", str(ONE_FILE)], stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    if not started.stderr.readline().startswith("mounted"):
        sys.exit(started.stderr.read())
    try:
        yield at
    finally:
        started.send_signal(signal.SIGINT)
        started.wait()


Read = Iterator[Callable[[], Any]]


@contextmanager
def _read(what: str, step: Path, model: Path, work: Path) -> Read:
    if what == "file":
        yield _file(model / "model.safetensors")
    elif what == "mount":
        with _mounted(step, work) as at:
            yield _file(at / "model.safetensors")
    elif what == "safe_open":
        from safetensors import safe_open

        with safe_open(model / "model.safetensors", "pt") as opened:
            yield _tensors(opened.keys(), lambda name: opened.get_tensor(name).clone())
    elif what == "open":
        import torch  # noqa: F401  # which is not part of reading

        import engine

        with engine.open(step, mapping=MAPPING) as tensors:
            yield _tensors(tensors, tensors.get_tensor)
    else:
        with _served(step if what == "serve" else None, model) as url:
            subprocess.run(["curl", "--silent", "--head", "--output", os.devnull, f"{url}/{NAME}"], check=True)  # plans
            yield _curl(url)


def _logits(what: str, step: Path, model: Path, work: Path) -> None:
    """The logits of one token, however the model comes here."""
    import engine

    if what == "open":
        with engine.open(step, mapping=MAPPING) as tensors:
            _compute(tensors.model(dtype="auto"))
    elif what == "serve":
        with _served(step, model) as url:
            os.environ |= {"HF_ENDPOINT": url, "HF_HOME": str(work / "out")}
            _compute(_load(NAME))
    elif what == "mount":
        with _mounted(step, work) as at:
            _compute(_load(str(at)))  # it maps the files, which must stay while it computes
    else:
        if what == "run":
            engine.convert(MAPPING, step, work / "out", max_shard_size=ONE_FILE)
        _compute(_load(str(work / "out" if what == "run" else model)))


def _load(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def _compute(loaded: Any) -> None:
    import torch

    with torch.no_grad():
        loaded(torch.tensor([[1]]))


READING = {
    "read, real file": "file", "read, mount": "mount", "read, safe_open of the real file": "safe_open",
    "read, open": "open", "read, served real file": "served", "read, serve": "serve",
}  # fmt: skip
LOGITS = {f"logits, {name}": what for name, what in (
    ("real files", "file"), ("run and load", "run"), ("open", "open"), ("serve", "serve"), ("mount", "mount"),
)}  # fmt: skip


def main() -> None:
    report, name, *folders = sys.argv[1:]
    step, model, work = map(Path, folders)
    shutil.rmtree(work / "out", ignore_errors=True)
    if name in LOGITS:
        begin = time.monotonic()
        _logits(LOGITS[name], step, model, work)
        marks = {"begin": begin, "first": begin, "end": time.monotonic()}
    else:
        with _read(READING[name], step, model, work) as read:
            begin = time.monotonic()
            read()
            marks = {"begin": begin, "first": begin, "end": time.monotonic()}
    Path(report).write_text(json.dumps(marks))


if __name__ == "__main__":
    main()
