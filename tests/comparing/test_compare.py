"""Comparing checkpoints: one verdict per tensor, and what the verdicts mean."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine import api
from engine.commands.main import cli
from engine.comparing.comparison import Comparison
from engine.comparing.tensors import Verdict
from engine.errors import EngineError
from engine.formats.safetensors import index_json
from engine.move.tensors import tiles
from engine.run.meter import Progress
from tests.support.depth import sampled

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32, "vocab_size": 40}
LAYERS = 3

State = dict[str, torch.Tensor]


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> State:
    """A tiny model in the names of Llama."""
    torch.manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,), "lm_head.weight": (40, 32)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (32, 32),
            f"{at}self_attn.k_proj.weight": (16, 32),
            f"{at}self_attn.v_proj.weight": (16, 32),
            f"{at}self_attn.q_proj.bias": (32,),
            f"{at}self_attn.o_proj.weight": (32, 32),
            f"{at}mlp.gate_proj.weight": (48, 32),
            f"{at}mlp.up_proj.weight": (48, 32),
            f"{at}mlp.down_proj.weight": (32, 48),
            f"{at}input_layernorm.weight": (32,),
        }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def ref(tmp_path: Path) -> Path:
    return save(tmp_path / "ref", model())


def compared(tmp_path: Path, one: State, two: State, **configs: Any) -> Comparison:
    out = save(tmp_path / "ours", one, configs.get("out", CONFIG))
    return api.compare(out, save(tmp_path / "theirs", two, configs.get("ref", CONFIG)))


def verdict(done: Comparison, name: str) -> Verdict:
    (found,) = (v for v in done.verdicts if v.name == name)
    return found


def unequal(done: Comparison) -> dict[str, str]:
    return {v.name: v.kind for v in done.verdicts if v.kind != "equal"}


def interleaved(tensor: torch.Tensor, head_dim: int = 8) -> torch.Tensor:
    """Rows (heads, half, pair) as (heads, pair, half)."""
    heads = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape).contiguous()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# -- verdicts


def test_a_checkpoint_equals_itself(ref: Path) -> None:
    done = api.compare(ref, ref)
    assert {v.kind for v in done.verdicts} == {"equal"} and len(done.verdicts) == 3 + 9 * LAYERS
    assert done.same() and not done.diagnoses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_after_casting_is_told_whichever_side_is_narrower(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = model(dtype=torch.float32)
    wide["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    narrow = {name: tensor.to(dtype) for name, tensor in wide.items()}
    for number, (one, two) in enumerate(((wide, narrow), (narrow, wide))):
        (tmp_path / str(number)).mkdir()
        done = compared(tmp_path / str(number), one, two)
        assert {v.kind for v in done.verdicts} == {"cast"}
        assert done.same(allow_cast=True) and not done.same()
        assert "equal after casting" in done.diagnoses[0]


@pytest.mark.parametrize("cast", ["out", "ref"])
def test_neither_half_type_is_the_narrower_one(cast: str, tmp_path: Path) -> None:
    first = torch.bfloat16 if cast == "ref" else torch.float16
    one = model(dtype=first)
    two = {name: t.to(torch.float16 if first == torch.bfloat16 else torch.bfloat16) for name, t in one.items()}
    assert {v.kind for v in compared(tmp_path, one, two).verdicts} == {"cast"}


def test_values_that_a_cast_does_not_explain_are_different(tmp_path: Path) -> None:
    wide = model(dtype=torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    narrow["model.norm.weight"][5] += 1
    found = verdict(compared(tmp_path, narrow, wide), "model.norm.weight")
    assert (found.kind, found.count, found.first) == ("changed", 1, (5,))


@pytest.mark.parametrize(("by_chance", "words"), [(False, "cut off to BF16"), (True, "rounded up or down to BF16")])
def test_a_type_written_without_rounding_to_the_nearest_is_told(by_chance: bool, words: str, tmp_path: Path) -> None:
    ref = model(dtype=torch.float32)
    bits = {name: tensor.view(torch.int32) for name, tensor in ref.items()}
    more = {
        name: torch.randint(0, 65536, one.shape) if by_chance else torch.zeros_like(one) for name, one in bits.items()
    }
    out = {
        name: ((one + more[name]) & -65536).to(torch.int32).view(torch.float32).bfloat16() for name, one in bits.items()
    }
    done = compared(tmp_path, out, ref)
    assert {v.kind for v in done.verdicts} == {"rounded"}
    assert all(words in v.note for v in done.verdicts)


def test_a_different_tensor_tells_how_many_elements_how_far_and_the_first(tmp_path: Path, ref: Path) -> None:
    state = model()
    name = "model.layers.1.self_attn.o_proj.weight"
    state[name][7, 3] += 2.0
    state[name][7, 9] += 0.5
    state[name][30, 0] += 0.25
    done = api.compare(save(tmp_path / "out", state), ref)
    assert unequal(done) == {name: "changed"}
    found = verdict(done, name)
    assert (found.count, found.first) == (3, (7, 3))
    assert found.largest == pytest.approx(2.0, abs=0.05)


def test_a_nan_against_a_number_deviates_without_bound(tmp_path: Path, ref: Path) -> None:
    state = model()
    state["model.norm.weight"][4] = float("nan")
    done = api.compare(save(tmp_path / "out", state), ref)
    assert verdict(done, "model.norm.weight").largest == float("inf")
    assert "Infinity" not in json.dumps(done.as_dict())


def test_integers_are_compared_and_measured_too(tmp_path: Path) -> None:
    done = compared(tmp_path, {"a": torch.tensor([1, 2, 3]), "b": torch.tensor([True])},
                    {"a": torch.tensor([1, 9, 3]), "b": torch.tensor([False])})  # fmt: skip
    assert (verdict(done, "a").count, verdict(done, "a").largest, verdict(done, "a").first) == (1, 7.0, (1,))
    assert verdict(done, "b").largest == 1.0


def test_types_without_a_common_one_are_different_without_a_count(tmp_path: Path) -> None:
    found = verdict(compared(tmp_path, {"a": torch.ones(3)}, {"a": torch.ones(3, dtype=torch.int32)}), "a")
    assert (found.kind, found.count) == ("different", None)


def test_missing_and_extra_tensors_are_told(tmp_path: Path, ref: Path) -> None:
    state = model()
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.ones(3)
    done = api.compare(save(tmp_path / "out", state), ref)
    assert unequal(done) == {"model.norm.weight": "missing", "model.extra.weight": "extra"}


def test_another_shape_is_told(tmp_path: Path, ref: Path) -> None:
    state = model()
    state["model.norm.weight"] = torch.ones(31, 2)
    assert unequal(api.compare(save(tmp_path / "out", state), ref)) == {"model.norm.weight": "shape"}


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.o_proj"])
def test_a_transposed_tensor_is_told_square_or_not(name: str, tmp_path: Path, ref: Path) -> None:
    state = model()
    for i in range(LAYERS):
        full = f"model.layers.{i}.{name}.weight"
        state[full] = state[full].t()
    done = api.compare(save(tmp_path / "out", state), ref)
    assert set(unequal(done).values()) == {"transposed"}
    assert done.diagnoses == (f"{name.split('.')[1]} in layers {{0…2}} equals the reference after transposing",)


@pytest.mark.parametrize("padded", ["out", "ref"])
def test_padding_of_the_vocabulary_is_told_on_either_side(padded: str, tmp_path: Path) -> None:
    more = model()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more[name] = torch.cat([more[name], torch.zeros(8, 32).bfloat16()])
    done = compared(tmp_path, *((more, model()) if padded == "out" else (model(), more)))
    assert set(unequal(done).values()) == {"padded"} and len(unequal(done)) == 2
    assert f"8 rows {'more' if padded == 'out' else 'fewer'}" in done.diagnoses[0]


def test_more_rows_after_others_are_no_padding(tmp_path: Path) -> None:
    others = model(seed=1)["lm_head.weight"]
    more = {**model(), "lm_head.weight": torch.cat([others, torch.zeros(8, 32).bfloat16()])}
    assert verdict(compared(tmp_path, more, model()), "lm_head.weight").kind == "shape"


@pytest.mark.parametrize("shape", [(32, 48), (16, 96)])
def test_equal_elements_prove_no_order(shape: tuple[int, int], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    one, two = ({**model(), name: torch.ones(size)} for size in ((48, 32), shape))
    done = compared(tmp_path, one, two)
    assert (verdict(done, name).kind, done.diagnoses) == ("shape", ())


def test_a_few_values_in_place_of_each_element_are_told(tmp_path: Path) -> None:
    """As of four bits by a table of values, which lie on no grid, and a scale for each row."""
    name, drawn = "model.layers.0.mlp.gate_proj.weight", torch.Generator().manual_seed(0)
    fine = torch.randn(32, 128, generator=drawn).to(torch.bfloat16)
    most, table = fine.float().abs().amax(1, keepdim=True), torch.linspace(-1.3, 1.3, 16).sinh() / 1.7
    coarse = (most * table[(fine.float()[..., None] / most[..., None] - table).abs().argmin(-1)]).to(torch.bfloat16)
    found = verdict(compared(tmp_path, {**model(), name: coarse}, {**model(), name: fine}), name)
    assert found.kind == "rounded" and "16 different values" in found.note


def test_a_vocabulary_in_another_order_is_told(tmp_path: Path, ref: Path) -> None:
    state = model()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0)
    done = api.compare(save(tmp_path / "out", state), ref)
    assert unequal(done) == {"model.embed_tokens.weight": "permuted"}
    assert "tokenizer" in done.diagnoses[0]


# -- rotary pairs


@pytest.mark.parametrize(
    ("out_interleaved", "choice", "doing"), [(True, "pairs", "de-interleaving"), (False, "halves", "interleaving")]
)
def test_rotary_pairs_tell_which_choice_would_have_been_right(
    out_interleaved: bool, choice: str, doing: str, tmp_path: Path
) -> None:
    halves, pairs = model(), model()
    for name in pairs:
        if "q_proj" in name or "k_proj" in name:
            pairs[name] = interleaved(pairs[name])
    done = compared(tmp_path, *((pairs, halves) if out_interleaved else (halves, pairs)))
    assert set(unequal(done).values()) == {"permuted"} and len(unequal(done)) == 3 * LAYERS
    assert done.diagnoses == (
        f"k_proj and q_proj in layers {{0…2}} equal the reference after {doing} rotary pairs: "
        f"`rotary` should be `{choice}`",
    )


def test_rotary_pairs_are_told_also_after_casting(tmp_path: Path) -> None:
    wide = model(dtype=torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    name = "model.layers.2.self_attn.k_proj.weight"
    narrow[name] = interleaved(narrow[name])
    found = verdict(compared(tmp_path, narrow, wide), name)
    assert (found.kind, found.rotary) == ("permuted", "pairs")


def test_rotary_pairs_are_told_in_a_fused_tensor(tmp_path: Path) -> None:
    fused = torch.randn(2, 4, 8, 32)  # groups, 2 queries + k + v, head_dim
    turned = fused.clone()
    turned[:, :3] = interleaved(fused[:, :3].reshape(48, 32)).view(2, 3, 8, 32)
    name = "model.layers.0.attention.wqkv.weight"
    found = verdict(compared(tmp_path, {name: turned.view(64, 32)}, {name: fused.view(64, 32)}), name)
    assert (found.kind, found.rotary) == ("permuted", "pairs")


def test_heads_of_four_do_not_tell_the_direction(tmp_path: Path) -> None:
    config = CONFIG | {"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    name = "model.layers.0.self_attn.q_proj.weight"
    one, two = model(), model()
    one[name] = interleaved(one[name], 4)
    done = compared(tmp_path, one, two, out=config, ref=config)
    assert verdict(done, name).rotary == "other" and "the other choice" in done.diagnoses[0]


def test_zeros_of_the_other_sign_are_named(tmp_path: Path) -> None:
    one, two = model(), model()
    for state, zero in ((one, -0.0), (two, 0.0)):
        state["lm_head.weight"][36:] = zero
    done = compared(tmp_path, one, two)
    assert unequal(done) == {"lm_head.weight": "changed"}
    assert verdict(done, "lm_head.weight").note.startswith("a part of it differs: rows 36…39: zeros of the other sign")


@pytest.mark.parametrize("having", ["out", "ref"])
def test_head_counts_come_from_either_configuration(having: str, tmp_path: Path) -> None:
    one = model()
    one["model.layers.0.self_attn.q_proj.weight"] = interleaved(one["model.layers.0.self_attn.q_proj.weight"])
    done = compared(tmp_path, one, model(), **{"out": None, "ref": None, having: CONFIG})
    assert set(unequal(done).values()) == {"permuted"}


def test_without_head_counts_rotary_pairs_are_told_by_the_heads_that_they_keep_to(tmp_path: Path) -> None:
    one = model()
    name = "model.layers.0.self_attn.q_proj.weight"
    one[name] = interleaved(one[name])
    done = compared(tmp_path, one, model(), out=None, ref=None)
    assert unequal(done) == {name: "permuted"}
    assert verdict(done, name).note == "rotary pairs in every block of 8 rows"
    assert verdict(done, name).rotary == "pairs"


@pytest.mark.parametrize(("wrong", "right", "doing"), [("halves", "pairs", "de-"), ("pairs", "halves", "")])
def test_a_conversion_with_the_wrong_rotary_is_told_to_use_the_other(
    wrong: str, right: str, doing: str, tmp_path: Path
) -> None:
    for choice in (wrong, right):
        api.convert(
            "families/internlm2.yaml",
            FIXTURES / "v2_tp4_pp1_nohf",
            tmp_path / choice,
            settings={"rotary": choice, "mlp_letters": "w2_is_down"},
        )
    done = api.compare(tmp_path / wrong, tmp_path / right)
    assert set(unequal(done).values()) == {"permuted"}
    assert done.diagnoses == (
        f"k_proj and q_proj in layers {{0…3}} equal the reference after {doing}interleaving rotary pairs: "
        f"`rotary` should be `{right}`",
    )


# -- other tensors of the reference


def exchange(state: State, one: str, two: str) -> None:
    state[one], state[two] = state[two], state[one]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("w1", "w3"), ("w2", "w3")])
def test_exchanged_tensors_are_told_once_for_all_layers(names: tuple[str, str], cast: bool, tmp_path: Path) -> None:
    wide = {n.replace("gate_proj", names[0]).replace("up_proj", names[1]): t for n, t in model().items()}
    out = dict(wide)
    for i in range(LAYERS):
        exchange(out, *(f"model.layers.{i}.mlp.{name}.weight" for name in names))
    done = compared(tmp_path, out, {n: t.float() if cast else t for n, t in wide.items()})
    one, two = (f"model.layers.1.mlp.{name}.weight" for name in names)
    assert (verdict(done, one).kind, verdict(done, one).other) == ("swapped", two)
    (told,) = (text for text in done.diagnoses if "exchanged" in text)
    assert told.startswith(f"{names[0]} and {names[1]} are exchanged in layers {{0…2}}: ") and "mlp_letters" in told


def test_exchanged_layers_are_told(tmp_path: Path, ref: Path) -> None:
    state = model()
    for name in list(state):
        if ".layers.0." in name:
            exchange(state, name, name.replace(".layers.0.", ".layers.2."))
    done = api.compare(save(tmp_path / "out", state), ref)
    assert set(unequal(done).values()) == {"swapped"} and len(unequal(done)) == 18
    assert done.diagnoses == ("layers are in another order: 0 holds 2, 2 holds 0",)


def expert(layer: int, number: int, name: str = "down") -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{name}_proj.weight"


@pytest.mark.parametrize(
    "pairs, told",
    [
        ([(expert(1, 0, n), expert(1, 2, n)) for n in ("down", "up")],
         "experts are in another order: 0 holds 2, 2 holds 0, in layer 1"),
        ([(expert(1, 0), expert(1, 2))],
         "experts are in another order: 0 holds 2, 2 holds 0, in layer 1, in down_proj alone"),
        ([(expert(i, 0, n), expert(i, 1 + i, n)) for n in ("down", "up") for i in (0, 1)],
         "experts are in another order: 0 holds 1, 1 holds 0, in layer 0"),
        ([(expert(0, i), expert(1, i)) for i in range(3)],
         "layers are in another order: 0 holds 1, 1 holds 0, in down_proj alone"),
        ([(expert(1, 2, "gate"), expert(1, 2, "up"))], "gate_proj and up_proj are exchanged in layer 1, expert 2"),
    ],
    ids=["in a layer", "of one kind", "otherwise in each layer", "layers of one kind", "gate and up"],
)  # fmt: skip
def test_experts_in_another_order_are_told_with_their_layers(
    pairs: list[tuple[str, str]], told: str, tmp_path: Path
) -> None:
    names = [expert(i, e, name) for i in (0, 1) for e in range(3) for name in ("gate", "up", "down")]
    one = {name: torch.randn(6, 6) for name in names}
    two = dict(one)
    for pair in pairs:
        exchange(two, *pair)
    diagnoses = compared(tmp_path, two, one).diagnoses
    assert any(text == told or text.startswith(f"{told}:") for text in diagnoses), diagnoses


def test_a_copy_of_another_expert_is_told_with_both(tmp_path: Path) -> None:
    one = {expert(i, e): torch.randn(6, 6) for i in (0, 1) for e in range(3)}
    (told,) = compared(tmp_path, {**one, expert(0, 2): one[expert(0, 1)].clone()}, one).diagnoses
    assert told == "down_proj in layer 0, expert 2 is a copy of down_proj of the reference in layer 0, expert 1"


def test_a_copy_of_another_tensor_is_told(tmp_path: Path) -> None:
    one, two = model(), model()
    two["model.layers.0.mlp.up_proj.weight"] = torch.randn(48, 32).bfloat16()
    one["model.layers.0.mlp.gate_proj.weight"] = two["model.layers.0.mlp.up_proj.weight"]
    done = compared(tmp_path, one, two)
    assert unequal(done)["model.layers.0.mlp.gate_proj.weight"] == "copied"
    assert unequal(done)["model.layers.0.mlp.up_proj.weight"] == "different"
    assert "gate_proj in layer 0 is a copy of up_proj of the reference in layer 0" in done.diagnoses


def test_tensors_under_other_names_are_told_on_both_sides(tmp_path: Path, ref: Path) -> None:
    state = {name.replace("mlp.gate_proj", "feed_forward.w1"): tensor for name, tensor in model().items()}
    done = api.compare(save(tmp_path / "out", state), ref)
    extra, missing = "model.layers.1.feed_forward.w1.weight", "model.layers.1.mlp.gate_proj.weight"
    assert (verdict(done, extra).kind, verdict(done, extra).other) == ("extra", missing)
    assert (verdict(done, missing).kind, verdict(done, missing).other) == ("missing", extra)
    assert done.diagnoses == (
        "model.layers.{0…2}.feed_forward.w1.weight is model.layers.{0…2}.mlp.gate_proj.weight in the reference",
    )


@sampled(2)
@pytest.mark.parametrize(
    ("fixture", "mapping"), [("v1_tp4_pp1", "families/internlm.yaml"), ("v2_tp4_pp1_nohf", "families/internlm2.yaml")]
)
def test_a_conversion_with_the_wrong_letters_is_told_to_use_the_other(
    fixture: str, mapping: str, tmp_path: Path
) -> None:
    for choice in ("w2_is_down", "w2_is_up"):
        api.convert(mapping, FIXTURES / fixture, tmp_path / choice, settings={"mlp_letters": choice})
    done = api.compare(tmp_path / "w2_is_up", tmp_path / "w2_is_down")
    assert set(unequal(done).values()) == {"swapped"}
    assert done.diagnoses == (
        "down_proj and up_proj are exchanged in layers {0…3}, and cut along the wrong dimension: "
        "`mlp_letters` should be the other choice",
    )


@pytest.mark.parametrize("tied", ["out", "ref"])
def test_a_tied_head_stored_on_one_side_only_is_no_difference(tied: str, tmp_path: Path) -> None:
    whole = model()
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    short = {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}
    states = (short, whole) if tied == "out" else (whole, short)
    configs = {"out": CONFIG, "ref": CONFIG, tied: CONFIG | {"tie_word_embeddings": True}}
    done = compared(tmp_path, *states, **configs)
    assert done.same() and verdict(done, "lm_head.weight").other == "model.embed_tokens.weight"


@pytest.mark.parametrize(("tied", "rows"), [(False, None), (True, -1)], ids=["not tied", "fewer rows"])
def test_a_head_that_one_side_lacks_is_a_difference_unless_its_embedding_takes_its_place(
    tied: bool, rows: int | None, tmp_path: Path
) -> None:
    whole = model()
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"][:rows].clone()
    short = {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}
    done = compared(tmp_path, short, whole, out=CONFIG | {"tie_word_embeddings": tied})
    assert unequal(done) == {"lm_head.weight": "missing"}


def test_a_tied_head_that_both_sides_store_equally_is_a_difference(tmp_path: Path) -> None:
    """The one takes its embedding for it, which is another matrix."""
    done = compared(tmp_path, model(), model(), out=CONFIG | {"tie_word_embeddings": True})
    assert not unequal(done) and not done.same()


def test_a_second_copy_under_a_name_of_its_own_leaves_the_first_equal(tmp_path: Path) -> None:
    whole = model()
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
    done = compared(tmp_path, whole | {other: whole[name].clone()}, whole)
    assert unequal(done) == {other: "extra"} and verdict(done, other).other == name


def test_a_tensor_over_another_is_a_copy_though_its_own_place_is_changed_too(tmp_path: Path) -> None:
    here, there = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    whole = model()
    done = compared(tmp_path, whole | {here: whole[there].clone(), there: -whole[there]}, whole)
    assert unequal(done) == {here: "copied", there: "negated"}


# -- forms of checkpoints


def test_shards_equal_a_single_file(tmp_path: Path, ref: Path) -> None:
    state, folder = model(), tmp_path / "sharded"
    folder.mkdir()
    names = sorted(state)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    listed = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_bytes(index_json(listed, 0))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert api.compare(folder, ref).same() and api.compare(ref, folder).same()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_equal_safetensors_whatever_their_strides(zipped: bool, tmp_path: Path, ref: Path) -> None:
    state = model()
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
    joined = torch.cat([state["model.layers.1.mlp.gate_proj.weight"], state["model.layers.1.mlp.up_proj.weight"]])
    state["model.layers.1.mlp.gate_proj.weight"], state["model.layers.1.mlp.up_proj.weight"] = joined.split(48)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert api.compare(tmp_path / "pytorch_model.bin", ref / "model.safetensors").same()
    assert api.compare(ref, tmp_path / "pytorch_model.bin").same()


def test_transposed_storage_hides_no_exchange(tmp_path: Path, ref: Path) -> None:
    state = model()
    exchange(state, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert set(unequal(api.compare(tmp_path / "pytorch_model.bin", ref)).values()) == {"swapped"}


def test_scalars_and_empty_tensors_are_compared(tmp_path: Path) -> None:
    one = {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 4)}
    done = compared(tmp_path, one, {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)})
    assert unequal(done) == {"scalar": "changed"}
    assert (verdict(done, "scalar").largest, verdict(done, "scalar").first) == (1.0, ())


@given(st.data())
def test_tiles_cover_every_element_once_and_stay_small(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4)))
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(2)]
    strides = []
    for order in orders:
        array = np.empty([shape[axis] for axis in order], np.int8).transpose(np.argsort(order))
        strides.append(array.strides)
    limit = data.draw(st.integers(1, 40))
    seen = np.zeros(shape, int)
    for box in tiles(shape, strides, limit):
        part = tuple(slice(low, high) for low, high in box)
        assert 0 < seen[part].size <= limit
        seen[part] += 1
    assert (seen == 1).all()


# -- size


def big(path: Path, change: tuple[int, int] | None = None) -> Path:
    """16 MiB of float32 in one tensor."""
    tensor = torch.arange(4 << 20, dtype=torch.int32).view(torch.float32).view(4096, -1).clone()
    if change is not None:
        tensor[change] += 1
    torch.save({"a.weight": tensor}, path)
    return path


@sampled(2)
@pytest.mark.parametrize("case", ["equal", "different", "transposed", "turned storage", "cast"])
def test_a_tensor_of_16_mib_is_compared_in_small_buffers(case: str, tmp_path: Path) -> None:
    one, two = big(tmp_path / "one.bin"), tmp_path / "two.bin"
    if case == "equal":
        big(two)
    elif case == "different":
        big(two, change=(4000, 17))
    elif case == "cast":
        torch.save({"a.weight": torch.load(one)["a.weight"].bfloat16()}, two)
    else:
        state = torch.load(one)["a.weight"]
        turned = state.t().contiguous()
        torch.save({"a.weight": turned if case == "transposed" else turned.t()}, two)
        del state, turned
    tracemalloc.start()
    try:
        done = api.compare(one, two)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert done.verdicts[0].kind == {"turned storage": "equal", "different": "changed"}.get(case, case)
    assert peak < 8 << 20


def test_comparing_imports_no_torch(ref: Path) -> None:
    code = f"import sys; from engine import api; api.compare({str(ref)!r}, {str(ref)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_progress_ends_at_the_whole(tmp_path: Path, ref: Path) -> None:
    state = model()
    state["model.norm.weight"] += 1
    state["model.more.weight"] = torch.ones(5)
    told: list[Progress] = []
    api.compare(save(tmp_path / "out", state), ref, progress=told.append)
    assert told[-1].done == told[-1].total == sum(t.nbytes for t in state.values())


# -- the command


def test_the_command_exits_with_0_only_when_all_is_equal(tmp_path: Path, ref: Path) -> None:
    assert invoke("compare", ref, ref).exit_code == 0
    cast = save(tmp_path / "cast", {name: tensor.float() for name, tensor in model().items()})
    assert invoke("compare", cast, ref).exit_code == 1
    assert invoke("compare", cast, ref, "--allow-cast").exit_code == 0
    name = "model.norm.weight"
    other = save(tmp_path / "other", {**model(), name: model(seed=1)[name]})
    assert invoke("compare", other, ref, "--allow-cast").exit_code == 1


def test_the_table_folds_layers_and_the_diagnosis_stands_below(tmp_path: Path, ref: Path) -> None:
    state = model()
    for i in range(LAYERS):
        name = f"model.layers.{i}.self_attn.k_proj.weight"
        state[name] = interleaved(state[name])
    state["model.norm.weight"][3] += 1
    printed = invoke("compare", save(tmp_path / "out", state), ref, "--no-color").output
    assert "model.layers.{0…2}.self_attn.k_proj.weight        3  permuted" in printed
    assert "1 of 32 elements, by up to" in printed and printed.count("[3]") == 2  # in its row and what it means
    assert printed.index("permuted") < printed.index("means k_proj in layers {0…2} equal")
    assert printed.splitlines()[-1] == "26 equal, 3 permuted, 1 changed"


def test_json_has_every_tensor_and_the_diagnoses(tmp_path: Path, ref: Path) -> None:
    state = model()
    exchange(state, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    done = invoke("compare", save(tmp_path / "out", state), ref, "--json")
    data = json.loads(done.output)
    assert done.exit_code == 1
    assert data["counts"] == {"equal": 28, "swapped": 2} and not data["equal"]
    assert len(data["tensors"]) == 30 and len(data["diagnoses"]) == 1


@pytest.mark.parametrize("hostile", [b"", b"PK\x03\x04", b"\xff" * 100, b"{}", b"\x80\x02c__builtin__\neval\n."])
def test_a_file_that_is_no_checkpoint_is_refused(hostile: bytes, tmp_path: Path, ref: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(hostile)
        for arguments in ((tmp_path / name, ref), (ref, tmp_path / name)):
            done = invoke("compare", *arguments)
            assert done.exit_code == 1 and done.output.startswith("E3"), done.output


def test_names_of_any_kind_are_compared(tmp_path: Path) -> None:
    names = ["9" * 5000, "a..b", ".", "²", "layers.٣.w", "{}", "layers.01.w", "layers.1.w", "x"]
    one, two = ({n: torch.randn(3) for n in names} for _ in range(2))
    done = compared(tmp_path, one, two)
    assert {v.kind for v in done.verdicts} == {"different"}
    assert done.as_dict()["rows"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_damaged_file_is_told_with_the_folder_that_it_is_in(name: str, tmp_path: Path, ref: Path) -> None:
    """Both folders have files of these names."""
    out = save(tmp_path / "out", model())
    (ref / name).write_bytes(b"{")
    for pair in ((out, ref), (ref, out)):
        with pytest.raises(EngineError) as caught:
            api.compare(*pair)
        assert caught.value.code == "E301" and caught.value.message.startswith(f"{ref}: ")


@pytest.mark.parametrize("given", ["--src", "--config"])
def test_a_damaged_configuration_is_told_with_the_option_that_gave_it(given: str, tmp_path: Path) -> None:
    """The output, the checkpoint and another folder may each hold a config.json."""
    genuine, step, other = FIXTURES.parent / "dcp" / "fsdp4-f32-hf", tmp_path / "step", tmp_path / "other"
    shutil.copytree(genuine / "step-10", step)
    shutil.copy(genuine / "hf_config.json", step / "config.json")
    out = save(tmp_path / "out", model())
    other.mkdir()
    (step if given == "--src" else other).joinpath("config.json").write_text("{")
    with pytest.raises(EngineError) as caught:
        if given == "--src":
            api.verify(out, src=step, mapping="transformers", dtype="auto")
        else:
            api.plan("transformers", step, config=other / "config.json")
    named = step if given == "--src" else other / "config.json"
    assert caught.value.message == f"{given} {named}: the file is not JSON"
