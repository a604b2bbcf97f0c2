"""The public functions that do a saved plan's work in parts, on as many machines as there are."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from engine.api.outputs import default_out, small_files
from engine.api.plans import load_plan
from engine.errors import EngineError
from engine.run.execute import Report, execute, output_at
from engine.run.journal import identity_of
from engine.run.parts import Part, is_done, write_marker
from engine.run.running import CommitOptions, RunOptions, running_of

__all__ = ["commit", "part", "part_of"]


def part(path: str | Path, which: Part | str, out: str | Path | None = None, **options: Unpack[RunOptions]) -> int:
    """Write one part of what a saved plan writes; returns its bytes, 0 for one that was done already.

    Nothing is visible at `out` before `commit`. Any number of parts gives the bytes of one run.

    Args:
        path: the saved plan, the same for all parts.
        which: such as `"3/8"`, the third of eight.
        out: where `commit` puts the output; default: `<src>-hf`.
        Others as for `convert`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    from engine.run.runner import check_runnable, write_weights
    from engine.storage.uploads import Upload

    how = running_of(options, RunOptions)
    mine = which if isinstance(which, Part) else part_of(which)
    compiled = load_plan(path)
    work, final = identity_of(compiled), default_out(compiled.folder) if out is None else out
    output = output_at(work, compiled.folder, final, how, parts=True)
    check_runnable(compiled, how.workers, how.max_memory, 0, output.buffer)
    store = output.join()
    if is_done(work, store, mine):
        return 0
    try:
        written = write_weights(
            compiled, store, workers=how.workers, max_memory=how.max_memory, listener=how.progress, part=mine,
            resume=isinstance(store, Upload),
        )  # fmt: skip
        if isinstance(store, Upload):
            store.complete()
        write_marker(work, store, mine, written)
        if isinstance(store, Upload):
            store.complete()
    finally:
        if isinstance(store, Upload):
            store.abort()
    whole = sum(compiled.outputs[output].nbytes for output in written.done)
    return whole + sum(high - low for _, low, high, _ in written.spans)


def commit(path: str | Path, out: str | Path | None = None, **options: Unpack[CommitOptions]) -> Report:
    """Make an output of what all parts of a saved plan wrote, as `convert` would have.

    Raises:
        EngineError: E409 when a part is missing or belongs to another plan.
    """
    started = time.monotonic()
    how = running_of(options, CommitOptions)
    compiled = load_plan(path)
    final = default_out(compiled.folder) if out is None else out
    small = partial(small_files, compiled, how.tokenizer, how.code)
    return execute(compiled, compiled.folder, final, small, how, started, parts=True)


def part_of(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """A part as a user names it, or as Slurm and Kubernetes number the tasks of an array.

    Args:
        text: `K/N`; or `N`, where the environment says which; or nothing, in an array of Slurm.

    >>> part_of("3/8"), part_of("8", {"JOB_COMPLETION_INDEX": "2"})
    (Part(number=3, count=8), Part(number=3, count=8))
    >>> part_of("", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "8"})
    Part(number=3, count=8)
    """
    found = re.fullmatch(r"(?:([0-9]{1,7})/)?([0-9]{1,7})?", text.strip())
    number, count = (found[1], found[2]) if found else (None, None)
    given: dict[str, Any] = {key: value for key, value in environment.items() if value.isdecimal()}
    if number is None and "SLURM_ARRAY_TASK_ID" in given:
        number = int(given["SLURM_ARRAY_TASK_ID"]) - int(given.get("SLURM_ARRAY_TASK_MIN", 0)) + 1
        count = count or given.get("SLURM_ARRAY_TASK_COUNT")
    elif number is None and "JOB_COMPLETION_INDEX" in given:
        number = int(given["JOB_COMPLETION_INDEX"]) + 1
    if found is None or number is None or count is None:
        raise EngineError(
            "E001",
            "the number of the part is not given",
            got=text or "nothing, and neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX",
            expected="K/N, or N in an array of Slurm or an Indexed Job of Kubernetes",
            fix="The first of eight parts is 1/8.",
        )
    return Part(int(number), int(count))
