"""A forward pass on whole training tensors: what the model computes, told without any Hugging Face name.

Written from the facts about InternEvo's models, in plain torch and float32. It reads the fused
tensors as training does, so it pins down what unpacking and permuting must preserve: a model, not
a formula.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear, normalize, silu

from tests.support.shards import Model, State, build


def whole_training(m: Model) -> State:
    """The unsharded training tensors of a tiny model, layers numbered through.

    >>> sorted(whole_training(Model(layers=1)))[:2]
    ['blocks.0.mixer.Wqkv.bias', 'blocks.0.mixer.Wqkv.weight']
    """
    layers, first, last, _ = build(m)
    block = "blocks" if m.family == "v1" else "layers"
    named = {f"{block}.{i}.{w.name}": w.data for i, listed in enumerate(layers) for w in listed}
    return named | {w.name: w.data for w in [*first, *last]}


def forward(m: Model, whole: State, ids: torch.Tensor, rope_base: float = 10000.0) -> torch.Tensor:
    """Logits (or rewards) of token ids, batch × length × vocab, as training computes them."""
    t = {name: tensor.float() for name, tensor in whole.items()}
    v1 = m.family == "v1"
    block, mlp = ("blocks", "mlp") if v1 else ("layers", "feed_forward")
    qkv, wo = ("mixer.Wqkv", "mixer.out_proj") if v1 else ("attention.wqkv", "attention.wo")
    n1, n2 = ("norm1", "norm2") if v1 else ("attention_norm", "ffn_norm")
    down, up = ("w2", "w3") if m.letters == "w2_is_down" else ("w3", "w2")
    x = embedding(ids, next(t[name] for name in t if "embedding" in name))
    for i in range(m.layers):
        at = f"{block}.{i}."
        fused = linear(rms(x, t[at + n1 + ".weight"]), t[at + qkv + ".weight"], t.get(at + qkv + ".bias"))
        mixed = attend(m, *unpack(m, fused), rope_base)
        x = x + linear(mixed, t[at + wo + ".weight"], t.get(at + wo + ".bias"))
        y = rms(x, t[at + n2 + ".weight"])
        gated = silu(linear(y, t[f"{at}{mlp}.w1.weight"])) * linear(y, t[f"{at}{mlp}.{up}.weight"])
        x = x + linear(gated, t[f"{at}{mlp}.{down}.weight"])
    head = t["head.weight" if v1 else "output.weight"]
    if m.head == "normalised":
        head = normalize(head, dim=1)
    return linear(rms(x, t["norm.weight"]), head)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def unpack(m: Model, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, each batch × length × heads × head_dim, of what the fused linear puts out.

    v1 puts all queries, then all keys, then all values; v2 puts, per key/value head, the queries
    that share it, then the key, then the value.
    """
    batch, length, _ = fused.shape
    if m.family == "v1":
        q, k, v = fused.view(batch, length, 3, m.heads, m.head_dim).unbind(2)
        return q, k, v
    grouped = fused.view(batch, length, m.groups, m.heads // m.groups + 2, m.head_dim)
    return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]


def attend(m: Model, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope_base: float) -> torch.Tensor:
    """Causal attention; query head h reads key/value head h // (heads / groups)."""
    q, k = rotate(q, m.rotary, rope_base), rotate(k, m.rotary, rope_base)
    k, v = (one.repeat_interleave(m.heads // m.groups, dim=2) for one in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / m.head_dim**0.5
    length = q.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def rotate(x: torch.Tensor, rotary: str, rope_base: float) -> torch.Tensor:
    """Turn each of a head's planes by its own angle times the position.

    Plane j lies in elements j and j + half of the head (`halves`), or in 2j and 2j + 1 (`pairs`).

    >>> rotate(torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4).repeat(1, 2, 1, 1), "pairs", 1.0)[0, 1, 0, 2:]
    tensor([0., 0.])
    """
    dim = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]).float(), rope_base ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    one, two = (x[..., 0::2], x[..., 1::2]) if rotary == "pairs" else x.chunk(2, dim=-1)
    turned = one * cos - two * sin, two * cos + one * sin
    if rotary == "pairs":
        return torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat(turned, dim=-1)
