import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.model import Expression, MappingFile
from engine.language.search import bundled, find_file, list_names

PARENT = """\
mapping: 1
name: parent
version: 1.0.0
source: {layout: internevo}
target: {model_type: llama, architecture: LlamaForCausalLM}
options:
  longest: {type: integer, default: 2048, help: longest sequence}
variants:
  rotary: {choices: {pairs: interleaved | default(false), halves: otherwise}, default: halves}
  head: {choices: {plain: otherwise}}
dims: {hidden: hidden_size, half: 2}
rules:
  - {source: embed.weight, target: model.embed.weight, axes: vocab hidden, split: vocab, stage: first}
  - name: q
    source: ["layers.{layer}.q.{param}", "blocks.{layer}.q.{param}"]
    axes: (heads half pair) | hidden
    split: heads
    when: {rotary: [pairs, halves]}
    targets: [{name: "model.layers.{layer}.q.{param}", axes: (heads pair half) | hidden}]
  - {name: head, source: head.weight, target: lm_head.weight, axes: vocab hidden, stage: last, when: {head: plain}}
ignore: [{source: "layers.{layer}.freq", why: recomputed}]
config:
  hidden_size: "{{ hidden }}"
  literal: "{layer} stays"
  rope: {kind: default, theta: "{{ rope_base | default(10000) }}"}
"""
CHILD = "mapping: 1\nname: child\nversion: 1.0.0\nextends: parent.yaml\n"


