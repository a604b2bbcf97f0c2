"""Faults of models rather than of files: ranks swapped, of another run, doubled, of other types, not numbers."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.attacks import add, attack
from tests.attacks.pickles import RANK, call, g, i, item, u, with_pickle
from tests.support.shards import Model, save

V1 = Model()


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(OrderedDict((name, tensor.clone()) for name, tensor in state.items()), path)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@attack("training", "E402", RANK)
def a_rank_of_another_run(folder: Path) -> None:
    save(Model(seed=1), folder.parent / "other", tp=2, pp=2)
    shutil.copy(folder.parent / "other" / RANK, folder / RANK)
    shutil.rmtree(folder.parent / "other")


@attack("training", "E203", "")
def a_rank_of_another_model(folder: Path) -> None:
    save(Model(ffn=40), folder.parent / "other", tp=2, pp=2)
    shutil.copy(folder.parent / "other" / RANK, folder / RANK)
    shutil.rmtree(folder.parent / "other")


@attack("training", "E203 E207 E208 E402", "")
def a_rank_of_a_run_with_more_ranks(folder: Path) -> None:
    save(Model(), folder.parent / "other", tp=4, pp=2)
    shutil.copy(folder.parent / "other" / RANK, folder / RANK)
    shutil.rmtree(folder.parent / "other")


@attack("training", "E201", "model_tp0_pp2.pt")
def a_stage_that_only_one_rank_has(folder: Path) -> None:
    shutil.copy(folder / "model_tp1_pp1.pt", folder / "model_tp1_pp2.pt")


@attack("training", "E201", "`model_tp2_pp0.pt` does not belong to this training run")
def a_rank_that_a_run_with_more_ranks_left_in_a_folder_of_fewer(folder: Path) -> None:
    training_config(folder, "parallel = dict(tensor=2)")
    save(Model(), folder.parent / "other", tp=4, pp=2)
    shutil.copy(folder.parent / "other" / "model_tp2_pp0.pt", folder)
    shutil.rmtree(folder.parent / "other")


@attack("training", "E201", "does not belong")
def a_rank_number_of_18_digits(folder: Path) -> None:
    shutil.copy(folder / RANK, folder / "model_tp999999999999999999_pp0.pt")


@attack("training", "E211", "3 layers")
def a_layer_doubled_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({k.replace(".1.", ".2."): v for k, v in s.items() if ".1." in k}))


@attack("training", "E203", "5 layers")
def a_layer_doubled_on_all_ranks(folder: Path) -> None:
    for tp in range(2):
        edit(folder / f"model_tp{tp}_pp0.pt",
             lambda s: s.update({k.replace(".1.", ".2."): v for k, v in s.items() if ".1." in k}))  # fmt: skip


@attack("training", "E211 E207", "")
def a_layer_of_a_number_far_away(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({k.replace(".1.", ".7."): s.pop(k) for k in list(s) if ".1." in k}))


@attack("training", "E207", "blocks.1.")
def a_layer_of_a_number_of_18_digits_that_the_configuration_confirms(folder: Path) -> None:
    a_layer_of_a_number_of_18_digits(folder)
    config(folder, num_layers=10**17 + 3)


@attack("training", "E203", "layers")
def a_layer_of_a_number_of_18_digits(folder: Path) -> None:
    far = f".{10**17}."
    for tp in range(2):
        edit(folder / f"model_tp{tp}_pp0.pt",
             lambda s: s.update({k.replace(".1.", far): s.pop(k) for k in list(s) if ".1." in k}))  # fmt: skip


@attack("training", None)
def every_name_with_and_without_prefix(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({f"model.{k}": v for k, v in s.items()}))


@attack("training", "E207", RANK)
def a_replica_that_is_missing_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.pop("blocks.0.norm1.weight"))


@attack("training", "E402", "norm1.weight")
def a_replica_that_is_not_a_number_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s["blocks.0.norm1.weight"].__setitem__(3, float("nan")))


@attack("training", "E402", "norm1.weight")
def a_replica_whose_zero_is_negative_on_one_rank(folder: Path) -> None:
    edit(folder / "model_tp0_pp0.pt", lambda s: s["blocks.0.norm1.weight"].__setitem__(3, 0.0))
    edit(folder / RANK, lambda s: s["blocks.0.norm1.weight"].__setitem__(3, -0.0))


@attack("training", None)
def a_weight_that_is_not_a_number(folder: Path) -> None:
    """Bytes are bytes: what training made of them is not the converter's to judge."""
    edit(folder / RANK, lambda s: s["blocks.0.mlp.w1.weight"].fill_(float("nan")))


@attack("training", "E210", "F32")
def another_type_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": s["blocks.0.mlp.w1.weight"].float()}))


@attack("training", "E210", "F16")
def another_type_of_the_same_width_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": s["blocks.0.mlp.w1.weight"].half()}))


@attack("training", "E210 E402", "")
def a_replica_of_another_type_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.norm1.weight": s["blocks.0.norm1.weight"].half()}))


