"""Walks: what a person types and sees, one after another, in a terminal of 80 columns.

A walk is a text file: `$ command` and below it the screen. `python -m tests.walks.walk` walks them all again and
writes down what it sees; a reviewer reads the difference.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.terminal import ROOT, run_in_terminal

FOLDER = Path(__file__).parent
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
_VARYING = (
    (re.compile(r"\bin [\d.]+ (?:min [\d.]+ )?s(?:, [\d.]+ \w?B/s)?"), "in … s"),
    (re.compile(r"\([\d.]+ s\)"), "(… s)"),
    (re.compile(r"about \d+ MiB"), "about … MiB"),
    (re.compile(r"within [\d.e-]+"), "within …"),
)


def newcomer(folder: Path) -> None:
    """A run's folder with one whole step and one that is still being written."""
    shutil.copytree(FIXTURES / "v1_tp2_pp2", folder / "ckpt" / "10", ignore=shutil.ignore_patterns("oracle.pt"))
    shutil.copytree(folder / "ckpt" / "10", folder / "ckpt" / "20")
    (folder / "ckpt" / "20" / "model_tp1_pp1.pt").unlink()


def stranger(folder: Path) -> None:
    """A checkpoint of a model that nobody has converted, whole and with a file that was cut off."""
    shutil.copytree(FIXTURES / "v2_tp2_pp2", folder / "ckpt", ignore=shutil.ignore_patterns("oracle.pt"))
    shutil.copytree(folder / "ckpt", folder / "cut-off")
    whole = (folder / "cut-off" / "model_tp1_pp0.pt").read_bytes()
    (folder / "cut-off" / "model_tp1_pp0.pt").write_bytes(whole[: len(whole) // 2])


RELEASE = """mapping: 1
name: small
version: 0.1.0
description: A small InternLM2 for a test
extends: families/internlm2.yaml
expect: {layer: 4, hidden: 64}
"""


def pull_request(folder: Path) -> None:
    """A repository with a family on main, and beside it a new release and a careless edit."""
    family = folder / "mappings" / "families" / "internlm2.yaml"
    family.parent.mkdir(parents=True)
    text = (ROOT / "mappings" / "families" / "internlm2.yaml").read_text()
    family.write_text(text)
    for words in ("init -q -b main", "add .", "-c user.name=a -c user.email=a@b.c commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    (folder / "mappings" / "small.yaml").write_text(RELEASE)
    family.write_text(text.replace("rope_base | default(10000)", "rope_base | default(1000)"))
    (folder / "broken.yaml").write_text(
        RELEASE.replace("description", "descripton").replace("{layer: 4", "{layer: four")
    )


WALKS: dict[str, Callable[[Path], None]] = {
    "newcomer": newcomer,
    "stranger": stranger,
    "pull_request": pull_request,
}


def commands(name: str) -> list[str]:
    """The commands of a walk."""
    return re.findall(r"^\$ (engine.*)$", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE)


def walked(name: str) -> str:
    """A walk as it is now: each command, and what stands on the screen when it ends."""
    parts = [f"# {(WALKS[name].__doc__ or '').strip()}\n"]
    with tempfile.TemporaryDirectory(prefix="walk-") as temporary:
        folder = Path(temporary).resolve()
        WALKS[name](folder)
        for line in commands(name):
            screen = run_in_terminal(shlex.split(line), folder, columns=80)
            text = screen.text.replace(str(folder), "FOLDER")
            for pattern, same in _VARYING:
                text = pattern.sub(same, text)
            code = f"[exit code {screen.code}]\n" if screen.code else ""
            parts.append(f"$ {line}\n{text.rstrip()}\n{code}")
    return "\n".join(parts)


if __name__ == "__main__":
    for one in sys.argv[1:] or WALKS:
        (FOLDER / f"{one}.txt").write_text(walked(one))
