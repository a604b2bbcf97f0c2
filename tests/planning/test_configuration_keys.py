"""No key of a configuration vanishes, and none has a value that cannot be, in either direction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine import api
from engine.errors import EngineError, Place
from engine.language.keys import Key, Limits
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.config_keys import Side, read_config, read_training
from engine.proving.lint import lint_file
from tests.support.depth import sampled
from tests.support.genuine import family_of, settings_of
from tests.support.shards import Model, same, save

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
FAMILY = "families/internlm2.yaml"
NAN, INF = float("nan"), float("inf")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine InternLM2 as Hugging Face has it, `config.json` as the engine writes it."""
    folder = tmp_path_factory.mktemp("whole") / "hf"
    engine.convert(FAMILY, FIXTURES / "v2_tp2_pp2", folder)
    return folder


def changed(whole: Path, folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in without}))
    return folder


def refused(call: Any, *args: Any, **more: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        call(*args, **more)
    return caught.value


# What a Llama's config.json may not say when it becomes a training checkpoint, and with what it is refused.
ELSEWHERE: list[tuple[dict[str, Any], str, str]] = [
    # another architecture, though all its tensors have these names and shapes
    *[({"model_type": kind}, "E212", kind) for kind in ("mistral", "qwen2", "gemma", "granite", "internlm3", "phi3")],
    ({"model_type": 5}, "E212", "5"),
    ({"model_type": None}, "E212", "null"),
    ({"architectures": ["MistralForCausalLM"]}, "E209", "MistralForCausalLM"),
    ({"architectures": ["LlamaModel"]}, "E209", "LlamaModel"),
    ({"architectures": "LlamaForCausalLM"}, "E218", "LlamaForCausalLM"),
    # another function
    ({"auto_map": {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}}, "E209", "auto_map"),
    ({"hidden_act": "gelu"}, "E209", "hidden_act"),
    ({"hidden_act": "relu2"}, "E209", "hidden_act"),
    ({"hidden_act": True}, "E218", "hidden_act"),
    ({"attention_bias": True}, "E209", "attention_bias"),
    ({"mlp_bias": True}, "E209", "mlp_bias"),
    ({"head_dim": 16}, "E209", "head_dim"),
    ({"pretraining_tp": 2}, "E209", "pretraining_tp"),
    ({"tie_word_embeddings": True}, "E209", "tie_word_embeddings"),
    ({"partial_rotary_factor": 0.5}, "E209", "partial_rotary_factor"),
    ({"sliding_window": 4096}, "E209", "sliding_window"),
    ({"use_sliding_window": True}, "E209", "use_sliding_window"),
    ({"final_logit_softcapping": 30.0}, "E209", "final_logit_softcapping"),
    ({"attn_logit_softcapping": 50.0}, "E209", "attn_logit_softcapping"),
    ({"logits_scaling": 8.0}, "E209", "logits_scaling"),
    ({"embedding_multiplier": 12.0}, "E209", "embedding_multiplier"),
    ({"residual_multiplier": 0.22}, "E209", "residual_multiplier"),
    ({"is_decoder": True}, "E209", "is_decoder"),
    ({"pruned_heads": {"0": [1]}}, "E209", "pruned_heads"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "E209", "quantization_config"),
    ({"num_key_value_heads": 8}, "E203", "groups"),
    ({"num_key_value_heads": None}, "E203", "groups"),
    # what nothing here has heard of
    ({"kv_lora_rank": 512}, "E219", "kv_lora_rank"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "E219", "layer_types"),
    ({"num_hiden_layers": 2}, "E219", "num_hidden_layers"),
    ({"a": {"b": {"c": 1}}}, "E219", "`a`"),
    ({"rope_parameters.rope_theta": 1e6}, "E219", "rope_theta"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_theta.": 1e6}}, "E219", "rope_theta."),
    # scaled rotary angles in every form
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}, "E219", "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "E209", "rope_parameters"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "E209", "rope_parameters"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "E209", "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "E209", "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, "E209", "factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "attention_factor": 2.0}}, "E219", "attention_factor"),
    ({"rope_parameters": {"type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "E209", "rope_parameters"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "E209", "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "E219", "full_attention"),
    *[
        (
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {name: kind, "factor": 2.0}},
            "E209",
            "rope_scaling.",
        )
        for name in ("type", "rope_type")
        for kind in ("linear", "dynamic", "yarn", "longrope")
    ],
    (
        {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        "E219",
        "rope_scaling.low_freq_factor",
    ),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "E209", "rope_scaling.type"),
    ({"rope_parameters": None, "rope_scaling": "linear"}, "E218", "rope_scaling"),
    ({"rope_parameters": 5, "rope_scaling": {"type": "linear"}}, "E218", "rope_parameters"),
    ({"rope_theta": None, "rope_parameters": 5, "rope_scaling": {"type": "linear"}}, "E218", "rope_parameters"),
    # two keys that disagree
    ({"rope_theta": 1e6}, "E218", "rope_theta"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}}, "E218", "rope_theta"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "E218", "rope"),
    ({"rope_parameters": {"rope_type": "default", "type": "linear"}}, "E218", "rope_parameters.type"),
    # programs read `rope_scaling`, where it is, in place of `rope_parameters`: the base would be 10000
    (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}},
        "E218",
        "in place",
    ),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"factor": 2.0}}, "E218", "in place"),
    ({"rope_parameters": {"factor": 2.0}, "rope_scaling": {"type": "linear"}}, "E218", "in place"),
    # values that cannot be
    *[({"rms_norm_eps": v}, "E218", "rms_norm_eps") for v in (-1e-5, 0, "1e-5", None, True, NAN, INF, 1e30, [1e-5])],
    *[
        ({"rope_parameters": {"rope_theta": v}}, "E218", "rope_theta")
        for v in (-1, 0, "1e4", True, NAN, INF, -INF, 1e300, 1, [1e4], {})
    ],
    *[({"rope_parameters": v}, "E218", "rope_parameters") for v in ("default", [], 5, True)],
    *[({"num_hidden_layers": v}, "E218", "num_hidden_layers") for v in (0, -4, "4", 4.0, True, None, INF, {}, [4])],
    *[({"vocab_size": v}, "E218", "vocab_size") for v in (-1, 0, "256", True, 256.0)],
    *[({"hidden_size": v}, "E218", "hidden_size") for v in (64.0, NAN, False)],
    *[({"head_dim": v}, "E218", "head_dim") for v in (0, -8, "8", 8.0)],
    *[({"max_position_embeddings": v}, "E218", "max_position_embeddings") for v in (0, -1, "many", True, INF)],
    # a model that transformers then refuses to load
    *[({"attention_dropout": v}, "E218", "attention_dropout") for v in (True, "none", [0], 7)],
    *[({"use_cache": v}, "E218", "use_cache") for v in (7, "yes")],
    ({"id2label": ["a"]}, "E218", "id2label"),
    *[({"tie_word_embeddings": v}, "E218", "tie_word_embeddings") for v in ("False", "false", "", 2, [], None, 0.0)],
    *[({"attention_bias": v}, "E218", "attention_bias") for v in ("False", "no", 2)],
    ({"bos_token_id": "<s>"}, "E218", "bos_token_id"),
    ({"bos_token_id": [1]}, "E218", "bos_token_id"),
    ({"eos_token_id": ["</s>"]}, "E218", "eos_token_id"),
    ({"id2label": {"a": 1}}, "E219", "id2label.a"),
    ({"num_labels": "two"}, "E218", "num_labels"),
]


