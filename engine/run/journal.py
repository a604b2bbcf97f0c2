"""The journal of a run: what is being written, and which tensors are complete, with their digests.

It lies in the partial output. Its first line says what the run does; a run may only be resumed by
one that does exactly the same. Each further line is one finished unit, written when its bytes are.

Equal headers do not mean equal content. What was copied from a file is kept if the file holds a checksum of every
tensor and is untouched since. What was copied from other files is read again and compared, or copied again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from engine.errors import EngineError, Place, first_of
from engine.language.version import __version__
from engine.move.reader import Reader
from engine.planning.model import Plan, digest_of_plan
from engine.run.looks import Look
from engine.run.meter import Meter
from engine.run.schedule import Job
from engine.storage.json_text import parse_json
from engine.storage.sources import SourceFiles

NAME = ".journal"
_NUMBER = re.compile(r"[0-9]{1,18}")
_WORDS = {
    "engine": "the engine's version",
    "mapping": "the mapping",
    "layout": "the layout",
    "settings": "the settings",
    "files": "the output files",
    "sources": "the source files",
    "sizes": "the model's sizes",
    "config": "the configuration",
    "plan": "what is copied from where",
}


@dataclass(frozen=True, slots=True)
class Begun:
    """An output of which the first `end` bytes, or all (None), are written; `digest` is theirs."""

    digest: str
    end: int | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What an interrupted run left: how far each output got, and the state of each source file then, as a list."""

    begun: Mapping[int, Begun] = field(default_factory=dict)
    states: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished output tensor: its digest, its CRC-32 where the format needs one, and what its values look like."""

    digest: str
    checksum: int
    look: Look = field(default=Look(), compare=False)


def work_of(plan: Plan) -> dict[str, Any]:
    """What a run of a plan does, as far as that affects the output."""
    listed: dict[str, str] = {}
    for file in plan.shards:
        outputs = [plan.outputs[i] for i in file.outputs]
        listed[file.name] = _short([file.format, [(o.name, o.dtype, o.shape) for o in outputs]])
    return {
        "engine": __version__,
        "mapping": plan.mapping.digest,
        "layout": plan.layout.digest,
        "settings": {
            **{name: decision.choice for name, decision in plan.decisions.items()},
            **{name: str(value) for name, value in plan.options.items()},
            "dtype": plan.dtype,
        },
        "files": listed,
        "sources": {file.name: file.identity for file in plan.files},
        "sizes": dict(plan.sizes),
        "config": {str(key): repr(value) for key, value in plan.config.items()},
        "plan": digest_of_plan(plan),
    }


def identity_of(plan: Plan) -> str:
    """A digest of everything that determines the bytes of a run; for source files without checksums, their state."""
    states = [(f.name, dict(f.state.told())) for f in plan.files if not f.summed and f.state is not None]
    return hashlib.sha256(json.dumps([work_of(plan), states], sort_keys=True, default=str).encode()).hexdigest()


def states_of(plan: Plan) -> dict[str, list[int]]:
    """The state of every source file when it was indexed."""
    return {file.name: list(file.state.told().values()) for file in plan.files if file.state is not None}


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:32]


class Journal:
    """Appends finished units; shared by the workers."""

    def __init__(self, folder: Path, plan: Plan, done: Mapping[int, Done]) -> None:
        """Args: done: outputs that were verified to be present and to equal what the sources give now."""
        self._lock = threading.Lock()
        path = folder / NAME
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self._write({**work_of(plan), "states": states_of(plan)})
        if done:
            self.add(done)

    def add(self, done: Mapping[int, Done]) -> None:
        """Record outputs whose bytes have all been written."""
        self._write({str(output): [one.digest, one.checksum] for output, one in done.items()})

    def mark(self, output: int, digest: str, end: int) -> None:
        """Record that an output's bytes up to `end` have been written; `digest` is theirs."""
        self._write({str(output): [digest, 0, end]})

    def _write(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)


