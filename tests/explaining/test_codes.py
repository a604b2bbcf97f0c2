"""Every code that the engine prints has a page that explains it, and no page explains another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.explaining.codes import explain_code, list_codes

ROOT = Path(__file__).parents[2]
CODES = list_codes()


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    raised = {
        code for path in (ROOT / "engine").rglob("*.py") for code in re.findall(r'"([EL]\d{3})"', path.read_text())
    }
    assert {page.stem for page in (ROOT / "docs" / "codes").iterdir()} == set(CODES) == raised | {"E901"}


@pytest.mark.parametrize("code", CODES)
def test_a_page_has_its_title_and_sections(code: str) -> None:
    text = explain_code(code)
    lines = text.splitlines()
    assert lines[0] == f"# {code}: {CODES[code]}"
    why = "Why it is refused" if code.startswith("E") else "Why it is reported"
    assert [line[3:] for line in lines if line.startswith("## ")] == [
        "What it means",
        "Example",
        why,
        "How to fix it",
    ]
    assert 12 <= len(lines) <= 60, len(lines)
    assert max(map(len, re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines())) <= 120


@pytest.mark.parametrize("code", CODES)
def test_the_example_is_a_message_with_the_code(code: str) -> None:
    example = explain_code(code).split("## Example")[1].split("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", example, re.MULTILINE | re.DOTALL)
    assert any(re.search(rf"^(\S+: )?{code} ", block, re.MULTILINE) for block in blocks), example


@pytest.mark.parametrize("code", CODES)
def test_a_page_names_known_codes_and_no_machine_paths(code: str) -> None:
    text = explain_code(code)
    assert set(re.findall(r"\b[EL]\d{3}\b", text)) <= {*CODES}
    assert not re.search(r"/(work|tmp|home)/", text)


def test_a_code_may_be_written_small() -> None:
    assert explain_code(" e203 ") == explain_code("E203")


@pytest.mark.parametrize(("code", "near"), [("E230", "E203"), ("203", "E203"), ("L006", "L00")])
def test_an_unknown_code_suggests_near_ones(code: str, near: str) -> None:
    with pytest.raises(EngineError) as caught:
        explain_code(code)
    assert caught.value.code == "E001"
    assert caught.value.expected is not None and near in caught.value.expected


def test_something_else_lists_the_codes() -> None:
    with pytest.raises(EngineError) as caught:
        explain_code("../../../etc/passwd")
    assert "E901" in str(caught.value.expected)