def told(change: dict[str, Any]) -> str:
    return json.dumps(change)[:70]


@sampled(4, "code")
@pytest.mark.parametrize(("change", "code", "word"), ELSEWHERE, ids=[told(change) for change, _, _ in ELSEWHERE])
def test_what_config_json_says_and_training_cannot_have_is_refused(
    whole: Path, tmp_path: Path, change: dict[str, Any], code: str, word: str
) -> None:
    source = changed(whole, tmp_path / "hf", change)
    error = refused(engine.reverse, FAMILY, source, tmp_path / "out")
    assert error.code == code, error
    assert word in str(error), error
    assert error.code == "E203" or "config.json" in str(error), error
    assert not (tmp_path / "out").exists()


HARMLESS: list[dict[str, Any]] = [
    {"architectures": None},
    {"attention_dropout": 0.1, "initializer_range": 0.5, "use_cache": False},
    {"head_dim": None, "rope_scaling": None, "sliding_window": None, "never_heard_of": None},
    {"tie_word_embeddings": 0, "attention_bias": False, "mlp_bias": 0},
    {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0, "use_sliding_window": False},
    {"torch_dtype": "float32", "transformers_version": "4.57.6", "_name_or_path": "x"},
    {"unsloth_version": "2026.3.3", "unsloth_fixed": True, "unsloth_vocab_pad_ids": [255]},  # written by unsloth
    {"group_size_ratio": 0.25, "gradient_checkpointing": False, "use_mrope": False, "max_sequence_length": 2048},
    {"_flash_attn_2_enabled": True, "_pre_quantization_dtype": "bfloat16", "_experts_implementation": "eager"},
    {"bos_token_id": 5, "eos_token_id": [2, 92542], "pad_token_id": None, "max_position_embeddings": 4096},
    {"rope_parameters": {"rope_theta": 10000.0}},
    {"rope_parameters": None, "rope_theta": 10000},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_theta": 10000.0},
    {"rope_parameters": {"rope_theta": 10000}, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {"type": "default", "rope_type": "default", "rope_theta": 10000}},
]


@sampled(3)
@pytest.mark.parametrize("change", HARMLESS, ids=told)
def test_what_changes_nothing_changes_nothing(whole: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    plan = api.plan_reverse(FAMILY, changed(whole, tmp_path / "hf", change))
    assert plan.config == api.plan_reverse(FAMILY, whole).config


@pytest.mark.parametrize(
    ("change", "without", "key", "value"),
    [
        ({"rope_parameters": None, "rope_theta": 1e6}, (), "rope_base", 1e6),
        ({"rope_theta": 1e6}, ("rope_parameters",), "rope_base", 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6}, (), "rope_base", 1e6),
        ({}, ("rope_parameters", "rope_theta"), "rope_base", 10000),
        ({}, ("rms_norm_eps",), "layer_norm_epsilon", 1e-6),
    ],
)
def test_a_key_in_any_of_its_places_is_read_as_transformers_reads_it(
    whole: Path, tmp_path: Path, change: dict[str, Any], without: tuple[str, ...], key: str, value: float
) -> None:
    plan = api.plan_reverse(FAMILY, changed(whole, tmp_path / "hf", change, without))
    assert plan.config[key] == value


def answered(error: EngineError) -> dict[str, Any]:
    """The settings that a message names, with the values that it says would fit."""
    return {name: values[0] for name, values in error.answers.items()}


@sampled(2)
@pytest.mark.parametrize("scaling", ["dynamic", "linear", "yarn"])
def test_scaling_for_serving_comes_back_only_where_it_is_given_again(tmp_path: Path, scaling: str) -> None:
    given = {"rope_scaling": scaling, "rope_factor": 3.0}
    engine.convert(FAMILY, FIXTURES / "v2_tp2_pp2", tmp_path / "hf", settings=given)
    error = refused(api.plan_reverse, FAMILY, tmp_path / "hf")
    assert error.code == "E209" and f"--set rope_scaling={scaling} --set rope_factor=3" in str(error.fix)
    api.plan_reverse(FAMILY, tmp_path / "hf", settings=answered(error))
    error = refused(api.plan_reverse, FAMILY, tmp_path / "hf", settings={"rope_scaling": scaling})
    assert error.code == "E209" and list(answered(error)) == ["rope_factor"]  # the other is given already
    assert api.plan_reverse(FAMILY, tmp_path / "hf", settings=given).config["rope_base"] == 10000
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    scaled = {k: v for k, v in config.pop("rope_parameters").items() if k not in ("rope_theta", "rope_type")}
    config |= {"rope_theta": 10000.0, "rope_scaling": scaled | {"type": scaling}}  # as transformers 4 has it
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert refused(api.plan_reverse, FAMILY, tmp_path / "hf").code == "E209"
    assert api.plan_reverse(FAMILY, tmp_path / "hf", settings=given).config["rope_base"] == 10000


