"""Tensors that another program exchanged or replaced inside a rank file, seen by the buffers that training saved.

The fixtures are genuine: their tensors are views of the buffers of InternEvo's and Megatron's optimizers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path

import pytest
import torch

import engine
from engine.checkpoint.order import check_order
from engine.errors import EngineError
from engine.formats.headers import FileHeader, TensorHeader, dense_strides
from engine.formats.rank_files import read_rank_file
from engine.language.layout_file import load_layout
from engine.planning import reading
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.frameworks import FIXTURES

State = dict[str, torch.Tensor]
LLAMA = FIXTURES / "internevo" / "llama_tp2_pp1_default"
LAYER = "layers.{}.feed_forward.w{}.weight"


def saved_again(folder: Path, change: Callable[[State], State | None], rank: int = 1, source: Path = LLAMA) -> Path:
    shutil.copytree(source, folder)
    (file,) = folder.rglob(f"model_tp{rank}_pp0.pt")
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, file)
    return file.parent


def exchange(*pairs: tuple[str, str]) -> Callable[[State], None]:
    def change(state: State) -> None:
        for one, other in pairs:
            state[one], state[other] = state[other], state[one]

    return change


def reported(step: Path) -> list[str]:
    return [one for one in engine.plan("llama", step).notices if "oracle.pt" not in one]


NORMS = ("layers.3.attention_norm.weight", "layers.3.ffn_norm.weight")
EXCHANGED = {
    "gate and up": exchange((LAYER.format(2, 1), LAYER.format(2, 3))),
    "gate and up of most layers": exchange(*((LAYER.format(at, 1), LAYER.format(at, 3)) for at in range(3))),
    "keys and values": exchange(("layers.0.attention.wk.weight", "layers.0.attention.wv.weight")),
    "two norms": exchange(NORMS),
    "gate of one layer and up of another": exchange((LAYER.format(0, 1), LAYER.format(3, 3))),
    "a layer's norm and the last": exchange((NORMS[0], "norm.weight")),
    "the same linear of two layers": exchange((LAYER.format(0, 2), LAYER.format(3, 2))),
    "two layers": exchange(*((f"layers.0.{n}", f"layers.1.{n}") for n in (
        "attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "attention.wo.weight",
        "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight",
        "attention_norm.weight", "ffn_norm.weight"))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGED)
def test_tensors_of_equal_shapes_that_exchanged_names_are_refused(name: str, tmp_path: Path) -> None:
    step = saved_again(tmp_path / "step", EXCHANGED[name])
    with pytest.raises(EngineError, match=r"model_tp1_pp0.pt` have exchanged names") as caught:
        engine.plan("llama", step)
    assert caught.value.code == "E306"


@pytest.mark.parametrize(
    ("folder", "layout", "views"),
    [
        ("internevo/llama_tp2_pp1_default", "internevo", True),
        ("megatron/torch-tp1pp1-tied/ckpt/iter_0000010", "megatron", True),
        ("megatron/dist-tp2pp2/ckpt/iter_0000010", "megatron", False),
        ("dcp/fsdp4-f32-hf/step-10", "torch-dcp", False),
    ],
)
def test_only_tensors_of_rank_files_may_be_views_of_one_buffer(
    folder: str, layout: str, views: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a safetensors file lie end to end whatever they were."""
    seen: list[bool] = []
    monkeypatch.setattr(reading, "check_order", lambda headers, *, buffers: seen.append(buffers) or ())
    config = (FIXTURES / folder).parents[1 if "ckpt" in folder else 0] / "hf_config.json"
    reading.read_checkpoint(FIXTURES / folder, load_layout(layout), config if config.exists() else None)
    assert seen == [views]


def test_the_message_names_both_and_how_many_more(tmp_path: Path) -> None:
    step = saved_again(tmp_path / "step", exchange(NORMS, (LAYER.format(2, 1), LAYER.format(2, 3))))
    with pytest.raises(EngineError) as caught:
        engine.plan("llama", step)
    told = str(caught.value)
    assert all(f"`{name}`" in told for name in (LAYER.format(2, 1), LAYER.format(2, 3))) and "1 more pair" in told


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    names = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    return lambda state: {names.get(name, name): one.clone() for name, one in state.items()}


