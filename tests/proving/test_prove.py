"""`engine prove`: every kind of defect is told in words."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import engine
from engine.commands.main import cli
from engine.errors import EngineError
from engine.language.axes import parse_axes
from engine.language.documents import flat
from engine.language.mapping_file import load_mapping
from engine.language.search import list_names
from engine.planning.boxes import Box
from engine.planning.stored import instances
from engine.proving import checks, symbolic
from engine.proving import committed as committed_module
from engine.proving import prove as proving
from engine.proving.checks import check_round_trip
from engine.proving.committed import (
    check_meaning,
    committed_text,
    failures_beside,
    path_of,
    read_meaning,
    write_meaning,
)
from engine.proving.matrix import cases, combinations_of, real_cases, rows
from engine.proving.meaning import usual_world
from engine.proving.meta_model import misfits
from engine.proving.mutants import mutants_of, reordered, try_mutants
from engine.proving.neighbour import laid_out_otherwise
from engine.proving.proof import Check, Proof
from engine.proving.tiny import Worlds, guess_sizes
from tests.support.depth import SOAK, sampled

META = "mappings/families/meta-llama.yaml"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A bundled family with some of its text replaced."""

    def edit(family: str, *changes: tuple[str, str]) -> Path:
        text = (ROOT / "mappings" / "families" / f"{family}.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{family}.yaml"
        path.write_text(text)
        return path

    return edit


@pytest.fixture
def broken(edited: Callable[..., Path]) -> Callable[..., Proof]:
    """The proof of such a one."""
    return lambda *edits: engine.prove([edited(*edits)])[0]


def told(*of: Proof | Check) -> str:
    checks = (check for one in of for check in (one.checks if isinstance(one, Proof) else [one]))
    return "\n".join(failure.message for check in checks for failure in check.failures)


def test_all_are_proved_side_by_side_releases_at_their_own_sizes_and_shared_rules_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`tests/proving/test_bundled.py` proves all that there are; here some in processes of their own."""
    releases = ["meta-llama-2-7b.yaml", "meta-llama-3-8b.yaml", "meta-llama-3_1-8b.yaml"]
    few = ["families/torchtitan-qwen3.yaml", *releases, "families/meta-llama.yaml"]
    monkeypatch.setattr(proving, "list_names", lambda: few)
    data = json.loads(invoke("--all", "--json").output)
    assert data["holds"] is True
    found = {one["mapping"]: {check["name"]: check for check in one["checks"]} for one in data["proofs"]}
    assert list(found["meta-llama"]) == ["rules", "meaning", "round trip", "model"]
    two, three, later = (found[name.removesuffix(".yaml")] for name in releases)
    assert two["real sizes"]["told"].startswith("6.74 billion elements")
    assert two["model"]["told"].startswith("291 names")
    assert three["round trip"]["told"] == "the rules of meta-llama, proved there"
    assert three["real sizes"]["told"].startswith("8.03 billion elements")
    assert later["real sizes"]["told"] == "the sizes of meta-llama-3-8b, proved there"
    assert found["torchtitan-qwen3"]["model"]["holds"] is True


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
    (meaning,) = [check for check in proof.checks if check.name == "meaning"]
    assert "mlp.upward_proj.weight is renamed" in told(meaning)
    places = [f.place for check in proof.checks for f in check.failures if "upward_proj" in f.message]
    assert places and places[0] is not None and places[0].split(":")[-2].isdecimal()


def test_a_shape_that_the_model_does_not_have_is_shown_beside_its_own(broken: Callable[..., Proof]) -> None:
    name = '"model.layers.{layer}.mlp.down_proj.weight"'
    line, turned = f"target: {name}", f"targets: [{{name: {name}, axes: ffn hidden}}]"
    proof = broken("meta-llama", (line, turned))
    assert "`model.layers.0.mlp.down_proj.weight` is 45 × 24, the model's is 24 × 45, and 3 like it" in told(proof)


@pytest.mark.parametrize("family", ["internlm", "internlm2"])
def test_no_model_is_made_up_with_biases_of_only_some_linears_of_an_mlp(family: str) -> None:
    mapping = load_mapping(family)
    worlds = Worlds(mapping)
    for choices, most in combinations_of(mapping):
        names = {one.sources[0].text for one in worlds.used(choices, most=most) or ()}
        linears = {name for name in names if re.search(r"w\d[.]weight|fused_w1_w3[.]weight", name)}
        biases = {name.replace("bias", "weight") for name in names if re.search(r"w\d[.]bias|w1_w3[.]bias", name)}
        assert biases in (set(), linears), choices


def test_a_configuration_that_is_not_read_back_alike_fails_the_round_trip(
    edited: Callable[..., Path], tmp_path: Path
) -> None:
    mapping = load_mapping(edited("internlm", ("\"{{ true if rotary == 'pairs' else omit }}\"", "false")))
    layout, worlds = engine.api.load_layout(mapping.layout), Worlds(mapping)
    every = [(c, most) for c, most in combinations_of(mapping) if worlds.used(c, most=most) is not None]
    pairs = next(one for one in every if (one[0]["rotary"], one[0]["gates"]) == ("pairs", "apart"))
    check = check_round_trip(mapping, layout, worlds, [pairs], tmp_path / "trips")
    assert "E216 variant `rotary` would be read as halves" in told(check)
    assert all("rotary=pairs" in (failure.where or "") for failure in check.failures)
    assert len({failure.where for failure in check.failures}) == 5  # layouts; more are not tried


@pytest.mark.parametrize(
    "values, message",
    [
        ("2e4 ** (-2 * index / head_dim)", "`values` of `ignore` are"),
        ("'one'", "E105 `values` is not a number"),
    ],
)
def test_values_that_the_two_sides_compute_otherwise_or_not_at_all_fail_the_round_trip(
    values: str, message: str, edited: Callable[..., Path], tmp_path: Path
) -> None:
    now = "values: rope_parameters.rope_theta ** (-2 * index / head_dim)"
    mapping = load_mapping(edited("internlm", (now, f'values: "{values}"')))
    layout, worlds = engine.api.load_layout(mapping.layout), Worlds(mapping)
    first = next((c, most) for c, most in combinations_of(mapping) if worlds.used(c, most=most) is not None)
    assert message in told(check_round_trip(mapping, layout, worlds, [first], tmp_path / "trips"))


def test_a_configuration_that_transformers_refuses_is_told(broken: Callable[..., Proof]) -> None:
    proof = broken("meta-llama", ("attention_bias: false", "attention_bias: false\n  layer_types: [odd]"))
    assert "E502 transformers refuses the configuration" in told(proof)


def test_sizes_of_which_the_model_class_wants_multiples_are_found(broken: Callable[..., Proof]) -> None:
    """No dim says that heads divide the width, and transformers refuses a Llama where they do not."""
    vocabulary = "  vocab: vocab_size if vocab_size > 0 else omit"
    proof = broken(
        "meta-llama",
        (f"  hidden: dim\n{vocabulary}", f"{vocabulary}\n  hidden: dim"),
        ("head_dim: hidden // heads", "head_dim: head_size"),
        ("training_config:\n", 'training_config:\n  head_size: "{{ head_dim }}"\n'),
        ("\n  target:\n", "\n  source:\n    head_size: {type: integer}\n  target:\n"),
    )
    assert {check.name: check.holds for check in proof.checks}["model"], told(proof)


@pytest.mark.parametrize(("name", "tried"), [("families/meta-llama", 3), ("meta-llama-2-7b", 1)])
def test_other_sizes_are_tried_of_a_family_that_its_class_refuses_and_not_of_a_release(
    name: str, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(config: Any, architecture: str | None) -> Any:
        asked.append(config)
        raise EngineError("E502", "odd")

    monkeypatch.setattr(checks, "wanted", refuse)
    mapping = load_mapping(name)
    world = usual_world(mapping, Worlds(mapping), mapping.expect)
    assert world is not None
    assert told(checks.check_model(mapping, [world])) == "E502 odd" and len(asked) == tried


def test_a_tensor_that_only_some_checkpoints_have_and_the_model_always_is_told(broken: Callable[..., Proof]) -> None:
    line = '    target: "model.layers.{layer}.mlp.up_proj.weight"\n'
    proof = broken("meta-llama", (line, f"{line}    optional: true\n"))
    source = "layers.{layer}.feed_forward.w3.weight"
    assert f"is missing: rule `{source}` writes it only if `{source}` is there" in told(proof)


def test_a_bias_that_a_model_has_is_told_with_the_rule_that_writes_it_for_others() -> None:
    written: Any = SimpleNamespace(targets={})
    every = instances(load_mapping("families/internlm.yaml"))
    (told,) = misfits({}, {"model.layers.0.self_attn.q_proj.bias": (4,)}, written, every)
    assert "writes it only if `blocks.{layer}.mixer.Wqkv.bias` is there" in told.message and told.place


def test_a_head_that_is_tied_in_every_model_is_none_too_many(broken: Callable[..., Proof]) -> None:
    proof = broken(
        "meta-llama",
        (
            "tie_word_embeddings: {type: boolean, default: false}",
            "tie_word_embeddings: {type: boolean, only: [true], why: it is}",
        ),
        ('  tie_word_embeddings: "{{ given.tie_word_embeddings | default(false) }}"', "  tie_word_embeddings: true"),
    )
    assert {check.name: check.holds for check in proof.checks}["model"], told(proof)


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
    assert list(symbolic._overlaps(disjoint, "x")) == []
    assert list(symbolic._overlaps([*disjoint, {"heads": (1, 3), "d": (2, 3)}], "x")) == [
        "two shards of x hold the element heads 1, d 2"
    ]


def test_tiny_sizes_divide_as_the_mapping_divides_them() -> None:
    sizes = guess_sizes(load_mapping("families/internlm2.yaml"))
    assert sizes["hidden"] % sizes["heads"] == sizes["heads"] % sizes["groups"] == 0
    assert len(set(sizes.values())) == len(sizes)


def test_every_pair_of_choices_and_modes_and_every_layout_occurs_in_some_row() -> None:
    mapping = load_mapping("families/internlm2.yaml")
    worlds = Worlds(mapping)
    possible = [(c, most) for c, most in combinations_of(mapping) if worlds.used(c, most=most) is not None]
    layouts = cases(engine.api.load_layout(mapping.layout))
    chosen = list(rows(mapping, layouts, possible, ()))
    seen = {(row.case.mode, name, choice) for row in chosen for name, choice in row.choices.items()}
    held = {mode.name: mode.choices for mode in engine.api.load_layout(mapping.layout).modes}
    assert seen == {
        (c.mode, v.name, x) for c in layouts for v in mapping.variants.values() for x in v.choices
        if held[c.mode].get(v.name, x) == x
    }  # fmt: skip
    assert {row.case.label for row in chosen} == {case.label for case in layouts}
    assert len(chosen) < 25


@pytest.mark.parametrize(
    ("code", "message", "left_out"),
    [
        ("E214", "no layout can hold", "not over 1 other, such as model_parallel tp1: odd"),
        ("E207", "E207 odd", ""),
    ],
)
def test_what_no_layout_can_hold_or_planning_refuses_is_not_proved(
    code: str, message: str, left_out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any) -> Any:
        raise EngineError(code, "odd")

    for name in ("prove_boxes", "write_ranks"):
        monkeypatch.setattr(checks, name, refuse)
    mapping = load_mapping("meta-llama-2-7b.yaml")
    layout, worlds = engine.api.load_layout(mapping.layout), Worlds(mapping)
    world = usual_world(mapping, worlds, mapping.expect)
    large = checks.check_real_sizes(mapping, layout, worlds, world)
    small = check_round_trip(mapping, layout, worlds, [(world.choices, False)], tmp_path)
    assert not large.holds and message in told(large) and left_out in large.told
    assert not small.holds and message in told(small)


def at_sizes(family: str, choices: Mapping[str, str], **sizes: int) -> Check:
    mapping = replace(load_mapping(f"families/{family}.yaml"), expect=sizes)
    worlds = Worlds(mapping)
    world = usual_world(mapping, worlds, mapping.expect)
    assert world is not None
    world = replace(world, choices={**world.choices, **choices})
    return checks.check_real_sizes(mapping, engine.api.load_layout(mapping.layout), worlds, world)


@pytest.mark.parametrize(
    ("family", "choices"),
    [("megatron-qwen2", {}), ("torchtitan-llama", {}), ("megatron-llama", {"norms": "minus_one"})],
    ids=["megatron-qwen2", "torchtitan-llama", "values that change"],
)
def test_a_release_of_another_framework_is_proved_also_if_ranks_pad_or_cut_unevenly(
    family: str, choices: dict[str, str]
) -> None:
    check = at_sizes(family, choices, layer=4, hidden=64, heads=8, vocab=99)
    assert check.holds, check


def test_a_release_of_one_layer_fits_into_a_single_stage() -> None:
    layout = engine.api.load_layout("internevo")
    assert all(modes[0].sizes["pp"] > 1 == modes[-1].sizes["pp"] for modes in real_cases(layout))


def test_two_directions_that_do_not_undo_each_other_are_no_proof_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "swap", lambda copy: copy)
    check = at_sizes("torchtitan-llama", {}, layer=2, hidden=64, heads=8, vocab=64)
    assert "is not the inverse of writing it" in told(check)


@pytest.mark.parametrize(("end", "name"), [("target", "w 8"), ("source", "what fills w 8")])
def test_boxes_of_one_side_that_overlap_are_found_in_tensors_of_each_shape(
    end: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = SimpleNamespace(key="w")
    groups = [SimpleNamespace(instance=instance, cut=(), shapes=lambda n=n: (n,), name=f"w {n}") for n in (4, 8)]
    ends = {"target": SimpleNamespace(groups=groups), "source": SimpleNamespace(reaching=lambda group, _: [group])}
    plan: Any = SimpleNamespace(copies=SimpleNamespace(**ends))

    def boxes(side: object, held: list[object]) -> Mapping[object, list[Box]]:
        twice = side is ends[end] and held == groups[1:]
        return {"w": [{"heads": (0, 4)}] * (2 if twice else 1)}

    monkeypatch.setattr(symbolic, "_boxes", boxes)
    assert list(symbolic.one_to_one(plan)) == [f"two shards of {name} hold the element heads 0"]


def test_mutants_reorder_sums_and_products_one_step_at_a_time() -> None:
    axes = parse_axes("(groups (queries + k) half) | hidden")
    assert [str(one) for one in reordered(axes)] == [
        "((queries + k) groups half) | hidden",
        "(groups half (queries + k)) | hidden",
        "(groups (k + queries) half) | hidden",
    ]
    assert [str(one) for one in reordered(parse_axes("(k heads d) hidden"), frozenset({"k"}))] == ["(k d heads) hidden"]


def test_mutants_are_of_every_kind_and_those_of_rules_and_values_are_caught() -> None:
    """`make soak` tries all of them, of every family."""
    mapping = load_mapping("families/internlm2.yaml")
    every = list(mutants_of(mapping))
    assert {change.kind for change in every} >= {
        "rule", "split", "stage", "axis order", "dim", "variant", "config expression", "training-config expression",
        "option", "tokenizer", "generation", "configuration key",
    }  # fmt: skip
    quick = ("rule", "split", "stage", "axis order", "tokenizer", "generation")
    named = ("`gate_proj` and `up_proj` exchanged", "left out")
    of_kind = [[one for one in every if one.kind == kind] for kind in quick]
    tried = [one for listed in of_kind for n, one in enumerate(listed) if SOAK or n % 66 == 0 or one.what in named]
    assert {one.kind for one in tried} == set(quick)
    found = try_mutants(mapping, tried)
    assert [(m.where, m.what) for m in found if m.caught_by is None] == [("generation.eos_token_id", "left out")]
    swap, *_ = [m for m in found if m.what == "`gate_proj` and `up_proj` exchanged"]
    assert swap.caught_by == "the committed meaning"
    assert swap.told == (
        "model.layers.{layer}.mlp.gate_proj.{param} (gates=apart, mlp_letters=w2_is_down) is read from elsewhere: "
        "layers.{layer}.feed_forward.w3.{param}, `ffn hidden`, split ffn; "
        "the committed meaning says layers.{layer}.feed_forward.w1.{param}, `ffn hidden`, split ffn"
    )


@sampled(2)
@pytest.mark.parametrize(
    ("family", "mutants"),
    [
        (
            "megatron-llama",
            [
                ("config.rope_parameters.factor", "if use_rope_scaling else"),  # a switch, absent
                ("config.rope_parameters.factor", "left out"),
                ("training_config.padded_vocab_size", "* tps + 1) //"),  # rounded up, from a multiple
                ("training_config.padded_vocab_size", "* tps - 2) //"),  # and from one more
                ("training_config.virtual_pipeline_model_parallel_size", "chunks > 2"),
                ("output", "pps > 2"),
                ("embed", "without `zeros`"),
            ],
        ),
        ("torchtitan-llama", [("rotary", "!= 'llama3'")]),  # a tensor and a key together
    ],
)
def test_what_only_few_configurations_show_is_caught(family: str, mutants: list[tuple[str, str]]) -> None:
    mapping = load_mapping(f"families/{family}.yaml")
    every = list(mutants_of(mapping))
    tried = [[one for one in every if one.where == where and what in one.what.split(" instead of ")[0]]
             for where, what in mutants[:: 1 if SOAK else 3]]  # fmt: skip
    assert all(tried)
    found = try_mutants(mapping, [one for listed in tried for one in listed])
    assert [(m.where, m.what) for m in found if m.caught_by is None] == []


def test_what_lint_says_of_every_mutant_catches_none() -> None:
    """A mutant is written out whole, where what only its parent needs is missing: InternLM3's has no such head."""
    mapping = load_mapping("families/internlm3.yaml")
    change = next(one for one in mutants_of(mapping) if one.what == "type `number`")
    assert [one.caught_by for one in try_mutants(mapping, [change])] == ["the committed meaning"]


def test_without_a_committed_meaning_mutants_are_told_from_what_the_mapping_meant_before(tmp_path: Path) -> None:
    path = tmp_path / "alone.yaml"
    path.write_text((ROOT / META).read_text().replace("name: meta-llama\n", "name: alone\n"))
    (proof,) = engine.prove([path])
    (meaning,) = [check for check in proof.checks if check.name == "meaning"]
    assert proof.holds and meaning.holds is None and "a wrong rule may go unnoticed" in meaning.told
    mapping = load_mapping(path)
    (swap,) = [one for one in mutants_of(mapping) if one.what == "`gate_proj` and `up_proj` exchanged"]
    (found,) = try_mutants(mapping, [swap])
    assert found.caught_by == "its meaning before"


@sampled(2)
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "feed_forward.w1",
            "feed_forward.w3",
            "up_proj.weight is read from layers.{layer}.feed_forward.w1.weight; the",
        ),
        ("attention_norm", "ffn_norm", "the bundled meta-llama reads layers.{layer}.ffn_norm.weight"),
        ("(groups queries half pair)", "(queries groups half pair)", "q_proj.weight is read differently: "),
        ("split: ffn\n  - {source", "split: hidden\n  - {source", "split hidden"),
    ],
)
def test_a_copy_under_another_name_is_held_against_the_bundled_mapping_that_reads_the_same(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    text = (ROOT / META).read_text().replace("name: meta-llama\n", "name: alone\n")
    path = tmp_path / "alone.yaml"
    path.write_text(text.replace(old, "\0").replace(new, old).replace("\0", new))
    check = check_meaning(load_mapping(path))
    assert check.holds is False and any(said in failure.message for failure in check.failures)
    assert "--write-meaning" in check.failures[-1].message


@sampled(2)
@pytest.mark.parametrize(
    ("family", "old", "new", "said"),
    [
        ("torchtitan-qwen3", "", "", ""),
        ("internlm3", "", "", ""),
        ("internevo-qwen2", "(groups queries half pair)}", "(groups queries pair half)}", "q_proj.bias (rotary=pairs)"),
        ("internevo-qwen2", "default(false)\n      halves", "default(true)\n      halves", "choice rotary"),
        ("internevo-qwen3-moe", 'k_norm.weight", axes: (half pair)', 'k_norm.weight", axes: (pair half)', "k_norm"),
    ],
)
def test_a_copy_of_a_family_that_extends_another_is_held_against_that_family_and_not_its_parent(
    family: str, old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "mappings" / "families" / f"{family}.yaml").read_text().replace(f"name: {family}\n", "name: own\n")
    assert old in text
    path = tmp_path / "families" / "own.yaml"
    path.parent.mkdir()
    path.write_text(text.replace(old, new, 1))
    path.with_name("broken.yaml").write_text("mapping: 1\n")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))  # its own families are no neighbours
    check = check_meaning(load_mapping(path))
    assert (check.holds, f"for mappings/families/{family}" in check.told) == (not said, not said)
    assert [said in one.message for one in check.failures[:-1]] == [True] * bool(said)