def test_a_length_that_angles_depend_on_is_given_again_too(whole: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rope_factor": 2.0}
    absent = ("rope_parameters", "max_position_embeddings")
    for kind, length, refuses in (
        ("dynamic", {}, "`max_position_embeddings` of config.json would be lost"),
        ("dynamic", {"max_position_embeddings": 64}, None),
        ("yarn", {}, "would be lost"),
        ("yarn", {"max_position_embeddings": 32}, "original_max_position_embeddings` of config.json would be added"),
    ):
        scaling = {"rope_scaling": {"type": kind, "factor": 2.0}, "rope_theta": 1e4, "max_position_embeddings": 64}
        hf = changed(whole, tmp_path / f"{kind}{len(length)}", scaling, ("rope_parameters",))
        settings = {**given, **length, "rope_scaling": kind}
        if refuses is None:
            api.plan_reverse(FAMILY, hf, settings=settings)
        else:
            error = refused(api.plan_reverse, FAMILY, hf, settings=settings)
            assert refuses in error.message
            assert answered(error) == ({"max_position_embeddings": 64} if kind == "dynamic" else {})  # yarn's lacks it
    hf = changed(whole, tmp_path / "absent", scaling | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, absent)
    error = refused(api.plan_reverse, FAMILY, hf, settings=given | {"rope_scaling": "dynamic"})
    assert "`max_position_embeddings` of config.json would be lost" in error.message  # it is 2048 then
    api.plan_reverse(FAMILY, hf, settings=given | {"rope_scaling": "dynamic", "max_position_embeddings": 2048})


def test_the_official_spelling_has_no_second_place_for_angles(tmp_path: Path) -> None:
    name, settings = "internlm2-official", {"rope_scaling": "dynamic", "rope_factor": 2.0}
    engine.convert(name, FIXTURES / "v2_tp2_pp2", tmp_path / "hf", settings=settings)
    api.plan_reverse(name, tmp_path / "hf", settings=settings)
    for number, (change, told) in enumerate(
        [
            ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta"),
            ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
            ({"max_position_embeddings": 64}, "max_position_embeddings"),
        ]
    ):
        hf = changed(tmp_path / "hf", tmp_path / str(number), change)
        error = refused(api.plan_reverse, name, hf, settings=settings)
        assert error.code == "E209" and told in error.message
    api.plan_reverse(name, hf, settings={**settings, "max_position_embeddings": 64})


def test_the_token_that_an_official_reward_model_reads_is_given_and_comes_back(tmp_path: Path) -> None:
    """The official class takes `reward_token_id` from `config.json`, which no training file holds."""
    name, model = "internlm2-official", Model("v2", layers=1, hidden=32, heads=4, groups=2, ffn=64, head="reward")
    save(model, tmp_path / "ckpt")
    assert "reward_token_id" not in api.plan(name, tmp_path / "ckpt").config
    engine.convert(name, tmp_path / "ckpt", tmp_path / "hf", settings={"reward_token_id": 5})
    given = tmp_path / "hf" / "config.json"
    assert json.loads(given.read_text())["reward_token_id"] == 5
    assert api.plan(name, tmp_path / "ckpt", config=given).config["reward_token_id"] == 5
    assert "reward_token_id" not in api.plan_reverse(name, tmp_path / "hf").config


def test_scaling_that_config_json_does_not_have_cannot_be_given_again(whole: Path, tmp_path: Path) -> None:
    plain = changed(whole, tmp_path / "hf", {}, ("rope_parameters", "rope_theta"))
    error = refused(api.plan_reverse, FAMILY, plain, settings={"rope_scaling": "linear", "rope_factor": 2})
    assert error.code == "E209" and "rope_scaling" in str(error.fix)


def with_weights(whole: Path, folder: Path, change: Any, config: dict[str, Any] | None = None) -> Path:
    changed(whole, folder, config or {})
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@sampled(3)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_quantised_weights_are_refused(whole: Path, tmp_path: Path, dtype: torch.dtype, asked: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = with_weights(whole, tmp_path / "hf", lambda state: state.update({name: state[name].float().to(dtype)}))
    error = refused(engine.reverse, FAMILY, source, tmp_path / "out", dtype=asked)
    assert error.code == "E209" and "floating-point" in error.message
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_rule_writes_are_refused(whole: Path, tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    source = with_weights(whole, tmp_path / "hf", lambda state: state.update(more))
    assert refused(api.plan_reverse, FAMILY, source).code == "E205"


TIED = f"""mapping: 1
name: tied
version: 1.0.0
extends: {FAMILY}
rules: [{{name: head, tied_to: model.embed_tokens.weight}}]
keys: {{target: {{tie_word_embeddings: {{type: boolean}}}}}}
config: {{tie_word_embeddings: true}}
"""


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_too_must_equal_what_it_is_tied_to(whole: Path, tmp_path: Path, equal: bool) -> None:
    (tmp_path / "tied.yaml").write_text(TIED)

    def change(state: dict[str, torch.Tensor]) -> None:
        if equal:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    source = with_weights(whole, tmp_path / "hf", change, {"tie_word_embeddings": True})
    if equal:
        engine.reverse(tmp_path / "tied.yaml", source, tmp_path / "out")
    else:
        assert refused(engine.reverse, tmp_path / "tied.yaml", source, tmp_path / "out").code == "E402"
    assert (tmp_path / "out").exists() is equal


# The training side.


def training(folder: Path, changes: dict[str, Any], fixture: str = "v2_tp2_pp2") -> Path:
    shutil.copytree(FIXTURES / fixture, folder)
    config = dict(api.read_checkpoint(folder, api.load_layout("internevo")).config)
    torch.save(config | changes, folder / "model_config.pt")
    return folder


HOMEGROWN: list[tuple[dict[str, Any], str, str]] = [
    ({"use_dynamic_ntk_rope": True}, "E209", "use_dynamic_ntk_rope"),
    ({"apply_post_layer_norm": True}, "E209", "apply_post_layer_norm"),
    ({"norm_type": "layernorm"}, "E209", "norm_type"),
    ({"use_swiglu": False}, "E209", "use_swiglu"),
    ({"moe_use_residual": True}, "E209", "moe_use_residual"),
    ({"num_shared_experts": 2}, "E209", "num_shared_experts"),
    ({"rope_scaling_factor": 2.0}, "E209", "rope_scaling_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "E209", "rope_scaling"),
    ({"sliding_window": 128}, "E209", "sliding_window"),
    ({"qk_norm": True}, "E209", "qk_norm"),
    ({"enable_qk_norm": True}, "E209", "enable_qk_norm"),
    ({"deepnorm": True}, "E209", "deepnorm"),
    ({"residual_scale": 0.5}, "E209", "residual_scale"),
    ({"partial_rotary_factor": 0.5}, "E209", "partial_rotary_factor"),
    ({"tie_word_embeddings": True}, "E209", "tie_word_embeddings"),
    ({"activation_type": "gelu"}, "E209", "activation_type"),
    ({"rope_type": "dynamic"}, "E209", "rope_type"),
    ({"rope_theta": 1e6}, "E209", "rope_theta"),
    ({"causal": False}, "E209", "causal"),
    ({"embed_scale": 8.0}, "E209", "embed_scale"),
    ({"add_unit_offset": True}, "E209", "add_unit_offset"),
    ({"moe_kwargs": {"top_k": 2}}, "E209", "moe_kwargs"),
    ({"norm_topk_prob": True}, "E209", "norm_topk_prob"),
    ({"routed_scaling_factor": 2.5}, "E209", "routed_scaling_factor"),
    *[({"rope_base": v}, "E218", "rope_base") for v in (-1, 0, 1, "10000", None, True, NAN, INF, 1e300, [1e4])],
    *[({"layer_norm_epsilon": v}, "E218", "layer_norm_epsilon") for v in (-1e-5, 0, "x", None, True, NAN, INF, 5)],
    *[({"num_layers": v}, "E218", "num_layers") for v in (0, -4, "4", 4.0, True, None, INF)],
    *[({"num_kv_attention_heads": v}, "E218", "num_kv_attention_heads") for v in (0, -4, "4")],
    *[({"mlp_ratio": v}, "E218", "mlp_ratio") for v in (0, -3.5, "3.5", NAN, 1e300)],
    *[({"multiple_of": v}, "E218", "multiple_of") for v in (0, -256, "256", 256.0)],
    *[({"adapt_hf": v}, "E218", "adapt_hf") for v in ("False", "True", None, 2, 0.0, [])],
    *[({"is_reward": v}, "E218", "is_reward") for v in ("False", "no", "")],
    *[({"norm_head": v}, "E218", "norm_head") for v in ("False", 5)],
    *[({"head_dim": v}, "E218", "head_dim") for v in ("8", 8.0, True, [8])],
    *[({"apply_post_layer_norm": v}, "E218", "apply_post_layer_norm") for v in ("False", None)],
]


@sampled(3, "code")
@pytest.mark.parametrize(("change", "code", "word"), HOMEGROWN, ids=[told(change) for change, _, _ in HOMEGROWN])
def test_what_model_config_says_and_the_target_cannot_have_is_refused(
    tmp_path: Path, change: dict[str, Any], code: str, word: str
) -> None:
    source = training(tmp_path / "ckpt", change)
    error = refused(engine.convert, FAMILY, source, tmp_path / "out")
    assert error.code == code and word in str(error) and "model_config.pt" in str(error), error
    assert not (tmp_path / "out").exists()


def test_no_number_of_key_value_heads_is_as_many_as_heads(tmp_path: Path) -> None:
    """InternEvo asks only whether there is one."""
    save(Model("v2", layers=1, hidden=32, heads=4, groups=4, ffn=64), tmp_path / "ckpt")
    given = dict(api.read_checkpoint(tmp_path / "ckpt", api.load_layout("internevo")).config)
    torch.save(given | {"num_kv_attention_heads": None}, tmp_path / "ckpt" / "model_config.pt")
    assert api.plan("families/internlm2", tmp_path / "ckpt").config["num_key_value_heads"] == 4
    grouped = training(tmp_path / "grouped", {"num_kv_attention_heads": None})
    (grouped / "config_file.pt").unlink()  # which says how many there are
    error = refused(api.plan, FAMILY, grouped)
    assert error.code == "E203" and "groups" in error.message


@sampled(2)
@pytest.mark.parametrize("fixture", ["v1_tp1_pp1", "v2_tp2_pp2", "llama_tp2_pp1_default"])
@pytest.mark.parametrize("change", [{"head_dim": 7}, {"head_dim": 16}, {"is_reward": True}], ids=told)
def test_what_model_config_says_and_the_tensors_contradict_is_refused(
    tmp_path: Path, change: dict[str, Any], fixture: str
) -> None:
    """A head over the vocabulary once became a reward model's, of as many labels."""
    source = training(tmp_path / "ckpt", change, fixture)
    (source / "config_file.pt").unlink()  # which would contradict as well
    error = refused(engine.convert, family_of(fixture), source, tmp_path / "out", settings=settings_of(fixture))
    assert error.code in ("E203", "E402"), error


@sampled(2, "code")
@pytest.mark.parametrize(
    ("fixture", "change", "code", "word"),
    [
        *[("moe_tp2_pp2_dp1", {"top_k": n}, "E218", "`expert`") for n in (5, 100_000)],
        ("moe_tp2_pp2_dp1", {"moe_type": "MegaBlock"}, "E209", "moe_type"),
        *[("v2_tp2_pp2", {"num_attention_heads": n, "head_dim": 8}, "E218", "`groups`") for n in (9, 11)],
        (
            "v2_tp2_pp2",
            {"num_kv_attention_heads": 16},
            "E218",
            "heads = 8 from `num_attention_heads` on model_config.pt; ",
        ),
        ("llama_tp2_pp1_default", {"num_attention_heads": 9, "head_dim": 8}, "E218", "`groups`"),
    ],
    ids=str,
)
def test_sizes_of_model_config_that_contradict_each_other_are_refused(
    tmp_path: Path, fixture: str, change: dict[str, Any], code: str, word: str
) -> None:
    """No tensor shows them: `config.json` once named as many heads, or experts for a token, as there are not."""
    source = training(tmp_path / "ckpt", change, fixture)
    (source / "config_file.pt").unlink(missing_ok=True)  # which would contradict as well
    error = refused(engine.convert, family_of(fixture), source, tmp_path / "out")
    assert error.code == code and word in str(error), error


def test_linears_that_were_not_cut_as_the_mapping_has_them_are_refused(tmp_path: Path) -> None:
    """InternEvo cuts a fused linear by lengths alone when it saves it: what it calls `wq` has keys in it."""
    source = training(tmp_path / "ckpt", {"enable_qkv_fusion": False}, "v2_tp2_pp2")
    error = refused(engine.convert, family_of("v2_tp2_pp2"), source, tmp_path / "out")
    assert error.code == "E202" and "enable_qkv_fusion" in str(error), error


@pytest.mark.parametrize("own", ["window: {type: integer}\n    ", ""], ids=["its own", "a pattern's"])
def test_a_key_whose_type_alone_is_declared_is_not_told_to_be_itself(own: str, tmp_path: Path) -> None:
    """Nothing reads it: a declaration that only has its type does not say that its value does not matter."""
    (tmp_path / "m.yaml").write_text(
        f"mapping: 1\nname: m\nversion: 1.0.0\ndescription: m\nextends: {FAMILY}\n"
        f'keys:\n  source:\n    {own}"*": {{type: integer}}\n'
    )
    source = training(tmp_path / "ckpt", {"window": 4}, "v2_tp2_pp2")
    error = refused(engine.convert, tmp_path / "m.yaml", source, tmp_path / "out")
    assert error.code == "E219" and "Did you mean" not in str(error), error
    assert "window" in str(error) and "m.yaml:8" in str(error.expected)


def test_a_value_in_place_of_keys_and_values_is_refused_though_a_pattern_takes_any() -> None:
    place = Place("m.yaml")
    keys = {"*": Key("*", Limits(), place, ignored="it is of training"), "a.b": Key("a.b", Limits(), place)}
    side = Side(keys, frozenset(["a.b"]), "config.json")
    assert read_config({"a": {"b": 1}, "c": 2}, side).config == {"a": {"b": 1}, "c": 2}
    error = refused(read_config, {"a": 2}, side)
    assert error.code == "E218" and error.expected == "keys and values"


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({}, None),
        ({"seed": 1}, 1),
        ({"untold": {"moe": True}}, None),
        ({"moe": {}, "untold": {"moe.top_k": True}}, None),
        ({"untold": {"others": True}}, None),
        ({"moe": {}, "untold": {"moe": False, "others": True}}, 1),
    ],
    ids=str,
)
def test_a_default_counts_only_where_the_training_file_leaves_no_such_key_open(
    config: dict[str, Any], experts: int | None
) -> None:
    """Of how many experts a token goes to: the file may lack it, or say what its text alone does not tell."""
    told = read_training(load_mapping(FAMILY), load_layout("internevo"), config)
    assert told.get("moe", {}).get("top_k") == experts


def test_a_token_goes_to_no_more_experts_than_there_are_in_reverse_either(tmp_path: Path) -> None:
    engine.convert(family_of("moe"), FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "hf")
    source = changed(tmp_path / "hf", tmp_path / "changed", {"num_experts_per_tok": 5})
    assert refused(engine.reverse, family_of("moe"), source, tmp_path / "out").code == "E218"


@sampled(2)
@pytest.mark.parametrize(
    "change",
    [
        {"drop_rate": 0.1, "attn_drop_rate": 0.1, "residual_in_fp32": True, "embed_grad_scale": 0.1, "checkpoint": 0.5},
        {"init_type": "normal", "attn_wqkv_init_std": 0.1, "use_flash_attn": True},
        {"rope_scaling_factor": 1.0, "sliding_window": None, "num_shared_experts": 0, "activation_type": "swiglu"},
        {"rope_type": "normal", "head_dim": None, "max_window_layers": 28, "causal": True, "moe_drop_tokens": True},
    ],
    ids=told,
)
def test_how_it_was_trained_does_not_matter(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = api.plan(FAMILY, training(tmp_path / "ckpt", change))
    assert plan.config == api.plan(FAMILY, FIXTURES / "v2_tp2_pp2").config
    assert not plan.noted


def test_switches_may_be_numbers(tmp_path: Path) -> None:
    change = {"use_dynamic_ntk_rope": False, "norm_head": 0, "is_reward": False, "adapt_hf": 1}
    step = training(tmp_path / "ckpt", change)
    (step / "config_file.pt").unlink()  # which has none of them: training adds no such values
    assert api.plan(FAMILY, step).config == api.plan(FAMILY, FIXTURES / "v2_tp2_pp2").config


def with_source(folder: Path, old: str, new: str, fixture: str = "v2_tp2_pp2") -> Path:
    """A genuine checkpoint whose `config_file.pt` has another text."""
    shutil.copytree(FIXTURES / fixture, folder)
    text = torch.load(folder / "config_file.pt", weights_only=False)
    assert old in text
    torch.save(text.replace(old, new), folder / "config_file.pt")
    return folder


@sampled(2)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"rope_base": 500000}, "rope_base"),
        ({"adapt_hf": False}, "adapt_hf"),
        ({"num_attention_heads": 4, "num_kv_attention_heads": 2}, "num_attention_heads"),
    ],
)
def test_a_configuration_of_another_run_beside_the_training_file_is_refused(
    tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    source = with_source(tmp_path / "ckpt", "adapt_hf=True", "adapt_hf=True, rope_base=10000")
    config = dict(api.read_checkpoint(source, api.load_layout("internevo")).config)
    torch.save(config | {"rope_base": 10000} | change, source / "model_config.pt")
    for call in (engine.convert, engine.reshard):
        error = refused(call, FAMILY, source, tmp_path / "out")
        assert error.code == "E218" and word in error.message and "config_file.pt" in error.message
    torch.save(config, source / "model_config.pt")  # without `rope_base`, which then has another default
    assert "rope_base" in refused(engine.convert, FAMILY, source, tmp_path / "out").message
    torch.save(config | {"rope_base": 1e4, "checkpoint": True}, source / "model_config.pt")
    api.plan(FAMILY, source)


@sampled(1)
@pytest.mark.parametrize(
    ("text", "change", "fits"),
    [
        ("", {"rope_base": 500000}, False), ("", {"head_dim": 8}, False), ("", {"head_dim": None}, True),
        ("", {"qk_interleaved": True}, False), ("", {"qk_interleaved": False, "enable_qkv_fusion": True}, True),
        ("adapt_hf=False", {"adapt_hf": False, "qk_interleaved": True}, True),
        ("rope_base=base()", {"rope_base": 500000}, True),
    ],
    ids=told,
)  # fmt: skip
def test_what_only_the_model_configuration_says_must_be_what_training_adds_to_its_text(
    text: str, change: dict[str, Any], fits: bool, tmp_path: Path
) -> None:
    source = with_source(tmp_path / "ckpt", "adapt_hf=True", text or "residual_in_fp32=False")
    config = dict(api.read_checkpoint(source, api.load_layout("internevo")).config)
    torch.save({name: one for name, one in config.items() if name != "adapt_hf"} | change, source / "model_config.pt")
    if fits:
        api.plan(FAMILY, source)
    else:
        error = refused(api.plan, FAMILY, source)
        assert error.code == "E218" and next(iter(change)) in error.message and "not in config_file.pt" in error.message
    text = torch.load(source / "config_file.pt", weights_only=True)
    torch.save(f"{text}\nmodel.update(base)\n", source / "config_file.pt")  # then it may say it too
    api.plan(FAMILY, source)


def test_what_only_the_training_file_says_must_be_what_its_absence_means(tmp_path: Path) -> None:
    source = with_source(tmp_path / "ckpt", "adapt_hf=True", "adapt_hf=True, tie_word_embeddings=False")
    api.plan(FAMILY, source)
    text = torch.load(source / "config_file.pt", weights_only=True)
    torch.save(text.replace("tie_word_embeddings=False", "tie_word_embeddings=True"), source / "config_file.pt")
    error = refused(api.plan, FAMILY, source)
    assert error.code == "E218" and "tie_word_embeddings" in error.message and "config_file.pt" in error.message


@pytest.mark.parametrize(
    "change", [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"attention_bias": True}], ids=told
)
def test_what_the_mapping_leaves_out_is_not_taken_from_a_given_configuration(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    engine.convert("internlm2-official", FIXTURES / "v2_tp2_pp2", tmp_path / "hf")
    given = changed(tmp_path / "hf", tmp_path / "given", change) / "config.json"
    source = FIXTURES / "v2_tp2_pp2"
    for call, src, how in (
        (api.plan, source, {}),
        (api.plan_reshard, source, {"tp": 1}),
        (api.plan_reverse, tmp_path / "hf", {"like": source}),
    ):
        error = refused(call, "internlm2-official", src, config=given, **how)
        assert error.code == "E218" and next(iter(change)) in error.message


def test_a_model_type_of_another_model_is_refused_though_all_tensors_fit(tmp_path: Path) -> None:
    source = with_source(tmp_path / "ckpt", "INTERNLM2_PUBLIC", "BAICHUAN2")
    for call in (engine.convert, engine.reshard):
        error = refused(call, FAMILY, source, tmp_path / "out")
        assert error.code == "E212" and "BAICHUAN2" in str(error) and "model_types" in str(error.fix)
    (tmp_path / "mine.yaml").write_text(MINE + "source: {model_types: [BAICHUAN2]}\n")
    api.plan(tmp_path / "mine.yaml", source)


def test_a_pipeline_that_is_only_a_number_is_understood(tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {})
    torch.save("parallel = dict(tensor=2, pipeline=2, weight=1)", source / "config_file.pt")
    api.plan(FAMILY, source)


@pytest.mark.parametrize("said", [True, False])
def test_two_keys_that_contradict_each_other_on_rotary_pairs_decide_nothing(tmp_path: Path, said: bool) -> None:
    for fixture, family in (("v2_tp2_pp2", FAMILY), ("llama_tp2_pp1_default", "families/llama.yaml")):
        source = training(tmp_path / fixture, {"adapt_hf": said, "qk_interleaved": said}, fixture)
        (source / "config_file.pt").unlink()
        error = refused(api.plan, family, source)
        assert error.code == "E202" and "rotary" in error.message
        api.plan(family, source, settings={"rotary": "halves"})


@pytest.mark.parametrize(
    ("key", "moe", "experts"), [("moe_gate_k", "dict()", 2), ("top_k", "dict(top_k=1)", 3), (None, "dict(top_k=4)", 4)]
)
def test_how_many_experts_a_token_goes_to_is_read_in_every_place(
    tmp_path: Path, key: str | None, moe: str, experts: int
) -> None:
    source = training(tmp_path / "ckpt", {key: experts} if key else {}, "moe_tp2_pp2_dp1")
    torch.save(f"moe = {moe}", source / "config_file.pt")
    assert api.plan("families/internlm-moe.yaml", source).config["num_experts_per_tok"] == experts


def test_keys_that_nothing_reads_are_listed_in_plan_and_manifest(tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {"mystery": 5, "other": {"a": ["\x1b[2J"]}})
    plan = api.plan(FAMILY, source)
    (notice,) = [one for one in plan.notices if "mystery" in one]
    assert "mystery = 5" in notice and "other" in notice and "model_config.pt" in notice and "\x1b" not in notice
    assert api.describe_plan(plan)["unread"].keys() == {"mystery", "other"}
    report = engine.convert(FAMILY, source, tmp_path / "hf")
    assert notice in report.notices
    assert json.loads((tmp_path / "hf" / "conversion.json").read_text())["unread"]["mystery"] == 5


def test_a_length_that_training_states_is_told_since_an_option_says_it(tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {"max_position_embeddings": 4096})
    assert any("max_position_embeddings = 4096" in notice for notice in api.plan(FAMILY, source).notices)


def test_resharding_keeps_what_cannot_be_converted(tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {"use_dynamic_ntk_rope": True, "mystery": 5})
    engine.reshard(FAMILY, source, tmp_path / "out", tp=1, pp=1)
    config = api.read_checkpoint(tmp_path / "out", api.load_layout("internevo")).config
    assert config["use_dynamic_ntk_rope"] is True and config["mystery"] == 5


@sampled(2)
@pytest.mark.parametrize("value", ["two", 0, -1, True, 2.0, None, []])
def test_what_is_read_of_the_training_configuration_has_its_type_and_range(tmp_path: Path, value: Any) -> None:
    shutil.copytree(FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "ckpt")
    torch.save(f"moe = dict(top_k={value!r})", tmp_path / "ckpt" / "config_file.pt")
    error = refused(api.plan, "families/internlm-moe.yaml", tmp_path / "ckpt")
    assert error.code == "E218" and "moe.top_k" in error.message and "config_file.pt" in error.message


def test_whether_later_code_normalises_the_head_is_asked(tmp_path: Path) -> None:
    """InternEvo 0.5.0 to 0.5.2 computed a normalised head and did not use it; code since does, and says the same."""
    source = training(tmp_path / "ckpt", {"norm_head": True}, "e052_v2_tp2_pp1_mult64")
    (source / "config_file.pt").unlink(missing_ok=True)
    error = refused(api.plan, FAMILY, source)
    assert error.code == "E202" and "norm_head" in str(error) and str(error).endswith("else --set head=normalised.")
    for head, transform in (("plain", None), ("normalised", ("normalize", "hidden"))):
        plan = api.plan(FAMILY, source, settings={"head": head})
        (output,) = [one for one in plan.outputs if one.name == "lm_head.weight"]
        assert output.transform == transform


@pytest.mark.parametrize(
    ("mapping", "fixture"), [("internlm", "v1_tp2_pp2"), ("internlm3", "llama_tp2_pp1_default")], ids=str
)
def test_a_family_without_a_head_that_is_normalised_refuses_it(mapping: str, fixture: str, tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {"norm_head": True}, fixture)
    (source / "config_file.pt").unlink(missing_ok=True)
    error = refused(api.plan, f"families/{mapping}.yaml", source)
    assert error.code == "E209" and "norm_head" in error.message


def test_a_key_that_only_a_dim_of_its_name_reads_is_not_told_as_unread(tmp_path: Path) -> None:
    source = training(tmp_path / "ckpt", {"head_dim": 8})
    (source / "config_file.pt").unlink()  # which has no such key
    assert not any("head_dim" in notice for notice in api.plan(FAMILY, source).notices)


@sampled(3, "name")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("rope_factor", v) for v in (-1, 0, 0.5, INF, NAN, "nan", "inf", "2x", True, 10**400, 1e30)],
        *[("max_position_embeddings", v) for v in (0, -1, 4096.0, "4k", True, 10**400, 10**12)],
        *[("rope_scaling", v) for v in ("llama3", 5, True)],
    ],
)
def test_an_option_that_cannot_be_is_refused_in_both_directions(
    whole: Path, tmp_path: Path, name: str, value: Any
) -> None:
    for call, source in ((engine.convert, FIXTURES / "v2_tp2_pp2"), (engine.reverse, whole)):
        error = refused(call, FAMILY, source, tmp_path / "out", settings={name: value})
        assert error.code == "E001" and name in error.message
    assert not (tmp_path / "out").exists()


