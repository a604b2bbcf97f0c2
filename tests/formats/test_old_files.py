"""Files of every age: zips without alignment, pre-zip files, buffers of old code, mixed element types."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from tests.support.depth import sampled
from tests.support.families import angles
from tests.support.shards import Model, same, save

MODEL = Model("v1", layers=2)
LETTERS = {"mlp_letters": "w2_is_down"}


def change(folder: Path, edit: object) -> None:
    for path in folder.glob("model_tp*.pt"):
        state = torch.load(path, weights_only=True)
        edit(state)
        torch.save(state, path)


@pytest.mark.parametrize("odd", [1, 3, 7])
def test_payload_at_any_byte_is_read(odd: int, tmp_path: Path) -> None:
    expected = save(MODEL, tmp_path / "step", tp=2)
    for path in (tmp_path / "step").glob("model_tp*.pt"):
        with zipfile.ZipFile(path) as old:
            members = {name.split("/", 1)[1]: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
            for name, data in members.items():
                new.writestr(f"{'a' * odd}/{name}", data)
    engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)


def test_frequencies_kept_as_buffers_are_left_out(tmp_path: Path) -> None:
    expected = save(MODEL, tmp_path / "step", tp=2, pp=2)
    kept = angles(10000.0, MODEL.head_dim)
    change(tmp_path / "step", lambda s: s.update({"blocks.0.mixer.rotary_emb.inv_freq": kept}))
    engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    report = engine.reshard(MODEL.mapping, tmp_path / "step", tmp_path / "other", tp=4, settings=LETTERS)
    assert any("inv_freq" in notice for notice in report.notices)


def test_norms_in_float32_stay_so_both_ways(tmp_path: Path) -> None:
    expected = save(MODEL, tmp_path / "step", tp=2, pp=2)

    def to_float(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if "norm" in name:
                state[name] = state[name].float()

    change(tmp_path / "step", to_float)
    engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf", settings=LETTERS)
    same(
        load_file(tmp_path / "hf" / "model.safetensors"),
        {name: tensor.float() if "norm" in name else tensor for name, tensor in expected.items()},
    )
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", like=tmp_path / "step", settings=LETTERS)
    for path in (tmp_path / "step").glob("model_tp*.pt"):
        same(
            dict(torch.load(tmp_path / "back" / path.name, weights_only=True)),
            dict(torch.load(path, weights_only=True)),
        )
    written = torch.load(tmp_path / "back" / "model_config.pt", weights_only=True)
    assert written["dtype"] == torch.bfloat16


@sampled(2, "legacy")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pre-zip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_files_of_any_age_and_type_reshard(legacy: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model("v2", groups=2, dtype=dtype, bias=False)
    expected = save(model, tmp_path / "a", tp=2, pp=2, legacy=legacy)
    engine.reshard(model.mapping, tmp_path / "a", tmp_path / "b", tp=1, pp=4, settings=LETTERS)
    same(dict(engine.iter_tensors(engine.plan(model.mapping, tmp_path / "b", settings=LETTERS))), expected)
