"""Any parallel layout of a model gives the unsharded truth, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

import engine
from tests.support.cases import cases
from tests.support.depth import examples
from tests.support.shards import Model, same, save

common = settings(deadline=None, max_examples=examples(60), suppress_health_check=list(HealthCheck))


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