# The language.

MINE = f"""mapping: 1
name: mine
version: 1.0.0
extends: {FAMILY}
"""


def test_a_mapping_of_a_few_lines_says_what_does_not_matter(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE + "keys: {target: {unsloth_* other: {ignored: a remark}}}\n")
    source = changed(whole, tmp_path / "hf", {"unsloth_version": "2026", "other": NAN})
    plan = api.plan_reverse(tmp_path / "mine.yaml", source)
    assert plan.config == api.plan_reverse(FAMILY, whole).config


def test_a_child_says_of_a_key_what_it_says_whole(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE + "keys: {target: {hidden_act: {ignored: all of them are SiLU here}}}\n")
    key = api.load_mapping(tmp_path / "mine.yaml").keys["target"]["hidden_act"]
    assert key.only is None and not key.limits.types
    api.plan_reverse(tmp_path / "mine.yaml", changed(whole, tmp_path / "hf", {"hidden_act": "gelu"}))


def test_a_key_that_is_read_and_not_declared_is_a_finding_with_the_near_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        MINE
        + 'dims: {layer: nun_layers}\ntraining_config: {layer_norm_epsilon: "{{ rms_norm_esp | default(1e-5) }}"}\n'
    )
    found = [f for f in lint_file(str(tmp_path / "mine.yaml")) if f.code == "L009"]
    assert {(f.severity, f.fix) for f in found} == {
        ("error", "Did you mean `num_layers`?"),
        ("error", "Did you mean `rms_norm_eps`?"),
    }


