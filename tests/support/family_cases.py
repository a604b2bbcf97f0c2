"""Hypothesis: any small model of the other families, any layout that it can have."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.support.families import Meta, model_of
from tests.support.shards import Model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


Case = tuple[Model, dict[str, Any]]


def layouts(draw: st.DrawFn, model: Any, modes: list[str]) -> dict[str, Any]:
    mode = draw(st.sampled_from(modes))
    layout: dict[str, Any] = {"mode": mode, "pp": draw(st.integers(1, 3)), "chunks": draw(st.integers(1, 2))}
    assume(model.layers % layout["chunks"] == 0 and model.layers // layout["chunks"] >= layout["pp"])
    if mode == "tensor":
        layout["tp"] = draw(st.integers(1, model.groups))
    elif mode == "isp":
        layout["tp"], layout["wp"] = draw(st.sampled_from([(1, 3), (2, 4), (4, 2), (2, 2), (1, 5)]))
    else:
        layout["wp"] = draw(st.integers(1, 5))
    layout["zbv"] = layout["chunks"] == 2 and draw(st.booleans())
    layout["wrapped"] = layout["chunks"] == 1 and draw(st.booleans())
    return layout


@st.composite
def llamas(draw: st.DrawFn, kind: str) -> Case:
    heads = draw(st.sampled_from([2, 3, 4, 6]))
    key = draw(
        st.sampled_from(["qk_interleaved", "adapt_hf", "neither"] if kind == "llama" else ["qk_interleaved", "neither"])
    )
    unsaid = "pairs" if kind == "llama" else "halves"
    bias = draw(st.booleans())
    model = model_of(
        kind,
        layers=draw(st.integers(2, 7)),
        hidden=heads * draw(st.sampled_from([2, 4])),
        heads=heads,
        groups=draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if heads % g == 0])),
        ffn=draw(st.integers(7, 25)),
        vocab=draw(st.integers(8, 19)),
        bias=bias,
        mlp_bias=bias if kind == "internlm3" else draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        rotary=unsaid if key == "neither" else draw(st.sampled_from(["pairs", "halves"])),
        key=key,
        letters=draw(st.sampled_from(["w2_is_down", "w2_is_up"])) if kind == "llama" else "w2_is_down",
        embedding=draw(st.sampled_from(["by_hidden", "by_vocab"])),
        head=draw(st.sampled_from(["lm", "reward"])) if kind == "llama" else "lm",
        seed=draw(st.integers(0, 9)),
    )
    return model, layouts(draw, model, ["tensor", "isp", "isp_wp"])


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    heads = draw(st.sampled_from([2, 3, 4]))
    model = model_of(
        "moe",
        layers=draw(st.integers(2, 6)),
        hidden=heads * draw(st.sampled_from([2, 4])),
        heads=heads,
        groups=heads,
        ffn=draw(st.integers(7, 15)),
        vocab=draw(st.integers(8, 19)),
        experts=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        rotary=draw(st.sampled_from(["pairs", "halves"])),
        letters=draw(st.sampled_from(["w2_is_down", "w2_is_up"])),
        seed=draw(st.integers(0, 9)),
    )
    return model, layouts(draw, model, ["tensor", "isp_wp"])


@st.composite
def metas(draw: st.DrawFn) -> Case:
    tp = draw(st.sampled_from([1, 2, 4]))
    groups = tp * draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 3]))
    model = model_of(
        "meta",
        layers=draw(st.integers(1, 3)),
        hidden=heads * draw(st.sampled_from([2, 4])),
        heads=heads,
        groups=groups,
        vocab=4 * draw(st.integers(2, 5)),
        ffn_dim_multiplier=draw(st.sampled_from([None, 1.3])),
        dtype=draw(st.sampled_from(DTYPES)),
        embedding=draw(st.sampled_from(["by_hidden", "by_vocab"])),
        rope_base=draw(st.sampled_from([10000.0, 500000.0])),
        seed=draw(st.integers(0, 9)),
    )
    return model, {"tp": tp}


def told(model: Model) -> dict[str, str]:
    """What shapes cannot always tell; Meta's letters never changed."""
    return {} if isinstance(model, Meta) else {"mlp_letters": model.letters}
