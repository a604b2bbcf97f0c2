"""The README in both languages: the same headings in the same order, the same commands, the same links."""

from __future__ import annotations

import re
from pathlib import Path

from engine.commands.main import cli

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
HEADINGS = {
    "Try it": "试一试",
    "Your own checkpoint": "你自己的检查点",
    "Install": "安装",
    "A rule": "一条规则",
    "Commands": "命令",
    "Without converting, and beyond one machine": "不转换，以及不止一台机器",
    "Limits": "限制",
    "Documentation": "文档",
}


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def code(text: str) -> list[str]:
    """Lines of code, comments and the picture aside."""
    blocks = re.findall(r"^```(?:console|python|yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]


def table(text: str) -> list[str]:
    return re.findall(r"^\| `(engine [^`]+)` \|", text, re.MULTILINE)


def test_both_have_the_same_headings_in_the_same_order() -> None:
    assert headings(ENGLISH) == list(HEADINGS)
    assert headings(CHINESE) == list(HEADINGS.values())


def test_both_have_the_same_code_and_commands() -> None:
    assert code(ENGLISH) == code(CHINESE)
    assert table(ENGLISH) == table(CHINESE)


def test_the_table_has_every_command() -> None:
    assert {line.split()[1] for line in table(ENGLISH)} == {n for n, c in cli.commands.items() if not c.hidden}


def test_both_link_to_the_same_pages() -> None:
    links = [
        sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"})
        for text in (ENGLISH, CHINESE)
    ]
    assert links[0] == links[1]
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(links[0]) <= {"docs/index.md", "docs/command-options.md"}
