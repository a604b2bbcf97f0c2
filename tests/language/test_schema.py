"""Documents are checked against their schemas quickly, and errors are worded from the place they are at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from jsonschema_rs import Draft7Validator as Quick

import engine
from engine.language.loader import load_text
from engine.language.validation import _as_json, _is_valid, check_schema, violations

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


def keys_of(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every key that a schema explains, as `rules.name`, with its own schema."""
    for below in schema if isinstance(schema, list) else [schema]:
        for key, one in below.get("properties", {}).items() if isinstance(below, dict) else ():
            if isinstance(one, dict) and "examples" in one:
                yield f"{path}.{key}", one
            yield from keys_of(one, f"{path}.{key}")
        for inner in ("items", "additionalProperties", "anyOf") if isinstance(below, dict) else ():
            yield from keys_of(below.get(inner), path)


KEYS = [pair for kind in ("mapping", "layout")
        for pair in keys_of(json.loads((ROOT / "schemas" / f"{kind}.schema.json").read_text()), kind)]  # fmt: skip
ANY = "keys.*.default options.default content"  # keys that take whatever a checkpoint may say
NUMBERS = f"{ANY} version prefixes.when layers.stage divides number"  # those whose examples are all texts
WHOLE = "top_k max_length max_new_tokens min_length min_new_tokens no_repeat_ngram_size num_beams num_return_sequences"
# A key takes what is of the kind of one of its examples, and nothing else. Those that take a value all the same, and
# those that do not although an example is of its kind.
VALUES_OF_KINDS = [
    ("?", ANY, "mapping.name type decide rules.stage keep names format as of else uneven zip_root boxes"),
    (True, "options.default prefixes.when layers.stage divides number modes.when content", ""),
    (None, f"{ANY} also target.transformers remote_code keys.*.type tokenizer", ""),
    (7, NUMBERS, "top_p min_p typical_p"),
    (0, NUMBERS, "temperature repetition_penalty max_length max_new_tokens num_beams num_return_sequences"),
    (-1, NUMBERS, f"{WHOLE} temperature top_p min_p typical_p repetition_penalty"),
    (0.5, NUMBERS, f"mapping.mapping layout.layout {WHOLE}"),
    ([], ANY, "only rules pieces targets prefixes files state"),
    ({}, ANY, "remote_code auto_map unless variants.choices transform classes layout.config layout.training "
     "layout.layers modes files.ranks mesh"),
    ("", f"{NUMBERS} split zeros prefix modes.when", "*"),
    ([[]], f"{ANY} only added options.choices", "*"),
    ([""], f"{ANY} only added variants.choices options.choices remove split zeros model_types skip", "*"),
    ({"x": ""}, f"{ANY} absent variants.choices modes.choices dims rules.when transform.when mapping.config "
     "training_config generation write indices cuts.* sizes", "*"),
    ({"x": [[]]}, f"{ANY} absent unless answers mapping.config training_config generation write", "*"),
]  # fmt: skip


def kind_of(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


@pytest.mark.parametrize(("value", "taken", "refused"), VALUES_OF_KINDS, ids=repr)
def test_a_key_takes_what_its_examples_are_like_and_nothing_else(value: Any, taken: str, refused: str) -> None:
    def among(path: str, words: str) -> bool:
        return any(fnmatchcase(f".{path}", f"*.{word}") for word in words.split())

    for path, schema in KEYS:
        like = kind_of(value) in map(kind_of, schema["examples"])
        expected = among(path, taken) or (like and not among(path, refused))
        assert Quick(schema).is_valid(value) == expected, path
        assert all(map(Quick(schema).is_valid, schema["examples"])), path


# Keys that must be there in files that together have nearly all; numbers, and names that a file chooses, are a star.
NEEDED = {
    "layout": (
        ["layouts/internevo", "layouts/megatron"],
        "config config.file config.format config.or.*.file config.or.*.format layers layers.stage "
        "layers.variants.*.choices layout modes modes.*.beside.*.file modes.*.files modes.*.files.*.mesh.dp "
        "modes.*.files.*.name modes.*.files.*.ranks.count modes.*.files.*.ranks.tp modes.*.files.*.ranks.wp name "
        "options.*.type prefixes prefixes.*.prefix refuse.*.file refuse.*.fix refuse.*.tensor refuse.*.why "
        "training.file training.format version",
    ),
    "mapping": (
        ["families/internlm", "families/internlm2", "families/internlm-moe", "families/transformers", "internlm2-1_8b"],
        "config extends ignore.*.source ignore.*.target ignore.*.why mapping name names options.*.type refuse.*.source "
        "refuse.*.why rules rules.*.axes rules.*.source rules.*.target rules.*.targets rules.*.targets.*.axes "
        "rules.*.targets.*.name rules.*.transform.normalize source source.layout target target.also.*.architecture "
        "target.architecture target.model_type target.remote_code.auto_map target.remote_code.auto_map.AutoConfig "
        "tokenizer.file variants.*.choices variants.*.choices.* version",
    ),
}
CHOSEN = re.compile(r"\b(variants|options|also|modes|choices)[.][^.]+|[.][0-9]+\b")


def without(data: Any, path: tuple[Any, ...]) -> Any:
    key, *rest = path
    if rest:
        return changed(data, [key], without(data[key], tuple(rest)))
    return {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize("kind", NEEDED)
def test_keys_that_must_be_there_are_missed_and_no_others(kind: str) -> None:
    names, needed = NEEDED[kind]
    missed = set()
    for name in names:
        data = _as_json(load_text((ROOT / "mappings" / f"{name}.yaml").read_text("utf-8"), "x.yaml").data)
        for path in paths(data):
            if path and isinstance(path[-1], str) and not _is_valid(without(data, path), kind):
                missed.add(CHOSEN.sub(r"\1.*", ".".join(map(str, path))))
    assert {one for one in missed if not one.startswith("keys.")} == set(needed.split())
