"""`engine diff` says what changes in a mapping's file, and separately what that comes to."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from engine import api
from engine.assets.chat import unmarked
from engine.commands.main import cli
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.proving import holdings, meaning
from engine.proving.diff import MappingDiff
from engine.proving.holdings import small_cases
from engine.proving.meaning import facts_of
from engine.show.changes import rendered

ROOT = Path(__file__).parents[2]
FAMILY = (ROOT / "tests" / "fixtures" / "mappings" / "internlm2-one-line-rules.yaml").read_text("utf-8")
CHILD = "mapping: 1\nname: child\nversion: 1.0.0\nextends: family.yaml\n"


@pytest.fixture(scope="module", autouse=True)
def few_grids() -> Iterator[None]:
    """Two grids tell mappings apart as well as all that are in what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meaning, "_KNOWN", {})
        patch.setattr(holdings, "small_cases", lambda layout: small_cases(layout)[:2])
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def compared(folder: Path, *edits: tuple[str, str]) -> MappingDiff | None:
    """The family against an edited copy."""
    text = FAMILY
    for before, after in edits:
        assert before in text, before
        text = text.replace(before, after)
    (folder / "old.yaml").write_text(FAMILY, encoding="utf-8")
    (folder / "new.yaml").write_text(text, encoding="utf-8")
    found = api.diff(folder / "old.yaml", folder / "new.yaml")
    return found[0] if found else None


def tensors(diff: MappingDiff | None) -> list[tuple[str, str, tuple[str, ...]]]:
    assert diff is not None
    return [(one.kind, one.target, one.when) for one in diff.tensors]