RENAMED = {
    "gate and up": renamed((LAYER.format(2, 1), LAYER.format(2, 3))),
    "gate and up of all layers, in one file": renamed(*((LAYER.format(at, 1), LAYER.format(at, 3)) for at in range(4))),
    "two norms": renamed(NORMS),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_in_another_order_than_in_other_layers_or_files_are_refused(name: str, tmp_path: Path) -> None:
    step = saved_again(tmp_path / "step", RENAMED[name])
    with pytest.raises(EngineError, match=r"model_tp1_pp0.pt` have exchanged names"):
        engine.plan("llama", step)


def test_an_experts_names_in_another_order_are_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "internevo" / "moe_tp2_pp2_dp1", tmp_path / "step")
    (file,) = (tmp_path / "step").rglob("model_moe_layer1_expert2_tp1.pt")
    state = torch.load(file, weights_only=True)
    names = sorted(state)
    torch.save(renamed((names[0], names[2]))(state), file)
    with pytest.raises(EngineError, match=r"E306 tensors of `model_moe_layer1_expert2_tp1.pt` have exchanged names"):
        engine.plan("internlm-moe", file.parent, settings={"mlp_letters": "w2_is_down"})


def as_copies(state: State) -> State:
    exchange((LAYER.format(2, 1), LAYER.format(2, 3)))(state)
    return {name: one.clone() for name, one in state.items()}


def last_again(state: State) -> None:
    """As a program that renames some keys leaves them."""
    for name in [name for name in state if name.endswith(("w2.weight", "wv.weight"))]:
        state[name] = state.pop(name)


HONEST: dict[str, Callable[[State], State | None]] = {
    "copies, whose exchange cannot be seen": as_copies,
    "keys in another order": last_again,
    "keys in the order of the alphabet": lambda state: dict(sorted(state.items())),
    "keys backwards": lambda state: dict(reversed(state.items())),
    "an average beside them, of the same sizes": lambda state: {
        **{name: one.clone() for name, one in state.items()},
        "average": {name: one.clone() for name, one in state.items()},
    },
}


@pytest.mark.parametrize("name", HONEST)
def test_another_order_of_names_says_nothing(name: str, tmp_path: Path) -> None:
    assert not [one for one in reported(saved_again(tmp_path / "step", HONEST[name])) if "another program" in one]


def test_sorted_names_of_a_middle_stage_are_not_told_as_an_exchange(tmp_path: Path) -> None:
    state = torch.load(LLAMA / "model_tp1_pp0.pt", weights_only=True)
    torch.save({name: state[name] for name in sorted(state) if "layers" in name}, tmp_path / "model_tp1_pp0.pt")
    assert check_order([read_rank_file(File(LocalStore(tmp_path), "model_tp1_pp0.pt"))]) == ()


@pytest.mark.parametrize("end", ["norm2.weight", "1.norm1.weight"])
def test_names_put_back_at_the_end_of_a_small_stage_say_nothing(end: str, tmp_path: Path) -> None:
    """Of two layers only one pair is then in another order, such as `0.norm2` and `1.norm1`."""
    state = torch.load(FIXTURES / "internevo" / "v1_tp2_pp2" / "model_tp1_pp0.pt", weights_only=True)
    for name in [name for name in state if name.endswith(end)]:
        state[name] = state.pop(name)
    torch.save(state, tmp_path / "model_tp1_pp0.pt")
    assert check_order([read_rank_file(File(LocalStore(tmp_path), "model_tp1_pp0.pt"))]) == ()


def test_pieces_of_one_linear_say_nothing_of_the_order_of_names(tmp_path: Path) -> None:
    """As a program cuts it that fused gate and up of one layer."""

    def change(state: State) -> None:
        one, other = LAYER.format(1, 1), LAYER.format(1, 3)
        state[other], state[one] = torch.cat([state[other], state[one]]).chunk(2)

    assert not reported(saved_again(tmp_path / "step", change))


