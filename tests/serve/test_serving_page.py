"""The examples of docs/serving.md run as they stand, one after the other."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.serve import mount
from tests.support.depth import deep
from tests.support.serving import STEP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps in the current folder, and an `engine` to call."""
    for step in ("100", "200"):
        shutil.copytree(STEP, tmp_path / "ckpt" / step)
    (tmp_path / "bin").mkdir()
    for name, runs in (("engine", "-m engine"), ("python", ""), ("hf", "-m huggingface_hub.cli.hf")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {runs} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_run_one_after_the_other(work: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["rows"].shape[0] == 16 and names["model"].store and "model.safetensors" in names["sizes"]
    assert (work / "ckpt-tp1" / "model_tp0_pp0.pt").exists()


def shell(work: Path, commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands; those in the background are waited for till they say that they are ready, and ended at last."""
    ports: dict[str, str] = {}
    lines = ["set -e", "trap 'kill $started; wait' EXIT", "started="]
    for number, command in enumerate(commands):
        for port in re.findall(r"\b800\d\b", command):
            ports.setdefault(port, str(free_port()))
            command = command.replace(port, ports[port])
        if command.startswith("engine serve") and "--port" not in command:
            command = command.replace(" &", f" --port {ports.setdefault('8000', str(free_port()))} &")
        if command.endswith("&"):
            command = command[:-1] + f"2> log{number} &"
            wait = f"until grep -q -e HF_ENDPOINT= -e 'mounted at' log{number}; do kill -0 $! ; sleep 0.1; done"
            lines += [command, 'started="$started $!"', wait]
        else:
            lines.append(command)
    binaries = f"{work / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=work, capture_output=True, text=True, timeout=110,
        env={**os.environ, "PATH": binaries, "PYTHONPATH": str(ROOT), "HF_HOME": str(work / "home")},
    )  # fmt: skip


def commands(text: str) -> list[str]:
    return re.findall(r"^\$ (.*)$", text, re.MULTILINE)


LOADS = "python -c 'from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(\"{}\")'"


def loads(command: str) -> bool:
    return command.startswith("python")


def test_the_page_loads_models_as_the_tests_of_clients_and_mounts_do() -> None:
    """Starting transformers takes as long as all else on the page."""
    found = [command for block in blocks("console") for command in commands(block) if loads(command)]
    assert found == [LOADS.format("internlm/mine"), LOADS.format("model")]


@deep
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_of_serving_run_one_after_the_other(work: Path) -> None:
    written = [command for block in blocks("console")[:3] for command in commands(block) if not loads(command)]
    assert sum(command.startswith("engine serve") for command in written) == 3
    done = shell(work, written)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "step-100" / "model.safetensors").stat().st_size > 500_000
    assert len((work / "start").read_bytes()) == 100
    assert '"mine/late"' in (work / "models.json").read_text()


@deep
def test_the_examples_of_mounting_run_one_after_the_other(work: Path) -> None:
    try:
        mount._fuse()
    except EngineError as error:
        pytest.skip(f"no FUSE: {error.got}")
    (block,) = [block for block in blocks("console") if "engine mount" in block]
    there = [command for command in commands(block) if shutil.which(command.split()[0]) or "engine" in command]
    done = shell(work, [command for command in there if not loads(command)])
    assert "model.safetensors" in done.stdout, done.stdout + done.stderr
    assert not os.path.ismount(work / "model")
