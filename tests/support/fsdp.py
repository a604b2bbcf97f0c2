"""FSDP checkpoints, sharded and pickled by torch itself; run as a script, by FSDP itself.

`save_fsdp` gives each rank's whole tensors to the function that FSDP's SHARDED_STATE_DICT calls for
every parameter, on a process group that only pretends to have the other ranks. The fixture was made by
`python -m tests.support.fsdp FOLDER`: as many processes, wrapped as InternEvo's `wrap_FSDP_model` does.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.support.shards import Model, State, build, tp_slice, write_config

FIXTURE = Model(family="v2", layers=1, hidden=8, heads=2, groups=1, ffn=10, vocab=7, bias=False)
RANKS = 3


def whole_states(m: Model, tp: int) -> tuple[list[State], State]:
    """Each tensor-parallel rank's tensors before FSDP shards them, and the expected Hugging Face tensors."""
    layers, first, last, expected = build(m)
    named = [(w.name, w) for w in first]
    named += [(f"{m.block}.{i}.{w.name}", w) for i, layer in enumerate(layers) for w in layer]
    named += [(w.name, w) for w in last]
    states: list[State] = []
    for rank in range(tp):
        slices = {name: tp_slice(w, rank, tp) for name, w in named}
        states.append({name: data.clone() for name, data in slices.items() if data is not None})
    return states, expected


def save_fsdp(
    m: Model, folder: Path, *, dp: int, tp: int = 1, zero: int | None = None, plain: str = "", legacy: bool = False
) -> State:
    """Write a checkpoint folder; returns the expected Hugging Face state dict.

    Args:
        zero: ranks that a tensor is cut over (`parallel.zero1.size`); the others hold the same.
        plain: tensors whose names end so are saved whole by every rank.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir(parents=True)
    states, expected = whole_states(m, tp)
    cut = zero or dp
    for process in range(dp * tp):
        d, t = divmod(process, tp)
        dist.init_process_group("fake", rank=process, world_size=dp * tp, store=FakeStore())
        try:
            first = d // cut * cut
            group = dist.new_group([(first + r) * tp + t for r in range(cut)])
            state: OrderedDict[str, torch.Tensor] = OrderedDict()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, data in states[t].items():
                    whole = plain and name.endswith(plain)
                    state[name] = (
                        data
                        if whole
                        else _create_chunk_sharded_tensor(data, d % cut, cut, 1, group, torch.device("cpu"))
                    )
                torch.save(state, folder / f"model_tp{t}_pp0_dp{d}.pt", _use_new_zipfile_serialization=not legacy)
        finally:
            dist.destroy_process_group()
    write_config(m, folder, 1, "tensor", tp, 1, 1, False)
    return expected


class Wrapped(nn.Module):
    """A module that FSDP wraps by itself, as it does attention, norm and feed forward."""


def module_of(state: State) -> nn.Module:
    """A tree of modules whose state dict this is."""
    root = nn.Module()
    for name, data in state.items():
        *path, last = name.split(".")
        at = root
        for i, part in enumerate(path):
            if not hasattr(at, part):
                at.add_module(part, Wrapped() if i == len(path) - 1 else nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(data))
    return root


def _train(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29617")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = FullyShardedDataParallel(
        module_of(whole_states(FIXTURE, 1)[0][0]),
        process_group=dist.group.WORLD,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({Wrapped}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        torch.save(model.state_dict(), f"{folder}/model_tp0_pp0_dp{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    torch.multiprocessing.spawn(_train, args=(str(out),), nprocs=RANKS)
    write_config(FIXTURE, out, 1, "tensor", 1, 1, 1, False)
    for other in ("context.pt", "topo_tp0_pp0.json", "10.step", "gpus-8.pt"):
        (out / other).unlink()
