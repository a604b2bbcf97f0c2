"""The page of commands shows what the commands print, with nothing left out but what `…` stands for."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.commands.main import cli
from tests.support.terminal import ROOT

PAGE = (ROOT / "docs" / "commands.md").read_text()
RUN = (  # quick ones
    "inspect", "mappings", "new", "plan", "run", "reverse", "reshard", "explain", "compare", "verify", "clean", "diff",
)  # fmt: skip
UNTOLD = ("engine compare hf step", "engine verify hf --mapping", "engine plan -m internlm2 -s step -o parts.json")
FIRST = {"engine compare hf2 hf": "engine run --mapping internlm2 --src step --out hf2 --set rotary=pairs"}
_VARYING = re.compile(r" in [\d.]+ s.*|about \d+ MiB|internlm2\.yaml:\d+(:\d+)?|, [\d.]+ kB$")


def examples() -> list[tuple[str, list[str]]]:
    """Each command of the page with the lines that are shown below it, in an order in which they can be run."""
    found = []
    for block in re.findall(r"^```console\n\$ (engine .*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        command, *lines = block.rstrip().split("\n")
        if command.split()[1] in RUN and not command.startswith(UNTOLD):
            found.append((command, lines))
    return sorted(found, key=lambda one: one[0].startswith("engine inspect hf"))


def told(lines: Iterable[str]) -> str:
    return "".join(f"{_VARYING.sub('', line)}\n" for line in lines if line)


def test_the_examples_of_the_page_are_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, but for what `…` on a line of its own stands for."""
    monkeypatch.chdir(tmp_path)
    ignored = shutil.ignore_patterns("oracle.pt")
    shutil.copytree(ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2", "step", ignore=ignored)
    family = (ROOT / "mappings" / "families" / "internlm2.yaml").read_text()
    source = "layers.{layer}.feed_forward.w%s.{param}"
    old = f'  - name: up\n    source: "{source % 3}"'
    assert old in family
    Path("changed.yaml").write_text(family.replace(old, old.replace(source % 3, source % 1)))
    for command, lines in examples():
        for one in (*([FIRST[command]] if command in FIRST else ()), command):
            done = CliRunner().invoke(cli, shlex.split(one)[1:])
        printed = told((done.stdout or done.stderr).split("\n"))
        shown = "".join(
            ".*" if part == "\n" else re.escape(part) for part in re.split("^…(\n)", told(lines), flags=re.M)
        )
        assert re.fullmatch(shown, printed, re.DOTALL), f"{command}:\n{printed}"
