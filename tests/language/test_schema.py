"""Documents are checked against their schemas quickly, and errors are worded from the place they are at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

import engine
from engine.language.loader import load_text
from engine.language.validation import check_schema, violations

ROOT = Path(__file__).parents[2]
FILES = [p for p in sorted((ROOT / "mappings").glob("**/*.yaml")) if "layouts" not in p.parts]
SCHEMA = json.loads((ROOT / "schemas" / "mapping.schema.json").read_text())
VALUES = st.sampled_from([None, True, 0, -1, 1.5, 10**400, float("nan"), "", "a b", [], {}, [None], {"x": 1}, {1: 2}])


def changed(data: Any, path: list[Any], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        found += paths(value, (*at, key))
    return found


@given(st.data())
def test_the_quick_check_and_the_one_that_words_errors_give_one_verdict(data: st.DataObject) -> None:
    document = load_text(data.draw(st.sampled_from(FILES)).read_text("utf-8"), "x.yaml").data
    path = data.draw(st.sampled_from(paths(document)))
    document = changed(document, list(path), data.draw(VALUES))
    assert any(violations(document, "mapping")) == (not Draft7Validator(SCHEMA).is_valid(document))


@pytest.mark.parametrize("part", ["ignore: [1]", "refuse: [true]", "rules: [1.5]", "ignore: [null]", "refuse: [[]]"])
def test_an_entry_that_is_no_mapping_is_told_once_with_its_place(part: str) -> None:
    with pytest.raises(engine.EngineError, match="not keys and values") as error:
        check_schema(load_text(f"mapping: 1\nname: x\nversion: 1\nextends: y\n{part}\n", "x.yaml"), "mapping")
    assert [one.code for one in error.value.errors] == ["E102"] and error.value.place.line == 5


@pytest.mark.parametrize("key", ["name", "version", "source", "target"])
def test_a_mapping_of_the_models_own_names_lacks_no_key_either(key: str, tmp_path: Path) -> None:
    text = (ROOT / "mappings" / "families" / "transformers.yaml").read_text("utf-8")
    path = tmp_path / "own.yaml"
    path.write_text(re.sub(rf"^{key}:.*\n(?: .*\n)*", "", text, flags=re.MULTILINE), "utf-8")
    with pytest.raises(engine.EngineError, match=f"the key `{key}` is missing") as error:
        engine.load_mapping(path)
    assert error.value.code == "E102"


def test_a_number_as_a_key_is_refused_as_an_error_with_a_place() -> None:
    with pytest.raises(engine.EngineError) as caught:
        check_schema(load_text("mapping: 1\nname: x\n1: 2\n", "x.yaml"), "mapping")
    assert caught.value.code == "E102"


def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """`jsonschema` words errors; `rich`, `torch` and the tokenizer libraries are for those who need them."""
    folder = ROOT / "tests" / "fixtures" / "internevo" / "llama_tp2_pp1_default"
    code = """
import sys
from engine.commands.main import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(*sorted({"jsonschema", "rich", "torch", "transformers", "tokenizers", "sentencepiece"} & set(sys.modules)))
"""
    command = ["run", "-m", "families/llama.yaml", "-s", str(folder), "-o", str(tmp_path / "hf"), "-q"]
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == ""