def keys(diff: MappingDiff | None) -> list[tuple[str, str, str]]:
    assert diff is not None
    return [(one.section, one.kind, one.name) for one in diff.changes]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a family and its child, as of `first`."""
    folder = tmp_path / "repository"
    (folder / "mappings").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "mappings" / "family.yaml").write_text(FAMILY, encoding="utf-8")
    (folder / "mappings" / "child.yaml").write_text(CHILD, encoding="utf-8")
    for name in (b"caf\xe9.txt", b"caf\xe9.yaml"):  # other files may have names that are no UTF-8
        (folder / os.fsdecode(name)).write_text("é", encoding="utf-8")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    git(folder, "tag", "first")
    return folder


def edit_family(repository: Path, before: str, after: str) -> None:
    path = repository / "mappings" / "family.yaml"
    text = path.read_text("utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("lost", ["mappings/family.yaml", "mappings"])
def test_a_revision_that_git_cannot_read_is_no_revision_without_files(repository: Path, lost: str) -> None:
    named = ["git", "-C", str(repository), "rev-parse", f"first:{lost}"]
    blob = subprocess.run(named, check=True, capture_output=True, text=True).stdout.strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(EngineError, match="git cannot read the files of revision `first`"):
        api.diff("first", None, [repository / "mappings" / "child.yaml"])


def test_files_of_a_revision_are_read_as_they_are_whatever_git_makes_of_them(repository: Path) -> None:
    attributes = repository / ".git" / "info" / "attributes"
    attributes.parent.mkdir(exist_ok=True)
    attributes.write_text("*.yaml filter=other text eol=crlf working-tree-encoding=UTF-16\n", encoding="utf-8")
    git(repository, "config", "filter.other.smudge", "sed s/norm/other/")
    git(repository, "config", "filter.other.required", "true")
    assert api.diff("first", None, [repository / "mappings" / "child.yaml"]) == []
    (repository / "child.yaml").write_text(CHILD.replace("family.yaml", "mappings/family.yaml"), encoding="utf-8")
    attributes.unlink()
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "one at the top")
    assert api.diff("HEAD", None, [repository / "child.yaml"]) == []


def test_a_parent_of_a_revision_may_lie_in_any_folder(repository: Path) -> None:
    (repository / "own").mkdir()
    (repository / "base").mkdir()
    (repository / "base" / "family.yaml").write_text(FAMILY, encoding="utf-8")
    child = CHILD.replace("family.yaml", "../base/family.yaml")
    (repository / "own" / "child.yaml").write_text(child, encoding="utf-8")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "two folders")
    assert api.diff("HEAD", None, [repository / "own" / "child.yaml"]) == []


# -- what it comes to


def test_comments_and_order_of_rules_are_no_difference(tmp_path: Path) -> None:
    line = next(one for one in FAMILY.splitlines(True) if "source: norm.weight" in one)
    assert compared(tmp_path, (line, ""), ("rules:\n", "rules:\n  # moved\n" + line)) is None


def test_a_renamed_target_is_renamed_and_nothing_else(tmp_path: Path) -> None:
    diff = compared(tmp_path, ("target: model.norm.weight", "target: model.final_norm.weight"))
    assert tensors(diff) == [("renamed", "model.final_norm.weight", ())]
    assert keys(diff) == [("rules", "changed", "norm.weight: target")]


def test_swapped_letters_are_rerouted_under_the_choice_they_are_swapped_for(tmp_path: Path) -> None:
    down = 'source: "layers.{layer}.feed_forward.w2.{param}", target: "model.layers.{layer}.mlp.down_proj.{param}"'
    diff = compared(tmp_path, (down, down.replace(".w2.", ".w9.")))
    assert tensors(diff) == [("rerouted", "model.layers.{layer}.mlp.down_proj.{param}", ("mlp_letters=w2_is_down",))]


def test_other_axes_are_another_layout_under_their_variant(tmp_path: Path) -> None:
    diff = compared(
        tmp_path, ("axes: (groups queries half pair) | hidden", "axes: (groups queries pair half) | hidden")
    )
    assert tensors(diff) == [("laid out", "model.layers.{layer}.self_attn.q_proj.{param}", ("rotary=pairs",))]


def test_what_axes_are_called_means_nothing(tmp_path: Path) -> None:
    diff = compared(tmp_path, ("pair half", "twin side"), ("half pair", "side twin"), ("pair: ", "twin: "),
                    ("half: ", "side: "))  # fmt: skip
    assert diff is not None and diff.tensors == () and ("dims", "added", "twin") in keys(diff)


def test_another_split_is_another_cut(tmp_path: Path) -> None:
    diff = compared(tmp_path, ("axes: vocab hidden, split: hidden", "axes: vocab hidden, split: vocab"))
    assert tensors(diff) == [("cut", "model.embed_tokens.weight", ("embedding=by_hidden",))]


def test_a_transform_that_goes_changes_values(tmp_path: Path) -> None:
    diff = compared(tmp_path, (", transform: {normalize: hidden}", ""))
    assert tensors(diff) == [("valued", "lm_head.weight", ("head=normalised",))]


def test_a_rule_that_splits_in_two_to_the_same_end_changes_no_tensor(tmp_path: Path) -> None:
    line = next(one for one in FAMILY.splitlines(True) if "name: wo," in one)
    one = line.replace("}\n", ", when: {rotary: pairs}}\n")
    two = line.replace("name: wo,", "name: wo_halves,").replace("}\n", ", when: {rotary: halves}}\n")
    diff = compared(tmp_path, (line, one + two))
    assert diff is not None and diff.tensors == ()
    assert keys(diff) == [("rules", "added", "wo: when"), ("rules", "added", "wo_halves")]


def test_a_rule_added_or_removed_maps_or_unmaps_its_target(tmp_path: Path) -> None:
    line = next(one for one in FAMILY.splitlines(True) if "name: score," in one)
    assert tensors(compared(tmp_path, (line, ""))) == [("removed", "score.weight", ("head=reward",))]
    diff = api.diff(tmp_path / "new.yaml", tmp_path / "old.yaml")[0]
    assert tensors(diff) == [("added", "score.weight", ("head=reward",))]
    assert keys(diff) == [("rules", "added", "score")]


def test_only_the_weight_of_a_weight_and_bias_pair_is_told_as_such(tmp_path: Path) -> None:
    wo = 'source: "layers.{layer}.attention.wo.{param}", target: "model.layers.{layer}.self_attn.o_proj.{param}"'
    axes = ", axes: hidden | (groups queries head_dim)"
    diff = compared(tmp_path, (wo + axes, wo.replace("{param}", "weight") + axes.replace(" |", "")))
    assert tensors(diff) == [("removed", "model.layers.{layer}.self_attn.o_proj.bias", ())]


def test_a_change_under_one_of_two_conditions_is_told_by_the_variants_that_matter(tmp_path: Path) -> None:
    line = next(one for one in FAMILY.splitlines(True) if "source: norm.weight" in one)
    when = line.replace("}\n", ", when: {rotary: halves, mlp_letters: w2_is_up}}\n")
    assert tensors(compared(tmp_path, (line, when))) == [
        ("removed", "model.norm.weight", ("rotary=halves", "mlp_letters=w2_is_down")),
        ("removed", "model.norm.weight", ("rotary=pairs",)),
    ]


def test_a_choice_by_which_tensors_there_are_is_told_once_with_an_example(tmp_path: Path) -> None:
    bias = "layers.{layer}.attention.%s.bias"
    told = f"all: present('{bias % 'wqkv'}') and present('{bias % 'wo'}')"
    diff = compared(tmp_path, (told, told.replace(" and ", " or ")))
    assert diff is not None
    (value,) = [one for one in diff.values if one.name == "attention_biases"]
    assert (value.file, value.given) == ("choice", f"tensors there: without {bias % 'wo'}")
    assert (value.old, value.new, value.others) == ("refused: E202", "all", 3)
    assert f"choice attention_biases with {value.given}, and 3 more inputs" in rendered([diff], "text")


# -- what the file says


def test_configurations_options_variants_and_dims_are_compared_key_by_key(tmp_path: Path) -> None:
    diff = compared(
        tmp_path,
        ("layer_norm_epsilon | default(1e-5)", "layer_norm_epsilon | default(1e-6)"),
        ('num_layers: "{{ num_hidden_layers }}"', 'num_layers: "{{ num_hidden_layers + 0 }}"'),
        ("default: 32768", "default: 4096"),
        ("queries: heads // groups", "queries: (heads // groups)"),
        ("reward: is_reward | default(false)", "reward: is_reward | default(true)"),
        ("generation: {eos_token_id: 2}", "generation: {eos_token_id: [2, 3]}"),
        ("bos: <s>", "bos: <b>"),
    )
    assert keys(diff) == [
        ("variants", "changed", "head.choices"),
        ("dims", "changed", "queries"),
        ("options", "changed", "max_position_embeddings.default"),
        ("config", "changed", "rms_norm_eps"),
        ("training_config", "changed", "num_layers"),
        ("tokenizer", "changed", "bos"),
        ("generation", "changed", "eos_token_id"),
    ]
    assert diff is not None and diff.tensors == ()


def test_releases_differ_in_what_they_expect(tmp_path: Path) -> None:
    (diff,) = api.diff("internlm2-7b.yaml", "internlm2-20b.yaml")
    assert {section for section, _, _ in keys(diff)} == {"about", "expect"}


# -- git revisions


def test_a_revision_is_compared_with_the_working_tree_through_its_parents(repository: Path) -> None:
    edit_family(repository, "target: model.norm.weight", "target: model.final_norm.weight")
    (diff,) = api.diff("first", None, [repository / "mappings" / "child.yaml"])
    assert (diff.name, tensors(diff)) == ("mappings/child.yaml", [("renamed", "model.final_norm.weight", ())])
    assert api.diff("HEAD", "first", [repository / "mappings" / "child.yaml"]) == []


def test_two_revisions_are_compared_whatever_the_working_tree_holds(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_family(repository, "default: 32768", "default: 4096")
    git(repository, "commit", "-qam", "second")
    edit_family(repository, "default: 4096", "default: 5")
    monkeypatch.chdir(repository)
    done = invoke("diff", "first", "HEAD", "--json")
    (diff,) = json.loads(done.output)["mappings"]
    assert (diff["name"], diff["same_in"]) == ("mappings/child.yaml", ["mappings/family.yaml"])
    assert [(one["old"], one["new"]) for one in diff["changes"]] == [("32768", "4096")]


def test_a_layout_that_changes_is_told_with_the_mappings(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    layout = repository / "mappings" / "layouts" / "mine.yaml"
    layout.parent.mkdir()
    text = (Path(__file__).parents[2] / "mappings" / "layouts" / "internevo.yaml").read_text("utf-8")
    layout.write_text(text, encoding="utf-8")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    layout.write_text(text.replace("uneven: first", "uneven: last") + "# a remark\n", encoding="utf-8")
    (diff,) = api.diff("HEAD")
    assert diff.name == "mappings/layouts/mine.yaml" and not diff.changes and not diff.tensors
    assert [(one.file, one.name, one.old, one.new) for one in diff.values] == [("layout", "uneven", "first", "last")]
    assert "| layout | `uneven` | `first` | `last` |" in rendered([diff], "github")
    assert api.diff("HEAD", None, [layout]) == [diff]
    layout.write_text(text + "# a remark\n", encoding="utf-8")
    assert api.diff("HEAD") == []


def test_a_chat_template_that_changes_is_told_by_what_it_makes_of_a_conversation(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    template = repository / "mappings" / "chat_templates" / "mine.jinja"
    template.parent.mkdir()
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", encoding="utf-8")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    assert api.diff("HEAD") == []
    template.write_text(template.read_text("utf-8").replace("<{{", "[{{"), encoding="utf-8")
    (diff,) = api.diff("HEAD")
    assert (
        diff.name == "mappings/chat_templates/mine.jinja"
        and diff.values[0].name == "written"
        and "<user>" in str(diff.values[0].old)
    )
    assert "[user>" in str(diff.values[0].new) and api.diff("HEAD", None, [template]) == [diff]
    git(repository, "commit", "-qam", "third")
    template.write_text(template.read_text("utf-8") + "{% if messages | length > 9 %}!{% endif %}", encoding="utf-8")
    ((told,),) = (diff.values for diff in api.diff("HEAD"))
    assert told.name == "its text" and "length > 9" in str(told.new) and "length > 9" not in str(told.old)


def test_an_edit_of_a_template_or_of_the_versions_that_load_the_model_is_another_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    (tmp_path / "chat_templates").mkdir()
    template = tmp_path / "chat_templates" / "mine.jinja"
    mine = tmp_path / "mine.yaml"
    mine.write_text("mapping: 1\nname: mine\nextends: internlm2\nchat_template: mine\n", encoding="utf-8")
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    meanings = set()
    for written, versions in ((text, ""), (unmarked(text), ""), (text, "target: {transformers: '>=4.30'}\n")):
        template.write_text(written, encoding="utf-8")
        mine.write_text(mine.read_text("utf-8") + versions, encoding="utf-8")
        meanings.add(str([*takewhile(lambda fact: fact[0][0] != "tensors", facts_of(load_mapping(mine)))]))
    assert len(meanings) == 3


def test_a_mapping_that_is_new_or_gone_is_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (repository / "mappings" / "child.yaml").unlink()
    (repository / "mappings" / "added.yaml").write_text(CHILD.replace("child", "added"), encoding="utf-8")
    done = invoke("diff", "first")
    assert "mappings/child.yaml: removed, was child 1.0.0" in done.output
    assert "mappings/added.yaml: new, added 1.0.0" in done.output
    assert "family.yaml:" not in done.output
    assert "removed" in invoke("diff", "first", "--", "mappings/child.yaml").output


def test_a_mapping_that_cannot_be_read_at_a_revision_is_placed_there(repository: Path) -> None:
    edit_family(repository, "split: groups", "split: grups")
    edit_family(repository, "split: ffn", "split: fn")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(EngineError) as caught:
        api.diff("HEAD", "first", [repository / "mappings" / "child.yaml"])
    places = [str(one.place) for one in (caught.value, *caught.value.errors)]
    assert len(places) > 2 and all(place.startswith("HEAD:mappings/family.yaml:") for place in places), places


@pytest.mark.parametrize("name", ["nowhere", "--upload-pack=x", "HEAD:mappings"])
def test_what_is_neither_mapping_nor_revision_is_refused(repository: Path, name: str) -> None:
    with pytest.raises(EngineError) as caught:
        api.diff(name, None, [repository / "mappings" / "child.yaml"])
    assert caught.value.code == "E001"


# -- how it is printed


def test_exit_codes_are_those_of_git_diff() -> None:
    same, other = ("internlm2-7b", "internlm2-7b"), ("internlm2-7b", "internlm2-20b")
    assert [invoke("diff", *same).exit_code, invoke("diff", *other).exit_code] == [0, 0]
    assert [invoke("diff", "--exit-code", *same).exit_code, invoke("diff", "--exit-code", *other).exit_code] == [0, 1]
    assert invoke("diff", *same).output == "no differences\n"


def test_a_comment_starts_with_one_line_and_folds_the_rest(tmp_path: Path) -> None:
    diff = compared(tmp_path, ("target: model.norm.weight", "target: model.final_norm.weight"))
    assert diff is not None
    first, *rest = rendered([diff], "github").splitlines()
    assert first == "**Mappings:** 1 mapping changed; tensors: 1 renamed."
    assert rest[1] == "<details>" and rest[-1] == "</details>"
    assert rendered([], "github") == "**Mappings:** No mapping changes."
    assert "<summary>&lt;b&gt;: " in rendered([replace(diff, name="<b>")], "github")


def test_a_comment_never_grows_larger_than_github_takes() -> None:
    diffs = [*api.diff("meta-llama", "internlm2")] * 12
    text = rendered(diffs, "github")
    assert len(text) < 65_536 and "run `engine diff` to see the rest" in text
    assert text.count("<details>") == text.count("</details>")


def test_tables_keep_their_columns_whatever_a_mapping_says() -> None:
    for line in rendered(api.diff("internlm", "families/internlm2.yaml"), "markdown").splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6), line


# -- what uses it


def test_the_workflow_only_uses_actions_of_github_and_may_write_nothing_but_the_comment() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "mappings.yml").read_text("utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = {step["uses"].split("@")[0] for step in steps if "uses" in step}
    assert used == {"actions/checkout", "actions/setup-python", "actions/github-script"}
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job.get("permissions") for name, job in workflow["jobs"].items()}
    assert granted == {"check": None, "comment": {"pull-requests": "write"}}
    assert not any("${{" in step.get("run", "") for step in steps)


def test_the_hooks_run_commands_that_exist() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert [hook["id"] for hook in hooks] == ["engine-lint", "engine-format"]
    for hook in hooks:
        program, command = hook["entry"].split()
        assert program == "engine" and command in cli.commands
