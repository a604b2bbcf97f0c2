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
from engine.assets.tokenizer import convert_tokenizer, written_merges
from tests.support.depth import sampled
from tests.support.families import Llama, save_family
from tests.support.sentencepiece_models import RESERVED, train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
MODELS = [
    ("v1_tp2_pp2", "families/internlm.yaml", 10000.0),
    ("v2_tp2_pp2", "families/internlm2.yaml", None),
    ("llama_tp2_pp1_default", "families/llama.yaml", None),
]
SPEC = {"bos": "<s>", "eos": "</s>", "pad": "</s>"}
SCALED = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}


def config(folder: str, mapping: str, scaling: str, out: Path) -> dict[str, Any]:
    settings = {"rope_scaling": scaling, "max_position_embeddings": 512}
    settings |= {} if scaling == "none" else {"rope_factor": 4}
    engine.convert(mapping, FIXTURES / folder, out, settings=settings)
    read: dict[str, Any] = json.loads((out / "config.json").read_text())
    return read


@sampled(3)
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


@sampled(5)
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
    names = {"use_scaled_rope": True, "rope_theta": 500000.0, "theta": "told", "scaling": "told", "vocab": 128256}
    names |= {"options": {"rope_factor": 8.0}, "given": {}}
    wanted = {name: mapping.config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters")}
    read = render_tree(wanted, names)
    scaling = {name: value for name, value in read["rope_parameters"].items() if name != "rope_theta"}
    assert read["rope_scaling"] == scaling  # with `type` beside `rope_type`, exllamav2 refuses it
    assert read["rope_theta"] == read["rope_parameters"]["rope_theta"] == 500000.0


@pytest.mark.parametrize("family", ["internevo-qwen3-moe", "megatron-qwen3-moe"])
def test_mixtures_of_qwen3_say_that_every_layer_has_experts(family: str) -> None:
    """mlx-lm assumes nothing for these two."""
    config = engine.load_mapping(f"families/{family}.yaml").config
    assert (config.get("decoder_sparse_step"), config.get("mlp_only_layers")) == (1, ())


@sampled(2)
@pytest.mark.parametrize(("folder", "mapping", "theta"), MODELS)
def test_what_was_written_so_can_be_written_back(
    folder: str, mapping: str, theta: float | None, tmp_path: Path
) -> None:
    config(folder, mapping, "none", tmp_path / "out")
    engine.reverse(mapping, tmp_path / "out", tmp_path / "back", like=FIXTURES / folder)


@sampled(2)
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


@sampled(2)
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


def test_every_tokenizers_reads_the_merges(tmp_path: Path) -> None:
    """Before 0.20, which transformers 4.40 asks for, a merge is one string."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(train())
    merges = json.loads(convert_tokenizer(model, SPEC)["tokenizer.json"])["model"]["merges"]
    assert merges and all(isinstance(one, str) and one.count(" ") == 1 for one in merges)


def test_merges_of_pieces_with_spaces_stay_pairs() -> None:
    pairs = [("a", "b"), ("a b", "c")]
    assert written_merges(pairs) == pairs
    assert written_merges(pairs[:1]) == ["a b"]


CARDS = [
    ("v2_tp2_pp2", "families/internlm2.yaml", {}, ">=4.40"),
    ("v2_tp2_pp2", "families/internlm2.yaml", {"rope_scaling": "linear"}, ">=4.40"),
    ("v1_tp2_pp2", "families/internlm.yaml", {"rope_scaling": "yarn"}, ">=4.51"),
    ("llama_tp2_pp1_default", "families/llama.yaml", {}, ">=4.40"),
    ("v2_tp2_pp2", "families/internlm2-official.yaml", {}, ">=4.41,<4.49"),
]


@sampled(2)
@pytest.mark.parametrize(("folder", "mapping", "settings", "versions"), CARDS)
def test_the_card_names_the_versions_that_read_it_as_this_model(
    folder: str, mapping: str, settings: dict[str, str], versions: str, tmp_path: Path
) -> None:
    engine.convert(mapping, FIXTURES / folder, tmp_path / "hf", settings=settings)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"transformers `{versions}`" in card
    assert "| heads | " in card and "| k | " not in card  # which is 1 in every model
    assert '("path/to/this/folder", dtype=' not in card  # transformers before 4.56 does not know that word


def test_a_model_with_biases_in_its_mlp_needs_a_version_that_reads_them(tmp_path: Path) -> None:
    model = Llama(layers=2, mlp_bias=True, bias=True)
    save_family(model, tmp_path / "src")
    engine.convert(model.mapping, tmp_path / "src", tmp_path / "hf")
    assert "transformers `>=4.41`" in (tmp_path / "hf" / "README.md").read_text()


def test_a_model_that_transformers_lacks_is_not_said_to_load_in_it(tmp_path: Path) -> None:
    engine.convert("families/internlm-moe.yaml", FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "No program loads this folder as it is" in card and "from_pretrained" not in card


@pytest.mark.parametrize("release", ["internlm-chat-7b", "internlm-chat-20b"])
def test_the_first_chats_end_with_eoa_for_programs_that_know_one_end(release: str) -> None:
    mapping = engine.load_mapping(release)
    assert mapping.tokenizer == {"file": "tokenizer.model", "bos": "<s>", "eos": "<eoa>", "pad": "</s>"}
    assert mapping.generation == {"eos_token_id": [2, 103028]}


def test_an_end_of_the_answer_is_a_special_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "tokenizer.model"
    model.write_bytes(train(user_defined_symbols=[*RESERVED, "<eoa>"]))
    for name, data in convert_tokenizer(model, {**SPEC, "eos": "<eoa>"}).items():
        (tmp_path / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("the cat<eoa>", add_special_tokens=False)
    assert ids == SentencePieceProcessor(model_file=str(model)).encode("the cat<eoa>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert tokenizer.eos_token == "<eoa>"
