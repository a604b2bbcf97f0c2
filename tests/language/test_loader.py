import time
from pathlib import Path

import pytest
import yaml

from engine.errors import EngineError, EngineErrors
from engine.language import search
from engine.language.loader import MAX_BYTES, load_text, load_yaml
from engine.language.yaml_words import unreadable


def refused(text: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        load_text(text, "x.yaml")
    assert caught.value.code == "E101"
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("True", "True"),
        ("~", "~"),
        ("1.0.0", "1.0.0"),
        (".inf", ".inf"),
        ("2024-03-15", "2024-03-15"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("", None),
        ("0", 0),
        ("-7", -7),
        ("1e-5", 1e-5),
        ("1e6", 1e6),
        ("2.5", 2.5),
        ("'1e6'", "1e6"),
        ('"012"', "012"),
        ("'true'", "true"),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    loaded = load_text(f"a: {text}").data["a"]
    assert loaded == value and type(loaded) is type(value)


def test_every_key_and_value_knows_its_place() -> None:
    document = load_text("dims:\n  half: 2\nrules:\n- {source: a}\n", "x.yaml")
    assert document.data == {"dims": {"half": 2}, "rules": [{"source": "a"}]}
    assert str(document.value_place("dims", "half")) == "x.yaml:2:9"
    assert str(document.place("dims", "half")) == "x.yaml:2:3"
    assert str(document.place("rules", 0)) == "x.yaml:4:3"
    assert str(document.value_place("rules", 0, "source")) == "x.yaml:4:12"


def test_a_duplicate_key_is_refused_and_both_places_are_named() -> None:
    error = refused("a: 1\nb: 2\na: 3\n")
    assert str(error.place) == "x.yaml:3:1" and "in line 1" in str(error)


def test_keys_that_differ_only_in_type_are_duplicates() -> None:
    refused("a: {1: x, '1': y}")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 012", "leading zero"),
        ("a: &x 1", "anchors"),
        ("a: *x", "aliases"),
        ("<<: {a: 1}", "merge keys"),
        ("a: !!str 1", "tags"),
        ("a: !python/object/apply:os.system [ls]", "tags"),
        ("true: 1", "word"),
        ("[a]: 1", "key"),
        ("a: 1\n---\nb: 1", "document"),
        ("", "empty"),
        ("- 1", "keys and values"),
        ("a: [", "is not closed"),
        ("a: {b: c}}", "there is a `}` too many"),
        ("a: {b: c: d}", "the text of `b` has a `:` in it, which ends a key"),
        ("a: {b: c #d, e: f}", "the text of `b` has a `#` in it, which begins a comment"),
        ("a: 1\n// b\nc: 2", "a comment begins with `#`, not with `//`"),
        ("a: {b: 1\n", "is not closed"),
        ("a: \x00", "character"),
        ("a: \ud800", "UTF-8"),
    ],
)
def test_yaml_traps_are_refused_with_a_place(text: str, word: str) -> None:
    error = refused(text)
    assert word in error.message
    assert error.place is not None and error.place.file == "x.yaml"


def test_a_quoted_merge_key_is_an_ordinary_key() -> None:
    assert load_text("'<<': 1").data == {"<<": 1}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[a, "])
def test_deep_nesting_is_refused_at_once(opening: str) -> None:
    assert "deeper" in refused("a:\n  " + opening * 150_000).message


def test_nesting_that_the_parser_itself_refuses_is_told_as_that() -> None:
    mark = yaml.Mark("x.yaml", 0, 0, 1002, None, None)
    stopped = yaml.scanner.ScannerError("while increasing flow level", mark, "exceeded maximum nesting depth", mark)
    assert "deeper" in unreadable(stopped, "[" * 1010, "x.yaml").message


def test_depth_up_to_the_limit_is_read() -> None:
    load_text("a: " + "[" * 60 + "]" * 60)


def test_a_file_that_is_too_large_is_refused(tmp_path) -> None:
    path = tmp_path / "big.yaml"
    path.write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(EngineError, match="too large"):
        load_yaml(path)


def test_text_that_is_not_utf8_is_refused_where_it_stands(tmp_path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(EngineError, match="UTF-8") as caught:
        load_yaml(path)
    assert caught.value.place is not None
    assert (caught.value.place.line, caught.value.place.column) == (2, 7)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x]\r\n")
    assert load_yaml(path).data == {"a": 1, "b": ["x"]}


def test_what_is_wrong_in_several_entries_is_told_at_once() -> None:
    text = """mapping: 1
dims:
  layer: num_layers
  hidden: `bad
  pair: [1,
  2]
  vocab: [1, 2
rules:
  - name: one
    source: "unclosed
  - name: two
   source: x
config:
  a: *alias
  b: 012
config: {}
"""
    with pytest.raises(EngineErrors) as raised:
        load_text(text)
    told = [(one.place.line if one.place else None, one.message) for one in raised.value.errors]
    assert told == [
        (4, "the text begins with ```, which means something else in YAML"),
        (7, "a `[` is not closed"),
        (10, 'a quote `"` is not closed, in rule `one`'),
        (12, "the line is indented by 3 spaces, the key above it by 4, in rule `two`"),
        (14, "aliases (`*alias`) are not part of the language"),
        (15, "`012` has a leading zero: octal, decimal or text?"),
    ]


def test_one_mistake_is_told_once_whatever_it_does_to_the_lines_below() -> None:
    text = "dims: {a: 1,\n  b: 2\nrules:\n  - {name: x,\n    axes: y}\nconfig: {c: d,\ne: f}\n"
    with pytest.raises(EngineError) as raised:
        load_text(text)
    assert not isinstance(raised.value, EngineErrors)


def test_a_long_file_that_is_no_yaml_is_refused_quickly() -> None:
    started = time.process_time()
    with pytest.raises(EngineError):
        load_text("".join(f"k{i}:\n" + "  a: [\n" * 50 for i in range(200)))
    assert time.process_time() - started < 2


def test_a_folder_without_mappings_or_with_far_more_files_than_mappings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="E002 there are no mappings below"):
        search.rule_files(tmp_path)
    monkeypatch.setattr(search, "_MOST_ENTRIES", 3)
    (tmp_path / "below").mkdir()
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / "below" / name).write_text("mapping: 1\n", encoding="utf-8")
    assert [path.name for path in search.rule_files(tmp_path)] == ["a.yaml", "b.yaml"]
    (tmp_path / "below" / "c.txt").touch()
    with pytest.raises(EngineError, match=r"E001 .* holds more than 3 files and folders"):
        search.rule_files(tmp_path)
