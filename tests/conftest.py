"""What all tests share: folders in memory, and nothing remembered in the cache folder of whoever runs them."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.depth import SOAK, in_sample

gc.set_threshold(1_000_000, 20, 100)  # a fifth of the time is else spent looking for cycles

_MOST = 100 if SOAK else 25  # examples of a property that does not say how many
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=_MOST)  # machines are of many speeds
hypothesis.settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch: there are as many workers as cores

_MEMORY, _ROOM = "/dev/shm", 4 << 30
if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY  # `make soak` has the tests of crashes on a disk


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are processors, as some tests wait; each takes a gigabyte and collects for itself."""
    return min(len(os.sched_getaffinity(0)), 7) + 1


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    items[:], left = in_sample(items)
    config.hook.pytest_deselected(items=left)


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests and all modules, which no collection need look through again


def pytest_sessionfinish() -> None:
    gc.collect()  # finds what was not closed, and says so
    gc.freeze()  # pytest collects five times more
