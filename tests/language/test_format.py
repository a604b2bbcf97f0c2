import re
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.language.format import format_mapping
from engine.language.loader import load_text
from engine.language.search import bundled
from tests.support.depth import sampled

FILES = sorted(bundled("mappings").rglob("*.yaml"))


def comments(text: str) -> list[str]:
    return sorted(re.findall(r"(?:^|\s)(#.*)", text))


@sampled(4)
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_formatting_a_bundled_file_changes_no_data_and_loses_no_comment(path: Path) -> None:
    text = path.read_text()
    once = format_mapping(text)
    assert load_text(once).data == load_text(text).data
    assert comments(once) == comments(text)
    assert format_mapping(once) == once
    assert all(line == line.rstrip() for line in once.split("\n"))


def test_keys_come_in_their_usual_order_with_their_comments() -> None:
    text = "# head\n\nrules: []\n# why\nname: a   # said\nmapping: 1\nversion: 1.0.0\n"
    assert format_mapping(text) == "# head\n\nmapping: 1\n# why\nname: a   # said\nversion: 1.0.0\nrules: []\n"


def test_a_long_rule_becomes_a_block_and_a_short_one_stays() -> None:
    text = """\
mapping: 1
rules:
  # the norm
  - {source: norm.weight, target: model.norm.weight, axes: hidden}
  - {axes: "(a b) | c", split: [a], when: {x: [y, z]}, name: "q", source: [s, r], targets: [{name: t, axes: b}]}   # why
"""
    assert (
        format_mapping(text)
        == """\
mapping: 1

rules:
  # the norm
  - {source: norm.weight, target: model.norm.weight, axes: hidden}
  - name: "q"   # why
    source: [s, r]
    axes: "(a b) | c"
    split: [a]
    when: {x: [y, z]}
    targets:
      - {name: t, axes: b}
"""
    )


def test_a_block_rule_is_put_in_order_with_its_comments() -> None:
    text = "mapping: 1\n\nrules:\n- axes: a\n  # from here\n  source: b   # old\n  name: c\n  target: d\n"
    expected = "mapping: 1\n\nrules:\n- name: c\n  # from here\n  source: b   # old\n  target: d\n  axes: a\n"
    assert format_mapping(text) == expected


def test_a_key_of_one_line_stays_beside_the_next_though_a_comment_follows_it() -> None:
    text = "mapping: 1\nname: a\n  # which is its own\nversion: 1.0.0\n"
    assert format_mapping(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "{rules: [], mapping: 1}\n",
        "rules:\n  - {source: a,\n     target: b, axes: c, split: c}\nmapping: 1\n",
        "description: |\n  text  \n  # no comment\n\n\nmapping: 1\n",
        "rules: [{source: a, target: b, axes: c, split: c}]\n",
        "rules:\n- source: a\n\n  name: b\n\n  axes: c\n",
        "rules:\n- # first\n  source: a\n  name: b\n",
        'name: "a\n  b "\nmapping: 1\n',
        "description: >-\n  one\n\n  two\n# end\nmapping: 1\n# last\n",
        "a: {}\n\n\n\nmapping: 1\n\n\n",
        "mapping: 1\n\ndescription: >-\n  one\n\nextends: a\n",
        "mapping: 1\n\ndescription: |+\n  one\n\nextends: a\n",
    ],
)
def test_unusual_spellings_keep_data_and_comments(text: str) -> None:
    once = format_mapping(text)
    assert load_text(once).data == load_text(text).data
    assert comments(once) == comments(text)
    assert format_mapping(once) == once


def test_windows_line_ends_and_a_byte_order_mark_go() -> None:
    assert format_mapping("\ufeffmapping: 1\r\nname: a\r\n") == "mapping: 1\nname: a\n"


def test_text_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(EngineError, match="is not closed"):
        format_mapping("a: [")


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_bundled_files_are_in_their_usual_form(path: Path) -> None:
    assert format_mapping(path.read_text()) == path.read_text()
