"""Servers that the tests of this folder share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import api
from engine.language.mapping_file import load_mapping
from tests.support.serving import MAPPING, SPLIT, STEP, Running, serving


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    yield serving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two complete steps and one that is being written."""
    folder = tmp_path_factory.mktemp("served") / "run"
    for step in ("100", "200", "300"):
        shutil.copytree(STEP, folder / step)
    (folder / "300" / "model_tp1_pp1.pt").unlink()
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def hub(run: Path) -> Iterator[Running]:
    models = [api.Model("org/name", MAPPING, run), api.Model("single", load_mapping(MAPPING), STEP)]
    with serving(models, max_shard_size=SPLIT) as running:
        yield running


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes of the newest complete step."""
    out = tmp_path_factory.mktemp("written") / "out"
    api.convert(MAPPING, run / "200", out, max_shard_size=SPLIT)
    return out