@attack("training", "E402", "F16 against BF16")
def a_replica_of_the_same_bytes_and_another_type_on_one_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.norm1.weight": s["blocks.0.norm1.weight"].view(torch.half)}))


@attack("training", "E303", "not supported")
def a_weight_of_complex_numbers(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": torch.ones(12, 16, dtype=torch.complex64)}))


@attack("training", "E203", "")
def a_weight_of_no_elements(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": torch.ones(0, 16).bfloat16()}))


@attack("training", "E203", "")
def a_weight_of_another_rank(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": torch.ones(12, 4, 4).bfloat16()}))


@attack("training", "E203", "")
def a_weight_that_is_one_number(folder: Path) -> None:
    edit(folder / RANK, lambda s: s.update({"blocks.0.mlp.w1.weight": torch.tensor(1.0).bfloat16()}))


@attack("training", "E303", "repeats its elements")
def a_weight_that_repeats_one_element_on_and_on(folder: Path) -> None:
    state = torch.load(folder / RANK, weights_only=True)
    state["blocks.0.mlp.w1.weight"] = torch.ones(1).bfloat16().expand(1 << 40, 16)
    torch.save(state, folder / RANK)


@attack("training", "E303", "repeats its elements")
def weights_that_repeat_one_element_on_every_rank(folder: Path) -> None:
    """The output would have 2 ** 46 bytes, out of files of a few thousand."""
    for tp in range(2):
        for pp in range(2):
            path = folder / f"model_tp{tp}_pp{pp}.pt"
            state = torch.load(path, weights_only=True)
            for name in [n for n in state if n.endswith(("w1.weight", "w3.weight"))]:
                state[name] = torch.ones(1).bfloat16().expand(1 << 40, 16)
            for name in [n for n in state if n.endswith("w2.weight")]:
                state[name] = torch.ones(1).bfloat16().expand(16, 1 << 40)
            torch.save(state, path)
    config(folder, mlp_ratio=float(1 << 37), multiple_of=1)


@attack("training", "E303", "repeats its elements")
def a_weight_whose_rows_overlap(folder: Path) -> None:
    """As by one flipped bit of a stride, in a file without checksums."""
    state = torch.load(folder / RANK, weights_only=True)
    weight = state["blocks.0.mlp.w1.weight"]
    state["blocks.0.mlp.w1.weight"] = weight.flatten().as_strided(weight.shape, (weight.shape[1] - 1, 1))
    torch.save(state, folder / RANK)


@attack("training", "E303", "negated")
def a_weight_that_is_negated_when_it_is_loaded(folder: Path) -> None:
    """Its bytes are those of before: torch keeps a mark beside them."""
    state = torch.load(folder / RANK, weights_only=True)
    state["blocks.0.mlp.w1.weight"] = torch._neg_view(state["blocks.0.mlp.w1.weight"])
    torch.save(state, folder / RANK)


@attack("training", "E402", "`blocks.0.mlp.w1.weight` and `model.blocks.0.mlp.w1.weight` stand for")
def a_weight_and_its_average_under_another_prefix(folder: Path) -> None:
    state = torch.load(folder / RANK, weights_only=True)
    state["model.blocks.0.mlp.w1.weight"] = state["blocks.0.mlp.w1.weight"] / 2
    torch.save(state, folder / RANK)


@attack("training", "E303", "other data")
def a_weight_that_is_given_other_data_when_it_is_loaded(folder: Path) -> None:
    """An attribute that torch.load sets; the tensor's own bytes are those of before."""
    state = torch.load(folder / RANK, weights_only=True)
    weight = state["blocks.0.mlp.w1.weight"]
    weight.__dict__["data"] = weight * 2
    torch.save(state, folder / RANK)


@attack("training", None)
def weights_that_share_their_storage(folder: Path) -> None:
    for path in folder.glob("model_tp*_pp0.pt"):  # on one rank alone it would be a copy
        state = torch.load(path, weights_only=True)
        state["blocks.0.mlp.w3.weight"] = state["blocks.0.mlp.w1.weight"]
        torch.save(state, path)


@attack("training", None)
def a_weight_that_lies_transposed(folder: Path) -> None:
    state = torch.load(folder / RANK, weights_only=True)
    state["blocks.0.mlp.w1.weight"] = state["blocks.0.mlp.w1.weight"].t().contiguous().t()
    torch.save(state, folder / RANK)


# Configurations: what a pickled mapping can hold that no training run would write.


def config(folder: Path, **changes: Any) -> None:
    held = dict(torch.load(folder / "plain_config.pt", weights_only=True))
    torch.save(held | changes, folder / "model_config.pt")


NAN, INF = float("nan"), float("inf")
for _key, _value, _codes in (
    ("num_layers", 0, "E218"),
    ("num_layers", -4, "E218"),
    ("num_layers", 1 << 62, "E203"),
    ("num_layers", 1 << 20_000, "E301"),
    ("num_layers", 4.5, "E218"),
    ("num_layers", NAN, "E218"),
    ("num_layers", INF, "E218"),
    ("num_layers", "four", "E218"),
    ("num_layers", [4], "E218"),
    ("num_layers", {"x": 4}, "E218"),
    ("num_layers", None, "E218"),
    ("num_layers", True, "E218"),
    ("num_attention_heads", 0, "E218"),
    ("num_attention_heads", -4, "E218"),
    ("num_attention_heads", 3, "E203 E105 E204"),
    ("num_attention_heads", 1 << 20_000, "E301"),
    ("num_attention_heads", 10**400, "E218"),
    ("hidden_size", 0, "E218"),
    ("hidden_size", "16" * 1000, "E218"),
    ("mlp_ratio", NAN, "E218"),
    ("mlp_ratio", INF, "E218"),
    ("mlp_ratio", 1e308, "E218"),
    ("mlp_ratio", "9**9**9", "E218"),
    ("multiple_of", 0, "E218"),
    ("multiple_of", -1, "E218"),
    ("vocab_size", 1 << 63, "E203 E218"),
    ("layer_norm_epsilon", NAN, "E218"),
    ("layer_norm_epsilon", INF, "E218"),
    ("layer_norm_epsilon", 1 << 20_000, "E301"),
    ("no_bias", True, "E202"),
    ("no_bias", None, None),
    ("num_chunks", 0, "E218"),
    ("num_chunks", 1 << 40, None),
    ("dtype", "\x1b[2J", None),
    ("{{ 7 * 7 }}", "{{ 7 * 7 }}", None),
    ("__class__", "__class__", None),
    ("present", 5, None),
    ("gcd", "os", None),
    ("omit", 5, None),
    ("options", 5, None),
    ("layer", "layer", None),
):
    _shown = repr(_value) if not isinstance(_value, int) or abs(_value) < 1 << 64 else f"{_value.bit_length()} bits"
    _name = f"a configuration with {_key} {_shown[:20]}"
    add(_name, "training", lambda folder, change={_key: _value}: config(folder, **change), _codes)


@attack("training", None)
def a_configuration_with_half_a_character(folder: Path) -> None:
    with_pickle(folder / "model_config.pt", item(u("\ud800"), u("\udfff")))


@attack("training", "E218", "layer_norm_epsilon")
def an_epsilon_of_half_a_character(folder: Path) -> None:
    with_pickle(folder / "model_config.pt", item(u("\ud800"), u("layer_norm_epsilon")))


@attack("training", "E303", "not a dict")
def a_configuration_that_is_a_list(folder: Path) -> None:
    torch.save([1, 2], folder / "model_config.pt")


@attack("training", "E303", "empty")
def a_configuration_that_keeps_everything_in_attributes(folder: Path) -> None:
    def change(_: bytes) -> bytes:
        return b"\x80\x02" + g("x", "Config") + b")\x81}" + u("num_layers") + i(4) + b"sb."

    with_pickle(folder / "model_config.pt", change)


@attack("training", "E302", "builtins.dict")
def a_configuration_made_by_calling_dict(folder: Path) -> None:
    with_pickle(folder / "model_config.pt", lambda _: b"\x80\x02" + call(g("builtins", "dict")) + b".")


def training_config(folder: Path, source: str) -> None:
    torch.save(source, folder / "config_file.pt")


for _name, _source, _codes in (
    ("that runs a command", "import os\nos.system('touch ran')\nparallel = dict(tensor=2)", None),
    ("nested 5000 deep", "x = " + "(" * 5000 + ")" * 5000, None),
    ("nested 90 deep", "x = " + "[" * 90 + "]" * 90, None),
    ("of a long sum", "x = " + "+".join(["1"] * 20_000), None),
    ("of lists in lists, each twice", "a = [1]\n" + "a = [a, a]\n" * 40 + "parallel = dict(tensor=a)", None),
    ("of text that doubles", "a = 'x'\n" + "a = a + a\n" * 60, None),
    ("of text that is repeated", "a = 'x' * 10 ** 9\nb = [0] * 10 ** 9", None),
    ("of powers of powers", "a = 9 ** 9 ** 9 ** 9\nb = 2 ** 64 ** 64\nc = 1 << 10 ** 9", None),
    ("of two megabytes", "x = '" + "y" * (2 << 20) + "'", None),
    ("with a zero byte", "x = 1\0\nparallel = dict(tensor=9)", None),
    ("that is not Python", "parallel = dict(tensor=", None),
    ("that claims tp 0", "parallel = dict(tensor=0)", None),
    ("that claims tp -1", "parallel = dict(tensor=-1)", None),
    ("that claims tp 3", "parallel = dict(tensor=3)", "E201"),
    ("that claims tp 2 ** 60", "parallel = dict(tensor=2 ** 60)", "E201"),
    ("that claims tp 'x'", "parallel = dict(tensor='x')", None),
    ("that claims tp 1.5", "parallel = dict(tensor=1.5)", None),
    ("that claims tp [2]", "parallel = dict(tensor=[2])", None),
    ("that is a list", "parallel = [dict(tensor=2)]", "E105 E201"),
    ("of many names", "\n".join(f"x{n} = {n}" for n in range(20_000)), None),
):
    _name = f"a training config {_name}"
    add(_name, "training", lambda folder, source=_source: training_config(folder, source), _codes)
