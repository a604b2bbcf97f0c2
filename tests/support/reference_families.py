"""Forward passes on whole training tensors: a Llama's separate wq, wk and wv, and a mixture of experts.

As `reference`: plain torch and float32, no Hugging Face name. Rotary pairs are turned where the
training code finds them: elements 2j and 2j + 1 of a head (`pairs`), or j and j + half (`halves`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding, linear, silu

from tests.support.families import WRAPPED, Experts, build_experts, build_llama
from tests.support.reference import attend, rms, unpack
from tests.support.shards import State


def whole_llama(m: Any) -> State:
    """The unsharded training tensors of a tiny Llama, layers numbered through."""
    layers, first, last, _ = build_llama(m)
    named = {f"layers.{i}.{w.name}": w.data for i, listed in enumerate(layers) for w in listed}
    return named | {w.name: w.data for w in [*first, *last]}


def forward_llama(m: Any, whole: State, ids: torch.Tensor) -> torch.Tensor:
    """Logits of token ids, batch × length × vocab, as training computes them."""
    t = {name: tensor.float() for name, tensor in whole.items()}
    down, up = ("w2", "w3") if m.letters == "w2_is_down" else ("w3", "w2")
    x = embedding(ids, next(t[name] for name in t if "embeddings" in name))

    def through(name: str, y: torch.Tensor) -> torch.Tensor:
        return linear(y, t[f"{name}.weight"], t.get(f"{name}.bias"))

    for i in range(m.layers):
        at, mlp = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = rms(x, t[f"layers.{i}.attention_norm.weight"])
        q, k, v = (through(f"{at}.{w}", y).unflatten(-1, (-1, m.head_dim)) for w in ("wq", "wk", "wv"))
        x = x + through(f"{at}.wo", attend(m, q, k, v, m.rope_base))
        y = rms(x, t[f"layers.{i}.ffn_norm.weight"])
        gated = silu(through(f"{mlp}.w1", y)) * through(f"{mlp}.{up}", y)
        x = x + through(f"{mlp}.{down}", gated)
    return linear(rms(x, t["norm.weight"]), t["output.weight"])


def forward_experts(m: Experts, whole: State, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a mixture of experts in v1 names: per token the two best experts, weighed against each other.

    Training drops tokens beyond an expert's capacity; here no expert is ever full.
    """
    t = {name: tensor.float() for name, tensor in whole.items()}
    letters = ("w2", "w3") if m.letters == "w2_is_down" else ("w3", "w2")
    x = embedding(ids, next(t[name] for name in t if "embedding" in name))
    for i in range(m.layers):
        at = f"blocks.{i}."
        qkv = linear(rms(x, t[at + "norm1.weight"]), t[at + "mixer.Wqkv.weight"], t.get(at + "mixer.Wqkv.bias"))
        mixed = attend(m, *unpack(m, qkv), 10000.0)
        x = x + linear(mixed, t[at + "mixer.out_proj.weight"], t.get(at + "mixer.out_proj.bias"))
        y = rms(x, t[at + "norm2.weight"])
        odds = linear(y, t[at + "mlp.moe_layer.gate.wg.weight"]).softmax(-1)
        best = odds * (odds >= odds.topk(2).values[..., -1:])
        shares = best / best.sum(-1, keepdim=True)
        for e in range(m.experts):
            gate, down, up = (t[f"{at}{WRAPPED}.{e}.{w}.weight"] for w in ("w1", *letters))
            x = x + shares[..., e, None] * linear(silu(linear(y, gate)) * linear(y, up), down)
    return linear(rms(x, t["norm.weight"]), t["head.weight"])


def whole_experts(m: Experts) -> State:
    """The unsharded training tensors of a mixture of experts, layers numbered through."""
    layers, first, last, experts, _ = build_experts(m)
    named = {f"blocks.{i}.{w.name}": w.data for i, listed in enumerate(layers) for w in listed}
    named |= {f"blocks.{i}.{w.name}": w.data for i, each in enumerate(experts) for one in each for w in one}
    return named | {w.name: w.data for w in [*first, *last]}
