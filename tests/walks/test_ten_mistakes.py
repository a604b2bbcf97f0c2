"""The ten mistakes of a mapping author: each gives one message, and they are a page of the guide.

`python -m tests.walks.test_ten_mistakes` writes the page anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.depth import sampled
from tests.support.mistakes import FILE, ROOT, Mistake, told

PAGE = ROOT / "docs" / "ten-mistakes.md"
WO = """  - name: wo
    source: "layers.{layer}.attention.wo.{param}"
    target: "model.layers.{layer}.self_attn.o_proj.{param}"
    axes: hidden | (groups queries head_dim)
    split: groups
"""
MISTAKES = (
    Mistake("A misspelt key", "    split: groups\n    when: {rotary: halves}",
            "    spilt: groups\n    when: {rotary: halves}", ("`spilt`", "rule `qkv`", "Did you mean `split`?")),
    Mistake("An axis of another name", "axes: (groups k head_dim) | hidden", "axes: (groups k head_dims) | hidden",
            ("rule `qkv`", "`head_dims`", "`head_dim`", "k_proj")),
    Mistake("A missing rule", WO, "", ("attention.wo.weight", "no rule", "like rule `qkv` (my-model.yaml:"),
            ("plan", "--mapping", FILE, "--src", "step")),
    Mistake("Two rules for one tensor", "  - source: norm.weight\n",
            "  - {source: norm.weight, target: model.final.weight, axes: hidden, stage: last}\n"
            "  - source: norm.weight\n    name: norm\n",
            ("`norm.weight`", "rules `norm.weight` and `norm`", "Give them different `when`")),
    Mistake("Not a Jinja expression", "layer_norm_epsilon | default(1e-5)", "layer_norm_epsilon | default(1e-5",
            ("a `(` is not closed", "layer_norm_epsilon | default(1e-5")),
    Mistake("A tab", "    split: groups\n    when: {rotary: halves}", "\tsplit: groups\n    when: {rotary: halves}",
            ("tab", "rule `qkv`", "Write 4 spaces")),
    Mistake("A wrong indentation", "    split: groups\n    when: {rotary: halves}",
            "     split: groups\n    when: {rotary: halves}", ("indented by 5 spaces", "rule `qkv`", "4 spaces")),
    Mistake("A duplicate key", "    split: groups\n    when: {rotary: halves}",
            "    split: groups\n    split: heads\n    when: {rotary: halves}", ("`split` occurs twice", "rule `qkv`")),
    Mistake("A value of the wrong type", "  layer: num_layers", "  layer: [num_layers]",
            ("`dims.layer` is a list", "a text")),
    Mistake("A layout that does not exist", "layout: internevo,", "layout: internevo2,",
            ("there is no layout `internevo2`", "Did you mean `internevo`?")),
)  # fmt: skip


@sampled(2)
@pytest.mark.parametrize("mistake", MISTAKES, ids=[one.title for one in MISTAKES])
def test_a_mistake_gives_one_message_that_says_where_what_and_what_to_do(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = told(mistake, tmp_path)
    assert code == 1
    assert len(re.findall(r"^[EL]\d{3} ", text, re.MULTILINE)) == 1, text
    assert all(part in text for part in mistake.says), text
    assert not re.search(r"token|template|mapping values|block|schema|violat", text), text  # a parser's own words
    if mistake.command[0] == "lint":
        at = re.search(rf"^  {FILE}:(\d+):", text, re.MULTILINE)
        assert at is not None, text
        lines = mistake.text.split("\n")
        near = "\n".join(lines[int(at[1]) - 2 : int(at[1]) + 12])
        assert any(line in near for line in mistake.new.split("\n") if line), text
    assert f"  {text.splitlines()[-1].strip()}" == text.splitlines()[-1]  # ends with what to do


def page(folder: Path) -> str:
    """The page of the guide, with what the engine says now."""
    parts = [
        "# Ten mistakes in a mapping, and what the engine says\n\n"
        "Each of these was made in a copy of `mappings/families/internlm2.yaml`, called `my-model.yaml`. The messages\n"
        "are what the engine prints; a file with several mistakes gets all their messages at once, and\n"
        "`engine explain CODE` says more about each code.\n"
    ]
    for number, mistake in enumerate(MISTAKES, 1):
        _, text = told(mistake, folder)
        parts.append(
            f"## {number}. {mistake.title}\n\n{mistake.edit}\n\n"
            f"```text\n$ engine {' '.join(mistake.command)}\n{text}\n```\n"
        )
    return "\n".join(parts)


def test_the_page_of_the_guide_has_these_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PAGE.read_text() == page(tmp_path)


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        PAGE.write_text(page(Path(temporary)))
