"""What happens to a source, or to a partial output, between an interruption and `--resume`.

Each is given the source folder; the partial output lies beside it, under `out`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from engine.formats.headers import FileHeader
from tests.attacks import Start, add, attack
from tests.attacks.pickles import RANK
from tests.support.readers import read_rank_file, read_safetensors
from tests.support.shards import Model, save

SHARD = "model-00002-of-00003.safetensors"
RESUMED: tuple[tuple[Start, str], ...] = (("interrupted", RANK), ("interrupted hf", SHARD))


def partial(folder: Path) -> Path:
    """The partial output of the interrupted run."""
    return next((folder.parent / "out").glob(".*.partial-*"))


def header_of(path: Path) -> FileHeader:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_rank_file(path)


def other_bytes(path: Path, few: bool = False) -> bytes:
    """The file with other values in its cut tensors, or in one of them; what describes them stays."""
    data = bytearray(path.read_bytes())
    cut = [tensor for tensor in header_of(path).tensors if "norm" not in tensor.name]
    for tensor in cut[:1] if few else cut:
        for at in range(tensor.offset, tensor.offset + tensor.nbytes):
            data[at] ^= 1
    return bytes(data)


def in_place(path: Path, data: bytes) -> None:
    """The same inode, and the times put back."""
    was = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def another_file(path: Path, data: bytes) -> None:
    """Another inode, and the times put back."""
    was = path.stat()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def through_a_link(path: Path, data: bytes) -> None:
    path.rename(path.parent.parent / "aside")
    (path.parent.parent / "elsewhere").write_bytes(data)
    path.symlink_to(path.parent.parent / "elsewhere")


def pipe_at(folder: Path) -> None:
    (folder / ".journal").unlink()
    os.mkfifo(folder / ".journal")


def on(name: str, put: Callable[[Path, bytes], object], few: bool) -> Callable[[Path], object]:
    return lambda folder: put(folder / name, other_bytes(folder / name, few))


for _start, _name in RESUMED:
    for _how, _put in {"in place": in_place, "by another file": another_file, "by a link": through_a_link}.items():
        add(f"{_name} replaced {_how} before a resume", _start, on(_name, _put, False), "E407", _name)
    add(f"one tensor of {_name} changed before a resume", _start, on(_name, in_place, True), "E407 ok", "source")
    add(f"{_name} touched before a resume", _start, lambda folder, name=_name: (folder / name).touch(), None)
    add(f"{_name} copied before a resume", _start,
        lambda folder, name=_name: another_file(folder / name, (folder / name).read_bytes()), None)  # fmt: skip
    add(f"{_name} gone before a resume", _start, lambda folder, name=_name: (folder / name).unlink(), "E201")
    add(f"the journal gone before a resume of {_name}", _start,
        lambda folder: (partial(folder) / ".journal").unlink(), None)  # fmt: skip
    add(f"the journal a pipe before a resume of {_name}", _start, lambda folder: pipe_at(partial(folder)), None)


@attack("interrupted", "E407", "source")
def another_run_s_rank_file_before_a_resume(folder: Path) -> None:
    save(Model(seed=1), folder.parent / "other", tp=2, pp=2)
    for path in (folder.parent / "other").glob("model_tp*.pt"):
        shutil.copy(path, folder / path.name)
    shutil.rmtree(folder.parent / "other")


@attack("interrupted", "E407", "rms_norm_eps")
def another_epsilon_before_a_resume(folder: Path) -> None:
    torch.save(Model().config(1) | {"layer_norm_epsilon": 0.01}, folder / "model_config.pt")


@attack("interrupted hf", "E407", "num_attention_heads")
def another_head_count_before_a_resume(folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text()
    heads = Model().heads
    changed = text.replace(f'"num_attention_heads": {heads}', f'"num_attention_heads": {heads // 2}')
    changed = changed.replace(f'"num_key_value_heads": {heads}', f'"num_key_value_heads": {heads // 2}')
    path.write_text(changed.replace(f'"head_dim": {16 // heads}', f'"head_dim": {32 // heads}'))


@attack("interrupted", None)
def a_partial_output_of_other_bytes_before_a_resume(folder: Path) -> None:
    for path in partial(folder).glob("model*"):
        path.write_bytes(bytes(255 - b for b in path.read_bytes()))


@attack("interrupted", None)
def a_partial_output_cut_off_before_a_resume(folder: Path) -> None:
    for path in partial(folder).glob("model*"):
        os.truncate(path, path.stat().st_size // 2)


@attack("interrupted", None)
def a_hard_link_in_the_partial_output_before_a_resume(folder: Path) -> None:
    path = min(partial(folder).glob("model*"))
    path.rename(folder.parent / "aside")
    path.hardlink_to(folder.parent / "aside")
