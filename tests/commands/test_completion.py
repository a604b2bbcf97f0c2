"""Completion in real shells: commands, options, names of mappings, files, settings and codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from engine.commands.main import cli
from tests.support.depth import SOAK
from tests.support.terminal import ROOT

# What the shell is asked to complete, and what must be offered.
ASKED = [
    ("engine resh", "reshard"),
    ("engine run -m internlm2_5-7b-chat-1m-o", "internlm2_5-7b-chat-1m-official"),
    ("engine run -m mi", "mine.yaml"),
    ("engine run -s st", "step"),
    ("engine run -m internlm2 --set rotary=h", "halves"),
    ("engine explain E20", "E203"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file and a folder in it, and `engine` on its own path."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "engine"
    command.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                       "from engine.commands.main import main\nmain()\n")  # fmt: skip
    command.chmod(0o755)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.yaml").touch()
    (tmp_path / "here" / "step").mkdir()
    return tmp_path


def offered(shell: list[str], script: str, folder: Path) -> str:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "TERM": "dumb"}
    done = subprocess.run([*shell, script], capture_output=True, text=True, cwd=folder / "here", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BASH = r"""
compopt() { :; }
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'
asked() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _engine_completion; printf '%s\n' "${COMPREPLY[@]}" ==; }
eval "$(engine completion bash)"
"""


def offers(found: str) -> list[list[str]]:
    return [one.split("\n") for one in found.split("==\n")[:-1]]


@pytest.mark.parametrize(("line", "wanted"), [ASKED[0], ASKED[1], ASKED[5]])
def test_words_that_are_no_files_are_given_to_a_shell(line: str, wanted: str) -> None:
    _, *words, last = line.split()
    offer = ShellComplete(cli, {}, "engine", "_ENGINE_COMPLETE").get_completions(words, last)
    assert wanted in [one.value for one in offer]


def test_bash_completes(folder: Path) -> None:
    asked = ASKED if SOAK else ASKED[2::2]  # each is a process; fish is asked others
    words = (" ".join(part for word in line.split() for part in word.replace("=", " = ").split()) for line, _ in asked)
    found = offered(["bash", "-c"], BASH + "\n".join(f"asked {line}" for line in words), folder)  # as readline splits
    for (_, wanted), offer in zip(asked, offers(found), strict=True):
        assert wanted in offer


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(folder: Path) -> None:
    asked = ASKED if SOAK else ASKED[1:4:2]
    lines = "; ".join(f"complete -C '{line}'; echo ==" for line, _ in asked)
    found = offered(["fish", "--no-config", "-c"], f"engine completion fish | source; {lines}", folder)
    for (_, wanted), offer in zip(asked, offers(found), strict=True):
        assert any(wanted in one.split("\t")[0] for one in offer)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(folder: Path) -> None:
    script = 'autoload -U compinit; compinit -u -D; eval "$(engine completion zsh)"; print $_comps[engine]'
    assert offered(["zsh", "-f", "-c"], script, folder) == "_engine_completion\n"


def test_the_shell_is_that_of_the_environment_when_none_is_named() -> None:
    assert "complete -o nosort" in CliRunner(env={"SHELL": "/usr/bin/bash"}).invoke(cli, ["completion"]).stdout
    assert CliRunner(env={"SHELL": "/bin/sh"}).invoke(cli, ["completion"]).exit_code == 2
