"""The runner: plan → weights files. Workers divide the tensors among them; checks run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

from engine.language.documents import grouped
from engine.move.values import check_transform
from engine.planning.model import Plan, Work
from engine.run.journal import NAME as JOURNAL
from engine.run.journal import Begun, Interrupted, Journal, compare_copied, read_journal, split
from engine.run.manifest import index_file
from engine.run.memory import workers_of
from engine.run.meter import Meter
from engine.run.parts import MARKER, Written, check_parts
from engine.run.replicas import checks, compare_replicas, replica_bytes
from engine.run.running import Running
from engine.run.schedule import Job, Shares, layout_of, schedule
from engine.run.writer import Writer
from engine.storage.output import sweep
from engine.storage.sources import check_unchanged
from engine.storage.store import Target
from engine.storage.upload import Upload

_WAITING = 16  # files that are brought to stable storage at the same time


def check_runnable(plan: Work, how: Running, beside_memory: int, buffer: Callable[[int], int]) -> None:
    """E209 or E001 for what `write_weights` could not do, before there is a folder to write to."""
    for output in plan.outputs:
        check_transform(output)
    workers_of(plan, how.workers, how.max_memory, beside_memory, buffer)


def write_weights(
    plan: Plan,
    store: Target,
    how: Running,
    *,
    beside: Sequence[Callable[[threading.Event], None]] = (),
    beside_memory: int = 0,
) -> Written:
    """Compare replicas, then write every weights file of a plan into `store`, to stable storage.

    Args:
        beside: functions to run in their own threads while tensors are written. Each is passed an event that is set
            when it should stop; an error in one ends the run.
        beside_memory: bytes that these take; they count towards `max_memory`.

    Raises:
        EngineError: E402 when replicas differ, E405 when a source changes during the run, E407 when the run to
            resume was another one, or its sources have changed.
    """
    count = workers_of(plan, how.workers, how.max_memory, beside_memory, store.buffer)
    folder = store.folder  # where a journal can lie
    left = Interrupted()
    if how.resume and folder is not None:
        left = read_journal(folder, plan)
        sweep(folder, {JOURNAL, *(file.name for file in plan.shards)} if left.begun else ())
    jobs = schedule(plan, positioned=store.positioned)
    known, unsure = split(plan, left, jobs)
    checked = sum(plan.outputs[o].nbytes for o in unsure)
    meter = Meter(sum(job.nbytes for job in jobs) + checked + replica_bytes(plan), how.progress)
    files = range(len(plan.shards))
    writer = Writer(plan, store, meter, files, digests=how.digests, workers=count, jobs=len(jobs))
    writer.take_over(known)
    again = sorted(unsure & writer.done.keys())
    meter.advance(sum(plan.outputs[o].nbytes for o in unsure.difference(again)))
    copied = partial(compare_copied, plan, writer.done, meter)
    before = [partial(copied, again[first::count]) for first in range(min(count, len(again)))]

    def journal() -> None:
        if how.digests and folder is not None:
            writer.journal = Journal(folder, plan, writer.done)

    try:
        _write(plan, jobs, store, writer, meter, count, resume=how.resume, before=before, ready=journal, beside=beside)
    finally:
        if writer.journal is not None:
            writer.journal.close()
    for name, data in index_file(plan).items():
        store.put(name, data)
    if folder is not None:
        (folder / JOURNAL).unlink(missing_ok=True)
    return Written(writer.done, kept=meter.kept)


def write_part(work: Work, jobs: Sequence[Job], store: Target, how: Running) -> Written:
    """Compare the replicas of a part's plan, then write its jobs. Files that other parts write to are not completed.

    In a store of whole files, what an earlier try wrote whole is kept. Errors as for `write_weights`.
    """
    count = workers_of(work, how.workers, how.max_memory, 0, store.buffer)
    meter = Meter(sum(job.nbytes for job in jobs) + replica_bytes(work), how.progress)
    files = sorted({file for job in jobs for file in job.files})
    writer = Writer(work, store, meter, files, digests=True, workers=count, jobs=len(jobs))
    _write(work, jobs, store, writer, meter, count, resume=not store.positioned)
    return Written(writer.done, sorted(writer.spans))


def _write(
    work: Work,
    jobs: Sequence[Job],
    store: Target,
    writer: Writer,
    meter: Meter,
    count: int,
    *,
    resume: bool,
    before: Sequence[Callable[[], object]] = (),
    ready: Callable[[], None] = lambda: None,
    beside: Sequence[Callable[[threading.Event], None]] = (),
) -> None:
    """Compare, then do all jobs with `count` workers.

    Args:
        before: what to compare before the replicas.
        ready: called once the files are begun.
    """
    files = sorted({file for job in jobs for file in job.files})
    if resume and not store.positioned:
        writer.take_whole(files)
    compared = checks(work)
    with ThreadPoolExecutor(count + len(beside), thread_name_prefix="writer") as pool:
        try:
            if before:
                meter.begin("checking what is kept")
            _run(pool, meter, before)
            dealt = [compared[first::count] for first in range(count)]
            comparing = partial(compare_replicas, work, meter, users=count, others={})
            if any(dealt):
                meter.begin("comparing replicas")
            _run(pool, meter, [partial(comparing, some) for some in dealt if some])
            meter.begin("writing")
            if store.positioned:
                _run(pool, meter, [partial(writer.start, index) for index in files])
            ready()
            works = [partial(writer.work, Shares(jobs))] * count
            _run(pool, meter, [*(partial(one, meter.stopped) for one in beside), *works])
            side_by_side(partial(writer.sync, index) for index in files)
            check_unchanged(work.files)
        finally:
            meter.stopped.set()
            pool.shutdown()


def take_parts(plan: Plan, store: Target, written: Written) -> Written:
    """Complete the files that parts wrote to; E409 when these no longer hold what was written."""
    writer = Writer(plan, store, Meter(0, None), range(len(plan.shards)), digests=True)
    if not isinstance(store, Upload):
        if store.folder is not None:
            sweep(store.folder, {*(name for name in store.names() if name.startswith(MARKER)),
                                 *(file.name for file in plan.shards)})  # fmt: skip
        told = [{o: Begun(written.done[o].digest, None) for o in f.outputs if o in written.done} for f in plan.shards]
        shared = grouped((span[0], span) for span in written.spans)
        with ThreadPoolExecutor(workers_of(plan, None, None, 0, store.buffer)) as pool:
            list(pool.map(writer.take_over, told))
            list(pool.map(writer.take_spans, shared.values()))
        check_parts(plan, store, written.done, writer.done)
        written = Written(writer.done)
        for index in range(len(plan.shards)):
            writer.start(index)
            writer.complete(index)
        side_by_side(partial(writer.sync, index) for index in range(len(plan.shards)))
    else:
        with store.sinks([file.name for file in plan.shards]) as sinks:
            whole = {n: f for n, f in enumerate(plan.shards) if sinks.whole(n, layout_of(plan, f).size)}
        now = store.objects([file.name for file in whole.values()])
        same = {n for n, f in whole.items() if now[f.name] and now[f.name] == written.objects.get(f.name)}
        writer.take_whole(whole.keys() - same)  # written anew, so they are read
        kept = {o: written.done[o] for n in same for o in whole[n].outputs}
        check_parts(plan, store, written.done, {**kept, **writer.done})
    for name, data in index_file(plan).items():
        store.put(name, data)
    return written


def side_by_side(tasks: Iterable[Callable[[], object]]) -> None:
    """Do tasks that wait for stable storage, which takes many files in one go; the first error is raised."""
    with ThreadPoolExecutor(_WAITING) as pool:
        for _ in pool.map(lambda task: task(), tasks):
            pass


def _run(pool: ThreadPoolExecutor, meter: Meter, tasks: Iterable[Callable[[], object]]) -> None:
    """Run tasks side by side; the first error stops them all and is raised."""
    futures = [pool.submit(task) for task in tasks]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done:
                future.result()
    except BaseException:
        meter.stopped.set()
        for future in futures:
            future.cancel()
        raise
