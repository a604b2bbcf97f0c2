"""Rank files that are not the ranks their names say: exchanged, doubled, linked, of another place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch.serialization import set_crc32_options

from tests.attacks import Make, add, attack
from tests.attacks.faults import edit, swap
from tests.attacks.pickles import RANK
from tests.support.shards import with_root

FIRST, LATER, OTHER = "model_tp0_pp0.pt", "model_tp1_pp1.pt", "model_tp0_pp1.pt"
ALL = (FIRST, RANK, OTHER, LATER)


def stages(folder: Path) -> None:
    for tp in range(2):
        swap(folder / f"model_tp{tp}_pp0.pt", folder / f"model_tp{tp}_pp1.pt")


def turned(folder: Path) -> None:
    """Every file moved on by one."""
    for one, other in pairwise(ALL):
        swap(folder / one, folder / other)


def instead(put: Callable[[Path, Path], object], wrong: str, right: str) -> Make:
    def make(folder: Path) -> None:
        (folder / wrong).unlink()
        put(folder / right, folder / wrong)

    return make


def saved_into_buffers(make: Make) -> Make:
    """torch then writes the same root, `archive`, into every file: names tell nothing."""

    def changed(folder: Path) -> None:
        for name in ALL:
            with_root(folder / name, "archive")
        make(folder)

    return changed


def saved_long_ago(make: Make) -> Make:
    """Files from before the zip format have no root and no checksums."""

    def changed(folder: Path) -> None:
        for name in ALL:
            state = torch.load(folder / name, weights_only=True)
            torch.save(state, folder / name, _use_new_zipfile_serialization=False)
        make(folder)

    return changed


def without_checksums(make: Make) -> Make:
    def changed(folder: Path) -> None:
        set_crc32_options(False)
        try:
            for name in ALL:
                edit(folder / name, lambda state: state)
        finally:
            set_crc32_options(True)
        make(folder)

    return changed


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "a copy": shutil.copy,
    "a hard link": os.link,
    "a symbolic link": lambda right, wrong: wrong.symlink_to(right.name),
    "an absolute link": lambda right, wrong: wrong.symlink_to(right.absolute()),
}
# How the files came to be, and the errors that are right when ranks, or stages, are exchanged or doubled in them.
MADE: dict[str, tuple[Callable[[Make], Make], str, str, str]] = {
    "": (lambda make: make, "E306", "E306", "E306"),
    " of files without a rank in them": (saved_into_buffers, "E207", "E211 E402", "E306"),
    " of old files": (saved_long_ago, "E207", "E211 E402", "E306"),
    " of files without checksums": (without_checksums, "E306", "E306", "E306"),
}
for _how, (_wrap, _ranks, _stages, _twice) in MADE.items():
    add(f"two tensor ranks exchanged{_how}", "training",
        _wrap(lambda folder: swap(folder / FIRST, folder / RANK)), _ranks)  # fmt: skip
    add(f"two stages exchanged{_how}", "training", _wrap(stages), _stages)
    add(f"two stages exchanged on one rank{_how}", "training",
        _wrap(lambda folder: swap(folder / RANK, folder / LATER)), _stages.replace("E402", "E207"))  # fmt: skip
    add(f"every file moved on by one{_how}", "training", _wrap(turned), f"{_ranks} {_stages}")
    for _what, _put in LINKS.items():
        add(f"{_what} for another rank{_how}", "training", _wrap(instead(_put, RANK, FIRST)), _twice)
        add(f"{_what} for another stage{_how}", "training", _wrap(instead(_put, RANK, LATER)), _twice)

for _root in (
    "model_tp0_pp0", "model_tp1_pp1", "model_tp7_pp0", "model_tp1_pp999999999999999", "model_wp0_pp0",
    "model_tp1_wp1_pp0", "model_tp0_pp0_dp1", "model_moe_layer0_expert1_tp1", "model_tp0_pp0.pt",
):  # fmt: skip
    add(f"a file that was saved as {_root}", "training",
        lambda folder, root=_root: with_root(folder / RANK, root), "E306", _root)  # fmt: skip
for _root in (
    "model_tp1_pp0", "model_tp1_pp0.pt", "archive", "model", "x", "model_tp1", "model_tp1_pp0_old", "tp0_pp0",
    "model_tp01_pp00", "my model_tp0_pp0", "model_tp1_pp9999999999999999999", "consolidated.00",
):  # fmt: skip
    add(f"a file of the root {_root}, which names no other rank", "training",
        lambda folder, root=_root: with_root(folder / RANK, root), None)  # fmt: skip


@attack("training", "E306", "hold the same tensors")
def a_rank_saved_again_under_the_name_of_another(folder: Path) -> None:
    """Its root is right, its file another; what it holds is not."""
    shutil.copy(folder / OTHER, folder / LATER)
    edit(folder / LATER, lambda state: state)


@attack("training", "E306", "hold the same tensors")
def a_rank_that_lies_otherwise_under_the_name_of_another(folder: Path) -> None:
    state = torch.load(folder / OTHER, weights_only=True)
    torch.save(dict(reversed(state.items())), folder / LATER)


@attack("training", None)
def ranks_that_hold_nothing_but_zeros(folder: Path) -> None:
    """Constants are the same on every rank, as biases are when training starts."""
    for name in ALL:
        edit(folder / name, lambda state: [tensor.zero_() for tensor in state.values()])


@attack("training", "E202", "variant `biases` cannot be decided")
def files_without_the_biases_that_training_had(folder: Path) -> None:
    """As by a program that keeps only names ending in `weight`; the configuration does not say `no_bias`."""
    for name in ALL:
        edit(folder / name, lambda state: [state.pop(one) for one in [*state] if one.endswith(".bias")])


def copied_with(change: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], object]) -> Make:
    """One rank's file made of another's: `change` is given the tensors of the rank itself and those of the other."""

    def make(folder: Path) -> None:
        other = torch.load(folder / FIRST, weights_only=True)
        edit(folder / RANK, lambda own: change(own, other))

    return make


def _but_one_element(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in own.items():
        tensor.copy_(other[name])
    cut = next(tensor for tensor in own.values() if tensor.dim() == 2)
    cut.view(-1)[0] += 1


def _one_tensor(part: str) -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], object]:
    def change(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        name = next(name for name in own if part in name and own[name].dim() == 2)
        own[name].copy_(other[name])

    return change


def _rows(part: str, rows: slice) -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], object]:
    def change(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        name = next(name for name in own if part in name and own[name].dim() == 2)
        own[name][rows] = other[name][rows]

    return change


for _part in ("w1", "w2", "qkv", "embedding"):
    for _what, _some in {"first": slice(0, 6), "last": slice(-6, None)}.items():
        add(f"a rank with the {_what} rows of {_part} of another", "training",
            copied_with(_rows(_part, _some)), "E306", "a part of the same slice")  # fmt: skip


def _of_another_layer(part: str) -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], object]:
    def change(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        first, second = (name for name in own if part in name and own[name].dim() == 2)
        own[second].copy_(own[first])

    return change


for _part in ("w1", "w2", "qkv"):
    add(f"a rank whose {_part} is that of another layer", "training",
        copied_with(_of_another_layer(_part)), "E306", "only on some ranks")  # fmt: skip


@attack("training", "E306", "model_tp1_pp1.pt` holds the same slice of `blocks.0.mlp.w1.weight` as")
def a_rank_whose_slice_is_that_of_a_layer_of_another_stage_and_rank(folder: Path) -> None:
    first = torch.load(folder / FIRST, weights_only=True)
    edit(folder / LATER, lambda own: own["blocks.0.mlp.w1.weight"].copy_(first["blocks.1.mlp.w1.weight"]))


@attack("training", "E306", "of `blocks.0.mlp.w1.weight`")
def a_rank_whose_gate_is_its_up_projection(folder: Path) -> None:
    edit(folder / RANK, lambda own: own["blocks.0.mlp.w3.weight"].copy_(own["blocks.0.mlp.w1.weight"]))


@attack("training", "E306", "holds the same slice of `blocks.0.mlp.w2.weight` as of `blocks.0.mlp.w1.weight`")
def a_rank_whose_down_projection_has_the_bytes_of_its_gate(folder: Path) -> None:
    edit(
        folder / RANK, lambda own: own["blocks.0.mlp.w2.weight"].view(-1).copy_(own["blocks.0.mlp.w1.weight"].view(-1))
    )


@attack("training", None)
def a_layer_that_is_a_copy_of_another_on_all_ranks(folder: Path) -> None:
    """As after upcycling."""
    for name in (FIRST, RANK):
        edit(folder / name, lambda own: [own[one.replace(".0.", ".1.")].copy_(own[one]) for one in own if ".0." in one])


COPIED = {"all of it but one element": _but_one_element}
COPIED |= {f"its {part}": _one_tensor(part) for part in ("w1", "w2", "qkv", "embedding")}
for _how, (_wrap, *_) in MADE.items():
    for _what, _change in COPIED.items():
        add(f"a rank with {_what} of another{_how}", "training", _wrap(copied_with(_change)), "E306", "same slice")
