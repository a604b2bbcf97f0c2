"""Release files: what they say fits together, and their configurations load in transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.assets.chat import chat_template
from engine.assets.generation import generation_config
from engine.errors import EngineError
from engine.language.expressions import evaluate, render_tree
from engine.language.mapping_file import load_mapping
from engine.planning.variants import decide, options_of
from tests.support.depth import sampled

MAPPINGS = Path(__file__).parents[2] / "mappings"
RELEASES = sorted(path.stem for path in MAPPINGS.glob("*.yaml"))
META = [name for name in RELEASES if name.startswith("meta-llama")]
REMOTE = [name for name in RELEASES if name.endswith("-official")]  # transformers has no such model
INTERNLM = [name for name in RELEASES if name.startswith(("internlm-", "internlm2"))]


def config_of(name: str, biases: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    """config.json as the release's own sizes give it, for a checkpoint with these biases."""
    mapping = load_mapping(name)
    sizes = {"head_dim": mapping.expect["hidden"] // mapping.expect["heads"], **mapping.expect}
    names: dict[str, Any] = {
        "options": options_of(mapping, settings),
        "present": lambda pattern: pattern in (*biases, "layers.{layer}.attention.wqkv.weight"),  # as all releases have
        "rope_base": 1000000,
        "no_bias": not {*biases} & {*V1},
        "norm_eps": 1e-5,
        "labels": 1,
        **sizes,
    }
    shapes = {n for n, v in mapping.variants.items() if v.decide == "shapes"}
    variants = {n: v for n, v in mapping.variants.items() if n not in shapes and n != "embedding"}
    choices = {n: d.choice for n, d in decide(variants, settings, names).items()}
    return render_tree(mapping.config, {**names, **choices})


def as_llama(config: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def test_every_promised_release_is_there() -> None:
    sizes = ["1_8b", "7b", "20b"]
    promised = [f"internlm-{chat}{size}" for size in ("7b", "20b") for chat in ("", "chat-")]
    promised += [f"internlm2-{chat}{size}" for size in sizes for chat in ("", "chat-")]
    promised += [f"internlm2_5-{size}{chat}" for size in sizes for chat in ("", "-chat")]
    promised += ["internlm3-8b-instruct", *(f"llama2-{size}" for size in ("7b", "13b", "70b"))]
    promised += ["meta-llama-2-7b", "meta-llama-3-8b"]
    assert set(promised) <= set(RELEASES)


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_names_itself_and_its_sizes(name: str) -> None:
    mapping = load_mapping(name)
    assert mapping.name == name
    assert {"layer", "hidden", "heads", "ffn", "vocab"} <= mapping.expect.keys()
    assert mapping.expect["hidden"] % mapping.expect["heads"] == 0


ENDS_OF_TURNS = {"internlm-": 103028, "internlm2": 92542, "internlm3": 128131}  # <eoa>, and twice <|im_end|>


@pytest.mark.parametrize("name", [name for name in RELEASES if name not in META])
def test_chat_releases_end_turns_and_base_releases_do_not(name: str) -> None:
    mapping = load_mapping(name)
    assert (mapping.chat_template is not None) == ("chat" in name or "instruct" in name)
    assert mapping.generation is not None
    config = render_tree({"eos_token_id": mapping.config["eos_token_id"]}, {"vocab": mapping.expect["vocab"]})
    eos = json.loads(generation_config(mapping.generation, config))["eos_token_id"]
    if mapping.chat_template is None:
        assert eos == 2
    else:
        assert eos == [2, next(end for start, end in ENDS_OF_TURNS.items() if name.startswith(start))]
        assert "role" in chat_template(mapping.chat_template)


@pytest.mark.parametrize("name", [name for name in INTERNLM if name.startswith("internlm2")])
def test_internlm2_names_all_six_reserved_ids(name: str) -> None:
    tokenizer = load_mapping(name).tokenizer
    assert tokenizer is not None
    assert {int(key): value for key, value in tokenizer["rename"].items()} == {
        92538: "<|plugin|>",
        92539: "<|interpreter|>",
        92540: "<|action_end|>",
        92541: "<|action_start|>",
        92542: "<|im_end|>",
        92543: "<|im_start|>",
    }


@sampled(3)
@pytest.mark.parametrize("name", [name for name in RELEASES if name not in META and name not in REMOTE])
def test_a_releases_configuration_loads_in_transformers(name: str, tmp_path: Path) -> None:
    config = as_llama(config_of(name), tmp_path)
    expect = load_mapping(name).expect
    assert type(config).__name__ == ("InternLM3Config" if name.startswith("internlm3") else "LlamaConfig")
    assert config.head_dim == expect.get("head_dim", expect["hidden"] // expect["heads"])
    assert config.num_hidden_layers == expect["layer"]
    assert config.num_key_value_heads == expect.get("groups", expect["heads"])
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    generation_config(load_mapping(name).generation or {}, config_of(name))


@pytest.mark.parametrize("name", META)
def test_a_meta_releases_configuration_loads_as_llama(name: str, tmp_path: Path) -> None:
    config = as_llama(config_of(name), tmp_path)
    expect = load_mapping(name).expect
    assert (config.num_hidden_layers, config.num_key_value_heads) == (expect["layer"], expect["groups"])
    third = name.startswith("meta-llama-3")
    assert (config.bos_token_id, config.eos_token_id) == ((128000, 128001) if third else (1, 2))
    assert config.max_position_embeddings == (131072 if "3_1" in name else 8192 if third else 4096)


def test_internlm3s_configuration_is_transformers_own_default(tmp_path: Path) -> None:
    """transformers' defaults are this release's sizes, written by its authors."""
    from transformers import InternLM3Config

    ours, theirs = as_llama(config_of("internlm3-8b-instruct"), tmp_path).to_dict(), InternLM3Config().to_dict()
    for set_here in ("architectures", "rope_parameters", "_name_or_path"):
        del ours[set_here], theirs[set_here]
    assert ours == theirs


# Meta's params.json of the releases, whose multiple_of gives the ffn that the release expects.
PARAMS = {
    "meta-llama-2-7b": (256, None),
    "meta-llama-2-13b": (256, None),
    "meta-llama-2-70b": (4096, 1.3),
    "meta-llama-3-8b": (1024, 1.3),
    "meta-llama-3-70b": (4096, 1.3),
    "meta-llama-3_1-8b": (1024, 1.3),
}


@pytest.mark.parametrize("name", META)
def test_a_meta_releases_ffn_follows_from_its_params(name: str) -> None:
    multiple, factor = PARAMS[name]
    params = {"multiple_of": multiple} if factor is None else {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    mapping = load_mapping(name)
    assert evaluate(mapping.dims["ffn"], {"hidden": mapping.expect["hidden"], **params}) == mapping.expect["ffn"]


@pytest.mark.parametrize(
    ("scaling", "extra", "positions"),
    [
        ("none", {}, 32768),
        ("dynamic", {"factor": 3.0}, 32768),
        ("linear", {"factor": 3.0}, 98304),
        ("yarn", {"factor": 3.0, "original_max_position_embeddings": 32768}, 98304),
    ],
)
def test_every_rope_scaling_is_spelled_as_transformers_reads_it(
    scaling: str, extra: dict[str, Any], positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    warned: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda self, record: warned.append(record))

    written = config_of("internlm2-1_8b", rope_scaling=scaling, rope_factor=3.0)
    config = as_llama(written, tmp_path)
    kind = "default" if scaling == "none" else scaling
    assert written["rope_parameters"] == {"rope_type": kind, "rope_theta": 1000000, **extra}
    assert config.max_position_embeddings == positions
    assert LlamaRotaryEmbedding(config).rope_type == kind
    assert not [one.getMessage() for one in warned]


V1 = ("blocks.{layer}.mixer.Wqkv.bias", "blocks.{layer}.mixer.out_proj.bias")
V2_MLP = tuple(f"layers.{{layer}}.feed_forward.w{i}.bias" for i in (1, 2, 3))


def test_biases_are_read_off_the_checkpoint() -> None:
    assert config_of("internlm-7b", V1)["attention_bias"] is True
    assert config_of("internlm-7b")["attention_bias"] is False
    config = config_of("internlm2-7b", V2_MLP)
    assert (config["attention_bias"], config["mlp_bias"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "biases"), [("internlm-20b", V1[:1]), ("internlm-7b", V1[1:]), ("internlm2-7b", V2_MLP[:2])]
)
def test_biases_in_part_are_more_than_llama_expresses(name: str, biases: tuple[str, ...]) -> None:
    with pytest.raises(EngineError, match="biases") as caught:
        config_of(name, biases)
    assert caught.value.code == "E202"


@pytest.mark.parametrize("family", ["internlm", "internlm2", "internlm2-official"])
def test_layer_norms_are_refused_with_the_reason(family: str) -> None:
    refused = [entry for entry in load_mapping(f"families/{family}").refuse if "norm" in entry.pattern]
    assert len(refused) == 3
    assert all("RMS norms have no bias" in entry.why for entry in refused)


def test_a_reward_model_has_its_number_of_labels(tmp_path: Path) -> None:
    config = as_llama(config_of("internlm2-7b", head="reward"), tmp_path)
    assert config.architectures == ["LlamaForSequenceClassification"]
    assert config.num_labels == 1
    assert "num_labels" not in config_of("internlm2-7b")
