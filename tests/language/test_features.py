"""Words of the language that few bundled mappings use, on a mapping and a checkpoint of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import EngineError
from engine.run import replicas

DATA: dict[str, Any] = {
    "mapping": 1,
    "name": "words",
    "version": "1.0.0",
    "source": {"layout": "internevo"},
    "target": {"model_type": "llama", "architecture": "LlamaForCausalLM"},
    "dims": {"layer": "num_layers", "hidden": "hidden_size", "vocab": "vocab_size"},
    "rules": [
        {
            "name": "embed",
            "source": "embed.weight",
            "target": "embed.weight",
            "axes": "vocab hidden",
            "split": "vocab",
            "stage": "first",
        },
        {
            "name": "mlp",
            "source": "layers.{layer}.mlp.{param}",
            "target": "h.{layer}.mlp.{param}",
            "axes": "ffn | hidden",
            "split": "ffn",
        },
        {
            "name": "gate",
            "source": "layers.{layer}.gate",
            "target": "h.{layer}.gate",
            "axes": "ffn",
            "split": "ffn",
            "optional": True,
        },
        {
            "name": "head",
            "source": "head.weight",
            "target": "head.weight",
            "axes": "vocab hidden",
            "split": "hidden",
            "stage": "last",
        },
    ],
    "config": {"tie_word_embeddings": False},
}


def rule(name: str, **keys: Any) -> dict[str, Any]:
    """The mapping with one rule changed."""
    rules = [{**r, **keys} if r["name"] == name else r for r in DATA["rules"]]
    return {**DATA, "rules": [{k: v for k, v in r.items() if v is not None} for r in rules]}


def write(data: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Writes a tp 2 checkpoint with whole tensors as returned."""
    state = {"embed.weight": torch.randn(8, 4), "head.weight": torch.randn(8, 4)}
    for i in range(2):
        state[f"layers.{i}.mlp.weight"] = torch.randn(6, 4)
        state[f"layers.{i}.mlp.bias"] = torch.randn(6)
        state[f"layers.{i}.gate"] = torch.randn(6)
    shards(state, tmp_path)
    return state