def test_two_rules_that_read_one_tensor_in_two_shapes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rule = '{name: "layers.{layer}.feed_forward.w1.weight", source: "layers.{layer}.feed_forward.w3.{param}"}'
    path.write_text(f"mapping: 1\nname: mine\nversion: 1.0.0\nextends: families/internlm2.yaml\nrules: [{rule}]\n")
    (proof,) = engine.prove([path])
    assert any("mlp.gate_proj.bias" in failure.message for failure in proof.checks[0].failures)


def test_what_an_edit_comes_to_is_told_beside_what_is_committed(edited: Callable[..., Path]) -> None:
    def meant(*edits: Any) -> str:
        return told(check_meaning(load_mapping(edited(*edits))))

    swap = (("gate_proj", "x_proj"), ("up_proj", "gate_proj"), ("x_proj", "up_proj"))
    assert "the committed meaning says layers.{layer}.feed_forward.w1.weight" in meant("meta-llama", *swap)
    turned = ("split: ffn", "split: hidden")
    cut = "model.layers.{layer}.mlp.up_proj.weight is cut differently over ranks: layers.{layer}.feed_forward.w3.weight"
    assert f"{cut}, `ffn hidden`, split hidden; the committed" in meant("meta-llama", turned)
    halves = ("(groups queries half pair)", "(groups queries pair half)")
    assert "self_attn.q_proj.weight is laid out differently: " in meant("meta-llama", halves)
    begins = ("128000 if vocab >= 128256 else 1) }}", "128000 if vocab >= 128256 else 2) }}")
    said = "config.json bos_token_id: 2; the committed meaning says 1"
    assert said in meant("meta-llama", begins)
    assert meant("meta-llama") == ""
    other = ("'gemma3n_text', 'olmo3'", "'gemma3n_text', 'olmo2'")  # a model type that an expression names
    assert 'model_type: "olmo3"' in meant("transformers", other)


