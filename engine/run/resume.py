"""What an interrupted run copied, held against its sources as they are now.

Equal headers do not mean equal content. Of a file that holds a checksum of every tensor and that nothing has touched
since, what was copied stands. Whatever was copied from others is read again and compared, or copied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import xxhash

from engine.errors import EngineError, Place
from engine.move.reader import Reader
from engine.planning.model import Plan
from engine.run.journal import Begun, Done, Interrupted, states_of
from engine.run.schedule import Job
from engine.storage.sources import SourceFiles


def split(plan: Plan, left: Interrupted, jobs: Iterable[Job]) -> tuple[dict[int, Begun], set[int]]:
    """What of an interrupted run is kept, and the outputs among it that `compare_copied` must read again.

    Of files that may have changed, only whole outputs are kept, and none that is filled from the source's side:
    those are copied again.
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


def compare_copied(
    plan: Plan,
    done: Mapping[int, Done],
    outputs: Sequence[int],
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    """E407 unless the sources give the same bytes again for outputs that are done."""
    with SourceFiles(plan.files) as files:
        reader = Reader(plan, files)
        for index in outputs:
            total = xxhash.xxh3_128()
            for _, data in reader.blocks(index):
                if stopped():
                    return
                total.update(data)
                advance(len(data))
            if total.hexdigest() != done[index].digest:
                sources = [plan.sources[copy.source] for copy in plan.copies(index)]
                names = dict.fromkeys(plan.files[source.file].name for source in sources)
                raise EngineError(
                    "E407",
                    "the interrupted run cannot be resumed: the source files changed",
                    place=Place(", ".join(list(names)[:4]), tensor=sources[0].header.name),
                    got=f"other bytes than those that `{plan.outputs[index].name}` was copied from",
                    expected="the same as when it was started",
                    fix="Run without --resume to start over, or put the files back that it was started with.",
                )