def shards(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir(exist_ok=True)
    for tp in range(2):
        cut = {n: t.chunk(2, 1 if n == "head.weight" else 0)[tp].clone() for n, t in state.items()}
        torch.save(cut, folder / f"model_tp{tp}_pp0.pt")
    torch.save({"num_layers": 2, "hidden_size": 4, "vocab_size": 8}, folder / "model_config.pt")


def result(data: dict[str, Any], tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    plan = engine.plan(write(data, tmp_path), tmp_path / "step", **options)
    return dict(engine.iter_tensors(plan))


def code(data: dict[str, Any], tmp_path: Path) -> str:
    with pytest.raises(EngineError) as caught:
        result(data, tmp_path)
    return caught.value.code


def test_the_mapping_converts_as_it_stands(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    got = result(DATA, tmp_path)
    assert torch.equal(got["h.1.mlp.weight"], whole["layers.1.mlp.weight"])
    assert torch.equal(got["h.0.mlp.bias"], whole["layers.0.mlp.bias"])
    assert torch.equal(got["head.weight"], whole["head.weight"])


def test_keep_exempts_a_tensor_from_the_dtype(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    got = result(rule("gate", keep="dtype"), tmp_path, dtype="bfloat16")
    assert torch.equal(got["h.0.gate"], whole["layers.0.gate"])
    assert got["h.0.mlp.weight"].dtype == torch.bfloat16
    assert torch.equal(got["h.0.mlp.weight"], whole["layers.0.mlp.weight"].bfloat16())


def test_optional_is_for_all_layers_or_for_none(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    none = {n: t for n, t in whole.items() if "gate" not in n}
    shards(none, tmp_path)
    assert "h.0.gate" not in result(DATA, tmp_path)
    assert code(rule("gate", optional=None), tmp_path) == "E207"
    shards({n: t for n, t in whole.items() if n != "layers.1.gate"}, tmp_path)
    assert code(DATA, tmp_path) == "E207"


def test_a_bias_is_there_for_all_layers_or_for_none(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    shards({n: t for n, t in whole.items() if n != "layers.1.mlp.bias"}, tmp_path)
    assert code(DATA, tmp_path) == "E207"


def test_padding_rows_are_dropped_with_a_reason(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    padded = torch.cat([whole["head.weight"], torch.full((3, 4), 9.0)])
    shards({**whole, "head.weight": padded}, tmp_path)
    changed = rule(
        "head",
        axes="(vocab + padding) hidden",
        target=None,
        drop={"padding": "rows added to divide by tp"},
        targets=[{"name": "head.weight", "axes": "vocab hidden"}],
    )
    assert torch.equal(result(changed, tmp_path)["head.weight"], whole["head.weight"])
    assert code(DATA, tmp_path) == "E203"


def test_experts_stack_into_one_tensor_and_gate_and_up_fuse(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    experts = {f"layers.{i}.e.{e}.{w}": torch.randn(6, 4) for i in range(2) for e in range(3) for w in ("g", "u")}
    shards({**whole, **experts}, tmp_path)
    fused = {"name": "h.{layer}.gate_up", "axes": "expert ((gate + up) ffn) hidden"}
    data = {**DATA, "dims": {**DATA["dims"], "gate": 1, "up": 1}}
    data["rules"] = [
        *DATA["rules"],
        {
            "name": "g",
            "source": "layers.{layer}.e.{expert}.g",
            "axes": "(gate ffn) hidden",
            "split": "ffn",
            "targets": [fused],
        },
        {
            "name": "u",
            "source": "layers.{layer}.e.{expert}.u",
            "axes": "(up ffn) hidden",
            "split": "ffn",
            "targets": [fused],
        },
    ]
    got = result(data, tmp_path)["h.1.gate_up"]
    assert got.shape == (3, 12, 4)
    for e in range(3):
        assert torch.equal(got[e], torch.cat([experts[f"layers.1.e.{e}.g"], experts[f"layers.1.e.{e}.u"]]))


def test_a_transposed_target_is_transposed(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = rule("head", target=None, targets=[{"name": "head.weight", "axes": "hidden vocab"}])
    assert torch.equal(result(changed, tmp_path)["head.weight"], whole["head.weight"].t())


def test_a_tied_tensor_is_left_out_when_it_is_equal_and_the_config_ties(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tied = {**rule("head", tied_to="embed.weight"), "config": {"tie_word_embeddings": True}}
    assert code(tied, tmp_path) == "E402"
    assert "head.weight" in result(rule("head", tied_to="embed.weight"), tmp_path)
    shards({**whole, "head.weight": whole["embed.weight"]}, tmp_path)
    got = result(tied, tmp_path)
    assert "head.weight" not in got
    assert torch.equal(got["embed.weight"], whole["embed.weight"])


def test_a_tied_tensor_that_differs_only_in_its_last_block_is_refused(
    whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = whole["embed.weight"].clone()
    head[-1, -1] += 1
    shards({**whole, "head.weight": head}, tmp_path)
    monkeypatch.setattr(replicas, "BLOCK_BYTES", 16)
    tied = {**rule("head", tied_to="embed.weight"), "config": {"tie_word_embeddings": True}}
    assert code(tied, tmp_path) == "E402"


@pytest.mark.parametrize(("there", "told"), [(False, "no such target"), (True, r"\(8, 4\) and \(8,\)")])
def test_a_tie_to_a_tensor_that_is_not_written_or_has_another_shape_is_refused(
    there: bool, told: str, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shards({**whole, **({"scale": torch.ones(8)} if there else {})}, tmp_path)
    data = {**rule("head", tied_to="scale"), "config": {"tie_word_embeddings": True}}
    data["rules"].append({**DATA["rules"][0], "name": "scale", "source": "scale", "target": "scale", "axes": "vocab",
                          "optional": True})  # fmt: skip
    with pytest.raises(EngineError, match=rf"E209 `head.weight` cannot be tied to `scale`(.|\n)*got +{told}"):
        result(data, tmp_path)


@pytest.mark.usefixtures("whole")
def test_a_transform_along_an_axis_that_blocks_cut_is_refused(tmp_path: Path) -> None:
    assert code(rule("head", transform={"normalize": "vocab"}), tmp_path) == "E209"


@pytest.mark.usefixtures("whole")
def test_a_mapping_that_does_not_say_how_to_write_the_training_configuration_is_not_reversed(tmp_path: Path) -> None:
    engine.convert(write(DATA, tmp_path), tmp_path / "step", tmp_path / "hf")
    with pytest.raises(EngineError, match="E215 mapping `words` does not say how to write"):
        engine.reverse(write(DATA, tmp_path), tmp_path / "hf", tmp_path / "back")


def test_ignored_tensors_are_left_behind_with_the_reason(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    shards({**whole, "layers.0.rotary.inv_freq": torch.ones(2)}, tmp_path)
    assert code(DATA, tmp_path) == "E205"
    data = {**DATA, "ignore": [{"source": "layers.{layer}.rotary.inv_freq", "why": "recomputed"}]}
    plan = engine.plan(write(data, tmp_path), tmp_path / "step")
    assert dict(plan.ignored) == {"layers.0.rotary.inv_freq": "recomputed"}


@pytest.mark.usefixtures("whole")
def test_only_a_mapping_that_names_models_is_held_against_the_one_that_training_names(tmp_path: Path) -> None:
    torch.save('model_type = "ODD"\n', tmp_path / "step" / "config_file.pt")
    assert "head.weight" in result(DATA, tmp_path)
    assert "head.weight" in result({**DATA, "source": {**DATA["source"], "model_types": ["ODD"]}}, tmp_path)
    assert code({**DATA, "source": {**DATA["source"], "model_types": ["EVEN"]}}, tmp_path) == "E212"


@pytest.mark.usefixtures("whole")
def test_a_tensor_one_row_short_of_what_is_known_of_its_axes_is_refused(tmp_path: Path) -> None:
    changed = rule("head", axes="(known + rest) hidden", target=None, targets=[
        {"name": "known.weight", "axes": "known hidden"}, {"name": "rest.weight", "axes": "rest hidden"},
    ])  # fmt: skip
    assert result({**changed, "dims": {**DATA["dims"], "known": 7}}, tmp_path)["rest.weight"].shape == (1, 4)
    with pytest.raises(EngineError, match="E203 sizes disagree: axis `rest`"):
        result({**changed, "dims": {**DATA["dims"], "known": 9}}, tmp_path)
    cut = rule("embed", axes="(known + rest) hidden", split="rest", target=None, targets=changed["rules"][3]["targets"])
    with pytest.raises(EngineError, match="E203 sizes disagree: axis `rest`"):  # a rank has 4 rows
        result({**cut, "dims": {**DATA["dims"], "known": 5}}, tmp_path)


def test_an_axis_nothing_determines_is_an_error(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = rule(
        "head",
        axes="(vocab extra) hidden",
        target=None,
        targets=[{"name": "head.weight", "axes": "(vocab extra) hidden"}],
    )
    assert result(changed, tmp_path)["head.weight"].shape == (8, 4)  # extra = 1, read off the shards
    two = rule(
        "head", axes="(one two) hidden", target=None, targets=[{"name": "head.weight", "axes": "(one two) hidden"}]
    )
    assert code(two, tmp_path) == "E204"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ("vocab other", "source piece {hidden, vocab} occurs in no target"),
        ("(vocab + other) hidden", "target piece {hidden, other} of `head.weight` has no source"),
    ],
)
def test_pieces_that_do_not_match_are_an_error_of_the_mapping(axes: str, told: str, tmp_path: Path) -> None:
    changed = rule("head", target=None, targets=[{"name": "head.weight", "axes": axes}])
    with pytest.raises(EngineError, match=re.escape(f"E107 rule `head`: {told}")):
        result({**changed, "dims": {**DATA["dims"], "other": "1"}}, tmp_path)


def test_rules_that_fill_one_target_change_its_values_alike(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Else the one's change would be made to the other's values too."""
    both = [{"name": "both.weight", "axes": "((one + two) vocab) hidden"}]
    made = rule("embed", axes="(one vocab) hidden", target=None, targets=both, transform={"add": 1})
    head = {**made["rules"][-1], "axes": "(two vocab) hidden", "targets": both}
    head.pop("target")
    made |= {"dims": {**DATA["dims"], "one": "1", "two": "1"}, "rules": [*made["rules"][:-1], head]}
    assert code(made, tmp_path) == "E107"
    head["transform"] = {"add": 1}
    assert torch.equal(
        result(made, tmp_path)["both.weight"], torch.cat((whole["embed.weight"], whole["head.weight"])) + 1
    )


def test_two_rules_for_one_tensor_are_an_error(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    again = {
        "name": "again",
        "source": "embed.weight",
        "target": "copy.weight",
        "axes": "vocab hidden",
        "split": "vocab",
        "stage": "first",
    }
    assert code({**DATA, "rules": [*DATA["rules"], again]}, tmp_path) == "E206"


def test_two_rules_that_write_one_name_are_an_error(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    shards({**whole, "extra": torch.randn(6)}, tmp_path)
    extra = {**DATA["rules"][2], "name": "extra", "source": "extra", "target": "h.0.gate", "stage": "first"}
    assert code({**DATA, "rules": [*DATA["rules"], extra]}, tmp_path) == "E206"


@pytest.mark.usefixtures("whole")
def test_a_setting_may_contradict_a_configuration_but_not_names_of_tensors(tmp_path: Path) -> None:
    names, config = "present('layers.0.gate')", "num_layers == 2"

    def set_to_a(a: str, b: str) -> Any:
        data = {**DATA, "variants": {"v": {"choices": {"a": a, "b": b}}}, "config": {"told": "{{ v }}"}}
        return engine.plan(write(data, tmp_path), tmp_path / "step", settings={"v": "a"}).config["told"]

    assert set_to_a("num_layers == 3", config) == "a"
    assert set_to_a(f"not {names}", config) == "a"  # the configuration decides it too
    with pytest.raises(EngineError, match="E202"):
        set_to_a(f"not {names}", names)


@pytest.mark.usefixtures("whole")
def test_more_combinations_than_can_be_tried_are_not_tried(tmp_path: Path) -> None:
    variants = {f"v{i}": {"choices": ["a", "b"], "decide": "shapes"} for i in range(5)}
    with pytest.raises(EngineError, match="E202 32 combinations of variants are too many"):
        result({**DATA, "variants": variants}, tmp_path)


def test_expectations_are_reported_and_refused_when_strict(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write({**DATA, "expect": {"hidden": 5}}, tmp_path)
    assert any("hidden: got 4" in notice for notice in engine.plan(path, tmp_path / "step").notices)
    with pytest.raises(EngineError) as caught:
        engine.plan(path, tmp_path / "step", strict=True)
    assert caught.value.code == "E213"