def test_names_of_one_shape_put_back_at_the_end_are_not_exchanged_ones(tmp_path: Path) -> None:
    """On four ranks all linears of this MLP are square; a program changed the second one of two layers."""
    shutil.copytree(FIXTURES / "internevo" / "v1_tp4_pp1", tmp_path / "step")
    for file in (tmp_path / "step").glob("model_tp*.pt"):
        state = torch.load(file, weights_only=True)
        for name in ("blocks.2.mlp.w2.weight", "blocks.3.mlp.w2.weight"):
            state[name] = state.pop(name).clone()
        torch.save({name: one.clone() for name, one in state.items()}, file)
    engine.plan("internlm", tmp_path / "step", settings={"mlp_letters": "w2_is_down"})


def test_an_exchange_in_all_layers_is_reported(tmp_path: Path) -> None:
    """It may be a renaming on purpose, as of the letters of an MLP whose linears all have one shape."""
    everywhere = exchange(*((LAYER.format(at, 1), LAYER.format(at, 3)) for at in range(4)))
    (told,) = reported(saved_again(tmp_path / "step", everywhere))
    assert told == (
        "each stored where the other belongs: another program exchanged or moved names: "
        f"{LAYER.format(0, 1)} and {LAYER.format(0, 3)} in model_tp1_pp0.pt"
    )


@pytest.mark.parametrize(
    ("folder", "file", "moves", "told"),
    [
        ("v1_tp2_pp2", "model_tp0_pp1.pt", {"blocks.0": "blocks.1"}, "blocks.0, blocks.1"),
        ("v2_tp2_pp2", "model_tp1_pp0.pt", {"layers.0": "layers.1"}, "layers.0, layers.1"),
        ("v2_tp2_pp2", "model_tp1_pp0.pt", {"layers.0.feed_forward": "layers.1.feed_forward"}, None),
        ("moe_tp2_pp2_dp1", "model_tp0_pp1.pt", {"blocks.0": "blocks.1"}, "blocks.0, blocks.1"),
        ("moe_tp2_pp2_dp1", "model_tp0_pp1.pt", {"blocks.0.mlp": "blocks.1.mlp"}, None),  # routers: a buffer of two
        ("moe_tp2_pp2_dp1", "model_tp1_pp0.pt", {"blocks.0.mixer": "blocks.1.mixer"}, None),  # eleven and two
        ("v1_tp2_pp2_l5", "model_tp0_pp1.pt", {"blocks.0": "blocks.2"}, "blocks.0, blocks.2"),
        ("v1_tp2_pp2_l5", "model_tp0_pp1.pt", {"blocks.1": "blocks.2"}, None),
        ("v1_tp2_pp2_l5", "model_tp0_pp1.pt", {"blocks.1.mixer": "blocks.2.mixer"}, None),
        ("v1_tp2_pp2_l5", "model_tp0_pp1.pt", {"blocks.0": "blocks.1", "blocks.1": "blocks.2"},
            "blocks.0, blocks.1, blocks.2"),
        ("v1_tp2_pp2_chunks2", "model_tp0_pp1.pt", {"0.model.blocks.0": "1.model.blocks.1"}, None),
    ],
)  # fmt: skip
def test_layers_of_a_small_stage_that_have_each_others_places_are_told(
    folder: str, file: str, moves: dict[str, str], told: str | None, tmp_path: Path
) -> None:
    """Refused, unless all may be that a program stores its layers in another order."""
    state = torch.load(FIXTURES / "internevo" / folder / file, weights_only=True)
    for one, other in moves.items():
        exchange(*((name, name.replace(f"{one}.", f"{other}.")) for name in state if f"{one}." in name))(state)
    torch.save(state, tmp_path / file)
    header = read_rank_file(File(LocalStore(tmp_path), file))
    with nullcontext() if told is not None else pytest.raises(EngineError, match="have exchanged names"):
        (found,) = check_order([header])
        assert found.replace("model.", "") == f"all of {told} in {file}".replace("model.", "")


