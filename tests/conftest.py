"""What all tests share: nothing is remembered in the cache folder of whoever runs them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

gc.set_threshold(100_000, 20, 100)  # as the command line has it: a fifth of the time is else spent looking for cycles


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
