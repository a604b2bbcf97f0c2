"""One finished process, measured: wall and processor time, peak anonymous and mapped memory."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_EVERY = 0.01  # seconds between looks at a process's memory
_SPARE = 1 << 30

# Private memory, written page by page; a mapping without a file would be shared by default.
_TOUCH = """
import mmap, sys
size, block = int(sys.argv[1]), b"1" * (1 << 20)
room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size - len(block) + 1, len(block)):
    room[at : at + len(block)] = block
"""


@dataclass(frozen=True)
class Measured:
    """A finished process. Times are in seconds, memory in MiB.

    Attributes:
        peak: most memory resident, as the kernel counted it.
        anonymous, mapped: most of either kind, as seen every 10 ms; mapped is files and shared memory.
        copying: of a run with a stopwatch, the time that moving the tensors took.
        first: of such a run, from the start of the process to the first byte of a tensor written.
    """

    wall: float
    cpu: float
    peak: float
    anonymous: float
    mapped: float
    copying: float | None = None
    first: float | None = None


def measure(command: Sequence[str], phases: Path | None = None) -> Measured:
    """Run a process to its end in the checkout.

    Args:
        phases: where `benchmarks.phases`, if that is what runs, reports to.
    """
    # As for a user: compiled modules are cached after the first run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=ROOT)
        with _Watched(process.pid) as watched:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\nexit code {process.returncode}\n{said.read().decode(errors='replace')}")
    copying = first = None
    if phases is not None:
        marks = json.loads(phases.read_text())
        copying, first = marks["end"] - marks["begin"], marks["first"] - started
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    return Measured(wall, cpu, peak, watched.anonymous, watched.mapped, copying, first)


class _Watched:
    """A thread that looks at the memory of a process and of its children."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.anonymous = self.mapped = 0.0

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_EVERY):
            found = [_resident(pid) for pid in (self._pid, *_children(self._pid))]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in found))
            self.mapped = max(self.mapped, sum(mapped for _, mapped in found))


def _resident(pid: int) -> tuple[float, float]:
    """MiB of anonymous and of mapped memory; nothing once the process has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = {name: int(size) / 1024 for name, size in re.findall(r"Rss(\w+):\s+(\d+) kB", text)}
    return found.get("Anon", 0), found.get("File", 0) + found.get("Shmem", 0)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def touch_memory(nbytes: int) -> None:
    """Have a process touch so much memory and a GB more, and end; the run measured next finds it at hand.

    The host of a virtual machine takes back memory that its guest does not use, and gives it again
    page by page when it is first touched. Whoever meets that pays several times the price of a
    copy: `cp` into memory-backed storage then varies by a factor of two from run to run, and repeats
    within 2 % when what it is about to fill has just been touched.
    """
    size = min(nbytes + _SPARE, available() - _SPARE)
    if size > 0:
        subprocess.run([sys.executable, "-S", "-c", _TOUCH, str(size)], check=True)


def evict(folders: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next run reads them from the disk. Needs no rights."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def available() -> int:
    """Bytes of memory that could be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def file_system(folder: Path) -> str:
    """Its type, such as `tmpfs`."""
    return subprocess.run(["stat", "-f", "-c", "%T", folder], check=True, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    from importlib.metadata import version

    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", text)
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cores": os.cpu_count(),
        "cpu": model[1] if model else platform.machine(),
        "memory_bytes": int(total[1]) * 1024 if total else None,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "safetensors", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }
