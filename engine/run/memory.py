"""The memory of a run, predicted before it starts and not exceeded: tables of the plan, buffers of each worker."""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import EngineError
from engine.move.blocks import LARGE_BLOCK_BYTES
from engine.move.runs import MOST_SPAN
from engine.planning.model import Work
from engine.storage.cores import cores
from engine.storage.sources import AHEAD, LEAST_WINDOW, WINDOW, share

MOST_WORKERS = 256  # threads: more do not help any disk, and each has its own buffers
_BASE = 48 << 20  # the interpreter and the libraries that a run needs
_PER_TENSOR = 1500  # bytes of headers, outputs and digests per tensor
_CLIENT = 32 << 20  # obstore, with its connections
_MAPPED = 8 << 20  # what the allocator keeps beyond what is allocated


def predicted_memory(plan: Work, workers: int, buffer: Callable[[int], int] = lambda files: 0) -> int:
    """Peak resident bytes of a run with this many workers; independent of the model's size.

    Args:
        buffer: takes the number of files written at once; returns the bytes that the store buffers for each.
    """
    widest = max((2 * 4 * o.shape[-1] for o in plan.outputs if o.transform is not None and o.shape), default=0)
    casts = not all(output.unchanged for output in plan.outputs)
    # A block, its scratch, the converted block; a transform holds its rows in float32 three times.
    worker = LARGE_BLOCK_BYTES + MOST_SPAN + (4 * LARGE_BLOCK_BYTES if casts else 0) + widest
    compared = 2 * (LARGE_BLOCK_BYTES + MOST_SPAN) if plan.replicas or plan.tied else 0
    tables = _PER_TENSOR * (len(plan.sources) + len(plan.outputs))
    window, written = _window(plan), buffer(workers)
    fetched = (AHEAD + 1) * share(window, workers)  # windows being fetched, and one being moved
    library = _CLIENT if window or written else 0
    return _BASE + _MAPPED + library + tables + workers * (max(worker, compared) + fetched + written)


def _window(plan: Work) -> int:
    return max((file.file.store.block for file in plan.files), default=0)


def workers_of(plan: Work, asked: int | None, limit: int | None, beside: int, buffer: Callable[[int], int]) -> int:
    """The number of workers of a run: as asked, else one per core, but no more than fit in memory.

    Args:
        beside: bytes that other work takes at the same time, within the same limit.
        buffer: as for `predicted_memory`.

    Raises:
        EngineError: E001 for a number of threads out of range, and when not even one fits in `limit` bytes.
    """
    if asked is not None and not (type(asked) is int and 1 <= asked <= MOST_WORKERS):
        raise EngineError(
            "E001", "this is not a number of workers", got=str(asked)[:40], expected=f"auto, or 1 to {MOST_WORKERS}",
            fix="More threads than cores rarely help.",
        )  # fmt: skip
    window = _window(plan)
    most = max(window // LEAST_WINDOW, 1) if 0 < window < WINDOW else MOST_WORKERS  # a small window is shared by fewer
    wanted = asked or min(cores(), most)
    if limit is None:
        return wanted
    least = predicted_memory(plan, 1, buffer) + beside
    if least > limit:
        raise EngineError(
            "E001",
            "this plan does not fit the memory allowed",
            got=f"--max-memory {limit}",
            expected=f"at least {least} bytes, for one worker" + (" and the tokenizer" if beside else ""),
            fix=f"Give --max-memory {-(-least // (1 << 20))}MiB or more.",
        )
    while wanted > 1 and predicted_memory(plan, wanted, buffer) + beside > limit:
        wanted -= 1
    return wanted