def test_letters_of_the_mlp_that_were_exchanged_on_purpose_are_converted(tmp_path: Path) -> None:
    """Shapes show which is which: the file is as InternEvo before 2024-03 would have written it."""
    letters = exchange(*((f"blocks.{at}.mlp.w2.weight", f"blocks.{at}.mlp.w3.weight") for at in range(4)))
    source = FIXTURES / "internevo" / "v1_tp2_pp1_vocabsplit"
    step = saved_again(tmp_path / "once", letters, 0, source)
    (other,) = step.rglob("model_tp1_pp0.pt")
    state = torch.load(other, weights_only=True)
    letters(state)
    torch.save(state, other)
    assert engine.plan("internlm", step).decisions["mlp_letters"].choice == "w2_is_up"


def test_megatrons_buffers_have_the_reverse_order() -> None:
    folder = FIXTURES / "megatron" / "leg_t2_distopt" / "iter_0000010" / "mp_rank_01"
    header = read_rank_file(File(LocalStore(folder), "model_optim_rng.pt"), nested=[re.compile("model")])
    check_order([header])
    held = {one.name: one for one in header.tensors}
    one, other = (held[f"model.decoder.layers.{at}.mlp.linear_fc1.weight"] for at in (0, 1))
    places = {one.name: other.offset, other.name: one.offset}
    moved = (replace(each, offset=places.get(each.name, each.offset)) for each in header.tensors)
    with pytest.raises(EngineError, match="have exchanged names"):
        check_order([replace(header, tensors=tuple(moved))])


REPLACED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda one: one * 2,
    "of another training": torch.randn_like,
    "its rows moved": lambda one: one.roll(1, 0),
}


@pytest.mark.parametrize("name", REPLACED)
def test_tensors_that_another_program_replaced_are_reported(name: str, tmp_path: Path) -> None:
    key = LAYER.format(2, 3)
    step = saved_again(tmp_path / "step", lambda state: state.update({key: REPLACED[name](state[key])}))
    assert reported(step) == [
        f"another program replaced these tensors after training had saved them: {key} in model_tp1_pp0.pt"
    ]


def test_verify_reports_replaced_tensors_of_the_source(tmp_path: Path) -> None:
    key = LAYER.format(2, 3)
    step = saved_again(tmp_path / "step", lambda state: state.update({key: -state[key]}))
    engine.convert("llama", step, tmp_path / "hf")
    found = engine.verify(tmp_path / "hf", src=step, mapping="llama")
    assert found.values == (f"replaced in the source after training had saved it: {key} in model_tp1_pp0.pt",)


def of_another_rank(part: str) -> Callable[[State], None]:
    """Tensors of the other file, which are views of its buffer."""
    (file,) = LLAMA.rglob("model_tp0_pp0.pt")
    other = torch.load(file, weights_only=True)
    return lambda state: state.update({name: one for name, one in other.items() if part in name})