def test_a_key_declared_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE + "keys: {target: {a b: {ignored: x}, b: {ignored: y}}}\n")
    error = refused(api.load_mapping, tmp_path / "mine.yaml")
    assert error.code == "E102" and "`b`" in error.message


def test_all_genuine_configurations_hold_nothing_unheard_of() -> None:
    families = {"v1": "internlm", "old": "internlm", "llama": "llama", "moe": "internlm-moe"}
    for folder in sorted(FIXTURES.iterdir()):
        family = families.get(folder.name.split("_")[0], "internlm2")
        try:
            plan = api.plan(f"families/{family}.yaml", folder)
        except EngineError as error:
            assert error.code == "E202"
            plan = api.plan(f"families/{family}.yaml", folder, settings={"mlp_letters": "w2_is_down"})
        assert not plan.noted, folder


def test_llama_3_1_comes_back_as_metas_params_say(tmp_path: Path) -> None:
    from tests.support.families import model_of, save_family

    model = model_of("meta", layers=2, vocab=64, embedding="by_vocab", rope_base=500000.0)
    save_family(model, tmp_path / "ckpt")
    params = json.loads((tmp_path / "ckpt" / "params.json").read_text()) | {"use_scaled_rope": True}
    (tmp_path / "ckpt" / "params.json").write_text(json.dumps(params))
    error = refused(engine.convert, "families/meta-llama.yaml", tmp_path / "ckpt", tmp_path / "hf")
    assert error.code == "E202" and "--set rope_factor=8 or --set rope_factor=32" in str(error.fix)
    engine.convert("families/meta-llama.yaml", tmp_path / "ckpt", tmp_path / "hf", settings={"rope_factor": 32})
    given = api.plan("families/meta-llama.yaml", tmp_path / "ckpt", config=tmp_path / "hf" / "config.json")
    assert given.config["rope_parameters"]["factor"] == given.config["rope_scaling"]["factor"] == 32
    old = json.loads((tmp_path / "hf" / "config.json").read_text())  # as transformers 4, and Meta's own, have it
    del old["rope_parameters"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    kept = api.plan("families/meta-llama.yaml", tmp_path / "ckpt", config=tmp_path / "old.json").config
    assert kept == given.config
    again = {"config": tmp_path / "hf" / "config.json", "settings": {"rope_factor": 32}}
    assert api.plan("families/meta-llama.yaml", tmp_path / "ckpt", **again).config == given.config
    error = refused(api.plan, "families/meta-llama.yaml", tmp_path / "ckpt", **again | {"settings": {"rope_factor": 8}})
    assert error.code == "E001" and "contradicts" in error.message and "32" in str(error.expected)
    engine.reshard("families/meta-llama.yaml", tmp_path / "ckpt", tmp_path / "two", tp=2)  # the factor stays unwritten
    engine.reverse("families/meta-llama.yaml", tmp_path / "hf", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "params.json").read_text())
    assert back["use_scaled_rope"] is True and back["rope_theta"] == 500000.0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("low_freq_factor", "factor"):  # params.json would not say it, and Meta's code has its own
        changes = {name: {**config[name], key: 2.0} for name in ("rope_parameters", "rope_scaling")}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        error = refused(api.plan_reverse, "families/meta-llama.yaml", tmp_path / "hf")
        assert error.code == "E209" and key in error.message


