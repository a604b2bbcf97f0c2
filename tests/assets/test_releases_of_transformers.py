"""The releases of transformers that a card names, for all families, by what config.json says.

That they are so was seen by logits in 22 releases; `make clients` runs some.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import engine
from engine.assets.releases import _data, releases, untried
from engine.language.mapping_file import load_mapping
from engine.language.search import list_names
from tests.support.depth import sampled
from tests.support.distributed import LLAMA, MOE, model, save

NARROW = {"head_dim": 16, "hidden_size": 32, "num_attention_heads": 4}
LENGTHS = {"factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = ["sliding_attention", "full_attention"]


def angles(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


ROWS = [
    ("llama", {}, ">=4.40"),
    ("llama", {"head_dim": 8, "hidden_size": 32, "num_attention_heads": 4}, ">=4.40"),
    ("llama", NARROW, ">=4.45"),
    ("mistral", NARROW | {"sliding_window": None}, ">=4.43"),
    ("mixtral", NARROW, ">=4.47"),
    ("glm", NARROW, ">=4.48"),
    ("qwen2", NARROW | {"sliding_window": None}, ">=4.48"),
    ("qwen2_moe", NARROW, ">=5"),
    ("qwen3", NARROW | {"sliding_window": None}, ">=4.51"),
    ("internlm3", {}, ">=5.23"),
    ("llama", {"mlp_bias": True}, ">=4.41"),
    ("mamba", {"hidden_act": "gelu"}, ">=5.18"),
    ("qwen3_next", {"hidden_act": "gelu"}, ">=5.18"),
    ("qwen3_next", {"hidden_act": None}, ">=4.57"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ">=4.40"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ">=4.43"),
    ("llama", {"rope_scaling": {"type": "yarn", **LENGTHS}, "max_position_embeddings": 64}, ">=4.51"),
    ("llama", {"rope_scaling": {"type": "yarn", **LENGTHS}, "max_position_embeddings": 65}, ">=4.56"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}, ">=4.56"),
    ("llama", angles("longrope"), ">=4.51"),
    ("phi3", angles("longrope"), ">=4.43"),
    ("phi3", angles("longrope", attention_factor=1.5), ">=5.23"),
    ("phi3", angles("default", partial_rotary_factor=0.5), ">=4.51"),
    ("qwen2", angles("linear", factor=2.0) | {"sliding_window": None}, ">=4.45"),
    ("qwen2_moe", angles("dynamic", factor=2.0), ">=4.45"),
    ("starcoder2", angles("llama3"), ">=4.45"),
    ("cohere", angles("linear", factor=2.0), ">=4.45"),
    ("phi", angles("linear", factor=2.0), ">=4.45"),
    ("mistral", angles("linear", factor=2.0), ">=4.48"),
    ("jetmoe", angles("linear", factor=2.0), ">=4.48"),
    ("nemotron", angles("linear", factor=2.0), ">=5"),
    ("olmo", angles("linear", factor=2.0), ">=5"),
    ("gpt_oss", angles("default"), ">=5"),
    ("gpt_oss", angles("yarn", **LENGTHS) | {"max_position_embeddings": 64}, ">=4.55"),
    ("gpt_oss", angles("yarn", **LENGTHS) | {"max_position_embeddings": 64, "swiglu_limit": 3.5}, ">=5.23"),
    ("llama", {"rope_scaling": {"type": "yarn", "rope_type": None, "factor": 4.0}}, ">=4.56"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, ">=4.53"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, ">=4.53"),
    ("qwen2", {"use_sliding_window": False, "sliding_window": None}, ">=4.40"),
    ("qwen2", {"sliding_window": 32768, "max_position_embeddings": 32768}, ">=4.40"),
    ("qwen2", {"sliding_window": 32768, "max_position_embeddings": 131072}, ">=4.52"),
    ("qwen2", {"use_sliding_window": False, "max_position_embeddings": 32768}, ">=4.52"),
    ("qwen3", {"use_sliding_window": False, "max_position_embeddings": 32768}, ">=4.52"),
    ("qwen3", {"use_sliding_window": False, "max_position_embeddings": 4096}, ">=4.51"),
    ("qwen3_moe", {"use_sliding_window": False, "max_position_embeddings": 32768}, ">=4.51"),
    ("qwen2_moe", {"use_sliding_window": False, "max_position_embeddings": 2048}, ">=4.40"),
    ("qwen2_moe", {"use_sliding_window": False}, ">=4.42"),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 0}, ">=5"),
    ("qwen2_moe", {"layer_types": SLIDING}, ">=5"),
    ("qwen2_moe", {"sliding_window": 0}, ">=4.42"),
    ("mistral", {"sliding_window": 4096}, ">=4.46"),
    ("mistral", {}, ">=4.46"),
    ("mistral", {"sliding_window": None}, ">=4.40"),
    ("mixtral", {"sliding_window": 4096}, ">=4.46"),
    ("phi3", {"sliding_window": 2047}, ">=4.46"),
    ("starcoder2", {"sliding_window": 4096}, ">=4.46"),
    ("gemma2", {"sliding_window": 4096}, ">=4.42"),
    ("gemma2", {"layer_types": SLIDING}, ">=4.53"),
    ("gemma3_text", {"layer_types": None}, ">=4.50"),
    ("gemma3_text", {"layer_types": SLIDING}, ">=4.53"),
    ("gemma3_text", {"use_bidirectional_attention": True}, ">=5"),
    ("gemma", {"hidden_act": "relu"}, ">=4.48"),
    ("gemma", {"hidden_act": "gelu"}, ">=5.18"),
    ("phi", {"qk_layernorm": True}, ">=4.48"),
    ("falcon", {"alibi": True}, ">=4.45"),
    *[(kind, {"architectures": ["ForSequenceClassification"], "pad_token_id": 2, "sliding_window": None}, ">=4.49")
      for kind in ("gemma", "llama", "mistral", "qwen2")],
    ("llama", {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": None}, ">=4.40"),
    ("llama", {"architectures": ["LlamaForCausalLM"], "pad_token_id": 2}, ">=4.40"),
    ("qwen2_moe", {"sliding_window": None, "mlp_only_layers": [0]}, ">=4.41"),
    ("qwen2_moe", {"sliding_window": None, "mlp_only_layers": []}, ">=4.40"),
    ("bert", {"tie_word_embeddings": True}, ">=4.40"),
    ("bert", {"tie_word_embeddings": False}, ">=5"),
    ("olmo3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 2e4}}},
     ">=5.18"),
    ("olmo3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}},
     ">=4.57"),
    ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, ">=5"),
    ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": True}, ""),
    ("mt5", {"tie_word_embeddings": True, "transformers_version": "4.57.6"}, "<5"),
    ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.23.0"}, ">=5"),
    ("mt5", {"tie_word_embeddings": False, "transformers_version": "4.57.6"}, ""),
    ("pegasus", {"tie_word_embeddings": False, "transformers_version": "5.23.0"}, ">=5"),
    ("pegasus", {"tie_word_embeddings": False, "transformers_version": "4.57.6"}, ""),
    *[(kind, {"tie_word_embeddings": False, "transformers_version": "5.23.0"}, ">=5")
      for kind in ("blenderbot", "blenderbot-small", "big_bird")],
    *[(kind, angles("linear", factor=2.0), ">=4.45") for kind in ("falcon", "gpt_neox", "persimmon", "stablelm")],
    *[(kind, angles("linear", factor=2.0), ">=4.48") for kind in ("gemma", "gemma2", "glm", "mixtral")],
    ("olmo2", angles("linear", factor=2.0), ">=5"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, ">=5"),
    ("cohere2", {"layer_types": SLIDING}, ">=4.53"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": {"rope_type": "yarn"}}, ">=4.56"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "said", "versions"), ROWS)
def test_releases_are_those_that_know_every_word_of_the_configuration(
    kind: str, said: dict[str, Any], versions: str
) -> None:
    assert releases({"model_type": kind, **said}, "") == versions


@pytest.mark.parametrize("name", [one for one in list_names() if re.search("(internevo|megatron)-qwen", one)])
def test_what_is_written_for_qwen_has_no_window_in_any_release(name: str) -> None:
    """Where `sliding_window` is absent it is 4096, which 4.40, 4.41 and 4.49 to 4.51 use whatever else is said."""
    config = load_mapping(name).config
    assert config["sliding_window"] is None
    since = ">=4.51" if "qwen3" in name else ">=4.40"
    assert releases({"model_type": config["model_type"], "sliding_window": None}, "") == since


@pytest.mark.parametrize(
    ("kind", "versions"),
    [("roberta", ">=4.51"), ("llama4_text", ">=4.56"), ("deepseek_v3", ">=5.12"), ("bamba", ">=5.18"),
     ("mamba2", ">=5.23")],
)  # fmt: skip
def test_releases_before_one_that_computed_the_class_otherwise_are_not_named(kind: str, versions: str) -> None:
    assert releases({"model_type": kind}, "") == versions
    assert untried({"model_type": kind})  # with other words of its configuration


def test_what_a_mapping_says_narrows_them_further_until_none_is_left() -> None:
    assert releases({"model_type": "llama"}, ">=4.41,<4.52") == ">=4.41,<4.52"
    assert releases({"model_type": "llama", **NARROW}, ">=4.41,<4.52") == ">=4.45,<4.52"
    assert releases({"model_type": "qwen3"}, "<4.51") == "none"
    assert (
        releases({"model_type": "llama"}, "<5,<4.52") == releases({"model_type": "llama"}, "<4.52,<5") == ">=4.40,<4.52"
    )
    assert releases({"model_type": "llama"}, ">=5.3,>=5.18") == ">=5.18"


def test_names_that_transformers_5_got_later_need_the_release_that_has_them() -> None:
    assert releases({"model_type": "gpt_neox"}, ">=5") == ">=5.18"
    assert releases({"model_type": "gpt_neox"}, "") == releases({"model_type": "gpt_neox"}, ">=4.40") == ">=4.40"
    for kind in ("aria_text", "granitemoe", "granitemoehybrid", "granitemoeshared"):
        assert releases({"model_type": kind}, ">=5") == ">=5.18"
    assert releases({"model_type": "mixtral"}, ">=5") == ">=5"


def test_a_value_of_another_kind_narrows_them_and_is_no_error() -> None:
    assert releases({"model_type": "bert", "transformers_version": 5, "rope_scaling": [1]}, "") == ">=4.40"
    assert releases({"model_type": "phi3", "sliding_window": "5", "swiglu_limit": []}, "") == ">=4.41"
    assert releases({"model_type": "mt5", "transformers_version": 5, "tie_word_embeddings": True}, "") == "none"


@pytest.mark.parametrize(
    ("config", "versions"),
    [
        (LLAMA, ">=4.40"),
        (LLAMA | {"head_dim": 8}, ">=4.45"),
        (LLAMA | {"mlp_bias": True}, ">=4.41"),
        (MOE, ">=5"),  # under the names that transformers 5 has in memory
    ],
)
def test_a_card_names_them_whatever_the_mapping(config: dict[str, Any], versions: str, tmp_path: Path) -> None:
    engine.convert("transformers", save(model(config), tmp_path / "step", config), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.findall("transformers `([^`]*)`", card) == [versions]


OTHER = {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_embd": 8, "n_head": 2, "n_layer": 1,
         "n_positions": 16, "rotary_dim": 4, "vocab_size": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LLAMA, ""),
        (OTHER, "Which versions of transformers load it as this model was not tried"),
        (OTHER | {"rope_scaling": {"rope_type": "yarn", **LENGTHS}}, "Which of these load it as this model"),
    ],
)
def test_a_card_says_that_no_release_was_tried_with_a_class(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    engine.convert("transformers", save(model(config), tmp_path / "step", config), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card and ("was not tried" in card) is bool(told)


def test_a_card_names_the_element_types_of_all_tensors(tmp_path: Path) -> None:
    state = {name: one if "norm" in name else one.bfloat16() for name, one in model(LLAMA).items()}
    engine.convert("transformers", save(state, tmp_path / "step", LLAMA), tmp_path / "out")
    assert "| element type | `bfloat16`, `float32` of 5 tensors |\n" in (tmp_path / "out" / "README.md").read_text()


def test_every_model_type_that_is_named_is_one_of_transformers() -> None:
    data = _data()
    kinds = {*data.types, *data.bases, *data.names, *(kind for row in data.rows for kind in row.of)}
    assert (len(data.types), len(data.bases)) == (66, 13) and kinds - {*CONFIG_MAPPING_NAMES, "internlm3"} == set()


@sampled(3, "name")
@pytest.mark.parametrize("name", [name for name in list_names() if "families/" in name])
def test_every_class_that_a_family_writes_has_a_first_release(name: str) -> None:
    mapping = load_mapping(name)
    if mapping.remote_code is None and mapping.model_type != "any":
        assert releases({"model_type": mapping.model_type}, "")
