"""A conversion in parts by an executor: threads, processes, Dask, or anything with `submit`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.api.parts import part
from engine.errors import EngineError, needs_extra
from engine.planning.saved_plan import digest_of
from engine.run.meter import Progress
from engine.run.parts import Part
from engine.run.running import Running
from engine.storage.places import options_now, store_options


def check_spread(how: Running) -> None:
    """E001 for options that parts cannot honor, or always do."""
    if not how.digests or how.check_source:
        raise EngineError(
            "E001", "--no-digests and --check-source cannot be used with an executor",
            fix="Leave them out, or run without an executor. Parts always record digests.",
        )  # fmt: skip
    Part(1, how.parts)


def do_parts(saved: bytes, out: str, how: Running) -> str:
    """Have an executor do all parts of a saved plan; returns the digest that identifies the plan.

    The checkpoint and the output must be where every worker sees them; the plan itself is sent along.

    Raises:
        EngineError: that of a part that is refused; E409 when the executor is lost. Finished parts are kept.
    """
    reached, told = options_now(), (how.overwrite, how.workers, how.max_memory)
    with executor_at(how.executor) as executor:
        waiting: list[Any] = []
        try:
            with _lost():
                for number in range(1, how.parts + 1):
                    waiting.append(executor.submit(_part, saved, f"{number}/{how.parts}", out, told, reached))
            ours = all(isinstance(one, Future) for one in waiting)  # else in the order of parts
            for done, one in enumerate(as_completed(waiting) if ours else waiting, 1):
                with _lost():
                    mistake = one.result()
                    if not isinstance(mistake, Exception | None):
                        raise TypeError(f"a part gave {mistake!r:.80}")
                if mistake is not None:
                    raise mistake
                if how.progress is not None:
                    how.progress(Progress(done, how.parts, "writing parts", "parts"))
        finally:
            for one in waiting:
                with suppress(Exception):  # an executor's own
                    one.cancel()
    return digest_of(saved)


@contextmanager
def _lost() -> Iterator[None]:
    """E409 for any failure of the executor; the error of a refused part is passed on unchanged."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            "E409", "the executor did not do all parts", got=f"{type(error).__name__}: {error}"[:300],
            fix="Run the same again: finished parts are kept, and it continues with the others.",
        ) from error  # fmt: skip


def _part(
    saved: bytes,
    which: str,
    out: str,
    told: tuple[bool, int | None, int | None],
    reached: tuple[dict[str, str], int],
) -> Exception | None:
    """Do one part of a plan that is given as data, with the options of the stores.

    Returns:
        An error of the engine itself, so that it is not mistaken for one of the executor.
    """
    overwrite, workers, max_memory = told
    with tempfile.TemporaryDirectory(prefix="engine-") as folder, store_options(*reached):
        plan = Path(folder) / "plan.json"
        plan.write_bytes(saved)
        try:
            part(plan, which, out, overwrite=overwrite, workers=workers, max_memory=max_memory)
        except (EngineError, OSError, MemoryError):
            raise
        except Exception as mistake:
            return mistake
        return None


@contextmanager
def executor_at(place: Any) -> Iterator[Any]:
    """The executor that a user passes or names: `dask`, a cluster on this machine, or `dask://host:port`.

    Raises:
        EngineError: E001 for any other name, a missing extra, or a scheduler that does not answer.
    """
    if not isinstance(place, str):
        yield place
        return
    kind, _, address = place.partition("://")
    if kind != "dask":
        raise EngineError(
            "E001", "there is no such executor", got=place, expected="dask, or dask://host:port",
            fix="Any other executor can be passed in Python.",
        )  # fmt: skip
    with needs_extra("dask", "this executor needs"):
        from distributed import Client
    try:
        client = Client(f"tcp://{address}") if address else Client(dashboard_address=None, silence_logs=50)
    except (OSError, ValueError) as error:  # ValueError: no port
        raise EngineError(
            "E001",
            "no Dask scheduler answers",
            got=str(error)[:200],
            expected=f"one at {address}",
            fix="Start one with `dask scheduler`, and workers on the machines that convert.",
        ) from None
    with client:
        yield client.get_executor(pure=False, retries=3)
