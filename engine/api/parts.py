"""The public functions that run a saved plan in parts, on any number of machines."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from engine.api.outputs import default_out, small_files_as_saved
from engine.api.plans import loaded_plan, of_second, read_saved, rules_of_request
from engine.checkpoint.hf_folder import read_hf_folder
from engine.checkpoint.identity import Marks, check_files
from engine.errors import EngineError
from engine.formats.headers import FileHeader
from engine.language.model import Layout
from engine.language.version import __version__
from engine.planning.given import check_type
from engine.planning.model import Work
from engine.planning.reading import read_some
from engine.planning.saved_plan import AGAIN, SavedPlan, check_rules, unreadable
from engine.planning.saved_work import SavedWork, saved_work
from engine.run.execute import Report, execute, output_at
from engine.run.parts import Part, is_done, share, write_marker
from engine.run.runner import check_runnable, write_part
from engine.run.running import CommitOptions, RunOptions, running_of
from engine.run.schedule import Job, schedule
from engine.storage.places import Source, found_at
from engine.storage.store import File, Store
from engine.storage.upload import Upload


def part(path: str | Path, which: Part | str, out: str | Path | None = None, **options: Unpack[RunOptions]) -> int:
    """Write one part of a saved plan's output; returns its size in bytes, 0 if it was done already.

    Nothing is visible at `out` before `commit`. Any number of parts gives the same bytes as one run.

    Args:
        path: the saved plan, the same for all parts.
        which: such as `"3/8"`, the third of eight.
        out: where `commit` puts the output; default: `<src>-hf`.
        Others as for `convert`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    how = running_of(options, RunOptions)
    check_type("which", which, Part | str, "text like 3/8")
    mine = which if isinstance(which, Part) else part_of(which)
    saved = read_saved(path)
    work, source = saved.digest, str(saved.request.src)
    output = output_at(work, source, default_out(source) if out is None else out, how, parts=True)
    if is_done(work, output.written, mine):
        return 0
    moved, jobs = loaded_part(saved, mine, positioned=output.written.folder is not None)
    check_runnable(moved, how, 0, output.buffer)
    store = output.join()
    try:
        written = write_part(moved, jobs, store, how)
        if isinstance(store, Upload):
            store.complete(last=mine.marker)
            written = replace(written, objects=store.objects(store.names()))
        write_marker(work, store, mine, written)
        if isinstance(store, Upload):
            store.complete()
    finally:
        if isinstance(store, Upload):
            store.abort()
    whole = sum(moved.outputs[output].nbytes for output in written.done)
    return whole + sum(high - low for _, low, high, _ in written.spans)


def loaded_part(saved: SavedPlan, part: Part, *, positioned: bool) -> tuple[Work, list[Job]]:
    """One part of a saved plan: the plan that moves its bytes, and its jobs in order. Opens only files that it reads.

    A saved plan without copies, or of another engine version, is planned again.

    Args:
        positioned: whether the output can be written anywhere, so that parts may share a tensor.

    Raises:
        EngineError: as for `load_plan`.
    """
    if any("work" not in one.data or one.data["engine"] != __version__ for one in (saved, saved.through or saved)):
        compiled = loaded_plan(saved)
        some = slice(part.number - 1, None, part.count)
        mine = replace(
            compiled, replicas=compiled.replicas[some], slices=compiled.slices[some], tied=compiled.tied[some]
        )
        return mine, share(schedule(compiled, positioned=positioned), part, cut=positioned)
    try:
        held, layout = _outlined(saved)
        jobs = share(schedule(held.outline, positioned=positioned, scattered=held.scattered), part, cut=positioned)
        units = [unit for job in jobs for unit in job.units]
        outputs = {output for unit in units for output in unit.outputs}
        begun = {output for unit in units if not (unit.span and unit.span[0]) for output in unit.outputs}
        return _some(saved, held, layout, outputs, begun), jobs
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise unreadable(saved.path, f"copies that cannot be read: {error!r}"[:200]) from error


def _outlined(saved: SavedPlan) -> tuple[SavedWork, Layout]:
    """The work of a saved plan, before any of its sources are opened, and the layout."""
    asked = saved.request if saved.through is None else of_second(saved.request)
    loaded, layout = rules_of_request(asked)
    check_rules(saved, loaded, layout)
    store = _store(asked.src)
    files = tuple(FileHeader(File(store, one["name"]), one["size"], (), one["identity"]) for one in saved.data["files"])
    places = {one.name: str(one.place) for one in loaded.rules}
    return saved_work(saved.data["work"], files, str(asked.src), places, layout), layout


