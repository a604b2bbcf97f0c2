"""Documents found valid before are not checked again, and nothing else is taken for one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import engine
from engine.language import valid, validation
from engine.language.documents import load_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_mapping_is_checked_once() -> None:
    with mock.patch.object(validation, "_validator", wraps=validation._validator) as used:
        engine.load_mapping("internlm2-7b.yaml")
        assert used.called
        used.reset_mock()
        engine.load_mapping("internlm2-7b.yaml")
        assert not used.called


def test_a_changed_document_is_checked_again() -> None:
    text = "mapping: 1\nname: x\n"
    for _ in range(2):  # what was refused is not remembered
        with pytest.raises(engine.EngineError) as caught:
            validation.check_schema(load_text(text, "x.yaml"), "mapping")
        assert caught.value.code == "E102"


def test_a_number_is_not_taken_for_a_text_nor_a_schema_for_another() -> None:
    keys = {valid.key("a", {1: "x"}), valid.key("a", {"1": "x"}), valid.key("b", {1: "x"}), valid.key("a", {True: "x"})}
    assert len(keys) == 4


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    engine.load_mapping("internlm2-7b.yaml")
    assert cache.read_text() == "a file where the folder would be"


def test_only_the_last_documents_are_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valid, "MOST", 3)
    for number in range(6):
        valid.remember(f"{number}")
        os.utime(cache / "internlm-engine" / "valid" / f"{number}", ns=(number, number))
    assert [valid.known(f"{number}") for number in range(6)] == [False, False, False, True, True, True]


@pytest.mark.parametrize("home", ["", "relative"])
def test_without_a_home_nothing_is_remembered(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    engine.load_mapping("internlm2-7b.yaml")
    assert not list(tmp_path.iterdir())


def test_nothing_heavy_is_imported_when_the_documents_are_known(tmp_path: Path) -> None:
    """`jsonschema`, `rich`, `torch` and the tokenizer libraries are for those who need them."""
    folder = Path(__file__).parent / "fixtures" / "internevo" / "llama_tp2_pp1_default"
    code = """
import sys
from engine.commands.main import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(*sorted({"jsonschema", "rich", "torch", "transformers", "tokenizers", "sentencepiece"} & set(sys.modules)))
"""
    for heavy in ("jsonschema", ""):
        command = [
            "run",
            "-m",
            "families/llama.yaml",
            "-s",
            str(folder),
            "-o",
            str(tmp_path / "hf"),
            "-q",
            "--overwrite",
        ]
        done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
        assert done.stdout.split("\n")[-2] == heavy
