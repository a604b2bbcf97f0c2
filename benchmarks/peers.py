"""Other ways to merge tensor-parallel ranks, each a few lines of public API. Run as processes.

    python -m benchmarks.peers {load,mmap,files,consolidate} SOURCE OUT

They write the tensors that `engine run` writes, under the same names: concatenated along the right
axis, the packed queries, keys and values taken apart. They check nothing and write no other file.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
PARTS = 4  # files that the ways write that write several

_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")  # cut along the second dimension


def axis_of(name: str) -> int | None:
    """The dimension that is cut over ranks; None for what every rank has."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(_COLUMNS) else 0


def named(name: str, tensor: torch.Tensor, queries: int, head: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A training tensor as Hugging Face tensors; `queries` of a group are followed by its key and value."""
    layer, _, rest = name.removeprefix("layers.").partition(".")
    if not name.startswith("layers."):
        yield f"{_NAMES[name.removesuffix('.weight')]}.weight", tensor
    elif rest == "attention.wqkv.weight":
        packed = tensor.view(-1, queries + 2, head, tensor.shape[1])
        for one, part in (("q", packed[:, :queries]), ("k", packed[:, queries]), ("v", packed[:, queries + 1])):
            yield f"model.layers.{layer}.self_attn.{one}_proj.weight", part.reshape(-1, tensor.shape[1])
    else:
        yield f"model.layers.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight", tensor


def read(source: Path, mmap: bool) -> tuple[list[State], int, int]:
    """Every rank's tensors, query heads per group, and the size of a head."""
    config = torch.load(source / "model_config.pt")
    files = sorted(source.glob("model_tp*.pt"), key=lambda path: int(path.stem.split("_")[1][2:]))
    states = [torch.load(path, mmap=mmap, weights_only=True) for path in files]
    heads = config["num_attention_heads"]
    return states, heads // config["num_kv_attention_heads"], config["hidden_size"] // heads


def merged(states: list[State], queries: int, head: int, names: list[str]) -> State:
    """The Hugging Face tensors that some training tensors become."""
    found: State = {}
    for name in names:
        axis = axis_of(name)
        whole = states[0][name] if axis is None else torch.cat([state[name] for state in states], dim=axis)
        found.update(named(name, whole, queries, head))
    return found


def one_file(source: Path, out: Path, *, mmap: bool) -> None:
    """Load all ranks, concatenate all, save all."""
    states, queries, head = read(source, mmap)
    save_file(merged(states, queries, head, list(states[0])), out / "model.safetensors", {"format": "pt"})


def several_files(source: Path, out: Path) -> None:
    """Map all ranks, then concatenate and save a part at a time: less memory."""
    states, queries, head = read(source, mmap=True)
    for number, names in enumerate(parts({name: tensor.numel() for name, tensor in states[0].items()}, PARTS), 1):
        part = merged(states, queries, head, names)
        save_file(part, out / f"model-{number:05}-of-{PARTS:05}.safetensors", {"format": "pt"})


def parts(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in runs of about the same size.

    >>> parts({"a": 3, "b": 1, "c": 2, "d": 2}, 2)
    [['a', 'b'], ['c', 'd']]
    """
    total, done = sum(sizes.values()), 0
    found: list[list[str]] = [[] for _ in range(count)]
    for name, size in sizes.items():
        found[min(done * count // total, count - 1)].append(name)
        done += size
    return [names for names in found if names]


def save_sharded(source: Path, out: Path) -> None:
    """Save a checkpoint as torch's distributed checkpointing would have: the input of `consolidate`.

    One process per rank, as when training. Concatenating is all that torch's consolidation does, so
    queries, keys and values are taken apart here already, and that time is the peer's gain.
    """
    context = torch.multiprocessing.get_context("fork")
    out.mkdir()
    world, meeting = len(list(source.glob("model_tp*.pt"))), out.parent / f"{out.name}.meeting"
    ranks = [context.Process(target=_save_rank, args=(r, world, source, out, meeting)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    meeting.unlink(missing_ok=True)
    if any(rank.exitcode for rank in ranks):
        sys.exit("torch's distributed checkpointing could not save")


def _save_rank(rank: int, world: int, source: Path, out: Path, meeting: Path) -> None:
    from torch import distributed
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{meeting.absolute()}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    states, queries, head = read(source, mmap=True)
    state = {}
    for name, tensor in states[rank].items():
        axis = axis_of(name)
        place = Replicate() if axis is None else Shard(axis)
        for target, part in named(name, tensor, queries, head):
            state[target] = DTensor.from_local(part, mesh, [place], run_check=False)
    save(state, storage_writer=HuggingFaceStorageWriter(str(out), save_distributed=True))
    distributed.destroy_process_group()


def consolidate(source: Path, out: Path) -> None:
    """Torch's own consolidation of what `save_sharded` saved, a thread for every file."""
    from safetensors import safe_open
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    sizes: dict[str, int] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                sizes[name] = sizes.get(name, 0) + math.prod(file.get_slice(name).get_shape())
    numbers = {name: number for number, names in enumerate(parts(sizes, PARTS), 1) for name in names}
    consolidate_safetensors_files(str(source), str(out), numbers, num_threads=os.cpu_count() or 1)


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "load": partial(one_file, mmap=False),
    "mmap": partial(one_file, mmap=True),
    "files": several_files,
    "consolidate": consolidate,
}


if __name__ == "__main__":
    what, given, written = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "save":
        save_sharded(given, written)
    else:
        written.mkdir()
        PEERS[what](given, written)
