"""What people see on their way is as written down, fits a terminal of 80 columns, and speaks their language."""

from __future__ import annotations

import re

import pytest

from tests.walks.walk import FOLDER, WALKS, walked


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_looks_as_it_is_written_down(name: str) -> None:
    assert walked(name) == (FOLDER / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", WALKS)
def test_screens_fit_and_hold_no_traceback(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text()
    assert "Traceback" not in text and "E901" not in text and "\x1b" not in text
    data = False  # for another program
    for line in text.splitlines():
        data = "--format" in line if line.startswith("$ ") else data
        copied = re.match(r"\s*(\$ |next: |hf upload )", line)  # a command to copy stays whole
        assert len(line) <= 80 or copied or data or line.startswith("# "), line
