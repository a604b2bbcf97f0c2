"""What a plan would write is the source of another plan, without a copy between them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

import engine
from engine.errors import EngineError
from tests.support.serving import MAPPING, STEP


def same(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_rank_files_are_cut_from_a_model_that_was_never_written(tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf")
    engine.reverse(MAPPING, tmp_path / "hf", tmp_path / "by file", tp=4)
    with engine.virtual(engine.plan(MAPPING, STEP)) as hf:
        engine.reverse(MAPPING, hf.store, tmp_path / "by plan", tp=4)
    same(tmp_path / "by plan", tmp_path / "by file")


def test_a_model_is_joined_from_rank_files_that_were_never_written(tmp_path: Path) -> None:
    engine.reshard(MAPPING, STEP, tmp_path / "ranks", tp=1, pp=2)
    engine.convert(MAPPING, tmp_path / "ranks", tmp_path / "by file")
    with engine.virtual(engine.plan_reshard(MAPPING, STEP, tp=1, pp=2)) as ranks:
        engine.convert(MAPPING, ranks.store, tmp_path / "by plan")
        with engine.virtual(engine.plan(MAPPING, ranks.store)) as hf:  # two plans deep
            for path in (tmp_path / "by file").iterdir():
                assert hf[path.name].read() == path.read_bytes(), path.name
    same(tmp_path / "by plan", tmp_path / "by file")


def test_a_source_that_changes_is_refused_through_every_plan(tmp_path: Path) -> None:
    shutil.copytree(STEP, tmp_path / "step")
    with engine.virtual(engine.plan(MAPPING, tmp_path / "step")) as hf:
        with engine.open(engine.plan_reverse(MAPPING, hf.store, tp=2)) as tensors:
            (tmp_path / "step" / "model_tp0_pp0.pt").touch()
            with pytest.raises(EngineError, match="E405"):
                list(tensors.values())
        with pytest.raises(EngineError, match="E405"):
            engine.reverse(MAPPING, hf.store, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_a_virtual_file_is_read_as_python_reads_files(tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf")
    data = (tmp_path / "hf" / "model.safetensors").read_bytes()
    with engine.virtual(engine.plan(MAPPING, STEP)) as hf, hf["model.safetensors"].open() as file:
        assert file.read(100) == data[:100] and file.tell() == 100 and file.read() == data[100:] and file.read(1) == b""
        assert file.seek(-50, io.SEEK_END) == len(data) - 50 and file.read(10) == data[-50:-40]
        assert file.seek(5) == 5 and file.seek(2, io.SEEK_CUR) == 7 and file.read(1) == data[7:8]
        assert file.seek(len(data) + 9) and file.read(5) == b""
        assert not file.writable()
        with pytest.raises(OSError, match="negative"):
            file.seek(-1)


def test_a_store_of_virtual_files_says_what_it_lacks() -> None:
    with engine.virtual(engine.plan(MAPPING, STEP)) as hf:
        store = hf.store
        assert store.names() == sorted(hf) and store.has("config.json") and not store.has("x")
        with pytest.raises(EngineError, match="E305"):
            store.open("x")
