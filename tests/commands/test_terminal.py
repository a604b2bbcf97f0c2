"""What a person at a terminal sees: an interruption says what is kept, progress has phase and rate, lines fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from engine import api
from engine.commands.main import cli
from engine.commands.say import say
from engine.errors import EngineError
from engine.run.meter import Meter, Progress
from engine.show.render import error
from engine.show.text import Styled, fit, table, terminal_width
from tests.support.terminal import ROOT, run_in_terminal

STEP = ROOT / "tests" / "fixtures" / "internevo" / "v1_tp2_pp2"


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_names_what_is_kept_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "convert", interrupted)
    out = tmp_path / "my model"
    partial = tmp_path / ".my model.partial-0123abcd"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(8192))
    done = CliRunner().invoke(cli, ["run", "-m", "internlm", "-s", str(STEP), "-o", str(out)])
    assert done.exit_code == 130
    assert f"interrupted: what was written is kept in {partial}" in done.stderr
    assert "continue  the same command with --resume" in done.stderr
    assert f"remove    engine clean '{out}'" in done.stderr


def test_a_run_that_fails_before_it_writes_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["run", "--plan", str(tmp_path / "none.json"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == "nothing was written"


def test_an_interruption_of_a_command_that_writes_nothing_speaks_of_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "prove", interrupted)
    done = CliRunner().invoke(cli, ["prove", "internlm"])
    assert (done.exit_code, done.stderr.strip()) == (130, "interrupted")


def test_a_resumed_run_says_what_it_kept(tmp_path: Path) -> None:
    from engine.show.render import render

    done = api.convert("internlm", STEP, tmp_path / "hf")
    assert done.kept == 0 and "kept" not in render("report.txt", done=done, then=())
    told: list[Progress] = []
    meter = Meter(100, told.append, "writing")
    meter.keep(40)
    meter.advance(60)
    assert (told[-1].done, told[-1].kept, told[-1].phase) == (100, 40, "writing")


def test_progress_is_shown_for_what_takes_over_a_second_and_is_gone_at_the_end(tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import time, click\nfrom engine.commands.progress import progress\nfrom engine.commands.say import say\n"
        "from engine.run.meter import Progress\n"
        "@click.command()\ndef main():\n    with progress(show=True) as tell:\n"
        "        for i in range(1, 13): tell(Progress(i * 10**9, 12 * 10**9, 'comparing replicas')); time.sleep(0.25)\n"
        "    say('done')\nmain()\n"
    )
    screen = run_in_terminal([sys.executable, str(program)], tmp_path)
    assert screen.text.strip() == "done"
    assert "comparing replicas" in screen.written and " %  " in screen.written and "/s, " in screen.written
    assert "\x1b[31m" not in screen.written and "\x1b[35m" not in screen.written  # colours of errors


def test_a_command_of_less_than_a_second_shows_no_progress(tmp_path: Path) -> None:
    assert "\x1b[?25l" not in run_in_terminal(["engine", "env"], tmp_path).written


def test_lines_go_on_under_their_own_first_word_and_break_at_separators() -> None:
    assert fit("  note one two three four five", 20) == "  note one two three\n      four five"
    assert fit("next: engine run --mapping internlm2-chat-7b", 20) == "next: engine run --mapping internlm2-chat-7b"
    assert fit("   hf upload ORG/NAME some/folder", 20) == "   hf upload ORG/NAME some/folder"
    assert all(len(line) <= 24 for line in fit("got " + "model.layers.0.mlp.gate_proj.weight" * 3, 24).split("\n"))


def test_whatever_is_printed_controls_no_terminal_but_by_the_engine_s_own_styles(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\x1b[1mbold\x1b[0m\x1b]0;title\x07\x1b[2J"
    with click.Context(click.Command("x")) as context:
        context.color = True
        say(text)
        say(Styled(text))
    assert capsys.readouterr().out.splitlines() == [
        r"\x1b[1mbold\x1b[0m\x1b]0;title\x07\x1b[2J", "\x1b[1mbold\x1b[0m" r"\x1b]0;title\x07\x1b[2J",
    ]  # fmt: skip


@pytest.mark.parametrize(("severity", "colour"), [("error", "red"), ("warning", "yellow")])
def test_the_colour_of_a_code_says_how_severe_it_is(severity: Any, colour: str) -> None:
    finding = EngineError("L001", "odd")
    finding.severity = severity
    assert error(finding).startswith(click.style("L001", fg=colour, bold=True))


def test_into_a_pipe_every_row_is_one_line() -> None:
    assert terminal_width() is None
    assert len(table(("a", "b"), [("x" * 300, "y" * 300)])) == 2


def test_a_terminal_that_claims_a_few_columns_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns, width in (("3", 40), ("40", 40), ("41", 41)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width


def test_a_column_without_anything_to_say_is_left_out() -> None:
    plain = [click.unstyle(line) for line in table(("step", "why", "size"), [(10, "", "1 kB"), (20, "", "2 kB")])]
    assert plain == ["  step  size", "    10  1 kB", "    20  2 kB"]
    assert click.unstyle(table(("step", "why"), [])[0]) == "  step  why"