@sampled(2)
@pytest.mark.parametrize(
    ("family", "old", "new", "said"),
    [
        ("internevo-qwen2-moe", "chosen <= num_experts", "chosen < num_experts", "with top_k: 3"),
        ("internevo-qwen2-moe", "(top_k | default(1)) > 1", "(top_k | default(1)) >= 1", 'moe_type: "GShard"'),
        ("xtuner-moe", "num_experts_per_tok <= num_experts", "num_experts_per_tok < num_experts", "num_experts: 1"),
        ("torchtitan-llama", "pad_token_id < vocab_size", "pad_token_id <= vocab_size", "with pad_token_id: 36"),
    ],
)
def test_two_numbers_that_a_mapping_compares_are_tried_where_they_are_equal_and_texts_that_it_allows(
    family: str, old: str, new: str, said: str, edited: Callable[..., Path]
) -> None:
    assert said in told(check_meaning(load_mapping(edited(family, (old, new)))))


def test_what_each_rank_holds_is_part_of_it(edited: Callable[..., Path]) -> None:
    """Right on one rank, wrong on two."""
    axes = ("axes: hidden (groups queries head_dim)", "axes: hidden (queries groups head_dim)")
    found = told(check_meaning(load_mapping(edited("internevo-qwen2", axes))))
    assert "self_attn.o_proj.weight is cut differently over ranks" in found
    assert "tensor tp2 pp2: tp0 pp0 [:, 0:12+24:36]" in found
    assert "tensor tp2 pp2: tp0 pp0 [:, 0:24]; tp1 pp0 [:, 24:48]" in found


