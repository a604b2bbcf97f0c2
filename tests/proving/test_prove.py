"""`engine prove`: every bundled mapping holds, and every kind of defect is told in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import engine
from engine.commands.main import cli
from engine.language.axes import parse_axes
from engine.language.mapping_file import load_mapping
from engine.proving.facts import check_facts
from engine.proving.matrix import cases, combinations_of, rows
from engine.proving.mutants import reordered
from engine.proving.proof import Proof
from engine.proving.symbolic import _overlaps
from engine.proving.tiny import Worlds, guess_sizes

# `make test` runs `engine prove --all`; here is one of each kind.
FAMILIES = [f"families/{name}.yaml" for name in ("internlm2", "internlm3", "moe-stacked", "meta-llama")]
META = "mappings/families/meta-llama.yaml"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Proof]:
    """Prove a bundled family with some of its text replaced."""

    def prove(family: str, *changes: tuple[str, str]) -> Proof:
        text = (ROOT / "mappings" / "families" / f"{family}.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{family}.yaml"
        path.write_text(text)
        (found,) = engine.prove([path])
        return found

    return prove


def told(proof: Proof) -> str:
    return "\n".join(failure.message for check in proof.checks for failure in check.failures)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundled_family_is_proved(family: str) -> None:
    (proof,) = engine.prove([family])
    assert proof.holds, told(proof)
    trip = next(check for check in proof.checks if check.name == "round trip")
    assert trip.holds and "every element back at its place" in trip.told
    # What changes values is not compared, and said so.
    assert ("totality only for head_normalised" in trip.told) == (family == "families/internlm2.yaml")


def test_releases_are_proved_at_their_own_sizes_and_shared_rules_once() -> None:
    proofs = engine.prove(["meta-llama-2-7b.yaml", "meta-llama-3-8b.yaml", "meta-llama-3_1-8b.yaml"])
    assert all(proof.holds for proof in proofs)
    checks = [{check.name: check for check in proof.checks} for proof in proofs]
    assert checks[0]["real sizes"].told.startswith("6.7 billion elements")
    assert checks[0]["model"].told.startswith("291 names")
    assert checks[1]["round trip"].told == "the rules of meta-llama-2-7b, proved there"
    assert checks[1]["real sizes"].told.startswith("8.0 billion elements")
    assert checks[2]["real sizes"].told == "the sizes of meta-llama-3-8b, proved there"


def test_a_model_that_transformers_lacks_is_said_to_be_open_and_does_not_fail() -> None:
    (proof,) = engine.prove(["families/moe-grouped.yaml"])
    (model,) = [check for check in proof.checks if check.name == "model"]
    assert model.holds is None and "no model of type internlm_moe" in model.told
    assert proof.holds


def test_an_element_that_two_targets_claim_is_named_on_both_sides(broken: Callable[..., Proof]) -> None:
    """Of Wqkv's value, v_proj and a second copy of it."""
    proof = broken(
        "internlm",
        (
            '- {name: "model.layers.{layer}.self_attn.v_proj.{param}", axes: (v heads head_dim) | hidden}',
            '- {name: "model.layers.{layer}.self_attn.v_proj.{param}", axes: (v heads head_dim) | hidden}\n'
            '      - {name: "model.layers.{layer}.self_attn.w_proj.{param}", axes: (v heads head_dim) | hidden}',
        ),
    )
    assert not proof.holds
    wanted = (
        "model.layers.0.self_attn.v_proj.weight[11,11] comes from blocks.0.mixer.Wqkv.weight[35,11], "
        "which model.layers.0.self_attn.w_proj.weight[11,11] claims too"
    )
    assert wanted in told(proof)


def test_an_element_that_two_sources_write_is_named(broken: Callable[..., Proof]) -> None:
    proof = broken("meta-llama", ("mlp.up_proj.weight", "mlp.gate_proj.weight"))
    assert (
        "model.layers.0.mlp.gate_proj.weight[44,23] comes from layers.0.feed_forward.w1.weight[44,23] "
        "and from layers.0.feed_forward.w3.weight[44,23]"
    ) in told(proof)


def test_an_element_that_goes_nowhere_is_named(broken: Callable[..., Proof]) -> None:
    line = '      - {name: "model.layers.{layer}.self_attn.v_proj.{param}", axes: (v heads head_dim) | hidden}\n'
    proof = broken("internlm", (line, ""))
    assert "blocks.0.mixer.Wqkv.weight[24,0] goes nowhere" in told(proof)


