"""Distributed checkpoints of transformers' classes beside plain decoders: names, ties, counters, parts with angles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

import engine
from engine.errors import EngineError, Place
from engine.language.expressions import OMIT, render_tree
from engine.language.mapping_file import load_mapping
from engine.proving.meta_model import asked
from tests.support.depth import sampled
from tests.support.distributed import LLAMA, MOE, equal, model, save
from tests.support.frameworks import weights

pytestmark = pytest.mark.filterwarnings("ignore")

ROBERTA = {
    "model_type": "camembert", "architectures": ["CamembertForMaskedLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
TEXT = {key: value for key, value in LLAMA.items() if key != "architectures"}
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
SEEING = {
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": TEXT,
    "image_token_index": 39, "tie_word_embeddings": False, "vision_config": VISION,
}  # fmt: skip


def state_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = getattr(transformers, config["architectures"][0])(AutoConfig.for_model(**config))
    return {k: torch.randn_like(v) if v.is_floating_point() else v + 3 for k, v in made.state_dict().items()}


def loaded(out: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the class has of a folder; nothing is at random."""
    kind = getattr(transformers, config["architectures"][0])
    made, told = kind.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.state_dict()


def test_a_head_that_the_class_names_before_the_embedding_is_tied_to_it(tmp_path: Path) -> None:
    state = state_of(ROBERTA)
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", save(state, tmp_path / "other", ROBERTA), tmp_path / "out")
    assert caught.value.code == "E402"
    for head, to in (("weight", "roberta.embeddings.word_embeddings.weight"), ("bias", "lm_head.bias")):
        state[f"lm_head.decoder.{head}"] = state[to]
    engine.convert("transformers", save(state, tmp_path / "tied", ROBERTA), tmp_path / "out")
    assert {*state} - {*weights(tmp_path / "out")} == {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    engine.reverse("transformers", tmp_path / "out", tmp_path / "back")
    made = loaded(tmp_path / "out", ROBERTA)
    assert all(torch.equal(made[name], one) for name, one in state.items())


def test_counters_of_a_class_are_whole_numbers_in_both_directions(tmp_path: Path) -> None:
    config = {"model_type": "levit", "architectures": ["LevitModel"], "hidden_sizes": [16, 16, 16], "image_size": 32}
    config |= {"num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    state = state_of(config)
    counters = [name for name, one in state.items() if one.dtype == torch.int64]
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out", dtype="bfloat16")
    made = weights(tmp_path / "out")
    assert counters and all(torch.equal(made[name], state[name]) for name in counters)
    engine.convert("transformers", tmp_path / "step", tmp_path / "own")
    engine.reverse("transformers", tmp_path / "own", tmp_path / "back")
    engine.convert("transformers", tmp_path / "back", tmp_path / "again", config=tmp_path / "own" / "config.json")
    assert equal(tmp_path / "again", state)
    state[counters[0]] = state[counters[0]].float()
    with pytest.raises(EngineError, match="whole numbers") as caught:
        engine.convert("transformers", save(state, tmp_path / "cast", config), tmp_path / "no")
    assert caught.value.code == "E209"


def older(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors under the names that transformers 4 had in memory, or saved."""
    made: dict[str, torch.Tensor] = {}
    for name, one in state.items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(one):
                base = name.replace("gate_up_proj", f"{number}")
                made[f"{base}.gate_proj.weight"], made[f"{base}.up_proj.weight"] = expert.chunk(2)
        elif name.endswith("experts.down_proj"):
            made |= {name.replace("down_proj", f"{number}.down_proj.weight"): part for number, part in enumerate(one)}
        else:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
            if kind == "saved":
                name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
                name = f"language_model.{name}" if name.startswith("lm_head") else name
            made[name] = one
    return made


@sampled(2)
@pytest.mark.parametrize(
    ("config", "kind", "prefix"), [(MOE, "in memory", ""), (SEEING, "in memory", "app.model."), (SEEING, "saved", "")]
)
def test_names_of_older_releases_are_kept_and_loaded(
    config: dict[str, Any], kind: str, prefix: str, tmp_path: Path
) -> None:
    state = state_of(config)
    named = older(state, kind)
    folder = save({prefix + name: one for name, one in named.items()}, tmp_path / "step", config)
    engine.convert("transformers", folder, tmp_path / "out")
    assert equal(tmp_path / "out", named)
    made = loaded(tmp_path / "out", config)
    assert all(torch.equal(made[name], one) for name, one in state.items())
    engine.reverse("transformers", tmp_path / "out", tmp_path / "back")
    engine.convert("transformers", tmp_path / "back", tmp_path / "again", config=tmp_path / "out" / "config.json")
    assert equal(tmp_path / "again", named)
    del named[next(name for name in named if name.endswith("v_proj.weight"))]
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", save(named, tmp_path / "less", config), tmp_path / "no")
    assert caught.value.code == "E207"


def test_a_configuration_of_two_parts_that_names_no_class_is_of_the_one_that_writes_text(tmp_path: Path) -> None:
    """transformers 4 put the class of some into `text_config`."""
    state = state_of(SEEING)
    config = {key: value for key, value in SEEING.items() if key != "architectures"}
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)


@sampled(2)
@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_local_base_freq": 5e3, "layer_types": ["full_attention"] * 2},
        {"rope_scaling": None},  # without it gpt-oss scales them
    ],
    ids=["part", "local", "none"],
)
def test_angles_that_transformers_4_has_beside_the_base_are_as_given(change: dict[str, Any], tmp_path: Path) -> None:
    kind = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_act": None}
    config = {k: v for k, v in (LLAMA | change | kind).items() if k not in ("mlp_bias", "hidden_act")}
    engine.convert("transformers", save(model(config), tmp_path / "step", config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in change} == change


@sampled(2)
@pytest.mark.parametrize(
    ("kind", "name", "angles", "own"),
    [
        ("gpt_neox", "GPTNeoXModel", {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 5e4, "rotary_pct": 0.5}),
        ("modernbert", "ModernBertModel", {kind: {"rope_type": "default", "rope_theta": base}
         for kind, base in (("full_attention", 5e4), ("sliding_attention", 3e4))},
         {"global_rope_theta": 5e4, "local_rope_theta": 3e4}),
        ("llama", "LlamaModel", {"rope_type": "longrope", "rope_theta": 5e4, "factor": 4.0, "long_factor": [3.0, 2.0],
         "short_factor": [2.0, 1.0], "original_max_position_embeddings": 16}, {"original_max_position_embeddings": 16}),
    ],
)  # fmt: skip
def test_angles_that_transformers_4_has_under_a_models_own_names_are_written_so_too(
    kind: str, name: str, angles: dict[str, Any], own: dict[str, float], tmp_path: Path
) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {key: LLAMA[key] for key in sizes} | {"model_type": kind, "architectures": [name], "pad_token_id": 0}
    config |= {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")} | {"max_position_embeddings": 64}
    folder = save(state_of(config), tmp_path / "step", config | {"rope_parameters": angles})
    for told in ({"rope_parameters": angles}, own):  # as transformers 5 saves them, and as 4
        (folder / "config.json").write_text(json.dumps(config | told))
        engine.convert("transformers", folder, tmp_path / "out", overwrite=True)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert {key: written[key] for key in own} == own and ("rope_parameters" in written) is (told is not own)
    (folder / "config.json").write_text(json.dumps(config | own | {"rope_parameters": angles, min(own): 1e4}))
    with pytest.raises(EngineError, match=min(own)) as caught:
        engine.convert("transformers", folder, tmp_path / "no")
    assert caught.value.code == "E218"


@pytest.mark.parametrize(
    ("key", "value", "code", "told"),
    [
        ("vocab_size", 0, "E218", "`model.embed_tokens.weight` of the model class would have no elements"),
        ("intermediate_size", 0, "E218", "got       the shape 0 × "),
        ("hidden_size", -4, "E502", "give this model's with --config FILE"),
        ("num_key_value_heads", 0, "E502", "Correct it in config.json"),
        ("architectures", ["BertModel"], "E502", "counts. Correct it in config.json"),
        ("rms_norm_eps", -1e-5, "E218", "`rms_norm_eps` of config.json cannot be -1e-05"),
        ("rms_norm_eps", 1e9, "E218", "`rms_norm_eps` of config.json cannot be 1000000000"),
        ("rope_theta", 0, "E218", "`rope_theta` of config.json cannot be 0"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, "E218", "rope_theta` of config.json cannot"),
    ],
)
def test_a_size_or_number_that_no_model_has_is_told_of_its_config(
    key: str, value: Any, code: str, told: str, tmp_path: Path
) -> None:
    folder = save(model(LLAMA), tmp_path / "step", LLAMA | {key: value})
    with pytest.raises(EngineError, match=re.escape(told)) as caught:
        engine.convert("transformers", folder, tmp_path / "out")
    assert caught.value.code == code and caught.value.place == Place("config.json")


def test_a_model_without_a_line_of_layers_is_written_for_ranks_too(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "superpoint", "architectures": ["SuperPointForKeypointDetection"]}
    config |= {"encoder_hidden_sizes": [4, 6, 8, 10], "decoder_hidden_size": 8, "descriptor_decoder_dim": 8}
    state = state_of(config)
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    engine.reverse("transformers", tmp_path / "out", tmp_path / "back", ranks={"dp": 2})
    engine.convert("transformers", tmp_path / "back", tmp_path / "again", config=tmp_path / "out" / "config.json")
    assert equal(tmp_path / "again", state)


@sampled(2)
@pytest.mark.parametrize(
    ("angles", "written"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        ({"rope_type": "default", "mrope_section": [1, 1, 0]}, {"mrope_section": [1, 1, 0]}),
    ],
    ids=["plain", "scaled", "of three axes"],
)
def test_angles_of_a_part_are_also_written_where_transformers_before_5_has_them(
    angles: dict[str, Any], written: dict[str, Any] | None, tmp_path: Path
) -> None:
    part = {key: value for key, value in TEXT.items() if key != "rope_theta"}
    config = SEEING | {"text_config": part | {"rope_parameters": angles | {"rope_theta": 5e5}}}
    folder = save(state_of(SEEING), tmp_path / "step", config)
    engine.convert("transformers", folder, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert made["rope_theta"] == 5e5 and (made.get("rope_scaling") or {}).items() >= (written or {}).items()
    assert ("rope_scaling" in made) is (written is not None)
    again = AutoConfig.from_pretrained(tmp_path / "out").text_config.rope_parameters
    assert {key: again[key] for key in angles} == angles and again["rope_theta"] == 5e5
    config["text_config"]["rope_theta"] = 1e4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"rope_theta.*\(text_config\)") as caught:
        engine.convert("transformers", folder, tmp_path / "no")
    assert caught.value.code == "E218"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"rope_theta.*\(text_config\)") as caught:
        engine.reverse("transformers", tmp_path / "out", tmp_path / "back")
    assert caught.value.code == "E218"


def test_a_head_that_differs_is_kept_where_only_transformers_5_ties_the_class_by_default(tmp_path: Path) -> None:
    """As some models of two parts, which 4 trained apart, and wrote nothing of it."""
    unsaid = ("tie_word_embeddings", "mlp_bias")
    text = {k: v for k, v in TEXT.items() if k not in unsaid} | {"model_type": "mistral"}
    config = {k: v for k, v in SEEING.items() if k not in unsaid} | {"model_type": "mistral3", "text_config": text}
    config["vision_config"] = {**VISION, "model_type": "pixtral"}
    config["architectures"] = ["Mistral3ForConditionalGeneration"]
    state = state_of(config | {"tie_word_embeddings": False})
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)


def test_a_head_that_the_class_ties_by_default_is_tied_in_both_directions(tmp_path: Path) -> None:
    """transformers 4 ignores one that is stored."""
    config = {k: v for k, v in LLAMA.items() if k not in ("mlp_bias", "hidden_act", "tie_word_embeddings")}
    config |= {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    state = model(config | {"tie_word_embeddings": False})
    with pytest.raises(EngineError, match="lm_head") as caught:
        engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert caught.value.code == "E402"
    said = config | {"tie_word_embeddings": False}
    engine.convert("transformers", save(state, tmp_path / "said", said), tmp_path / "said-out")
    assert equal(tmp_path / "said-out", state)
    head = state.pop("lm_head.weight")
    state["model.embed_tokens.weight"] = head
    both = save(state | {"lm_head.weight": head}, tmp_path / "both", config)
    engine.convert("transformers", both, tmp_path / "tied")
    assert equal(tmp_path / "tied", state)
    engine.reverse("transformers", tmp_path / "tied", tmp_path / "back")
    engine.convert("transformers", tmp_path / "back", tmp_path / "again", config=tmp_path / "tied" / "config.json")
    assert equal(tmp_path / "again", state)
    (tmp_path / "said-out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="lm_head") as caught:
        engine.reverse("transformers", tmp_path / "said-out", tmp_path / "no")
    assert caught.value.code == "E402"


@sampled(2, "since")
@pytest.mark.parametrize(
    ("sliding", "since"),
    [({"rope_type": "linear", "factor": 2.0}, True), ({"rope_theta": 5e4}, True), ({}, False)],
)
def test_scaled_angles_of_sliding_layers_need_a_transformers_that_has_them(
    sliding: dict[str, Any], since: bool, tmp_path: Path
) -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = {k: v for k, v in LLAMA.items() if k not in ("mlp_bias", "hidden_act", "rope_theta", "head_dim")}
    config |= {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "pad_token_id": 0, "eos_token_id": 1}
    angles = {"full_attention": plain, "sliding_attention": plain | sliding}
    folder = save(model(config), tmp_path / "step", config)
    for told in ({"rope_parameters": angles}, {} if since else {"rope_theta": 1e4}):
        (folder / "config.json").write_text(json.dumps(config | told))
        engine.convert("transformers", folder, tmp_path / "out", overwrite=True)
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("with transformers `>=5.18`" in card) is (since and bool(told))


@pytest.mark.parametrize(("part", "since"), [(True, False), (False, True)])
def test_a_part_that_is_not_tied_as_the_whole_needs_a_transformers_that_ties_by_the_whole(
    part: bool, since: bool
) -> None:
    config = {"model_type": "smolvlm", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": part}}
    found = asked(config | {"architectures": ["SmolVLMForConditionalGeneration"]})
    assert (found.versions == ">=5") is since


def test_phi3s_scaled_angles_are_written_in_the_form_that_its_class_of_transformers_4_takes() -> None:
    """With any key more, as in `rope_parameters`, it does not load; transformers 5 reads both."""
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    angles = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8, **factors}
    told = {"model_type": "phi3", "rope_parameters": angles}
    scaling = load_mapping("transformers").config["rope_scaling"]
    assert render_tree(scaling, told) == {"type": "longrope", **factors}
    assert render_tree(scaling, told | {"model_type": "llama"}) == angles


def test_a_mixture_is_counted_where_transformers_4_counts_it_too() -> None:
    """transformers 5 saves Qwen3's experts as `num_local_experts`, which 4 and llama.cpp's converter do not read."""
    mapping, kind = load_mapping("transformers").config["num_experts"], {"num_local_experts": 6}
    assert render_tree(mapping, kind | {"model_type": "qwen3_moe"}) == 6
    assert render_tree(mapping, kind | {"model_type": "mixtral"}) is OMIT


@pytest.mark.parametrize("change", [{"vocab_size": 39}, {"num_hidden_layers": 1}], ids=str)
def test_sizes_of_the_class_are_said_to_be_those_of_config_json(change: dict[str, Any], tmp_path: Path) -> None:
    folder = save(state_of(LLAMA), tmp_path / "step", LLAMA | change)
    with pytest.raises(EngineError) as caught:
        engine.plan("transformers", folder)
    told = caught.value
    assert told.code == "E203"
    assert f"{next(iter(change.values()))} " in str(told.expected)
    assert "from the model class of config.json" in str(told.expected)
    assert "the configuration" in str(told.fix)