def test_what_each_rank_holds_is_part_of_it_in_every_mode_that_writes_a_rule(edited: Callable[..., Path]) -> None:
    """Of biases of queries only isp was tried with halves."""
    axes = ("axes: (groups queries head_dim)\n", "axes: (queries groups head_dim)\n")
    found = told(check_meaning(load_mapping(edited("internevo-qwen2", axes))))
    assert "q_proj.bias (rotary=halves) is cut differently over ranks" in found and "tensor tp2 pp2: tp0 pp0" in found


def test_a_copy_of_a_bundled_mapping_is_held_against_what_is_committed_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text((ROOT / META).read_text().replace("stage: last", "stage: first"))
    check = check_meaning(load_mapping(tmp_path / "copy.yaml"))
    assert not check.holds and "the bundled meta-llama" in check.told
    assert any(
        f.message.startswith("lm_head.weight is cut differently") and "stage first" in f.message for f in check.failures
    )


def test_beside_committed_meanings_a_mapping_without_one_fails(tmp_path: Path) -> None:
    (tmp_path / "meanings").mkdir()
    (tmp_path / "mine.yaml").write_text("mapping: 1\nname: mine\nversion: 1.0.0\nextends: families/meta-llama.yaml\n")
    check = check_meaning(load_mapping(tmp_path / "mine.yaml"))
    assert not check.holds and "no meaning of its own is committed" in check.failures[0].message