class Folder:
    """Writes mapping files into a folder and loads them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("parent.yaml", PARENT)

    def write(self, name: str, text: str) -> str:
        (self.path / name).write_text(text)
        return str(self.path / name)

    def load(self, text: str, name: str = "child.yaml") -> MappingFile:
        return load_mapping(self.write(name, text))

    def refused(self, code: str, text: str) -> EngineError:
        with pytest.raises(EngineError) as caught:
            self.load(text)
        assert caught.value.code == code, str(caught.value)
        assert caught.value.place is not None and caught.value.place.line is not None, str(caught.value)
        return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize("name", list_names())
def test_every_bundled_mapping_loads(name: str) -> None:
    mapping = load_mapping(name)
    assert mapping.layout and (mapping.as_model or (mapping.rules and mapping.config))
    assert mapping.files[-1].endswith(name)


@pytest.mark.parametrize("kind", ["mapping", "layout"])
def test_the_schemas_are_draft_07_and_explain_every_key(kind: str) -> None:
    schema = json.loads((bundled("schemas") / f"{kind}.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    assert "draft-07" in schema["$schema"]

    def walk(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [m for child in node for m in walk(child, path)]
        if not isinstance(node, dict):
            return []
        missing = []
        for key, below in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
            if "description" not in below or "examples" not in below:
                missing.append(f"{path}.{key}")
            missing += walk(below, f"{path}.{key}")
        for key in ("items", "additionalProperties", "anyOf", "oneOf"):
            missing += walk(node.get(key), path)
        if "properties" in node and node.get("additionalProperties") is not False:
            missing += [] if "ranks" in path or path.endswith("generation") else [f"{path} is open"]
        return missing

    assert walk(schema, kind) == []


def test_a_mapping_holds_what_its_file_says(folder: Folder) -> None:
    mapping = folder.load(PARENT)
    assert [rule.name for rule in mapping.rules] == ["embed.weight", "q", "head"]
    embed, q, head = mapping.rules
    assert embed.targets[0].name == "model.embed.weight" and embed.targets[0].axes == embed.axes
    assert q.sources == ("layers.{layer}.q.{param}", "blocks.{layer}.q.{param}")
    assert (q.split, dict(q.when), str(q.targets[0].axes)) == (
        ("heads",),
        {"rotary": ("pairs", "halves")},
        "(heads pair half) | hidden",
    )
    assert (head.stage, head.optional, head.transform) == ("last", False, None)
    assert mapping.config["literal"] == "{layer} stays"
    assert isinstance(mapping.config["rope"]["theta"], Expression)
    assert mapping.config["rope"]["theta"].text == "rope_base | default(10000)"
    assert mapping.dims["half"].text == "2"
    assert mapping.variants["rotary"].choices["halves"] is None
    assert mapping.ignore[0].side == "source"
    assert (q.place.line, q.targets[0].place.line) == (14, 19)


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("mapping: 1", "mapping: 2", "E102", "version 2"),
        ("mapping: 1\n", "", "E102", "`mapping` is missing"),
        ("    axes: (heads half pair)", "    axis: (heads half pair)", "E102", "Did you mean `axes`"),
        ("ignore: [", "ignore: [{source: a, why: b, values: options.longst}, ", "E108", "Did you mean `longest`"),
        ("dims:", "dim:", "E102", "Did you mean `dims`"),
        ("stage: last", "stage: lst", "E102", "Did you mean `last`"),
        ("version: 1.0.0", "version: [1]", "E102", "version"),
        ("target: lm_head.weight, ", "", "E102", "target"),
        ("target: lm_head.weight", "targets: [{name: a, axes: b}], target: c", "E102", "Keep one"),
        ("source: head.weight", "source: embed.weight, name2: x", "E102", "name2"),
        ("name: head, source: head.weight", "source: embed.weight", "E102", "two rules"),
        (", stage: last", "", "E102", "stage"),
        ("    split: heads", "    split: heads\n    stage: first", "E102", "must not"),
        ("split: heads", "split: haeds", "E108", "Did you mean `heads`"),
        ("{head: plain}", "{head: plan}", "E108", "Did you mean `plain`"),
        ("when: {head: plain}", "when: {haed: plain}", "E108", "Did you mean `head`"),
        ("default: halves", "default: halfs", "E108", "Did you mean `halves`"),
        ("{{ hidden }}", "{{ options.longst }}", "E108", "Did you mean `longest`"),
        ("default: halves", "answers: {config: [], longst: [8]}", "E108", "Did you mean `longest`"),
        ("default: halves", "answers: {rotary: [pair]}", "E108", "Did you mean `pairs`"),
        ("when: {head: plain}", "tied_to: model.embd.weight", "E108", "Did you mean `model.embed.weight`"),
        ("when: {head: plain}", "drop: {paddin: rows added}", "E108", "paddin"),
        ("when: {head: plain}", "transform: {normalize: hiden}", "E108", "Did you mean `hidden`"),
        ("when: {head: plain}", "transform: {normalise: hidden}", "E102", "Did you mean `normalize`"),
        ("when: {head: plain}", "transform: {add: 1, when: {haed: plain}}", "E108", "Did you mean `head`"),
        ("when: {head: plain}", "transform: {add: 1, when: {head: plan}}", "E108", "Did you mean `plain`"),
        (
            "when: {head: plain}",
            "transform: {add: 1}, drop: {hidden: none}, zeros: hidden",
            "E102",
            "as they are stored",
        ),
        ("when: {head: plain}", "transform: {add: 1}, tied_to: model.embed.weight", "E102", "has `tied_to`"),
        (
            "when: {head: plain}}",
            "tied_to: a.weight}\n  - {source: a, target: a.weight, axes: hidden, stage: last, transform: {add: 1}}",
            "E102",
            "has `tied_to`",
        ),
        ("when: {head: plain}", "drop: {hidden: none}, zeros: hiden", "E108", "Did you mean `hidden`"),
        ("when: {head: plain}", "transform: {add: one}", "E102", "a number"),
        ("when: {head: plain}", "transform: {add: 1, normalize: hidden}", "E102", "transform"),
        ("when: {head: plain}", "transform: {when: {head: plain}}", "E102", "transform"),
        ("ignore: [", "remove: [q]\nignore: [", "E106", "`remove` without a parent"),
        ("ignore: [", "tokenizer: {file: ../up.model}\nignore: [", "E104", "leaves its folder"),
        ("{plain: otherwise}", "[plain]", "E102", "has choices without expressions"),
        ("choices: {plain: otherwise}", "choices: {plain: otherwise}, decide: shapes", "E102", "is decided by shapes"),
        ("ignore: [", "generation: {temperature: hot}\nignore: [", "E102", "generation.temperature"),
        ("ignore: [", "generation: {top_p: 1.5}\nignore: [", "E102", "generation.top_p"),
        ("ignore: [", "generation: {do_sample: 1}\nignore: [", "E102", "generation.do_sample"),
        ("{{ hidden }}", "x {{ hidden }}", "E105", "around"),
        ("{{ hidden }}", "{{ hidden }} {{ hidden }}", "E105", "around"),
        ("{{ hidden }}", "{{ hidden + }}", "E105", "read"),
        ("hidden: hidden_size", "hidden: hidden_size.foo()", "E105", "called"),
        ("axes: vocab hidden, split", "axes: vocab (hidden, split", "E103", "closed"),
        ("axes: vocab hidden, split", "axes: vocab (+ hidden), split", "E103", "an axis is missing before `+`"),
        ("axes: vocab hidden, split", "axes: vocab (hidden +), split", "E103", "an axis is missing before `)`"),
        ("target: model.embed.weight", 'target: "model.{embed.weight"', "E104", "brace"),
        ("target: model.embed.weight", 'target: "model.*.weight"', "E104", "no wildcards"),
        ("hidden: hidden_size", 'hidden: "{{ hidden_size }}"', "E105", "without braces"),
        ("model.layers.{layer}.q.{param}", "model.layers.{layer}.q.weight", "E104", "one side"),
        ('"blocks.{layer}.q.{param}"', '"blocks.{block}.q.{param}"', "E104", "placeholders"),
    ],
)
def test_a_mistake_is_refused_with_its_place(folder: Folder, old: str, new: str, code: str, says: str) -> None:
    assert old in PARENT
    error = folder.refused(code, PARENT.replace(old, new, 1))
    assert says in str(error), str(error)


def test_what_is_said_twice_is_told_beside_a_misspelt_key_like_it(folder: Folder) -> None:
    twice = PARENT.replace("target: lm_head.weight", "targets: [{name: a, axes: b}], target: c, targts: d")
    told = [one.fix for one in folder.refused("E102", twice).errors]
    assert told == ["Keep one of them.", "Did you mean `targets`?"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("when: {head: plain}", "transform: {normalise: hidden}"), ("target: lm_head.weight", "tarket: lm_head.weight")],
)
def test_a_misspelt_key_is_not_told_as_a_missing_one_too(folder: Folder, old: str, new: str) -> None:
    error = folder.refused("E102", PARENT.replace(old, new, 1))
    assert "Did you mean" in str(error) and "is missing" not in str(error)


@pytest.mark.parametrize("name", [name for name in list_names() if name.startswith("families/")])
def test_what_the_help_of_a_variant_says_to_give_is_in_its_answers(name: str) -> None:
    for variant in load_mapping(name).variants.values():
        told = re.findall(r"--set (\w+)=", variant.help) + ["config"] * ("--config" in variant.help)
        assert set(told) == set(variant.answers)


def test_the_place_of_a_mistake_is_the_key_or_the_text(folder: Folder) -> None:
    error = folder.refused("E108", PARENT.replace("split: heads", "split: haeds"))
    assert (error.place.line, error.place.column) == (17, 12)
    error = folder.refused("E102", PARENT.replace("    axes: (heads half", "    axs: (heads half"))
    assert (error.place.line, error.place.column) == (16, 5)


def test_a_child_changes_only_what_it_writes(folder: Folder) -> None:
    parent, child = (
        folder.load(PARENT),
        folder.load(
            CHILD + "options: {longest: {default: 8}}\nconfig: {rope: {theta: 1e6}}\nexpect: {hidden: 64}\n"
            "rules:\n- {name: q, target: 'a.{layer}.{param}'}\n- {source: b, target: b, axes: hidden, stage: last}\n"
            "ignore: [{source: c, why: d}]\n"
        ),
    )
    assert (child.name, child.layout, child.files[-1]) == ("child", "internevo", str(folder.path / "child.yaml"))
    assert (child.options["longest"].default, child.options["longest"].help) == (8, "longest sequence")
    assert child.config["rope"] == {"kind": "default", "theta": 1e6}
    assert child.config["hidden_size"].text == "hidden"
    assert [*child.dims] == [*parent.dims] and dict(child.expect) == {"hidden": 64}
    assert [r.name for r in child.rules] == ["embed.weight", "q", "head", "b"]
    q = child.rules[1]
    assert [t.name for t in q.targets] == ["a.{layer}.{param}"] and q.targets[0].axes == q.axes
    assert q.when == parent.rules[1].when
    assert [e.pattern for e in child.ignore] == ["layers.{layer}.freq", "c"]
    assert child.rules[0].place.file.endswith("parent.yaml") and child.rules[1].place.file.endswith("child.yaml")
    assert "extends" not in child.resolved and child.digest != parent.digest


def test_a_file_that_changed_is_read_again_however_little_shows_it(folder: Folder) -> None:
    child, path = folder.write("child.yaml", CHILD), folder.path / "parent.yaml"
    before, then = load_mapping(child), path.stat().st_mtime_ns
    path.write_text(PARENT.replace("default(10000)", "default(20000)"))
    os.utime(path, ns=(then, then))
    after = load_mapping(child)
    assert "20000" in after.config["rope"]["theta"].text and after.digest != before.digest
    assert load_mapping(child) is after


def test_targets_replace_target(folder: Folder) -> None:
    child = folder.load(CHILD + "rules: [{name: head, targets: [{name: z, axes: hidden vocab}]}]")
    assert [(t.name, str(t.axes)) for t in child.rules[2].targets] == [("z", "hidden vocab")]


def test_choices_are_replaced_as_a_whole(folder: Folder) -> None:
    child = folder.load(CHILD + "variants: {rotary: {choices: {halves: otherwise, pairs: 'false'}}}")
    assert list(child.variants["rotary"].choices) == ["halves", "pairs"]
    assert child.variants["rotary"].default == "halves"


def test_remove_takes_rules_variants_dims_and_options(folder: Folder) -> None:
    child = folder.load(CHILD + "remove: [q, rotary, longest, half, rules.head, variants.head]")
    assert [r.name for r in child.rules] == ["embed.weight"]
    assert not child.variants and not child.options and list(child.dims) == ["hidden"]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("remove: [qq]\n", "E106", "does not have"),
        ("remove: [embed.wieght]\n", "E106", "Did you mean `embed.weight`"),
        ("remove: [head]\n", "E106", "more than one"),
        ("remove: [rotary]\n", "E108", "no variant `rotary`"),
        ("rules: [{name: new, target: a}]\n", "E102", "has no `source`"),
        ("rules: [{target: a}]\n", "E102", "neither"),
        ("ruls: []\n", "E102", "Did you mean `rules`"),
        ("expect: {hiden: 3}\n", "E108", "Did you mean `hidden`"),
    ],
)
def test_a_child_that_names_what_its_parent_lacks_is_refused(folder: Folder, text: str, code: str, says: str) -> None:
    error = folder.refused(code, CHILD + text)
    assert says in str(error)
    if code != "E108" or "expect" in text:
        assert error.place.line == 5


def test_circles_missing_parents_and_long_chains_are_refused(folder: Folder) -> None:
    assert "child.yaml → child.yaml" in str(folder.refused("E106", CHILD.replace("parent.yaml", "child.yaml")))
    assert "cannot be found" in str(folder.refused("E106", CHILD.replace("parent.yaml", "paren.yaml")))
    for i in range(9):
        folder.write(f"c{i}.yaml", CHILD.replace("parent.yaml", f"c{i - 1}.yaml" if i else "parent.yaml"))
    assert "more than" in str(folder.refused("E106", CHILD.replace("parent.yaml", "c8.yaml")))


def test_the_digest_depends_on_meaning_not_on_layout(folder: Folder) -> None:
    one = folder.load(PARENT).digest
    assert (
        folder.load(
            "# a comment\n" + PARENT.replace("{hidden: hidden_size, half: 2}", "\n  half: 2\n  hidden: hidden_size")
        ).digest
        == one
    )
    assert folder.load(PARENT.replace("split: heads", "split: half")).digest != one
    swapped = PARENT.replace(
        "{pairs: interleaved | default(false), halves: otherwise}",
        "{halves: otherwise, pairs: interleaved | default(false)}",
    )
    assert folder.load(swapped).digest != one


def test_mappings_are_found_by_path_name_and_search_folder(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_file(str(folder.path / "parent.yaml")).name == "parent.yaml"
    for name in ("families/internlm2.yaml", "families/internlm2", "internlm2.yaml", "internlm2"):
        assert find_file(name).name == "internlm2.yaml"
    with pytest.raises(EngineError) as caught:
        find_file("families/internlm22.yaml")
    assert caught.value.code == "E002" and "internlm2" in str(caught.value.fix)
    monkeypatch.setenv("ENGINE_MAPPINGS", str(folder.path))
    assert load_mapping("parent").name == "parent"
    (folder.path / "families").mkdir()
    folder.write("families/internlm2.yaml", PARENT.replace("name: parent", "name: mine", 1))
    assert load_mapping("families/internlm2.yaml").name == "mine"


@pytest.mark.parametrize("name", ("./internlm2.yaml", "./internlm2", "x/../internlm2.yaml", "families/./internlm2"))
def test_a_path_that_says_where_is_never_the_bundled_mapping_of_that_name(name: str) -> None:
    with pytest.raises(EngineError, match="there is no mapping file"):
        find_file(name)


def test_a_name_cannot_leave_the_search_folders(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder.path / "inside"
    inside.mkdir()
    monkeypatch.setenv("ENGINE_MAPPINGS", str(inside))
    with pytest.raises(EngineError, match="there is no mapping"):
        find_file("../parent")
