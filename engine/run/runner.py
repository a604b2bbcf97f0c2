"""The runner: plan → weight files. Workers own output files; blocks stream through their buffers."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.checkpoint.headers import ITEM_SIZES
from engine.checkpoint.safetensors_files import index_json
from engine.checkpoint.sinks import CHECKED, FORMATS, FileLayout, SinkFiles
from engine.checkpoint.sources import SourceFiles
from engine.plan.model import Output, Plan
from engine.run.blocks import BLOCK_BYTES, LARGE_BLOCK_BYTES, MANY_RUNS, blocks
from engine.run.digests import Total
from engine.run.gather import Gatherer, Scatterer
from engine.run.journal import NAME as JOURNAL
from engine.run.journal import Begun, Done, Journal, read_journal, work_of
from engine.run.memory import workers_of
from engine.run.output import write_error
from engine.run.replicas import compare_replicas, replica_bytes
from engine.run.schedule import Job, Unit, copies_from, schedule
from engine.run.values import Converter, check_transform

MARK_BYTES = 64 << 20  # of one tensor between entries of the journal


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes moved so far and in all: replicas compared plus tensors written."""

    done_bytes: int
    total_bytes: int


class Meter:
    """Adds up what workers did; tells the listener at most once every 8 MiB. Also the stop flag."""

    def __init__(self, total: int, listener: Callable[[Progress], None] | None) -> None:
        self._total, self._listener = total, listener
        self._done = self._told = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._listener is not None and (self._done - self._told >= 8 << 20 or self._done == self._total):
                self._told = self._done
                self._listener(Progress(self._done, self._total))


def write_weights(
    plan: Plan,
    folder: Path,
    *,
    workers: int | None = None,
    max_memory: int | None = None,
    listener: Callable[[Progress], None] | None = None,
    digests: bool = True,
    resume: bool = False,
) -> dict[int, Done]:
    """Compare replicas, then write every weight file of a plan into `folder`, to stable storage.

    Args:
        workers: threads, each with its own output files at a time; default: as many as cores, but
            no more than there are files to write independently.
        max_memory: bytes resident at most; fewer workers keep to it, and E001 refuses less than one needs.
        digests: compute a digest of every tensor, which also lets the run be resumed.
        resume: go on with what an interrupted run of the same plan left in `folder`.

    Returns:
        The digest and checksum of every output.

    Raises:
        EngineError: E402 when replicas differ, E407 when there is another run to resume.
    """
    for output in plan.outputs:
        check_transform(output)
    work = work_of(plan)
    known = read_journal(folder, work) if resume else {}
    meter = Meter(plan.nbytes + replica_bytes(plan), listener)
    with SourceFiles(plan.files) as files:
        compare_replicas(plan, files, meter.advance)
    count = workers_of(plan, workers, max_memory)
    jobs = schedule(plan, count)
    writer = _Writer(plan, folder, meter, digests)
    writer.take_over(known)
    journal = Journal(folder, work, writer.done) if digests else None
    try:
        for index in range(len(plan.shards)):
            writer.start(index)
        writer.journal = journal
        if min(count, len(jobs)) <= 1:
            for job in jobs:
                writer.run(job)
        else:
            _in_parallel(writer, jobs, min(count, len(jobs)), meter)
        for index in range(len(plan.shards)):
            writer.finish(index)
    finally:
        if journal is not None:
            journal.close()
    if len(plan.shards) > 1 and plan.written is None:
        names = {plan.outputs[i].name: file.name for file in plan.shards for i in file.outputs}
        write_bytes(folder / "model.safetensors.index.json", index_json(names, plan.nbytes))
    (folder / JOURNAL).unlink(missing_ok=True)
    return writer.done