def test_the_same_weights_come_out_whatever_the_harmless_keys_say(whole: Path, tmp_path: Path) -> None:
    source = changed(whole, tmp_path / "hf", {"use_cache": False, "pad_token_id": None})
    for name, folder in (("a", whole), ("b", source)):
        engine.reverse(FAMILY, folder, tmp_path / name)
    rank = "model_tp0_pp0.pt"
    same(torch.load(tmp_path / "a" / rank, weights_only=True), torch.load(tmp_path / "b" / rank, weights_only=True))


@sampled(2)
@pytest.mark.parametrize(
    ("family", "fixture"),
    [("internlm2", "v2_tp2_pp2"), ("internlm", "v1_tp1_pp1"), ("llama", "llama_tp2_pp1_default"),
     ("internlm3", "llama_tp2_pp1_default"), ("internlm", "v1_tp2_pp1_reward")],
)  # fmt: skip
def test_what_transformers_saves_of_the_same_model_is_understood_key_by_key(
    tmp_path: Path, family: str, fixture: str
) -> None:
    """Its own `config.json`, as saved and with every default written out."""
    from transformers import AutoConfig

    name, letters = f"families/{family}.yaml", {}
    source = training(tmp_path / "ckpt", {}, fixture)
    (source / "config_file.pt").unlink()  # which says the model type
    try:
        engine.convert(name, source, tmp_path / "hf")
    except EngineError as error:
        assert error.code == "E202"
        letters = {"mlp_letters": "w2_is_down"}
        engine.convert(name, source, tmp_path / "hf", settings=letters)
    ours = api.plan_reverse(name, tmp_path / "hf", settings=letters).config
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    config.save_pretrained(tmp_path / "hf")
    assert api.plan_reverse(name, tmp_path / "hf", settings=letters).config == ours
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config.to_dict()))
    assert api.plan_reverse(name, tmp_path / "hf", settings=letters).config == ours


def test_weight_files_that_are_no_part_of_the_model_are_told(whole: Path, tmp_path: Path) -> None:
    """vLLM reads every file of weights in a folder, transformers those of the model alone."""
    folder = changed(whole, tmp_path / "hf", {})
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    plan = api.plan_reverse(FAMILY, folder)
    assert plan.notices == ("not part of the checkpoint, left alone: model-2.safetensors",)
    for number in range(100, 200):
        (folder / f"model-{number}.safetensors").touch()
    assert api.plan_reverse(FAMILY, folder).notices[0].endswith("model-111.safetensors and 89 more")
