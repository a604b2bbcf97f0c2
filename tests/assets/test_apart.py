"""The tokenizer is converted in a process of its own while tensors are copied, with the same result."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import engine
from engine.assets import apart, tokenizer
from engine.assets.tokenizer import convert_tokenizer
from engine.errors import EngineError
from engine.run.memory import predicted_memory
from tests.support.chats import SPEC
from tests.support.depth import sampled
from tests.support.shards import Model, save

MODEL = Model("v2", layers=3, hidden=64, heads=4, groups=2, ffn=96, vocab=512, bias=False)
LETTERS = {"mlp_letters": MODEL.letters}


@pytest.fixture(autouse=True)
def always_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "APART", 0)


@pytest.fixture(scope="module")
def wanted(model_file: Path) -> dict[str, bytes]:
    """What it comes to in this process."""
    return convert_tokenizer(model_file, SPEC)


def convert(file: Path, spec: dict[str, Any] = SPEC) -> dict[str, bytes]:
    return apart.convert_apart(file, spec, threading.Event())


def test_another_process_gives_the_same_files(model_file: Path, wanted: dict[str, bytes]) -> None:
    with mock.patch.object(tokenizer, "convert_understood", side_effect=AssertionError("not in this process")):
        files = convert(model_file)
    assert files == wanted


def test_an_error_of_the_other_process_is_told_as_if_it_were_ours(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    told = []
    for function in (convert, lambda file: convert_tokenizer(file, SPEC)):
        with pytest.raises(EngineError) as caught:
            function(tmp_path / "tokenizer.model")
        told.append(str(caught.value))
    assert told[0] == told[1] and told[0].startswith("E501")


@sampled(2)
@pytest.mark.parametrize("program", ["", "no-such-program", "false", "true"])
def test_without_another_process_it_is_converted_here(
    program: str,
    model_file: Path,
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert convert(model_file) == wanted


def test_what_python_prints_as_it_starts_is_not_taken_for_the_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this cluster')")
    monkeypatch.syspath_prepend(tmp_path)
    assert apart.call_apart(sorted, [3, 1]) == [1, 3]
    monkeypatch.setattr(sys, "executable", "echo")
    assert apart.call_apart(sorted, [3, 1]) is None


def test_a_run_that_stops_does_not_wait_for_it(model_file: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    assert apart.convert_apart(model_file, SPEC, stopped) == {}


def test_modules_are_not_taken_from_the_current_folder(
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sentencepiece.py").write_text("open('planted', 'w').close()")
    (tmp_path / "json.py").write_text("open('planted', 'w').close()")
    monkeypatch.chdir(tmp_path)
    convert(model_file)
    assert not (tmp_path / "planted").exists()


def test_the_memory_it_takes_is_told_and_counts_in_what_is_allowed(model_file: Path, tmp_path: Path) -> None:
    code = """
import re, sys
from engine.assets.apart import main
main()
print(re.search("VmHWM:[^0-9]*([0-9]+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""
    asked = pickle.dumps((convert_tokenizer, (model_file, SPEC)))
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, check=True)
    assert int(done.stderr) * 1024 <= apart.predicted_memory(model_file)
    model = MODEL
    save(model, tmp_path / "step", tp=1)
    plan = engine.plan(model.mapping, tmp_path / "step", settings=LETTERS)
    allowed = predicted_memory(plan, 1) + apart.predicted_memory(model_file) - 1
    with pytest.raises(EngineError) as caught:
        engine.convert(
            MODEL.mapping,
            tmp_path / "step",
            tmp_path / "hf",
            settings=LETTERS,
            tokenizer=model_file,
            max_memory=allowed,
        )
    assert caught.value.code == "E001" and "tokenizer" in str(caught.value)
