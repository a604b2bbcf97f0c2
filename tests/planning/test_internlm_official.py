"""InternLM as it was released: model_type internlm, whose code is beside the weights, under Llama's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import api
from engine.errors import EngineError
from tests.support.depth import sampled
from tests.support.genuine import FIXTURES

SOURCE = FIXTURES / "v1_tp2_pp2"
HUB = {  # what the Hub's config.json has besides sizes
    "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True,
    "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig",
                 "AutoModel": "modeling_internlm.InternLMForCausalLM",
                 "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "rotary": {"base": 10000, "type": "dynamic"}, "hidden_act": "silu", "initializer_range": 0.02,
    "torch_dtype": "float16", "transformers_version": "4.33.2", "use_cache": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the Hub, saved again as safetensors."""
    out = tmp_path_factory.mktemp("released") / "hf"
    engine.convert("internlm", SOURCE, out)
    config = json.loads((out / "config.json").read_text())
    names = ("head_dim", "num_key_value_heads", "rope_theta", "rope_parameters", "attention_bias", "mlp_bias", "dtype")
    config = {name: value for name, value in config.items() if name not in names} | HUB
    (out / "config.json").write_text(json.dumps(config))
    (out / "conversion.json").unlink()
    return out


def test_a_release_is_written_back_as_it_was_trained(released: Path, tmp_path: Path) -> None:
    assert [fit.name for fit in engine.inspect(released).fits] == ["internlm"]
    engine.reverse("internlm", released, tmp_path / "back", like=SOURCE)
    for path in sorted(SOURCE.glob("model_tp*.pt")):
        saved, back = (torch.load(one, weights_only=False) for one in (path, tmp_path / "back" / path.name))
        for name, value in back.items():
            assert torch.equal(value, saved[name]), name
    config = torch.load(tmp_path / "back" / "model_config.pt", weights_only=False)
    assert config["rope_base"] == 10000 and config["layer_norm_epsilon"] == 1e-5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"rotary": {"base": 10000, "type": "linear"}}, "E209"), ({"bias": False}, "E209"),
        ({"rope_theta": 5e5}, "E218"),
        # its code reads rotary.base alone, and takes 10000 where it is not there
        *[({"rotary": rotary, "rope_theta": 5e5}, "E218") for rotary in (None, {}, {"type": "dynamic"})],
        ({"rotary": None, "rope_parameters": {"rope_theta": 5e5}}, "E218"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1e4}, "E209"),
        ({"hidden_act": "gelu"}, "E209"),
        ({"num_key_value_heads": 2}, "E209"), ({"model_type": "internlm2"}, "E212"),
        ({"architectures": ["InternLMForSequenceClassification"]}, "E212"), ({"model_type": "llama"}, "E209"),
        ({"unheard_of": 1}, "E219"),
    ],
)  # fmt: skip
def test_what_the_official_code_or_training_cannot_have_is_refused(
    released: Path, tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    for path in released.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((released / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(EngineError) as caught:
        api.plan_reverse("internlm", tmp_path)
    assert caught.value.code == code


def plan_of(released: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    for path in released.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    (folder / "config.json").write_text(json.dumps(config))
    return dict(api.plan_reverse("internlm", folder).config)


def test_keys_that_are_left_out_are_what_the_official_code_takes_for_them(released: Path, tmp_path: Path) -> None:
    config = json.loads((released / "config.json").read_text())
    del config["rotary"], config["bias"]
    assert plan_of(released, tmp_path, config)["rope_base"] == 10000


def test_a_llamas_class_does_not_read_the_keys_of_the_official_code(released: Path, tmp_path: Path) -> None:
    """Of a `config.json` whose model type was changed, transformers reads neither `rotary` nor `bias`."""
    config = json.loads((released / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": None, "rotary": {"base": 5e5}}
    folders = [tmp_path / name for name in ("told", "untold")]
    for folder in folders:
        folder.mkdir()
    assert plan_of(released, folders[0], config | {"attention_bias": True})["rope_base"] == 10000
    with pytest.raises(EngineError) as caught:
        plan_of(released, folders[1], config)
    assert caught.value.code == "E209" and "attention_bias" in caught.value.message


@sampled(2, "code")
@pytest.mark.parametrize(
    ("told", "code", "named"),
    [
        ({"rotary": {"base": 5e5}}, "E209", "rotary.base"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "E218", "`rope_theta` is missing"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}, "", ""),
    ],
)
def test_the_mixtures_code_reads_rope_theta_alone(told: dict[str, Any], code: str, named: str, tmp_path: Path) -> None:
    engine.convert("families/internlm-moe", FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_theta"], config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | told))
    if not code:
        assert api.plan_reverse("families/internlm-moe", tmp_path / "hf").config["rope_base"] == 5e5
        return
    with pytest.raises(EngineError) as caught:
        api.plan_reverse("families/internlm-moe", tmp_path / "hf")
    assert caught.value.code == code and named in caught.value.message