def _in_parallel(writer: _Writer, jobs: Sequence[Job], count: int, meter: Meter) -> None:
    with ThreadPoolExecutor(count, thread_name_prefix="writer") as pool:
        futures = [pool.submit(writer.run, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            meter.stopped.set()
            for future in futures:
                future.cancel()
            raise


class _Writer:
    """Writes the files of a plan, job by job; shared by the workers."""

    def __init__(self, plan: Plan, folder: Path, meter: Meter, digests: bool) -> None:
        self._plan, self._meter = plan, meter
        self._paths = [folder / file.name for file in plan.shards]
        self._layouts: list[FileLayout] = []
        self._places: dict[int, tuple[int, int]] = {}  # output → its file and the absolute byte offset there
        for index, file in enumerate(plan.shards):
            tensors = [(plan.outputs[i].name, plan.outputs[i].dtype, plan.outputs[i].shape) for i in file.outputs]
            layout = FORMATS[file.format](tensors, Path(file.name).stem)
            self._layouts.append(layout)
            self._places.update((i, (index, at)) for i, at in zip(file.outputs, layout.offsets, strict=True))
        checked = {o for file in plan.shards if file.format in CHECKED for o in file.outputs}
        # Each is changed by the one worker that writes the output.
        self._checked, self._digests = checked, digests
        self._totals = {output: self._new_total(output) for output in range(len(plan.outputs))}
        self.done: dict[int, Done] = {}
        self.journal: Journal | None = None

    def _new_total(self, output: int) -> Total:
        return Total(digest=self._digests, checksum=output in self._checked)

    def take_over(self, known: Mapping[int, Begun]) -> None:
        """Keep what an interrupted run wrote, as far as its bytes are there; read them for their digests."""
        with SinkFiles(self._paths) as sinks:
            for output, one in known.items():
                if output not in self._places:
                    continue
                (file, at), nbytes = self._places[output], self._plan.outputs[output].nbytes
                end = nbytes if one.end is None else one.end
                total = self._new_total(output)
                try:
                    for block in sinks.read(file, at, end) if 0 <= end <= nbytes else ():
                        total.add(total.end, block)
                except OSError:
                    continue
                if total.mark() != (one.digest, end):
                    continue
                if end == nbytes:
                    self.done[output] = Done(one.digest, total.checksum())
                else:
                    self._totals[output] = total

    def start(self, index: int) -> None:
        """Create a file of its full size, with what comes before its payload."""
        with SinkFiles(self._paths) as sinks, self._errors(index):
            sinks.create(index, self._layouts[index].end)
            for offset, data in self._layouts[index].start():
                sinks.write(index, offset, data)

    def finish(self, index: int) -> None:
        """Write what is only known when the payload is complete, and bring the file to stable storage."""
        file = self._plan.shards[index]
        with SinkFiles(self._paths) as sinks, self._errors(index):
            for offset, data in self._layouts[index].finish([self.done[output].checksum for output in file.outputs]):
                sinks.write(index, offset, data)
            sinks.sync(index)

    def run(self, job: Job) -> None:
        """Write every tensor of a job. Each output is written by one job."""
        plan = self._plan
        with SinkFiles(self._paths) as sinks, SourceFiles(plan.files) as files, self._errors(job.files[0]):

            def write(output: int, offset: int, data: memoryview) -> None:
                self._totals[output].add(offset, data)
                file, at = self._places[output]
                sinks.write(file, at + offset, data)
                self._meter.advance(len(data))

            gatherer, converter = Gatherer(files, plan.sources), Converter()
            scatterer = Scatterer(files, plan.sources, write)
            for unit in job.units:
                if all(output in self.done for output in unit.outputs):
                    self._meter.advance(sum(plan.outputs[output].nbytes for output in unit.outputs))
                    continue
                if unit.sources:
                    self._scatter(unit, scatterer)
                else:
                    self._gather(unit.outputs[0], gatherer, converter, write)
                if self._meter.stopped.is_set():
                    return
                self._record(unit, sinks)

    def _record(self, unit: Unit, sinks: SinkFiles) -> None:
        """Digests of a finished unit, into the journal too."""
        finished: dict[int, Done] = {}
        for output in unit.outputs:
            (file, at), nbytes = self._places[output], self._plan.outputs[output].nbytes
            total = self._totals.pop(output)
            again = partial(sinks.read, file, at, nbytes)
            finished[output] = Done(total.digest(again), total.checksum())
        self.done.update(finished)
        if self.journal is not None:
            self.journal.add(finished)

    @contextmanager
    def _errors(self, index: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self._paths[index], error) from error

    def _gather(
        self, index: int, gatherer: Gatherer, converter: Converter, write: Callable[[int, int, memoryview], None]
    ) -> None:
        output = self._plan.outputs[index]
        copies = self._plan.copies(index)
        item = ITEM_SIZES[output.dtype]
        total = self._totals[index]
        begun = marked = total.end  # what an interrupted run wrote of it
        self._meter.advance(begun)
        for block in blocks(copies, output.elements, block_elements(output, len(copies)), row_quantum(output)):
            if self._meter.stopped.is_set():
                return
            if block.high * item <= begun:
                continue
            written = converter.convert(output, gatherer.gather(block, output.read_dtype))
            skip = max(begun - block.low * item, 0)
            write(index, block.low * item + skip, written.view(np.uint8).data[skip:])
            if self.journal is not None and total.end - marked >= MARK_BYTES:
                marked = total.end
                self.journal.mark(index, *(total.mark() or ("", 0)))

    def _scatter(self, unit: Unit, scatterer: Scatterer) -> None:
        for source, copies in copies_from(self._plan, unit).items():
            header = self._plan.sources[source].header
            elements = math.prod(header.shape)
            limit = block_bytes(len(copies)) // ITEM_SIZES[header.dtype]
            for block in blocks(copies, elements, limit):
                if self._meter.stopped.is_set():
                    return
                scatterer.scatter(source, block)


def block_bytes(runs: int) -> int:
    return BLOCK_BYTES if runs <= MANY_RUNS else LARGE_BLOCK_BYTES


def block_elements(output: Output, runs: int) -> int:
    """Elements of a block, by the larger of the types read and written."""
    return block_bytes(runs) // max(ITEM_SIZES[output.dtype], ITEM_SIZES[output.read_dtype])


def row_quantum(output: Output) -> int:
    """A transform needs whole rows of the last dimension in each block."""
    return output.shape[-1] if output.transform is not None else 1


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole, to stable storage."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