def child(folder: Path, more: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"mapping: 1\nname: mine\nversion: 1.0.0\nextends: families/meta-llama.yaml\n{more}\n")
    return path


def test_a_child_of_other_defaults_is_open_and_says_in_what(tmp_path: Path) -> None:
    check = check_meaning(load_mapping(child(tmp_path, "options: {max_position_embeddings: {default: 8192}}")))
    assert check.holds is None
    assert any("default 8192" in failure.message for failure in check.failures)


def test_a_child_that_is_another_model_fails_until_its_own_meaning_is_committed(tmp_path: Path) -> None:
    path = child(tmp_path, "config: {rms_norm_eps: 1.0e-3}")
    check = check_meaning(load_mapping(path))
    assert not check.holds and any("config.json rms_norm_eps: 0.001" in f.message for f in check.failures)
    write_meaning(path)
    assert check_meaning(load_mapping(path)).holds


@pytest.mark.parametrize("swapped", [False, True])
def test_a_fact_that_takes_the_place_of_several_is_read_as_it_was_committed(
    swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = {f"v{n}": {"tp1": "all"} for n in range(30)}  # so that what differs is shorter than the whole
    many: dict[str, Any] = {"ranks": {"w": {"torch tp1": "all", "torch tp2": "tp0 [0:2]"}, **alike}}
    one: dict[str, Any] = {"ranks": {"w": "in no plan", **alike}}
    said = [many, one][:: -1 if swapped else 1]
    mapping = load_mapping(child(tmp_path, ""))
    monkeypatch.setattr(committed_module, "meaning_of", lambda m: said[m.name == "mine"])
    monkeypatch.setattr(committed_module, "path_of", lambda file: tmp_path / "none.txt")
    text = committed_text(mapping)
    (tmp_path / "mine.txt").write_text(text)
    assert "extends" in text and read_meaning(tmp_path / "mine.txt") == dict(flat(said[1]))


def test_a_meaning_is_written_beside_a_mapping_and_then_holds(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / META).read_text())
    done = invoke(str(path), "--write-facts")  # as it was once called
    assert done.exit_code == 0 and "proved meaning" in done.output
    written = (tmp_path / "meanings" / "mine.txt").read_text("utf-8")
    assert written == (ROOT / "mappings" / "families" / "meanings" / "meta-llama.txt").read_text("utf-8")


