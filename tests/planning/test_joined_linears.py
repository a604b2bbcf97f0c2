"""Whether three linears are one is seen by where their tensors are stored, whatever the configuration says."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.checkpoint.joined import joined_in
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.formats.headers import FileHeader, TensorHeader
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.frameworks import FIXTURES
from tests.support.shards import Model, save

GENUINE = FIXTURES / "internevo_2025" / "v2_isp_wp2"  # what its code of January 2025 saved of InternLM2
LLAMA = FIXTURES / "internevo" / "llama_tp2_pp1_default"
KEYS = {"enable_qkv_fusion": ("wq", "wk", "wv"), "mlp_layer_fusion": ("w1", "w3")}
LETTERS = {"mlp_letters": "w2_is_down"}

State = dict[str, torch.Tensor]


def trained(state: State, fused: dict[str, bool], ranks: int, *, by_layer: bool = False) -> State:
    """Views as InternEvo's optimizer and its hooks leave them.

    `_partition_param_list` deals parameters out to `ranks`, the largest first, each to the one that has least, or by
    its layer; what each has is flattened into one tensor. Hooks cut fused linears when the state is saved.
    """
    parameters: dict[str, State] = {}
    for name, tensor in state.items():
        begin, _, word = name.removesuffix(".weight").rpartition(".")
        of = next((f"{'+'.join(words)}" for key, words in KEYS.items() if word in words and fused[key]), word)
        parameters.setdefault(f"{begin}.{of}", {})[name] = tensor
    buckets: list[list[State]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name, own in sorted(parameters.items(), key=lambda one: -sum(each.numel() for each in one[1].values())):
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        rank = layer % ranks if by_layer else sizes.index(min(sizes))
        buckets[rank].append(own)
        sizes[rank] += sum(each.numel() for each in own.values())
    saved = OrderedDict.fromkeys(state)
    for bucket in filter(None, buckets):
        tensors = [(name, one) for own in bucket for name, one in own.items()]
        views = torch.cat([one.flatten() for _, one in tensors]).split([one.numel() for _, one in tensors])
        saved.update((name, view.view(one.shape)) for (name, one), view in zip(tensors, views, strict=True))
    return saved


def header(state: State) -> FileHeader:
    """The header of a file of these tensors, with a gap between storages, as a zip has it."""
    starts: dict[int, int] = {}
    tensors = []
    for name, one in state.items():
        held = one.untyped_storage()
        start = starts.setdefault(held.data_ptr(), sum(starts.values()) + (len(starts) + 1) * (1 << 40))
        offset = start + one.storage_offset() * one.element_size()
        tensors.append(TensorHeader(name, "F32", tuple(one.shape), one.stride(), offset))
    return FileHeader(File(LocalStore(Path()), "model_tp0_pp0.pt"), 1 << 60, tuple(tensors), "")


def model(layers: int, heads: int, groups: int, ffn: int, *, old: bool) -> State:
    """A rank's linears of InternEvo's Llama or InternLM2, in the order of its modules: w3 before w2 since 2024-09."""
    hidden, state = 8 * heads, OrderedDict[str, torch.Tensor]()
    state["tok_embeddings.weight"] = torch.empty(64, hidden)
    for layer in range(layers):
        rows = {"wq": hidden, "wk": 8 * groups, "wv": 8 * groups, "wo": hidden}
        for word, count in rows.items():
            state[f"layers.{layer}.attention.{word}.weight"] = torch.empty(count, hidden)
        state[f"layers.{layer}.attention_norm.weight"] = torch.empty(hidden)
        for word in ("w1", "w2", "w3") if old else ("w1", "w3", "w2"):
            shape = (hidden, ffn) if word == "w2" else (ffn, hidden)
            state[f"layers.{layer}.feed_forward.{word}.weight"] = torch.empty(shape)
    state["norm.weight"] = torch.empty(hidden)
    state["output.weight"] = torch.empty(64, hidden)
    return state


SHAPES = [*product((1, 2, 5), ((4, 4), (4, 1)), (24, 88, 128), (True, False))]
DEALT = [*product((1, 2, 3, 8), (False,)), (2, True), (5, True)]


@pytest.mark.parametrize(("qkv", "mlp"), [*product((True, False), repeat=2)])
def test_places_of_trained_tensors_never_tell_what_is_not_so(qkv: bool, mlp: bool) -> None:
    fused, silent = {"enable_qkv_fusion": qkv, "mlp_layer_fusion": mlp}, []
    for (layers, heads, ffn, old), (ranks, by_layer) in product(SHAPES, DEALT):
        state = trained(model(layers, *heads, ffn, old=old), fused, ranks, by_layer=by_layer)
        told = {key: one.one for key, one in joined_in([header(state)], KEYS).items()}
        assert told.items() <= fused.items(), (layers, heads, ffn, old, ranks, by_layer)
        silent += [layers] if told != fused and ranks < 3 and not by_layer else []
    assert 5 not in silent  # where a rank holds several layers, places tell both


def test_copies_tell_nothing() -> None:
    state = trained(model(2, 4, 2, 24, old=False), {"enable_qkv_fusion": True, "mlp_layer_fusion": True}, 1)
    assert joined_in([header({name: one.clone() for name, one in state.items()})], KEYS) == {}


def moved(state: State, of: Callable[[str], str], order: Callable[[str], Any]) -> State:
    """Views as a program leaves them that flattens a state, or each layer or module `of` it, in some `order`."""
    buckets: dict[str, list[str]] = {}
    for name in state:
        buckets.setdefault(of(name), []).append(name)
    saved = OrderedDict.fromkeys(state)
    for bucket in buckets.values():
        names = sorted(bucket, key=order)
        views = torch.cat([state[name].flatten() for name in names]).split([state[name].numel() for name in names])
        saved.update((name, view.view(state[name].shape)) for name, view in zip(names, views, strict=True))
    return saved


OF = {
    "state": lambda _: "",
    "layer": lambda name: name.split(".")[1],
    "module": lambda name: name.rpartition(".w")[0].rpartition(".w")[0] or name,
}
ORDERS = {
    "as listed": lambda _: 0,
    "by name": lambda name: name,
    "pieces last": lambda name: name.endswith(("o.weight", "2.weight")),
    "at random": lambda name: sum(name.encode()) % 7,
}


@pytest.mark.parametrize(("of", "order"), [*product(OF, ORDERS)])
def test_buffers_that_no_optimizer_sorted_tell_nothing(of: str, order: str) -> None:
    for layers, heads, ffn, old in SHAPES[::7]:
        state = moved(model(layers, *heads, ffn, old=old), OF[of], ORDERS[order])
        assert joined_in([header(state)], KEYS) == {}, (layers, heads, ffn, old)


def configure(folder: Path, **values: Any) -> None:
    """Change keys of model_config.pt; one that is None is taken out."""
    config = {**read_pickled_mapping(File(LocalStore(folder), "model_config.pt")), "dtype": torch.bfloat16, **values}
    torch.save({name: value for name, value in config.items() if value is not None}, folder / "model_config.pt")


def one_mlp(folder: Path, *, fused: bool) -> Path:
    """Files under isp; with `fused`, w1 and w3 of a rank are halves of its rows of one linear."""
    save(Model("v2", heads=8, groups=4, hidden=32, bias=False), folder, mode="isp_wp", wp=2)
    for path in sorted(folder.glob("model_wp*.pt")):
        state = torch.load(path, weights_only=True)
        torch.save(trained(state, {"enable_qkv_fusion": True, "mlp_layer_fusion": fused}, 1), path)
    return folder


CONTRADICTED: dict[str, tuple[str, Callable[[Path], Path], dict[str, bool]]] = {
    "pieces of one linear are said to be three": (
        "internlm2", lambda folder: Path(shutil.copytree(GENUINE, folder)), {"enable_qkv_fusion": False}),
    "three linears are said to be pieces of one": (
        "llama", lambda folder: Path(shutil.copytree(LLAMA, folder)), {"enable_qkv_fusion": True}),
    "halves of one linear are said to be gate and up": (
        "internlm2", lambda folder: one_mlp(folder, fused=True), {"mlp_layer_fusion": False}),
    "gate and up are said to be halves of one linear": (
        "internlm2", lambda folder: one_mlp(folder, fused=False), {"mlp_layer_fusion": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTED)
def test_a_key_that_contradicts_how_linears_are_stored_is_refused(name: str, tmp_path: Path) -> None:
    family, make, wrong = CONTRADICTED[name]
    step = make(tmp_path / "step")
    (step / "config_file.pt").unlink(missing_ok=True)
    (key,) = wrong
    configure(step, **{key: not wrong[key]})
    plan = engine.plan(family, step, settings=LETTERS)
    configure(step, **{key: None})
    same_plan = engine.plan(family, step, settings=LETTERS)  # they tell what the key would
    assert {n: d.choice for n, d in same_plan.decisions.items()} == {n: d.choice for n, d in plan.decisions.items()}
    assert f"the places of tensors show {key}" in str(same_plan.decisions)
    configure(step, **wrong)
    with pytest.raises(EngineError, match=f"E218 `{key}` of model_config.pt contradicts") as caught:
        engine.plan(family, step, settings=LETTERS)
    assert caught.value.place is not None and caught.value.place.tensor is not None


@pytest.mark.parametrize(
    "name", ["pieces of one linear are said to be three", "halves of one linear are said to be gate and up"]
)
def test_trainings_own_pass_takes_linears_as_they_are_stored_too(name: str, tmp_path: Path) -> None:
    family, make, said = CONTRADICTED[name]
    step = make(tmp_path / "step")
    (step / "config_file.pt").unlink(missing_ok=True)
    configure(step, **dict.fromkeys(said))
    engine.convert(family, step, tmp_path / "hf", settings=LETTERS)
    assert engine.verify(tmp_path / "hf", src=step, mapping=family, logits=True, settings=LETTERS).problems == ()
