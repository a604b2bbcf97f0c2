"""Hypothesis: any small model, any layout that it can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.support.shards import Model, State, same


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, dict[str, Any]]:
    family = draw(st.sampled_from(["v1", "v2"]))
    heads = draw(st.sampled_from([2, 3, 4, 6]))
    groups = heads if family == "v1" else draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if heads % g == 0]))
    model = Model(
        family=family,
        layers=draw(st.integers(2, 7)),
        hidden=heads * draw(st.sampled_from([2, 4])),
        heads=heads,
        groups=groups,
        ffn=draw(st.integers(7, 25)),
        vocab=draw(st.integers(8, 19)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        rotary=draw(st.sampled_from(["halves", "pairs"])),
        letters=draw(st.sampled_from(["w2_is_down", "w2_is_up"])),
        embedding=draw(st.sampled_from(["by_hidden", "by_vocab"])),
        head=draw(st.sampled_from(["lm", "reward"])),
        seed=draw(st.integers(0, 9)),
        fused=draw(st.sampled_from([True, True, False])),
    )
    mode = draw(st.sampled_from(["tensor", "isp", "isp_wp"]))
    layout: dict[str, Any] = {"mode": mode, "pp": draw(st.integers(1, 3)), "chunks": draw(st.integers(1, 2))}
    assume(model.layers % layout["chunks"] == 0 and model.layers // layout["chunks"] >= layout["pp"])
    if mode == "tensor":
        layout["tp"] = draw(st.integers(1, groups))
    elif mode == "isp":
        layout["tp"], layout["wp"] = draw(st.sampled_from([(1, 1), (1, 3), (2, 4), (4, 2), (2, 2), (1, 5)]))
    else:
        layout["wp"] = draw(st.integers(1, 5))
    layout["zbv"] = layout["chunks"] == 2 and draw(st.booleans())
    layout["wrapped"] = layout["chunks"] == 1 and draw(st.booleans())
    layout["legacy"] = draw(st.booleans())
    return model, layout


def rank_files(folder: Path) -> dict[str, State]:
    """Every weights file of a folder; Python's own unpickler is quicker than torch's, which runs no code."""
    found = {}
    for path in sorted(folder.glob("model_*.pt")):
        if path.name != "model_config.pt":
            found[path.name] = dict(torch.load(path, weights_only=False))
    return found


def same_files(got: dict[str, State], wanted: dict[str, State]) -> None:
    assert sorted(got) == sorted(wanted)
    for name, state in wanted.items():
        same(got[name], state)


def request(layout: dict[str, Any]) -> dict[str, Any]:
    """What a layout of the sharder is on the command line."""
    asked = {key: layout[key] for key in ("mode", "tp", "pp", "wp", "chunks") if key in layout}
    return asked | {"settings": {"schedule": "zbv" if layout.get("zbv") else "interleaved"}}


def writable(model: Model, layout: dict[str, Any]) -> bool:
    """Whether training could have written it: embeddings and heads are cut evenly, and no rank is empty."""
    first = layout.get("wp", 1) if layout["mode"] == "isp_wp" else layout.get("tp", 1)
    cut = model.vocab if model.embedding == "by_vocab" else model.hidden
    empty = layout["pp"] == 1 and layout["chunks"] > 1
    heads = model.heads if model.family == "v1" else model.groups
    if heads % layout.get("tp", 1):
        return False
    keys = model.hidden if model.fused else heads * model.head_dim  # rows of the least linear of attention
    return cut % first == 0 and not empty and max(layout.get("wp", 1), first) <= min(model.ffn, model.hidden, keys)


@st.composite
def writable_cases(draw: st.DrawFn) -> tuple[Model, dict[str, Any]]:
    model, layout = draw(cases())
    assume(writable(model, layout))
    return model, layout


@st.composite
def layouts_of(draw: st.DrawFn, model: Model) -> dict[str, Any]:
    """Another layout that the same model can have."""
    mode = draw(st.sampled_from(["tensor", "isp", "isp_wp"]))
    layout: dict[str, Any] = {"mode": mode, "pp": draw(st.integers(1, 3))}
    layout["chunks"] = draw(st.integers(1, 2)) if layout["pp"] > 1 else 1
    assume(model.layers % layout["chunks"] == 0 and model.layers // layout["chunks"] >= layout["pp"])
    if mode == "tensor":
        layout["tp"] = draw(st.integers(1, model.groups))
    elif mode == "isp":
        layout["tp"], layout["wp"] = draw(st.sampled_from([(1, 1), (1, 3), (2, 4), (4, 2), (2, 2), (1, 5)]))
    else:
        layout["wp"] = draw(st.integers(1, 5))
    layout["zbv"] = layout["chunks"] == 2 and draw(st.booleans())
    assume(writable(model, layout))
    return layout
