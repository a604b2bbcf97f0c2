"""The runner: plan → weight files. Workers own output files; blocks stream through their buffers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoint.headers import ITEM_SIZES
from engine.checkpoint.safetensors_files import encode_header, index_json
from engine.checkpoint.sources import SourceFiles
from engine.plan.model import Output, Plan
from engine.run.blocks import BLOCK_BYTES, LARGE_BLOCK_BYTES, MANY_RUNS, blocks
from engine.run.gather import Gatherer
from engine.run.output import write_error
from engine.run.replicas import compare_replicas, replica_bytes
from engine.run.values import Converter, check_transform


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
    listener: Callable[[Progress], None] | None = None,
) -> None:
    """Compare replicas, then write every weight file of a plan into `folder`.

    Args:
        workers: threads, each with its own output file at a time; default: as many as cores, but
            no more than files.
    """
    for output in plan.outputs:
        check_transform(output)
    meter = Meter(plan.nbytes + replica_bytes(plan), listener)
    with SourceFiles(plan.files) as files:
        compare_replicas(plan, files, meter.advance)
    # The largest files first, so that workers finish together.
    order = sorted(plan.shards, key=lambda shard: -sum(plan.outputs[i].nbytes for i in shard[1]))
    count = min(workers or os.cpu_count() or 1, len(order))
    if count <= 1:
        for name, indices in order:
            _write_file(plan, folder / name, indices, meter)
    else:
        _in_parallel(plan, folder, order, count, meter)
    if len(plan.shards) > 1:
        names = {plan.outputs[i].name: name for name, indices in plan.shards for i in indices}
        write_bytes(folder / "model.safetensors.index.json", index_json(names, plan.nbytes))


def _in_parallel(
    plan: Plan, folder: Path, order: Sequence[tuple[str, tuple[int, ...]]], count: int, meter: Meter
) -> None:
    with ThreadPoolExecutor(count, thread_name_prefix="writer") as pool:
        jobs = [pool.submit(_write_file, plan, folder / name, indices, meter) for name, indices in order]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
        except BaseException:
            meter.stopped.set()
            for job in jobs:
                job.cancel()
            raise


def _write_file(plan: Plan, path: Path, indices: Sequence[int], meter: Meter) -> None:
    described = [(plan.outputs[i].name, plan.outputs[i].dtype, plan.outputs[i].shape) for i in indices]
    header, offsets = encode_header(described, {"format": "pt"})
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(descriptor, header, 0)
            with SourceFiles(plan.files) as files:
                gatherer, converter = Gatherer(files, plan.sources), Converter()
                for index, offset in zip(indices, offsets, strict=True):
                    _write_tensor(plan, index, offset, descriptor, gatherer, converter, meter)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def _write_tensor(
    plan: Plan,
    index: int,
    offset: int,
    descriptor: int,
    gatherer: Gatherer,
    converter: Converter,
    meter: Meter,
) -> None:
    output = plan.outputs[index]
    copies = plan.copies(index)
    item = ITEM_SIZES[output.dtype]
    for block in blocks(copies, output.elements, block_elements(output, len(copies)), row_quantum(output)):
        if meter.stopped.is_set():
            return
        written = converter.convert(output, gatherer.gather(block, output.read_dtype))
        _write_all(descriptor, written.view(np.uint8).data, offset + block.low * item)
        meter.advance((block.high - block.low) * item)


def block_elements(output: Output, runs: int) -> int:
    """Elements of a block, by the larger of the types read and written."""
    nbytes = BLOCK_BYTES if runs <= MANY_RUNS else LARGE_BLOCK_BYTES
    return nbytes // max(ITEM_SIZES[output.dtype], ITEM_SIZES[output.read_dtype])


def row_quantum(output: Output) -> int:
    """A transform needs whole rows of the last dimension in each block."""
    return output.shape[-1] if output.transform is not None else 1


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise write_error(path, error) from error
