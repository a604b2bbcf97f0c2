"""`make soak`: kill runs at random moments, and see that nothing is ever lost or half written.

An old output lies where a run writes. The run is killed (SIGKILL) at a random moment, some resumed
ones too. After each kill the output must be the old one, byte for byte, or the new one, complete.
Sometimes a source file is replaced by a copy of it then. Resuming must give the bytes of a run that was
never interrupted, and leave nothing beside it.
Runs, reversals and reshardings take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from tests.support.shards import Model, save

ROOT = Path(__file__).resolve().parent.parent
MODEL = Model("v2", layers=8, hidden=512, heads=8, groups=4, ffn=2816, vocab=8192, bias=False)  # about 100 MB
LETTERS = ("--set", "mlp_letters=w2_is_down")


@dataclass(frozen=True)
class Job:
    """A command, without its output, and what an uninterrupted run of it wrote."""

    name: str
    command: tuple[str, ...]
    reference: dict[str, str]
    seconds: float


def digests(folder: Path) -> dict[str, str]:
    """File name → digest of its bytes."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        total = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
        found[path.name] = total.hexdigest()
    return found


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]


def start(command: Sequence[str], *more: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "engine", *command, "--quiet", *more]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)


def make_jobs(folder: Path) -> list[Job]:
    """The three commands, each with its reference run and how long that took."""
    save(MODEL, folder / "step", tp=2, pp=2)
    commands = {
        "run": ("run", "-m", MODEL.mapping, "-s", str(folder / "step"), "--max-shard-size", "20MB", *LETTERS),
        "reverse": ("reverse", "-m", MODEL.mapping, "-s", str(folder / "run"), "--tp", "4", "--pp", "2", *LETTERS),
        "reshard": ("reshard", "-m", MODEL.mapping, "-s", str(folder / "step"), "--tp", "4", "--pp", "1", *LETTERS),
    }
    jobs: list[Job] = []
    for name, command in commands.items():
        started = time.monotonic()
        finish(start((*command, "--out", str(folder / name))))
        jobs.append(Job(name, command, digests(folder / name), time.monotonic() - started))
    return jobs


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        raise AssertionError(f"it ended with {process.returncode}: {errors.decode()[:2000]}")


def kill(process: subprocess.Popen[bytes], job: Job, out: Path, dice: random.Random) -> None:
    """Kill at any moment of the run, or of the time in which it writes, which is shorter."""
    if dice.random() < 0.3:
        time.sleep(dice.uniform(0, job.seconds * 1.1))
    else:
        deadline = time.monotonic() + job.seconds * 2
        while process.poll() is None and not any(".partial-" in p.name for p in leftovers(out)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        time.sleep(dice.uniform(0, job.seconds / 2))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)


def state(out: Path, old: dict[str, str], job: Job) -> str:
    """`old` or `new`; an error for anything between."""
    found = digests(out)
    if found == old:
        return "old"
    if found == job.reference:
        finish(start(("verify", str(out))))
        return "new"
    changed = [name for name in {**found, **job.reference} if found.get(name) != job.reference.get(name)]
    raise AssertionError(f"the output is neither the old one nor the new one: {changed[:5]}")


def touch(job: Job) -> None:
    """Put a source file's copy in its place, so that what was copied of it must be read again."""
    source = Path(job.command[job.command.index("-s") + 1])
    path = next(path for path in sorted(source.iterdir()) if path.suffix in (".pt", ".safetensors"))
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def one_round(job: Job, old: Path, folder: Path, dice: random.Random) -> list[str]:
    """Kill, look, resume, perhaps kill again, compare; returns what was found after each kill."""
    out = folder / "out" / "made"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    shutil.copytree(old, out)
    before, found = digests(old), []
    command = (*job.command, "--out", str(out), "--overwrite")
    again: tuple[str, ...] = ()
    while True:
        kill(start(command, *again), job, out, dice)
        found.append(state(out, before, job))
        if dice.random() < 0.5:
            touch(job)
        again = ("--resume",)
        if dice.random() < 0.7:
            break
    finish(start(command, *again))
    if digests(out) != job.reference:
        raise AssertionError("the resumed run wrote other bytes")
    if left := leftovers(out):
        raise AssertionError(f"left behind: {', '.join(path.name for path in left)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
    dice, counted, problems = random.Random(seed), Counter[str](), 0
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        jobs = make_jobs(folder)
        save(Model("v2", layers=1, bias=False), folder / "small")
        older = start(("run", "-m", MODEL.mapping, "-s", str(folder / "small"), "--out", str(folder / "old"), *LETTERS))
        finish(older)
        turn = 0
        while (kills := sum(n for word, n in counted.items())) < options.kills:
            job, turn = jobs[turn % len(jobs)], turn + 1
            try:
                counted.update(f"{job.name}: {word}" for word in one_round(job, folder / "old", folder, dice))
            except (AssertionError, subprocess.TimeoutExpired) as error:
                problems += 1
                counted[f"{job.name}: WRONG"] += 1
                print(f"round {turn}, {job.name}: {error}", flush=True)
            if turn % 10 == 0:
                print(f"{kills} kills, {problems} problems, {time.monotonic() - started:.0f} s", flush=True)
    for word, number in sorted(counted.items()):
        print(f"{word:<20} after {number} kills")
    print(f"{sum(counted.values())} kills, {problems} problems, {time.monotonic() - started:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