MANY = {
    "a layer of another rank": (of_another_rank("layers.2."), 9),
    "all norms of another rank, among them neighbours in the buffer": (of_another_rank("norm"), 9),
    "most layers of another rank, so that fewer are its own": (of_another_rank("layers"), 3),
    "most of the buffer, by copies": (
        lambda state: state.update({name: -state[name] for name in state if "feed_forward" in name}),
        12,
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_any_number_of_replaced_tensors_is_reported(name: str, tmp_path: Path) -> None:
    change, count = MANY[name]
    step = saved_again(tmp_path / "step", change)
    (file,) = step.rglob("model_tp1_pp0.pt")
    header = read_rank_file(File(LocalStore(file.parent), file.name))
    assert len(header.replaced) == count


def header_of(names: list[tuple[str, tuple[int, ...]]], stored: list[tuple[str, tuple[int, ...]]]) -> FileHeader:
    """A file with these tensors of bfloat16, in one buffer in the order of `stored`."""
    ends = accumulate(2 * prod(shape) for _, shape in stored)
    begins = {name: end - 2 * prod(shape) for (name, shape), end in zip(stored, ends, strict=True)}
    tensors = [TensorHeader(name, "BF16", shape, dense_strides(shape), begins[name]) for name, shape in names]
    return FileHeader(File(LocalStore(Path()), "model_tp0_pp0.pt"), 0, tuple(tensors), "")


def test_what_a_program_sorted_by_sizes_and_names_says_nothing() -> None:
    """There the head is before the embedding. It would be so too if these two alone exchanged names."""
    layer = [("attention.wqkv", (12, 8)), ("attention.wo", (8, 8)), ("feed_forward.w1", (16, 8)),
             ("feed_forward.w3", (16, 8)), ("attention_norm", (8,)), ("ffn_norm", (8,))]  # fmt: skip
    layers = [(f"layers.{at}.{name}.weight", shape) for at in range(2) for name, shape in layer]
    names = [("tok_embeddings.weight", (32, 8)), *layers, ("norm.weight", (8,)), ("output.weight", (32, 8))]
    by_size = sorted(names, key=lambda one: -prod(one[1]))
    check_order([header_of(names, by_size)])
    check_order([header_of(names, sorted(names, key=lambda one: (-prod(one[1]), one[0])))])
    other = {f"layers.1.feed_forward.{one}.weight": f"layers.1.feed_forward.{two}.weight"
             for one, two in (("w1", "w3"), ("w3", "w1"))}  # fmt: skip
    with pytest.raises(EngineError, match="have exchanged names"):
        check_order([header_of(names, [(other.get(name, name), shape) for name, shape in by_size])])


def test_a_buffers_first_tensor_and_its_last_that_exchanged_names_are_refused() -> None:
    names = [(f"layers.{at}.{kind}.weight", (8,)) for at in range(6) for kind in ("wo", "norm")]
    with pytest.raises(EngineError, match=r"got +`layers.0.wo.weight` and `layers.5.norm.weight`"):
        check_order([header_of(names, [names[-1], *names[1:-1], names[0]])])


def test_names_that_a_program_sorted_by_their_numbers_say_nothing() -> None:
    """Layer 10 is after layer 9."""
    names = [(f"layers.{at}.w{one}.weight", (8, 8)) for at in range(12) for one in range(3)]
    assert check_order([header_of(names, [names[1], names[0], *names[2:]])]) == ()


@pytest.mark.parametrize(
    ("layers", "moved", "told"),
    [(5, 1, False), (6, 1, True), (6, 2, False), (6, 5, False), (12, 6, True), (12, 7, False)],
)
def test_pairs_that_exchanged_names_are_few_of_a_buffer(layers: int, moved: int, told: bool) -> None:
    """A program that orders parameters otherwise exchanges many pairs: here gate and up of the first layers.

    Of few tensors a quarter may be moved, of twice as many the half. Fewer than twelve may be in order by chance.
    """
    names = [(f"layers.{at}.{kind}.weight", (8,)) for at in range(layers) for kind in ("w3", "w1")]
    stored = [one for at in range(layers) for one in names[2 * at : 2 * at + 2][:: -1 if at < moved else 1]]
    with pytest.raises(EngineError, match="have exchanged names") if told else nullcontext():
        assert check_order([header_of(names, stored)]) == ()


@pytest.mark.parametrize("pairs", [1, 2])
def test_only_a_single_pair_of_other_layers_and_parameters_is_told(pairs: int) -> None:
    names = [(f"layers.{at}.{kind}.weight", (8,)) for at in range(12) for kind in ("w3", "w1")]
    stored = [*names]
    for at in range(0, 4 * pairs, 4):
        stored[at], stored[-at - 1] = stored[-at - 1], stored[at]
    with pytest.raises(EngineError, match="have exchanged names") if pairs == 1 else nullcontext():
        assert check_order([header_of(names, stored)]) == ()


@pytest.mark.parametrize(("kinds", "told"), [(5, False), (6, True)])
def test_layers_of_few_tensors_that_have_each_others_places_are_refused(kinds: int, told: bool) -> None:
    """Of more, a program may store the layers in another order."""
    names = [(f"layers.{at}.w{kinds - one}.weight", (8,)) for at in range(3) for one in range(kinds)]
    stored = [*names[-kinds:], *names[kinds:-kinds], *names[:kinds]]
    with nullcontext() if told else pytest.raises(EngineError, match="have exchanged names"):
        assert check_order([header_of(names, stored)]) == ("all of layers.0, layers.2 in model_tp0_pp0.pt",)


@pytest.mark.parametrize("also", [False, True], ids=["alone", "beside tensors of other sizes"])
def test_an_exchange_is_told_unless_tensors_of_unequal_sizes_have_another_order_too(also: bool) -> None:
    sizes = {"w1": (16,), "w3": (16,), "wo": (8,), "norm": (4,)}
    names = [(f"layers.{at}.{kind}.weight", shape) for at in range(4) for kind, shape in sizes.items()]
    stored = [*names[:4], names[5], names[4], *names[6:14], *(names[:13:-1] if also else names[14:])]
    with nullcontext() if also else pytest.raises(EngineError, match="have exchanged names"):
        assert check_order([header_of(names, stored)]) == ()


@pytest.mark.parametrize(
    ("names", "layers", "others", "told"),
    [
        (6, 2, 1, False), (6, 3, 1, True), (5, 3, 1, False), (5, 4, 1, True),
        (6, 8, 4, True), (5, 8, 2, True), (5, 8, 3, False),
    ],
)  # fmt: skip
def test_an_order_of_names_is_known_from_enough_layers(names: int, layers: int, others: int, told: bool) -> None:
    """Of many names from two and the half, of few from three and three quarters: then it is not by chance.

    The last layers have another order.
    """
    orders = [[*range(names)] if at < layers - others else [*range(names - 2), names - 1, names - 2]
              for at in range(layers)]  # fmt: skip
    listed = [(f"layers.{at}.w{one}.weight", (8,)) for at, order in enumerate(orders) for one in order]
    with pytest.raises(EngineError, match="have exchanged names") if told else nullcontext():
        check_order([header_of(listed, listed)], buffers=False)


def test_files_that_hold_other_numbers_of_boxes_of_the_same_tensors_are_not_compared() -> None:
    """As Megatron's torch_dist of stages with one layer and with two, where all layers are one tensor."""
    once, twice = ([(f"layers.0.{name}", (8, 8)) for name in ("qkv", "proj") for _ in range(n)] for n in (1, 2))
    files = [once, twice, once, once, once]
    check_order([header_of(each, each) for each in files], buffers=False)
    with pytest.raises(EngineError, match="have exchanged names"):
        check_order([header_of(each, each) for each in [*files, once[::-1]]], buffers=False)


def test_norms_that_are_exchanged_in_all_layers_of_a_buffer_of_their_own_are_reported() -> None:
    kinds = ("wo", "attention_norm", "ffn_norm")
    names = [(f"layers.{at}.{kind}.weight", (8,)) for at in range(6) for kind in kinds]
    norms = [one for one in names if "norm" in one[0]]
    other = dict(zip(kinds[1:], kinds[:0:-1], strict=True))
    moved = [(".".join(other.get(part, part) for part in name.split(".")), shape) for name, shape in norms]

    def told(stored: list[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
        together = header_of(names, [*stored, *(one for one in names if one not in norms)])
        apart = [one if "norm" in one.name else replace(one, offset=2 * one.offset) for one in together.tensors]
        return check_order([replace(together, tensors=tuple(apart))])

    assert told(norms) == ()
    assert told(moved) == ("layers.0.attention_norm.weight and layers.0.ffn_norm.weight in model_tp0_pp0.pt",)


@pytest.mark.parametrize("names", [["head.weight"], ["norm.weight", "norm.bias", "head.weight"]])
def test_a_stage_without_layers_is_in_order(names: list[str]) -> None:
    tensors = tuple(TensorHeader(name, "F32", (4,), (1,), 64 + 16 * at) for at, name in enumerate(names))
    assert check_order([FileHeader(File(LocalStore(Path()), "model_tp0_pp3.pt"), 1 << 20, tensors, "")]) == ()
