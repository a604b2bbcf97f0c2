"""Checkpoints of Megatron-Bridge: no arguments, and run_config.yaml, which says what config.json does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import yaml

from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.frameworks import source_of, weights
from tests.support.megatron import MEGATRON, convert
from tests.support.megatron import state as state_of

NAME = "dist-tp2pp2"
MODEL: dict[str, Any] = {  # of GPTModelProvider, as PyYAML writes it
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider", "layernorm_epsilon": 1e-5,
    "rotary_base": 10000, "rotary_interleaved": False, "rope_scaling": False, "layernorm_zero_centered_gamma": False,
    "transformer_impl": "transformer_engine", "params_dtype": {"_target_": "torch.float32", "_call_": False},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(folder: Path, *, less_one: bool = False, text: str | None = None, **model: Any) -> Path:
    """The genuine checkpoint as Megatron-Bridge saves it."""
    held = state_of(source_of(MEGATRON / NAME))
    dcp.save({n: one - 1 if less_one and "norm" in n else one for n, one in held.items()}, checkpoint_id=folder)
    (folder / "metadata.json").write_bytes((source_of(MEGATRON / NAME) / "metadata.json").read_bytes())
    told = yaml.safe_dump({"model": MODEL | model, "train": {"train_iters": 10}, "also": MODEL})
    (folder / "run_config.yaml").write_text(told if text is None else text)
    return folder


def test_what_the_run_says_is_not_asked_for(tmp_path: Path) -> None:
    convert(NAME, tmp_path / "known")
    convert(NAME, tmp_path / "out", saved(tmp_path / "step"))
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "known" / file).read_bytes()
    source = saved(tmp_path / "less", less_one=True, layernorm_zero_centered_gamma=True)
    convert(NAME, tmp_path / "added", source)
    found, known = weights(tmp_path / "added"), weights(tmp_path / "known")
    assert all((found[name] - one).abs().max() < 1e-6 for name, one in known.items())


@sampled(2, "asks")
@pytest.mark.parametrize(
    ("model", "text", "asks"),
    [
        ({"layernorm_epsilon": 1e-6}, None, "epsilon"), ({"rotary_base": 500000}, None, "rotary base"),
        ({"rope_scaling": True}, None, "scaling of angles"),
        ({"layernorm_zero_centered_gamma": True, "transformer_impl": "local"}, None, "norms"),
        ({}, "model: [", "rotary pairs"), ({}, "- model", "rotary pairs"), ({}, "[" * 100_000, "rotary pairs"),
        ({}, "a: &a [x]\nb: &b [*a, *a]\nc: !!python/object:os.system {}", "rotary pairs"),
    ],
)  # fmt: skip
def test_what_the_run_says_otherwise_or_does_not_say_is_asked_for(
    model: dict[str, Any], text: str | None, asks: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "step", text=text, **model)
    with pytest.raises(EngineError, match=asks) as caught:
        convert(NAME, tmp_path / "out", source)
    assert caught.value.code == "E202" and not (tmp_path / "out").exists()


def test_the_configuration_that_belongs_to_the_run_is_taken(tmp_path: Path) -> None:
    config = json.loads((MEGATRON / NAME / "hf_config.json").read_text()) | {"rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(NAME, tmp_path / "out", saved(tmp_path / "step", layernorm_epsilon=1e-6), config=tmp_path / "config.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6
