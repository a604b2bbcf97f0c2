"""A conversion whose parts an executor runs: threads, processes, Dask, whatever has `submit`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from engine.api.parts import commit, part
from engine.errors import EngineError
from engine.run.execute import Report
from engine.run.meter import Progress
from engine.run.running import WholeRunOptions, running_of
from engine.storage.places import options_now, store_options

__all__ = ["run_parts", "run_plan_on"]


def run_parts(
    path: str | Path,
    executor: Executor,
    parts: int,
    out: str | Path | None = None,
    **options: Unpack[WholeRunOptions],
) -> Report:
    """Do a saved plan in parts by an executor, and commit them.

    The checkpoint and the output must be where every worker sees them; the plan itself is sent along. What the
    executor loses leaves the parts that are done: the same call goes on with those that are not.

    Args:
        executor: an executor of `concurrent.futures`, or anything else with its `submit`.
        parts: how many.
        Others as for `convert`; `progress` is told after each part.
    """
    how = running_of(options, WholeRunOptions)
    text = Path(path).read_text(encoding="utf-8")
    final, reached = None if out is None else str(out), options_now()
    waiting = [
        executor.submit(_part, text, f"{number}/{parts}", final, how.workers, how.max_memory, reached)
        for number in range(1, parts + 1)
    ]
    done = 0
    try:
        for one in as_completed(waiting):
            one.result()
            done += 1
            if how.progress is not None:
                how.progress(Progress(done, parts, "writing parts", "parts"))
    finally:
        for one in waiting:
            one.cancel()
    return commit(path, out, **options)


def run_plan_on(
    path: str | Path, place: str, parts: int, out: str | Path | None = None, **options: Unpack[WholeRunOptions]
) -> Report:
    """Do a saved plan in parts by a named executor, such as `dask://host:port`. Arguments as for `run_parts`."""
    how = running_of(options, WholeRunOptions)
    if not how.digests or how.check_source or how.resume:
        raise EngineError(
            "E001", "--no-digests, --check-source and --resume have no use with an executor",
            fix="Leave them out, or run without --executor. Parts always record digests, and resume by themselves.",
        )  # fmt: skip
    with executor_at(place) as executor:
        return run_parts(path, executor, parts, out, **options)


def _part(
    text: str,
    which: str,
    out: str | None,
    workers: int | None,
    max_memory: int | None,
    reached: tuple[dict[str, str], int],
) -> int:
    """One part, of a plan that is given as text, with the options that stores are reached by."""
    with tempfile.TemporaryDirectory(prefix="engine-") as folder, store_options(*reached):
        plan = Path(folder) / "plan.json"
        plan.write_text(text, encoding="utf-8")
        return part(plan, which, out, workers=workers, max_memory=max_memory)


@contextmanager
def executor_at(place: str) -> Iterator[Any]:
    """The executor that a user names: `dask`, a cluster of this machine, or `dask://host:port`.

    Raises:
        EngineError: E001 for any other name, without the extra, and when no scheduler answers.
    """
    kind, _, address = place.partition("://")
    if kind != "dask":
        raise EngineError(
            "E001", "there is no such executor", got=place, expected="dask, or dask://host:port",
            fix="In Python `run_parts` takes any executor.",
        )  # fmt: skip
    try:
        from distributed import Client
    except ImportError:
        raise EngineError(
            "E001",
            "this executor needs the extra `dask`",
            got="no module distributed",
            fix="Install it: pip install 'internlm-engine[dask]'.",
        ) from None
    try:
        client = Client(f"tcp://{address}") if address else Client(dashboard_address=None, silence_logs=50)
    except OSError as error:
        raise EngineError(
            "E001",
            "no Dask scheduler answers",
            got=str(error)[:200],
            expected=f"one at {address}",
            fix="Start one with `dask scheduler`, and workers on the machines that convert.",
        ) from None
    with client:
        yield client.get_executor(pure=False, retries=3)
