"""Models of random numbers under transformers' names, saved by torch itself as distributed checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.frameworks import weights

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 40,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 64,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 40, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 64, "attention_bias": False,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False, "rope_theta": 10000.0,
}  # fmt: skip


def model(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    known = AutoConfig.for_model(**config)
    return {k: torch.randn_like(v) for k, v in AutoModelForCausalLM.from_config(known).state_dict().items()}


def save(state: dict[str, Any], folder: Path, config: dict[str, Any], **how: Any) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **how), no_dist=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def equal(out: Path, truth: dict[str, torch.Tensor]) -> bool:
    made = weights(out)
    return set(made) == set(truth) and all(torch.equal(made[name], one) for name, one in truth.items())
