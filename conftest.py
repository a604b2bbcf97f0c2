"""Examples in docstrings of the public functions run beside a genuine checkpoint: `ckpt/1000`, an InternLM of two by
two ranks."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
from _pytest.doctest import DoctestModule

_CHECKPOINT = Path(__file__).parent / "tests" / "fixtures" / "internevo" / "v1_tp2_pp2"
_BESIDE = (
    "engine.api.", "engine.diff", "engine.discover.files.new_mapping", "engine.discover.inspect.find_mapping",
    "engine.proving.mapping_diff",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)  # a fixture would be made for each of thousands of tests
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    if not isinstance(item, pytest.DoctestItem) or not item.name.startswith(_BESIDE):
        return (yield)
    import engine

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copytree(_CHECKPOINT, Path("ckpt", "1000"), ignore=shutil.ignore_patterns("oracle.pt"))
        item.dtest.globs["engine"] = engine
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """A module without examples has none to look for, function by function."""
    found = yield
    if file_path.suffix == ".py" and b">>>" not in file_path.read_bytes():
        return [one for one in found if not isinstance(one, DoctestModule)]
    return found
