"""Any parallel layout of a model gives the unsharded truth, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import engine
from tests.support.shards import Model, same, save

common = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


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


@common
@given(cases())
def test_every_layout_of_a_model_gives_the_unsharded_truth(case: tuple[Model, dict[str, Any]]) -> None:
    model, layout = case
    with tempfile.TemporaryDirectory() as folder:
        expected = save(model, Path(folder) / "step", **layout)
        plan = engine.plan(model.mapping, Path(folder) / "step", settings={"mlp_letters": model.letters})
        same(dict(engine.iter_tensors(plan)), expected)


@common
@given(cases())
def test_the_letters_are_decided_right_or_asked_for_never_guessed(case: tuple[Model, dict[str, Any]]) -> None:
    model, layout = case
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "step", **layout)
        try:
            plan = engine.plan(model.mapping, Path(folder) / "step")
        except engine.EngineError as error:
            assert error.code == "E202"
            assert f"--set mlp_letters={model.letters}" in str(error)
        else:
            assert plan.decisions["mlp_letters"].choice == model.letters
