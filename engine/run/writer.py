"""The writer: fills the files of a plan, unit by unit; blocks stream through a worker's buffers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from engine.formats.headers import ITEM_SIZES
from engine.formats.written import CHECKED, FileLayout
from engine.move.blocks import block_bytes, blocks, largest_block
from engine.move.moves import Scatterer, Write
from engine.move.reader import Reader
from engine.move.runs import straight
from engine.planning.model import Work
from engine.run.digests import Total
from engine.run.journal import Begun, Done, Journal
from engine.run.meter import Meter
from engine.run.schedule import Shares, Unit, copies_from, layout_of
from engine.storage.sources import SourceFiles
from engine.storage.store import Sinks, Target, writing

MARK_BYTES = 64 << 20  # written of one tensor between journal entries
_DIRECT_BYTES = 8 << 20  # moved by the system between checks of the stop flag


class Writer:
    """Writes the files of a plan; shared by the workers."""

    def __init__(
        self,
        plan: Work,
        store: Target,
        meter: Meter,
        files: Iterable[int],
        *,
        digests: bool,
        workers: int = 1,
        jobs: int = 1,
    ) -> None:
        """
        Args:
            files: the files of the plan to write.
            workers, jobs: the number of workers, and of jobs that they share.
        """
        self._plan, self._meter = plan, meter
        self._store, self._names = store, [file.name for file in plan.shards]
        self._users = workers if store.positioned else min(workers, jobs) or 1  # workers that read and write at once
        self._layouts: dict[int, FileLayout] = {}
        self._places: dict[int, tuple[int, int]] = {}  # output → its file and the absolute byte offset there
        self._numbers: dict[int, int] = {}  # output → its index in its file
        self._checked: set[int] = set()  # outputs whose format wants checksums
        for index in files:
            file = plan.shards[index]
            layout = self._layouts[index] = layout_of(plan, file)
            self._places.update((i, (index, at)) for i, at in zip(file.outputs, layout.offsets, strict=True))
            self._numbers.update((output, number) for number, output in enumerate(file.outputs))
            self._checked.update(file.outputs if file.format in CHECKED else ())
        self._digests = digests
        self._totals: dict[int, Total] = {}  # outputs in progress; only the worker that writes one changes its total
        # The system may copy bytes that need no look; then two workers of one file wait longer for each other.
        self._direct = workers <= jobs and not digests
        self.done: dict[int, Done] = {}
        self.spans: list[tuple[int, int, int, str]] = []  # of outputs shared with other parts, with digests
        self._whole: set[int] = set()  # files that are complete already
        self.journal: Journal | None = None

    def _total(self, output: int) -> Total:
        """The digest of an output so far."""
        found = self._totals.get(output)
        if found is None:
            size, checked = self._plan.outputs[output].nbytes, output in self._checked
            found = self._totals[output] = Total(size, digest=self._digests, checksum=checked)
        return found

    def take_over(self, known: Mapping[int, Begun]) -> None:
        """Keep what an interrupted run wrote, if its bytes are there; reads them for their digests."""
        with self._store.sinks(self._names) as sinks:
            for output, one in known.items():
                if output not in self._places:
                    continue
                (file, at), nbytes = self._places[output], self._plan.outputs[output].nbytes
                end = nbytes if one.end is None else one.end
                total = self._total(output)
                try:
                    for block in sinks.read(file, at, end) if 0 <= end <= nbytes else ():
                        total.add(total.end, block)
                    kept = total.mark() == (one.digest, end)
                except OSError:
                    kept = False
                if kept and end == nbytes:
                    self.done[output] = Done(one.digest, total.checksum(), total.look)
                if not kept or end == nbytes:
                    del self._totals[output]

    def take_whole(self, files: Iterable[int]) -> None:
        """Keep files that an interrupted run left whole; reads them for their digests."""
        with self._store.sinks(self._names) as sinks:
            for index in files:
                file = self._plan.shards[index]
                if not sinks.whole(index, self._layouts[index].size):
                    continue
                self._whole.add(index)
                for output in file.outputs:
                    total = self._total(output)
                    for block in sinks.read(index, self._places[output][1], self._plan.outputs[output].nbytes):
                        total.add(total.end, block)
                    self.done[output] = Done(total.digest(tuple), total.checksum(), total.look)
                    del self._totals[output]

    def start(self, index: int) -> None:
        """Create a file; write what is known before its payload, and what follows outputs that are done."""
        layout = self._layouts[index]
        with self._store.sinks(self._names, self._users) as sinks, self._errors(index):
            sinks.create(index, layout.size)
            for offset, data in layout.start():
                sinks.write(index, offset, (data,))
            for output in self.done.keys() & set(self._plan.shards[index].outputs):
                self._write_behind(output, sinks)

    def _write_behind(self, output: int, sinks: Sinks) -> None:
        file, _ = self._places[output]
        for offset, data in self._layouts[file].after(self._numbers[output], self.done[output].checksum):
            sinks.write(file, offset, (data,))

    def work(self, shares: Shares) -> None:
        """Write units until none is left. One worker writes each output."""
        plan = self._plan
        with self._store.sinks(self._names) as sinks, SourceFiles(plan.files, self._users) as files:

            def write(output: int, offset: int, parts: Sequence[memoryview]) -> None:
                total, end = self._total(output), offset
                for part in parts:
                    total.add(end, part)
                    end += len(part)
                file, at = self._places[output]
                sinks.write(file, at + offset, parts)
                self._meter.advance(end - offset)

            reader = Reader(plan, files)
            scatterer = Scatterer(files, plan.sources, write)
            job = None
            while (taken := shares.take(job)) is not None:
                job, unit = taken
                left = sorted((o for o in unit.outputs if o not in self.done), key=self._places.__getitem__)
                self._meter.keep(sum(plan.outputs[i].nbytes for i in unit.outputs if i in self.done))
                with self._errors(self._places[unit.outputs[0]][0]):
                    if not self._store.positioned and left:
                        self.start(self._places[left[0]][0])
                    if unit.span is not None:
                        self._gather_span(unit.outputs[0], unit.span, reader, sinks)
                    elif unit.scattered and left:
                        self._scatter(unit, scatterer)
                        self._record(unit.outputs, sinks)
                    elif left and not self._copied(left, files, sinks):
                        self._gather(left, reader, write, sinks)
                    if self._meter.stopped.is_set():
                        return
                if shares.finish(job):
                    for file in shares.files(job):
                        self._finish(file, sinks)

    def _gather_span(self, output: int, span: tuple[int, int], reader: Reader, sinks: Sinks) -> None:
        """Write some bytes of an output; whoever completes the output later reads all of it for the digest."""
        (file, place), (low, high) = self._places[output], span
        total = Total(high - low, digest=True, checksum=False)
        for _, at, data in reader.stream([(output, low)]):
            if self._meter.stopped.is_set():
                return
            some = data[: max(high - at, 0)]
            total.add(at - low, some)
            sinks.write(file, place + at, (some,))
            self._meter.advance(len(some))
            if at + len(data) >= high:
                break
        self.spans.append((output, low, high, total.digest(tuple)))

    def take_spans(self, spans: Sequence[tuple[int, int, int, str]]) -> None:
        """Keep an output that several parts wrote, if it holds what each of them wrote; reads it for its digest."""
        output, total = spans[0][0], self._total(spans[0][0])
        file, place = self._places[output]
        with self._store.sinks(self._names) as sinks:
            for _, low, high, digest in spans:
                own = Total(high - low, digest=True, checksum=False)
                try:
                    for block in sinks.read(file, place + low, high - low):
                        own.add(own.end, block)
                        total.add(total.end, block)
                except OSError:
                    return
                if own.digest(tuple) != digest:
                    return
        self.done[output] = Done(total.digest(tuple), total.checksum(), total.look)

    def _finish(self, index: int, sinks: Sinks) -> None:
        """Write what is only known once the payload is complete, and start bringing the file to stable storage."""
        outputs = self._plan.shards[index].outputs
        if index in self._whole or not all(output in self.done for output in outputs):  # others write the rest
            return
        with self._errors(index):
            for offset, data in self._layouts[index].finish([self.done[output].checksum for output in outputs]):
                sinks.write(index, offset, (data,))
            sinks.complete(index)

    def complete(self, index: int) -> None:
        """Complete a file whose outputs are all done."""
        with self._store.sinks(self._names) as sinks:
            self._finish(index, sinks)

    def sync(self, index: int) -> None:
        """Flush a file to stable storage."""
        with self._store.sinks(self._names) as sinks, self._errors(index):
            sinks.sync(index)

    def _record(self, outputs: Sequence[int], sinks: Sinks) -> None:
        """Record digests of finished outputs, also in the journal; does nothing when the run was stopped."""
        if self._meter.stopped.is_set():
            return
        finished: dict[int, Done] = {}
        for output in outputs:
            (file, at), nbytes = self._places[output], self._plan.outputs[output].nbytes
            total = self._total(output)
            again = partial(sinks.read, file, at, nbytes)
            finished[output] = Done(total.digest(again), total.checksum(), total.look)
            del self._totals[output]
        self.done.update(finished)
        for output in finished:
            self._write_behind(output, sinks)
        if self.journal is not None:
            self.journal.add(finished)

    def _errors(self, index: int) -> AbstractContextManager[None]:
        return writing(self._store.place(self._names[index]))

    def _copied(self, outputs: Sequence[int], files: SourceFiles, sinks: Sinks) -> bool:
        """Have the system copy an output that consists of whole runs of its sources; False where it cannot."""
        index, *more = outputs
        output = self._plan.outputs[index]
        if more or not self._direct or index in self._checked or not output.unchanged:
            return False
        copies, item = self._plan.copies(index), ITEM_SIZES[output.dtype]
        if not all(straight(copy) for copy in copies):
            return False
        file, at = self._places[index]
        moved = 0
        for copy in copies:
            source = self._plan.sources[copy.source]
            descriptor = files.opened(source.file).descriptor
            if descriptor is None:
                return False
            begin = source.header.offset + copy.source_offset * item
            to, left = at + copy.target_offset * item, copy.volume() * item
            while left and not self._meter.stopped.is_set():
                count = sinks.copy(file, to, descriptor, begin, min(left, _DIRECT_BYTES))
                if not count:  # gathering will report what is wrong, if anything is
                    self._meter.advance(-moved)
                    return False
                begin, to, left, moved = begin + count, to + count, left - count, moved + count
                self._meter.advance(count)
        self._record(outputs, sinks)
        return True

    def _gather(self, outputs: Sequence[int], reader: Reader, write: Write, sinks: Sinks) -> None:
        """Write outputs one after the other, each from where an interrupted run stopped."""
        begun = {output: self._total(output).end for output in outputs}
        self._meter.keep(sum(begun.values()))
        waiting = iter(outputs)  # outputs that are not finished
        marked = dict(begun)

        def finish(end: int | None) -> None:
            """Record outputs before this one, or all."""
            for output in waiting:
                self._record((output,), sinks)
                if output == end:
                    return

        for output, at, data in reader.stream(begun.items()):
            if self._meter.stopped.is_set():
                return
            write(output, at, (data,))
            if at + len(data) == self._plan.outputs[output].nbytes:
                finish(output)
            elif self.journal is not None and (total := self._total(output)).end - marked[output] >= MARK_BYTES:
                marked[output] = total.end
                self.journal.mark(output, *(total.mark() or ("", 0)))
        finish(None)

    def _scatter(self, unit: Unit, scatterer: Scatterer) -> None:
        for source, copies in copies_from(self._plan, unit).items():
            header = self._plan.sources[source].header
            elements = math.prod(header.shape)
            limit = block_bytes(len(copies)) // ITEM_SIZES[header.dtype]
            for block in blocks(copies, elements, limit, most=largest_block(ITEM_SIZES[header.dtype])):
                if self._meter.stopped.is_set():
                    return
                scatterer.scatter(source, block)