def read_journal(folder: Path, plan: Plan) -> Interrupted:
    """What an interrupted run left; None when it wrote no journal.

    A last line that the interruption cut short is ignored.

    Raises:
        EngineError: E407 when that run did something else; names what has changed.
    """
    begun: dict[int, Begun] = {}
    states: Mapping[str, Any] = {}
    for number, line in enumerate(_lines(folder / NAME)):
        try:
            value = parse_json(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        if number == 0:
            _check_same(value, work_of(plan), folder)
            states = value["states"] if isinstance(value.get("states"), dict) else {}
            continue
        for output, entry in value.items():
            kinds = list(map(type, entry)) if isinstance(entry, list) else []
            if _NUMBER.fullmatch(output) and kinds in ([str, int], [str, int, int]):
                begun[int(output)] = Begun(entry[0], entry[2] if len(entry) == 3 else None)
    return Interrupted(begun, states)


def _lines(path: Path) -> list[bytes]:
    """The lines of a file in the partial output; refuses a link, as others may have put one there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []
    with os.fdopen(descriptor, "rb") as file:
        return file.read().split(b"\n") if stat.S_ISREG(os.fstat(descriptor).st_mode) else []


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    plain = json.loads(json.dumps(now))
    changed = [word for word in plain if before.get(word) != plain[word]]
    changed = [word for word in changed if word != "plan"] or changed  # a digest: it tells nothing beside the others
    if changed:
        raise EngineError(
            "E407",
            "the interrupted run cannot be resumed: " + ", ".join(_WORDS.get(w, w) for w in changed) + " changed",
            place=Place(str(folder)),
            got="; ".join(_shown(before.get(word), plain[word]) for word in changed),
            expected="the same as when it was started",
            fix="Run without --resume to start over, or `engine clean` to remove what is there.",
        )


def _shown(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return first_of(sorted(names), 4)
    return f"{now}"[:80] + f", then {before}"[:80]


def split(plan: Plan, left: Interrupted, jobs: Iterable[Job]) -> tuple[dict[int, Begun], set[int]]:
    """The outputs of an interrupted run to keep, and those among them that `compare_copied` must read again.

    Of outputs whose source files may have changed, only whole ones are kept, and none that is scattered from its
    sources: the others are copied again.
    """
    now = states_of(plan)
    changed = {
        index
        for index, file in enumerate(plan.files)
        if not file.summed or left.states.get(file.name) != now.get(file.name)
    }
    unsure: set[int] = set()
    if changed:
        for output in left.begun:
            copies = plan.copies(output) if output < len(plan.outputs) else ()
            if any(plan.sources[copy.source].file in changed for copy in copies):
                unsure.add(output)
    scattered = {output for job in jobs for unit in job.units if unit.scattered for output in unit.outputs}
    lost = {output for output in unsure if left.begun[output].end is not None or output in scattered}
    return {output: one for output, one in left.begun.items() if output not in lost}, unsure - lost


def compare_copied(plan: Plan, done: Mapping[int, Done], meter: Meter, outputs: Sequence[int]) -> None:
    """E407 unless the sources give the same bytes again for outputs that are done."""
    with SourceFiles(plan.files) as files:
        reader = Reader(plan, files)
        for index in outputs:
            total = xxhash.xxh3_128()
            for _, data in reader.blocks(index):
                if meter.stopped.is_set():
                    return
                total.update(data)
                meter.advance(len(data))
            if total.hexdigest() != done[index].digest:
                sources = [plan.sources[copy.source] for copy in plan.copies(index)]
                names = dict.fromkeys(plan.files[source.file].name for source in sources)
                raise EngineError(
                    "E407",
                    "the interrupted run cannot be resumed: the source files changed",
                    place=Place(first_of(list(names), 4), tensor=sources[0].header.name),
                    got=f"other bytes than `{plan.outputs[index].name}` was copied from",
                    expected="the same as when it was started",
                    fix="Run without --resume to start over, or restore the files that it was started with.",
                )