@pytest.mark.parametrize("name", list_names() if SOAK else ["families/meta-llama.yaml", "meta-llama-2-7b.yaml"])
def test_what_a_bundled_mapping_means_is_committed_to_the_letter(name: str) -> None:
    path = path_of(ROOT / "mappings" / name)
    assert path.read_text("utf-8") == committed_text(load_mapping(name)), "run `make meanings`, and read the diff"


def test_every_committed_meaning_is_of_a_mapping_a_layout_or_a_class() -> None:
    found = {path for path in (ROOT / "mappings").rglob("meanings/*.txt")}
    beside = {path_of(path) for of in ("layouts", "classes") for path in (ROOT / "mappings" / of).glob("*.yaml")}
    assert found == {path_of(ROOT / "mappings" / name) for name in list_names()} | beside


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


def test_the_command_takes_mappings_or_all_and_not_both() -> None:
    assert invoke().exit_code == 2
    assert invoke("families/meta-llama.yaml", "--all").exit_code == 2


@sampled(3)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("only: [rmsnorm]", "only: [rmsnorm, layernorm]", "keys, source, norm_type, only"),
        ('{prefix: "model.", when: options.wrapped}', '{prefix: "model."}', "prefixes"),
        ("type: boolean, default: false", "type: boolean, default: true", "options, wrapped, default"),
        ("zip_root: file_name ", "", "zip_root"),
        ("number: pp * (layers // pps) + nth ", "number: pp * layers + nth ", "modes, tensor, files"),
        ("conversion.json, ", 'conversion.json, "model_tp1*", ', "skip"),
        ("rope_base: {type: number", "rope_base: {type: integer", "rope_base, type"),
        ("# the names that mappings see", "# a comment", ""),
        ("axes: ffn hidden", "axes: hidden ffn", "class LlamaForCausalLM: rules"),
        ("only: [default, llama3]", "only: [default, llama3, yarn]", "has also yarn"),
        ("rope_percent: {only: [1, null]", "rope_percent: {only: [true, null]", "rope_percent, only: True, None"),
        ("why: others may be unknown", "why: others may be none", ""),
    ],
)
def test_an_edit_of_a_layout_or_class_is_told_beside_what_is_committed_of_it(
    old: str, new: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "mappings", tmp_path / "mappings")
    edited = {"internlm2": "layouts/internevo.yaml", "transformers": "classes/llama.yaml"}
    texts = {name: (tmp_path / "mappings" / file).read_text(encoding="utf-8") for name, file in edited.items()}
    name = next(name for name, text in texts.items() if old in text)
    (tmp_path / "mappings" / edited[name]).write_text(texts[name].replace(old, new, 1), encoding="utf-8")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "mappings"))
    found = failures_beside(load_mapping(tmp_path / "mappings" / "families" / f"{name}.yaml"))
    assert [words in one.message for one in found] == ([True] if words else [])


