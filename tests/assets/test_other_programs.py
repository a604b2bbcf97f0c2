"""What is written is the same model to programs that read older keys: transformers 4, CTranslate2, optimum, llama.cpp.

`make clients` runs these programs themselves; here their keys are held.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

import engine
from engine.assets.tokenizer import convert_tokenizer
from tests.support.sentencepiece_models import RESERVED, train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
MODELS = [
    ("v1_tp2_pp2", "families/internlm.yaml", 10000.0),
    ("v2_tp2_pp2", "families/internlm2.yaml", None),
    ("llama_tp2_pp1_default", "families/llama.yaml", None),
]
SCALED = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}


def config(folder: str, mapping: str, scaling: str, out: Path) -> dict[str, Any]:
    settings = {"rope_scaling": scaling, "rope_factor": 4, "max_position_embeddings": 512}
    engine.convert(mapping, FIXTURES / folder, out, settings=settings)
    read: dict[str, Any] = json.loads((out / "config.json").read_text())
    return read


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize(("folder", "mapping", "theta"), MODELS)
def test_the_rotary_settings_stand_in_the_old_form_too(
    folder: str, mapping: str, theta: float | None, scaling: str, tmp_path: Path
) -> None:
    read = config(folder, mapping, scaling, tmp_path / "out")
    assert read["rope_theta"] == read["rope_parameters"]["rope_theta"]
    assert theta is None or read["rope_theta"] == theta
    assert read.get("rope_scaling") == SCALED[scaling]
    assert read["rope_parameters"]["rope_type"] == ("default" if scaling == "none" else scaling)
    assert read["dtype"] == read["torch_dtype"]


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize(("folder", "mapping", "theta"), MODELS)
def test_transformers_5_reads_the_same_with_the_old_keys_and_without(
    folder: str, mapping: str, theta: float | None, scaling: str, tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    read = config(folder, mapping, scaling, tmp_path / "out")
    new = {name: value for name, value in read.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    both, only = LlamaConfig(**read), LlamaConfig(**new)
    for key in read["rope_parameters"]:
        assert both.rope_parameters[key] == only.rope_parameters[key] == read["rope_parameters"][key]
    assert both.dtype == only.dtype


def test_llama_3_scaling_stands_in_the_old_form_too() -> None:
    from engine.language.expressions import render_tree

    mapping = engine.load_mapping("families/meta-llama.yaml")
    names = {"use_scaled_rope": True, "rope_theta": 500000.0, "options": {"rope_factor": 8.0}}
    wanted = {name: mapping.config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters")}
    read = render_tree(wanted, names)
    scaling = {name: value for name, value in read["rope_parameters"].items() if name != "rope_theta"}
    assert read["rope_scaling"] == {**scaling, "type": "llama3"}
    assert read["rope_theta"] == read["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize(("folder", "mapping", "theta"), MODELS)
def test_what_was_written_so_can_be_written_back(
    folder: str, mapping: str, theta: float | None, tmp_path: Path
) -> None:
    config(folder, mapping, "none", tmp_path / "out")
    engine.reverse(mapping, tmp_path / "out", tmp_path / "back", like=FIXTURES / folder)


@pytest.mark.parametrize("dummy", [True, False])
def test_the_tokenizers_settings_say_what_llama_cpp_reads_there(dummy: bool, tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(model_with(dummy))
    files = convert_tokenizer(model, {"bos": "<s>", "eos": "</s>", "pad": "</s>", "rename": renamed(model, dummy)})
    settings, tokenizer = (json.loads(files[name]) for name in ("tokenizer_config.json", "tokenizer.json"))
    assert settings["add_prefix_space"] is dummy
    read = [{"id": int(index), **token} for index, token in settings["added_tokens_decoder"].items()]
    assert sorted(read, key=lambda token: token["id"]) == tokenizer["added_tokens"]
    assert dummy or "<|im_start|>" in {token["content"] for token in read}


@pytest.mark.parametrize("dummy", [True, False])
def test_transformers_gives_the_ids_of_sentencepiece_with_these_settings(dummy: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "tokenizer.model"
    model.write_bytes(model_with(dummy))
    for name, data in convert_tokenizer(model, {"bos": "<s>", "eos": "</s>", "add_bos": False}).items():
        (tmp_path / name).write_bytes(data)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), SentencePieceProcessor(model_file=str(model))
    for text in ("hello world", " two  spaces", "a\nb", "x---", "你好"):
        assert ours.encode(text) == theirs.encode(text), text


def model_with(dummy: bool) -> bytes:
    """A model with or without a dummy prefix; with one, symbols of its own cannot be expressed."""
    return train(add_dummy_prefix=dummy, **({"user_defined_symbols": []} if dummy else {}))


def renamed(model: Path, dummy: bool) -> dict[int, str]:
    index = SentencePieceProcessor(model_file=str(model)).piece_to_id(RESERVED[0])
    return {} if dummy else {index: "<|im_start|>"}
