"""Examples in docstrings of the public functions run beside a genuine checkpoint: `ckpt/1000`, an InternLM of two by
two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

_CHECKPOINT = Path(__file__).parent / "tests" / "fixtures" / "internevo" / "v1_tp2_pp2"
_BESIDE = (
    "engine.api.", "engine.diff", "engine.discover.files.new_mapping", "engine.discover.inspect.find_mapping",
    "engine.proving.mapping_diff",
)  # fmt: skip


@pytest.fixture(autouse=True)
def beside_a_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(request.node, pytest.DoctestItem) or not request.node.name.startswith(_BESIDE):
        return
    names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
    import engine

    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(_CHECKPOINT, folder / "ckpt" / "1000", ignore=shutil.ignore_patterns("oracle.pt"))
    monkeypatch.chdir(folder)
    names["engine"] = engine
