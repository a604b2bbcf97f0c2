"""Genuine Megatron-Core checkpoints: their mappings, conversions, and the same saved with other arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import engine
from tests.support.frameworks import FIXTURES, source_of

MEGATRON = FIXTURES / "megatron"
FAMILIES = {
    "dcp-tp1": "megatron-llama",
    "dist-ep2-moe": "megatron-mixtral",
    "dist-ep2-qwen2-moe": "megatron-qwen2-moe",
    "dist-tp2pp1-bf16-qkvbias": "megatron-qwen2",
    "dist-tp2pp2": "megatron-llama",
    "leg_p2_uneven": "megatron-llama",
    "leg_t2_distopt": "megatron-llama",
    "leg_t4_g2": "megatron-llama",
    "td15_t1": "megatron-llama",
    "td19_t2": "megatron-llama",
    "torch-ep2-moe": "megatron-mixtral",
    "torch-p2-layout": "megatron-llama",
    "torch-qwen3-moe": "megatron-qwen3-moe",
    "torch-tp2-qwen2-moe": "megatron-qwen2-moe",
    "torch-tp1pp1-tied": "megatron-llama",
    "torch-tp2pp2-vpp2": "megatron-llama",
}


def convert(name: str, out: Path, source: Path | None = None, **options: Any) -> engine.Report:
    options.setdefault("config", MEGATRON / name / "hf_config.json")
    return engine.convert(FAMILIES[name], source or source_of(MEGATRON / name), out, **options)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a distributed checkpoint."""
    listed = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    held = {n: torch.empty(one.size, dtype=one.properties.dtype) for n, one in listed.items() if hasattr(one, "size")}
    dcp.load(held, checkpoint_id=str(folder), no_dist=True)
    return held


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], **beside: Any) -> None:
    """Save every rank file of a folder again, with the arguments changed; without them where none are left."""
    import argparse

    for path in (*folder.glob("mp_rank_*/model_optim_rng.pt"), *folder.glob("common.pt")):
        value = torch.load(path, weights_only=False, pickle_module=_stubs())
        args = {k: v for k, v in vars(value["args"]).items() if type(v).__module__ in ("builtins", "torch")}
        change(args)
        model = {name: one.clone() for name, one in value.get("model", {}).items() if one is not None}
        saved = {"checkpoint_version": 3.0, "iteration": 10, **({"model": model} if model else {}), **beside}
        torch.save({**saved, **({"args": argparse.Namespace(**args)} if args else {})}, path)


def _stubs() -> Any:
    """A pickle module that loads classes of Megatron as something."""
    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.startswith("megatron"):
                return lambda *_: None
            return super().find_class(module, name)

    return types.SimpleNamespace(__name__="stubs", Unpickler=Unpickler, load=pickle.load)
