"""Tensors larger than a block: whatever the block size, the bytes are the same.

Test models are far smaller than a block of half a MiB, so blocks are made tiny here; one test has
tensors of several real blocks.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from tests.support.shards import Model, State, same, save
from tests.test_any_layout import cases

LETTERS = {"mlp_letters": "w2_is_down"}
common = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def written(model: Model, source: Path, out: Path, **options: Any) -> State:
    engine.convert(model.mapping, source, out, settings={"mlp_letters": model.letters}, **options)
    state: State = {}
    for file in sorted(out.glob("*.safetensors")):
        state |= load_file(file)
    return state


def blocks_of(nbytes: int) -> Any:
    """Blocks of at most `nbytes`, for writing and for comparing replicas."""
    runner = mock.patch.multiple("engine.run.runner", BLOCK_BYTES=nbytes, LARGE_BLOCK_BYTES=nbytes)
    replicas = mock.patch("engine.run.replicas.BLOCK_BYTES", nbytes)
    return runner, replicas, mock.patch("engine.run.gather.READ_THROUGH", 8)


@common
@given(cases(), st.sampled_from([8, 16, 24, 40, 64, 136, 520]))
def test_tiny_blocks_write_the_unsharded_truth(case: tuple[Model, dict[str, Any]], nbytes: int) -> None:
    model, layout = case
    one, two, three = blocks_of(nbytes)
    with tempfile.TemporaryDirectory() as folder, one, two, three:
        expected = save(model, Path(folder) / "step", **layout)
        same(written(model, Path(folder) / "step", Path(folder) / "hf"), expected)


@pytest.mark.parametrize("nbytes", [8, 64, 200])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tiny_blocks_cast_and_normalise_alike(nbytes: int, dtype: str, tmp_path: Path) -> None:
    model = Model("v2", hidden=24, heads=6, groups=3, ffn=40, head="normalised", rotary="pairs")
    expected = save(model, tmp_path / "step", tp=3, pp=2)
    whole = written(model, tmp_path / "step", tmp_path / "whole", dtype=dtype)
    one, two, three = blocks_of(nbytes)
    with one, two, three:
        same(written(model, tmp_path / "step", tmp_path / "tiny", dtype=dtype), whole)
    kind = getattr(torch, dtype)
    cast = {name: t.to(kind) for name, t in expected.items() if name != "lm_head.weight"}
    same({name: t for name, t in whole.items() if name != "lm_head.weight"}, cast)


def test_replicas_that_differ_in_a_late_block_are_found(tmp_path: Path) -> None:
    model = Model(layers=2)
    save(model, tmp_path / "step", tp=2)
    path = tmp_path / "step" / "model_tp1_pp0.pt"
    state = {name: t.clone() for name, t in torch.load(path, weights_only=True).items()}
    state["norm.weight"][-1] += 1
    torch.save(state, path)
    one, two, three = blocks_of(8)
    with one, two, three, pytest.raises(EngineError) as caught:
        engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    assert caught.value.code == "E402"
    assert "1 of 16 elements" in str(caught.value)


@pytest.mark.parametrize("rotary", ["halves", "pairs"])
@pytest.mark.parametrize("layout", [{"tp": 4}, {"mode": "isp_wp", "wp": 3}, {"tp": 2, "pp": 2, "chunks": 2}])
def test_tensors_of_several_real_blocks_are_exact(rotary: str, layout: dict[str, Any], tmp_path: Path) -> None:
    model = Model("v2", layers=4, hidden=512, heads=8, groups=4, ffn=1408, vocab=1000, bias=False, rotary=rotary)
    expected = save(model, tmp_path / "step", **layout)
    assert max(t.nbytes for t in expected.values()) > 2 * 512 * 1024
    same(written(model, tmp_path / "step", tmp_path / "hf"), expected)
    wide = written(model, tmp_path / "step", tmp_path / "wide", dtype="float32", max_shard_size=5_000_000, workers=2)
    same(wide, {name: t.float() for name, t in expected.items()})


def test_rows_shorter_than_one_are_normalised_too(tmp_path: Path) -> None:
    """Scaling by max(length, 1) instead of the length would leave short rows short."""
    model = replace(Model("v2", hidden=24, heads=6, groups=3, ffn=40, head="normalised"), dtype=torch.float32)
    save(model, tmp_path / "step", tp=1)
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = {name: t.clone() for name, t in torch.load(path, weights_only=True).items()}
    state["output.weight"] *= 1e-3
    state["output.weight"][5] = 0
    torch.save(state, path)
    lengths = written(model, tmp_path / "step", tmp_path / "hf")["lm_head.weight"].norm(dim=1)
    assert lengths[5] == 0
    torch.testing.assert_close(lengths[lengths != 0], torch.ones(model.vocab - 1))