def test_what_is_committed_of_a_layout_is_written_with_its_mapping_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "mappings", tmp_path / "mappings")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "mappings"))
    committed = tmp_path / "mappings" / "layouts" / "meanings" / "meta-llama.txt"
    before = committed.read_bytes()
    committed.unlink()
    mapping = load_mapping(tmp_path / "mappings" / "families" / "meta-llama.yaml")
    assert "--write-meaning" in failures_beside(mapping)[0].message
    write_meaning(tmp_path / "mappings" / "families" / "meta-llama.yaml")
    assert committed.read_bytes() == before
    assert failures_beside(mapping) == []


def test_a_class_whose_file_is_missing_fails_the_proof_of_its_mapping_alone(tmp_path: Path) -> None:
    text = (ROOT / "mappings" / "families" / "transformers.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("classes/mistral", "classes/mistrall"))
    mine, other = engine.prove([tmp_path / "mine.yaml", "families/meta-llama.yaml"])
    assert not mine.holds and "mistrall" in told(mine)
    assert other.holds


def test_a_full_folder_of_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    (proof,) = engine.prove(["families/torchtitan-llama.yaml"])
    assert not proof.holds and "E403 writing failed; got No space left on device" in told(proof)


def test_proofs_stay_out_of_a_small_folder_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert proving._quick() is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 30))
    assert proving._quick() == (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert proving._quick() is None


@pytest.mark.parametrize(
    ("layout", "old", "new", "said"),
    [
        ("megatron", "stage: chunk * pps + pp", "stage: pp * chunks + chunk", "layers, stage is pp * chunks + chunk"),
        ("megatron", "expert: ep * count + expert", "expert: expert * eps + ep", "has ep * count + expert"),
        ("torch-dcp", "layers: {stage: 0", "indices: {layer: 3 - layer}\nlayers: {stage: 0", "layer is 3 - layer"),
        ("internevo", "(layers // pps) + nth ", "(layers // pps) - nth ", "modes, tensor, files"),
        ("internevo", "lone_rank: {tp: 0}", "lone_rank: {tp: 1}", "lone_rank, tp is 1; the bundled internevo has 0"),
        ("internevo", "zip_root: file_name", "", "zip_root is (not there)"),
        (
            "internevo",
            "    help: mtp, msp",
            "    state: [model]\n    help: mtp, msp",
            "tensor, state is model",
        ),
        ("internevo", "max: 1.0e+15, added", "max: 1.0e+15, ignored: unused, added", "rope_base, ignored is True"),
        ("internevo", "    causal: {only", "    of_my_own: {only: [1]}\n    causal: {only", ""),
        ("internevo", "name: internevo", "name: internevo", ""),
    ],
)
def test_a_copied_layout_is_held_against_the_bundled_one(
    layout: str, old: str, new: str, said: str, tmp_path: Path
) -> None:
    text = (ROOT / "mappings" / "layouts" / f"{layout}.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1).replace(f"name: {layout}", "name: mine"), encoding="utf-8")
    found = [one.message for one in laid_out_otherwise(str(path))]
    assert (said in found[0] and len(found) == 2) if said else not found, found