def test_an_element_that_comes_from_nowhere_is_named(broken: Callable[..., Proof]) -> None:
    axes = ("axes: (v heads head_dim) | hidden", "axes: ((v + more) heads head_dim) | hidden")
    proof = broken("internlm", axes, ("  v: 1\n", "  v: 1\n  more: 1\n"))
    assert "model.layers.0.self_attn.v_proj.weight[12,0] comes from nowhere" in told(proof)


def test_a_name_that_the_model_lacks_is_unexpected_and_its_own_is_missing(broken: Callable[..., Proof]) -> None:
    proof = broken("meta-llama", ("mlp.up_proj.weight", "mlp.upward_proj.weight"))
    assert "`model.layers.0.mlp.upward_proj.weight` is unexpected: the model has no such tensor, and 3" in told(proof)
    assert "`model.layers.0.mlp.up_proj.weight` (45 × 24) is missing: no rule writes it, and 3 like it" in told(proof)
    places = [f.place for check in proof.checks for f in check.failures if "upward_proj" in f.message]
    assert places and places[0] is not None and places[0].split(":")[-2].isdecimal()


def test_a_shape_that_the_model_does_not_have_is_shown_beside_its_own(broken: Callable[..., Proof]) -> None:
    name = '"model.layers.{layer}.mlp.down_proj.weight"'
    line, turned = f"target: {name}", f"targets: [{{name: {name}, axes: ffn hidden}}]"
    proof = broken("meta-llama", (line, turned))
    assert "`model.layers.0.mlp.down_proj.weight` is 45 × 24, the model's is 24 × 45, and 3 like it" in told(proof)


def test_a_configuration_that_is_not_read_back_alike_fails_the_round_trip(broken: Callable[..., Proof]) -> None:
    proof = broken("internlm", ("\"{{ true if rotary == 'pairs' else omit }}\"", "false"))
    assert "E216 variant `rotary` would be read as halves" in told(proof)
    assert any("rotary=pairs" in (f.where or "") for check in proof.checks for f in check.failures)


def test_a_configuration_that_transformers_refuses_is_told(broken: Callable[..., Proof]) -> None:
    proof = broken("meta-llama", ("attention_bias: false", "attention_bias: false\n  initializer_range: perhaps"))
    assert "E502 transformers refuses the configuration" in told(proof)


def test_a_release_whose_sizes_do_not_follow_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    family = ROOT / "mappings" / "families" / "meta-llama.yaml"
    path.write_text(
        f"mapping: 1\nname: mine\nversion: 1.0.0\nextends: {family}\n"
        "expect: {head_dim: 100, heads: 32, hidden: 4096}\n"
    )
    (proof,) = engine.prove([path])
    assert "`head_dim` would be" in told(proof) and "the release has 100" in told(proof)


def test_a_file_that_is_no_mapping_is_a_failed_proof_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("mapping: 1\n")
    proofs = engine.prove([tmp_path / "x.yaml", "families/meta-llama.yaml"])
    assert [proof.holds for proof in proofs] == [False, True]
    assert told(proofs[0]).startswith("E102")


def test_overlapping_boxes_are_found_by_arithmetic() -> None:
    disjoint = [{"heads": (0, 2), "d": (0, 8)}, {"heads": (2, 3), "d": (0, 3)}, {"heads": (2, 3), "d": (3, 8)}]
    assert list(_overlaps(disjoint, "x")) == []
    assert list(_overlaps([*disjoint, {"heads": (1, 3), "d": (2, 3)}], "x")) == [
        "two shards of x hold the element heads 1, d 2"
    ]


def test_tiny_sizes_divide_as_the_mapping_divides_them() -> None:
    sizes = guess_sizes(load_mapping("families/internlm2.yaml"))
    assert sizes["hidden"] % sizes["heads"] == sizes["heads"] % sizes["groups"] == 0
    assert len(set(sizes.values())) == len(sizes)


def test_every_pair_of_choices_and_layouts_occurs_in_some_row() -> None:
    mapping = load_mapping("families/internlm2.yaml")
    worlds = Worlds(mapping)
    possible = [(c, most) for c, most in combinations_of(mapping) if worlds.shows(c, most=most)]
    layouts = cases(engine.api.load_layout(mapping.layout))
    chosen = list(rows(mapping, layouts, possible, ()))
    seen = {(row.case.label, name, choice) for row in chosen for name, choice in row.choices.items()}
    assert seen == {(c.label, v.name, x) for c in layouts for v in mapping.variants.values() for x in v.choices}
    assert len(chosen) < 40


