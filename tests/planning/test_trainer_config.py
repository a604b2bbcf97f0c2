"""What `reverse` tells the trainer of the model, and numbers in the type that is declared of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import EngineError
from engine.language.keys import find_key
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.config_keys import declared
from engine.planning.variants import options_of
from tests.support.depth import sampled
from tests.support.genuine import FIXTURES, GENUINE, family_of, settings_of
from tests.support.readers import read_config

MAPPINGS = Path(__file__).parents[2] / "mappings"
ALL = [str(path.relative_to(MAPPINGS).with_suffix("")) for path in sorted(MAPPINGS.glob("**/*.yaml"))]
ALL = [name for name in ALL if not name.startswith("layouts")]


@pytest.fixture(scope="module", params=GENUINE)
def there_and_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A genuine checkpoint's name, and a folder with its model (`hf`) and the rank files written of that (`back`)."""
    name, folder = request.param, tmp_path_factory.mktemp("there")
    engine.convert(family_of(name), FIXTURES / name, folder / "hf", settings=settings_of(name))
    engine.reverse(family_of(name), folder / "hf", folder / "back")
    return name, folder


@sampled(4)
def test_the_training_config_names_the_model_as_the_trainer_registers_it(there_and_back: tuple[str, Path]) -> None:
    """Without `model_type`, InternEvo takes INTERNLM, whatever the tensors."""
    name, folder = there_and_back
    genuine = read_config(FIXTURES / name / "config_file.pt", "python_source")["model_type"]
    assert read_config(folder / "back" / "config_file.pt", "python_source")["model_type"] == genuine


def test_a_checkpoint_to_be_like_says_its_own_model_type(tmp_path: Path) -> None:
    source = FIXTURES / "v2_tp2_pp2"
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "mapping: 1\nname: mine\nversion: 1.0.0\nextends: families/internlm2.yaml\n"
        "source: {layout: internevo, model_types: [INTERNLM2_PUBLIC, INTERNLM2_FORKED]}\n"
    )
    engine.convert(mapping, source, tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "like")
    (tmp_path / "like" / "config_file.pt").write_bytes(renamed(tmp_path / "like" / "config_file.pt"))
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", like=tmp_path / "like")
    assert read_config(tmp_path / "back" / "config_file.pt", "python_source")["model_type"] == "INTERNLM2_FORKED"


def renamed(path: Path) -> bytes:
    text = read_text(path).replace("INTERNLM2_PUBLIC", "INTERNLM2_FORKED")
    buffer = io.BytesIO()
    torch.save(text, buffer)
    return buffer.getvalue()


MOE = FIXTURES / "moe_tp2_pp2_dp1"


@sampled(2)
@pytest.mark.parametrize("like", [False, True])
def test_what_only_the_trainer_says_of_the_model_is_kept_by_reshard(like: bool, tmp_path: Path) -> None:
    """Other experts were chosen once: `moe.top_k` was dropped, and every reader has a default of its own."""
    other = tmp_path / "other"
    shutil.copytree(MOE, other)
    text = read_text(other / "config_file.pt").replace("top_k=2", "top_k=3")
    torch.save(text, other / "config_file.pt")
    for source, top_k in ((MOE, 2), (other, 3)):
        out = tmp_path / str(top_k)
        engine.reshard(
            "families/internlm-moe", source, out / "ranks", tp=1, like=(MOE if top_k == 3 else other) if like else None
        )
        engine.convert("families/internlm-moe", out / "ranks", out / "hf")
        assert json.loads((out / "hf" / "config.json").read_text())["num_experts_per_tok"] == top_k


def test_a_layout_that_would_not_write_it_is_refused(tmp_path: Path) -> None:
    layout, mapping = tmp_path / "layout.yaml", tmp_path / "mapping.yaml"
    lines = (MAPPINGS / "layouts" / "internevo.yaml").read_text().splitlines(keepends=True)
    layout.write_text("".join(line for line in lines if "training.moe |" not in line))
    mapping.write_text(
        f"mapping: 1\nname: mine\nversion: 1.0.0\nextends: families/internlm-moe.yaml\nsource: {{layout: {layout}}}\n"
    )
    with pytest.raises(EngineError) as caught:
        engine.plan_reshard(mapping, MOE, tp=1)
    assert caught.value.code == "E216" and "num_experts_per_tok" in caught.value.message


def read_text(path: Path) -> str:
    text = torch.load(path, weights_only=True)
    assert isinstance(text, str)
    return text


@sampled(3)
@pytest.mark.parametrize("family", ["families/internlm2", "families/internlm2-official"])
@pytest.mark.parametrize("scaling", ["dynamic", "linear"])
def test_a_whole_number_for_a_number_is_written_with_its_point(family: str, scaling: str, tmp_path: Path) -> None:
    settings = {"rope_scaling": scaling, "rope_factor": 2}
    engine.convert(family, FIXTURES / "v2_tp2_pp2", tmp_path / "hf", settings=settings)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    factor = (config.get("rope_parameters") or config["rope_scaling"])["factor"]
    assert isinstance(factor, float) and factor == 2


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_the_type_it_declares(name: str) -> None:
    mapping = load_mapping(name)
    kinds: dict[str, type] = {"integer": int, "number": float, "string": str, "boolean": bool}
    given: dict[str, Any] = {option.name: 2 for option in mapping.options.values() if option.type == "number"}
    for settings in ({}, given):
        for option, value in options_of(mapping, settings).items():
            assert value is None or type(value) is kinds[mapping.options[option].type], option


def test_a_number_beyond_floats_is_refused() -> None:
    with pytest.raises(EngineError) as caught:
        options_of(load_mapping("families/internlm2"), {"rope_factor": 10**400})
    assert caught.value.code == "E001"


def floats(config: dict[str, Any], prefix: str = "") -> dict[str, type]:
    found: dict[str, type] = {}
    for name, value in config.items():
        found |= floats(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": type(value)}
    return found


def test_every_key_that_may_be_any_number_is_written_as_one(there_and_back: tuple[str, Path]) -> None:
    """Both ways, whatever the other side's file held: trainers write `rope_base` whole."""
    name, folder = there_and_back
    mapping = load_mapping(family_of(name))
    there = floats(json.loads((folder / "hf" / "config.json").read_text()))
    back = floats(read_config(folder / "back" / "model_config.pt", "pickled_mapping"))
    source = declared(mapping, load_layout(mapping.layout), "source")
    checked = 0
    for keys, written in ((mapping.keys["target"], there), (source, back)):
        for path, kind in written.items():
            key = find_key(keys, path)
            if key is not None and "number" in key.limits.types:
                assert kind is float, path
                checked += 1
    assert checked >= 5, "rms_norm_eps, theta; mlp_ratio, layer_norm_epsilon, rope_base"