def _some(saved: SavedPlan, held: SavedWork, layout: Layout, outputs: Collection[int], begun: Collection[int]) -> Work:
    """The plan that moves some outputs of a saved plan; checks that their source files are those that were planned."""
    wanted = held.read_for(outputs, begun)
    then = [saved.data["files"][number] for number in wanted]
    headers = _headers(saved, layout, then, {name for names in wanted.values() for name in names})
    check_files(then, headers, str(saved.request.src), saved.path, AGAIN)
    return held.of(outputs, begun, dict(zip(wanted, headers, strict=True)))


def _store(src: Source) -> Store:
    found = found_at(src)
    return found.store if isinstance(found, File) else found


def _headers(saved: SavedPlan, layout: Layout, then: Sequence[Marks], tensors: Collection[str]) -> Sequence[FileHeader]:
    """The headers of some files of a source that was planned before, for the tensors that are wanted."""
    names = [one["name"] for one in then]
    if saved.through is not None:
        store = _virtual(saved.through, tensors, {one["name"]: one["state"]["etag"] for one in then})
    elif saved.request.reads == "whole":
        store = _store(saved.request.src)
    else:
        return read_some(saved.request.src, layout, saved.data["mode"], names)
    return [header for name in names for header in read_hf_folder(File(store, name))]


def _virtual(saved: SavedPlan, tensors: Collection[str], etags: Mapping[str, str]) -> Store:
    """Some files that a run of a saved plan would write; only some of their tensors can be read."""
    from engine.serve.virtual import weight_files

    held, layout = _outlined(saved)
    outputs = {number for number, output in enumerate(held.outline.outputs) if output.name in tensors}
    return weight_files(_some(saved, held, layout, outputs, held.compared_with(outputs)), etags)


def commit(path: str | Path, out: str | Path | None = None, **options: Unpack[CommitOptions]) -> Report:
    """Combine what all parts of a saved plan wrote into the output that `convert` would have written.

    Raises:
        EngineError: E409 when a part is missing or belongs to another plan.
    """
    started = time.monotonic()
    how = running_of(options, CommitOptions)
    saved = read_saved(path)
    compiled = loaded_plan(saved)
    final = default_out(compiled.folder) if out is None else out
    small = partial(small_files_as_saved, saved, compiled, how.tokenizer, how.code)
    return execute(compiled, compiled.folder, final, small, how, started, parts=saved.digest)


_NUMBERED = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "JOB_COMPLETION_INDEX")


def part_of(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """A part as a user names it, or as Slurm and Kubernetes number the tasks of an array.

    Args:
        text: `K/N`; or `N`, where the environment gives K; or nothing, in a Slurm array.

    >>> part_of("3/8"), part_of("8", {"JOB_COMPLETION_INDEX": "2"})
    (Part(number=3, count=8), Part(number=3, count=8))
    >>> part_of("", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "8"})
    Part(number=3, count=8)
    """
    found = re.fullmatch(r"(?:([0-9]{1,7})/)?([0-9]{1,7})?", text.strip())
    number, count = (found[1], found[2]) if found else (None, None)
    told = {"SLURM_ARRAY_TASK_MIN": "0", **environment}
    given: dict[str, Any] = {key: value for key, value in told.items() if re.fullmatch("[0-9]{1,9}", value)}
    if number is None and {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN"} <= given.keys():
        number = int(given["SLURM_ARRAY_TASK_ID"]) - int(given["SLURM_ARRAY_TASK_MIN"]) + 1
        count = count or given.get("SLURM_ARRAY_TASK_COUNT")
    elif number is None and "JOB_COMPLETION_INDEX" in given:
        number = int(given["JOB_COMPLETION_INDEX"]) + 1
    if found is None or number is None or count is None:
        here = ", ".join(f"{name}={environment[name]:.20}" for name in _NUMBERED if name in environment)
        raise EngineError(
            "E001",
            "the number of the part is not given",
            got=text or here or "nothing, and neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX",
            expected="K/N; N alone in a Kubernetes Indexed Job, and nothing or N in a Slurm array",
            fix="The first of eight parts is 1/8.",
        )
    return Part(int(number), int(count))
