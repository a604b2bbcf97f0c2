"""The page of commands shows what the commands print: every line of its examples is in their real output."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.commands.main import cli
from tests.support.terminal import ROOT

PAGE = (ROOT / "docs" / "commands.md").read_text()
RUN = ("inspect", "mappings", "new", "plan", "run", "reverse", "reshard", "diff")  # quick ones, in the page's order
_VARYING = re.compile(r" in [\d.]+ s.*|about \d+ MiB|internlm2\.yaml:\d+:\d+")


def examples() -> list[tuple[str, list[str]]]:
    """Each command of the page with the lines that are shown below it."""
    found = []
    for block in re.findall(r"^```console\n\$ (engine .*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        command, *lines = block.rstrip().split("\n")
        if command.split()[1] in RUN and not any(line.startswith("$ ") for line in lines):
            found.append((command, [line for line in lines if line not in ("", "…")]))
    order = [command for command, _ in found if not command.startswith("engine inspect hf")]
    return sorted(found, key=lambda one: order.index(one[0]) if one[0] in order else len(order))


def test_the_examples_of_the_page_are_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ignored = shutil.ignore_patterns("oracle.pt")
    shutil.copytree(ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2", "step", ignore=ignored)
    family = (ROOT / "mappings" / "families" / "internlm2.yaml").read_text()
    source = "layers.{layer}.feed_forward.w%s.{param}"
    old = f'  - name: up\n    source: "{source % 3}"'
    assert old in family
    Path("changed.yaml").write_text(family.replace(old, old.replace(source % 3, source % 1)))
    for command, lines in examples():
        done = CliRunner().invoke(cli, shlex.split(command)[1:])
        printed = [_VARYING.sub("", line) for line in (done.stdout + done.stderr).split("\n")]
        for line in lines:
            assert _VARYING.sub("", line) in printed, f"{command}: {line}\n" + "\n".join(printed)