def test_mutants_reorder_sums_and_products_one_step_at_a_time() -> None:
    axes = parse_axes("(groups (queries + k) half) | hidden")
    assert [str(one) for one in reordered(axes)] == [
        "((queries + k) groups half) | hidden",
        "(groups half (queries + k)) | hidden",
        "(groups (k + queries) half) | hidden",
    ]
    assert [str(one) for one in reordered(parse_axes("(k heads d) hidden"), frozenset({"k"}))] == ["(k d heads) hidden"]


def test_every_mutant_of_internlm2_is_caught_and_a_swap_of_gate_and_up_only_by_the_committed_facts() -> None:
    (proof,) = engine.prove(["families/internlm2.yaml"], mutants=True)
    assert [m for m in proof.mutants if m.caught_by is None] == []
    assert proof.holds and len(proof.mutants) > 60
    (swap,) = [m for m in proof.mutants if m.what == "`gate_proj` and `up_proj` exchanged"]
    assert swap.caught_by == "the committed facts"
    assert swap.told == (
        "model.layers.{layer}.mlp.gate_proj.weight comes from layers.{layer}.feed_forward.w3.weight "
        "(mlp_letters=w2_is_down) or layers.{layer}.feed_forward.w2.weight (mlp_letters=w2_is_up); "
        "the committed facts say layers.{layer}.feed_forward.w1.weight"
    )
    assert {m.caught_by for m in proof.mutants} == {
        "lint",
        "planning",
        "the model's names and shapes",
        "the committed facts",
    }


def test_without_facts_a_swap_is_only_caught_by_the_rules_before_it_and_shown_with_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "alone.yaml"
    path.write_text((ROOT / META).read_text())
    (proof,) = engine.prove([path], mutants=True)
    (facts,) = [check for check in proof.checks if check.name == "facts"]
    assert facts.holds is None and "a swap of equal shapes goes unseen" in facts.told
    (swap,) = [m for m in proof.mutants if m.what == "`gate_proj` and `up_proj` exchanged"]
    assert swap.caught_by == "the committed rules"
    assert swap.told.startswith("model.layers.") and " comes from consolidated.0" in swap.told
    assert swap.told.endswith("claims too")


def test_gate_and_up_exchanged_contradict_the_committed_facts(broken: Callable[..., Proof], tmp_path: Path) -> None:
    facts = ROOT / "mappings" / "families" / "meta-llama.facts.json"
    (tmp_path / facts.name).write_bytes(facts.read_bytes())
    swap = (("gate_proj", "x_proj"), ("up_proj", "gate_proj"), ("x_proj", "up_proj"))
    assert "the committed facts say layers.{layer}.feed_forward.w1.weight" in told(broken("meta-llama", *swap))
    turned = ("split: ffn", "split: hidden")
    assert "w1.weight is cut on hidden; the committed facts say ffn" in told(broken("meta-llama", turned))
    halves = ("(groups queries half pair)", "(groups queries pair half)")
    assert "in another order than the committed facts say" in told(broken("meta-llama", halves))
    assert broken("meta-llama").holds


def test_facts_are_written_beside_a_mapping_and_then_hold(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / META).read_text())
    done = invoke(str(path), "--write-facts")
    assert done.exit_code == 0 and "proved facts" in done.output
    written = json.loads((tmp_path / "mine.facts.json").read_text())
    assert written == json.loads((ROOT / META).with_suffix(".facts.json").read_text())


def test_the_committed_facts_of_every_family_are_of_its_rules() -> None:
    for path in (ROOT / "mappings" / "families").glob("*.yaml"):
        check = check_facts(load_mapping(path))
        assert check.holds, [failure.message for failure in check.failures]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["prove", *arguments])


def test_the_command_shows_each_check_and_exits_by_the_outcome(tmp_path: Path) -> None:
    done = invoke("families/meta-llama.yaml")
    assert done.exit_code == 0
    assert "proved round trip" in done.output and done.output.rstrip().endswith("1 of 1 proved")
    path = tmp_path / "broken.yaml"
    path.write_text((ROOT / META).read_text().replace("mlp.up_proj.weight", "mlp.gate_proj.weight"))
    done = invoke(str(path))
    assert done.exit_code == 1
    assert "fails  rules" in done.output and "0 of 1 proved" in done.output


def test_the_command_prints_json() -> None:
    done = invoke("families/meta-llama.yaml", "--mutants", "--json")
    data = json.loads(done.output)
    assert data["holds"] is True
    (proof,) = data["proofs"]
    assert [check["name"] for check in proof["checks"]] == ["rules", "facts", "round trip", "model"]
    assert {"rule", "what", "caught_by", "told"} == set(proof["mutants"][0])


def test_the_command_takes_mappings_or_all_and_not_both() -> None:
    assert invoke().exit_code == 2
    assert invoke("families/meta-llama.yaml", "--all").exit_code == 2
