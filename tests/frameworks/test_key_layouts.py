"""Names and orders of trainers that save DCP, on models made of random numbers and saved by torch itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

import engine
from engine.assets.apart import call_apart
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.search import find_file
from engine.planning.wanted import wanted_by_mapping
from engine.proving import meta_model
from engine.proving.checks import check_classes
from engine.proving.meta_model import asked
from tests.support import shards
from tests.support.depth import sampled
from tests.support.distributed import LLAMA, MOE, equal, model, save
from tests.support.frameworks import weights
from tests.support.shards import Model

pytestmark = pytest.mark.filterwarnings("ignore")

SCALED: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves as Meta's pairs: what torchtitan trains."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def titan(state: dict[str, torch.Tensor], *, old: bool) -> dict[str, torch.Tensor]:
    inside = "attention" if old else "attention.qkv_linear"
    made = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"],
        "output.weight" if old else "lm_head.weight": state["lm_head.weight"],
    }  # fmt: skip
    for layer in range(2):
        hf, own = f"model.layers.{layer}", f"layers.{layer}"
        made |= {
            f"{own}.{inside}.wq.weight": turned(state[f"{hf}.self_attn.q_proj.weight"], 4),
            f"{own}.{inside}.wk.weight": turned(state[f"{hf}.self_attn.k_proj.weight"], 2),
            f"{own}.{inside}.wv.weight": state[f"{hf}.self_attn.v_proj.weight"],
            f"{own}.attention.wo.weight": state[f"{hf}.self_attn.o_proj.weight"],
            f"{own}.feed_forward.w1.weight": state[f"{hf}.mlp.gate_proj.weight"],
            f"{own}.feed_forward.w2.weight": state[f"{hf}.mlp.down_proj.weight"],
            f"{own}.feed_forward.w3.weight": state[f"{hf}.mlp.up_proj.weight"],
            f"{own}.attention_norm.weight": state[f"{hf}.input_layernorm.weight"],
            f"{own}.ffn_norm.weight": state[f"{hf}.post_attention_layernorm.weight"],
        }
    return made


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As torchtitan saved its fused linear from April to June 2026: each group's queries, its key and its value."""
    made = dict(state)
    for name in [name for name in state if name.endswith("wq.weight")]:
        parts = [made.pop(name.replace("wq", word)).unflatten(0, (2, -1)) for word in ("wq", "wk", "wv")]
        made[name.replace("wq", "wqkv")] = torch.cat(parts, 1).flatten(0, 1)
    return made


@pytest.mark.parametrize("old", [True, False], ids=["torchtitan 0.2", "torchtitan 0.3"])
def test_torchtitans_llama_is_read_whatever_its_release(old: bool, tmp_path: Path) -> None:
    state = model(LLAMA)
    saved = {**titan(state, old=old), "optimizer.state.norm.weight.exp_avg": torch.ones(16), "train_state": {"step": 3}}
    folder = save(saved, tmp_path / "step-3", LLAMA | ({"rope_scaling": SCALED} if old else {}))
    engine.convert("torchtitan-llama", folder, tmp_path / "out")
    assert equal(tmp_path / "out", state)
    if not old:
        engine.convert("torchtitan-llama", save(fused(saved), tmp_path / "fused", LLAMA), tmp_path / "again")
        assert equal(tmp_path / "again", state)


def cast(module: str, name: str, key: str, patch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """A class of such a name whose objects hold a tensor, and settings of its library, as float8's weights do."""

    def dispatch(kind: Any, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        found = func(getattr(args[0], key), *args[1:], **(kwargs or {}))
        return of(found) if isinstance(found, torch.Tensor) else found

    kind: Any = type(name, (torch.Tensor,), {"__module__": module, "__torch_dispatch__": classmethod(dispatch)})
    about: Any = type("Settings", (tuple,), {"__module__": module})
    for where in accumulate(module.split("."), "{}.{}".format):
        patch.setitem(sys.modules, where, ModuleType(where))
    vars(sys.modules[module]).update({name: kind, "Settings": about})

    def of(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.Tensor._make_wrapper_subclass(kind, tensor.shape, dtype=tensor.dtype)  # type: ignore[attr-defined]
        made.__dict__.update({"_settings": about((True, None)), key: tensor, "_dtype": torch.float8_e4m3fn})
        return made  # type: ignore[no-any-return]

    return of


@pytest.mark.parametrize(
    ("module", "name", "key"),
    [
        ("torchao.float8.fsdp_utils", "WeightWithDynamicFloat8CastTensor", "_tensor"),
        ("torchao.prototype.moe_training.tensor", "MXFP8TrainingWeightWrapperTensor", "_data"),
        ("xtuner.v1.float8.fsdp_utils", "WeightWithDynamicTilewiseFloat8CastTensor", "_tensor"),
    ],
)
def test_weights_that_training_casts_to_float8_are_read_as_what_they_hold(
    module: str, name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchtitan's and axolotl's with `enable_fsdp_float8_all_gather`, and XTuner's."""
    state, of = model(LLAMA), cast(module, name, key, monkeypatch)
    saved = {one: of(tensor) if "proj" in one else tensor for one, tensor in state.items()}
    engine.convert("transformers", save(saved, tmp_path / "step", LLAMA), tmp_path / "out")
    assert equal(tmp_path / "out", state)


def test_weights_that_are_quantised_themselves_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, of = model(LLAMA), cast("torchao.dtypes", "AffineQuantizedTensor", "_data", monkeypatch)
    folder = save({name: of(tensor) for name, tensor in state.items()}, tmp_path / "step", LLAMA)
    with pytest.raises(EngineError, match=r"only code can rebuild: `torchao\.dtypes\.AffineQuantizedTensor`"):
        engine.convert("transformers", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old", [True, False], ids=["torchtitan 0.2", "torchtitan 0.3"])
def test_torchtitans_qwen3_is_read_and_written_with_its_norms_and_halves(old: bool, tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "mlp_bias"}
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6}
    state = model(config)
    saved = titan(state, old=old) | {
        name.replace("self_attn.", f"attention.{inside}").replace("q_proj", "wq").replace("k_proj", "wk")[6:]: one
        for name, one in state.items()
        for inside in ("" if old or "norm" in name else "qkv_linear.",)
        if any(part in name for part in ("self_attn.q", "self_attn.k"))
    }
    engine.convert("torchtitan-qwen3", save(saved, tmp_path / "step-3", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)
    if not old:
        engine.convert("torchtitan-qwen3", save(fused(saved), tmp_path / "fused", config), tmp_path / "one")
        assert equal(tmp_path / "one", state)
    engine.reverse("torchtitan-qwen3", tmp_path / "out", tmp_path / "back")
    engine.convert("torchtitan-qwen3", tmp_path / "back", tmp_path / "again")
    assert equal(tmp_path / "again", state)
    scaled = config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(EngineError, match="plain angles") as caught:
        engine.convert("torchtitan-qwen3", save(saved, tmp_path / "scaled", scaled), tmp_path / "no")
    assert caught.value.code == "E209"
    with pytest.raises(EngineError, match="q_norm") as caught:
        (tmp_path / "step-3" / "config.json").write_text(json.dumps(LLAMA))
        engine.convert("torchtitan-llama", tmp_path / "step-3", tmp_path / "no", settings={"rotary": "as_configured"})
    assert caught.value.code == "E205" and not (tmp_path / "no").exists()


@sampled(3)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"sliding_window": 16},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"final_logit_softcapping": 30.0},
        {"rms_norm_eps": -1e-5},
        {"rope_theta": True},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": SCALED, "original_max_position_embeddings": 32},  # transformers 5 takes the latter
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"is_causal": False},
        {"per_layer_config": {"0": {"head_dim": 2}}},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"transformers_weights": "other.safetensors"},
        {"return_dict": False},
        {"initializer_range": "0.02"},
        {"bos_token_id": [1, 2]},
        {"pad_token_id": 40},
    ],
    ids=str,
)
def test_a_model_that_torchtitan_cannot_have_is_refused_in_both_directions(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(titan(model(LLAMA), old=False), tmp_path / "step-3", LLAMA)
    engine.convert("torchtitan-llama", folder, tmp_path / "hf")
    engine.reverse("torchtitan-llama", tmp_path / "hf", tmp_path / "back")
    for path, go in ((folder, engine.convert), (tmp_path / "hf", engine.reverse)):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(EngineError) as caught:
            go("torchtitan-llama", path, tmp_path / "out")
        assert caught.value.code in ("E202", "E209", "E212", "E218") and not (tmp_path / "out").exists()


def test_angles_that_old_transformers_saved_are_left_out(tmp_path: Path) -> None:
    state = model(LLAMA)
    angles = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    report = engine.convert("transformers", save({**state, **angles}, tmp_path / "step", LLAMA), tmp_path / "out")
    assert equal(tmp_path / "out", state)
    assert any("not part of the model" in one and "inv_freq" in one for one in report.notices)


ANGLES = {"freqs_cis": torch.polar(torch.ones(8, 4), torch.ones(8, 4))}  # until August 2025, and plain


@sampled(2, "old", "known")
@pytest.mark.parametrize(
    ("old", "angles", "scaled", "known"),
    [
        (True, {}, None, False), (True, {}, SCALED, True), (True, {}, SCALED | {"factor": 32.0}, False),
        (True, ANGLES, None, True), (True, ANGLES, SCALED, False),
        (False, {}, None, True), (False, {}, SCALED, True), (False, ANGLES, SCALED, False),
        *[(False, {}, SCALED | {key: 2 * SCALED[key]}, False) for key in SCALED if key != "rope_type"],
    ],
)  # fmt: skip
def test_the_angles_that_torchtitan_trained_are_those_of_the_configuration_or_asked_for(
    old: bool, angles: dict[str, torch.Tensor], scaled: dict[str, Any] | None, known: bool, tmp_path: Path
) -> None:
    folder = save({**titan(model(LLAMA), old=old), **angles}, tmp_path / "step-3", LLAMA | {"rope_scaling": scaled})
    if not known:
        with pytest.raises(EngineError, match="rotary") as caught:
            engine.convert("torchtitan-llama", folder, tmp_path / "out")
        assert caught.value.code == "E202"
    told = {} if known else {"rotary": "as_configured"}
    assert engine.convert("torchtitan-llama", folder, tmp_path / "out", settings=told).tensors == 21


@pytest.mark.parametrize("key", [key for key in SCALED if key != "rope_type"])
def test_scaled_angles_of_which_a_number_is_absent_are_asked_for(key: str, tmp_path: Path) -> None:
    lacking = {name: value for name, value in SCALED.items() if name != key}
    folder = save(titan(model(LLAMA), old=False), tmp_path / "step-3", LLAMA | {"rope_scaling": lacking})
    with pytest.raises(EngineError, match="rotary") as caught:
        engine.convert("torchtitan-llama", folder, tmp_path / "out")
    assert caught.value.code == "E202" and not (tmp_path / "out").exists()


@sampled(2)
@pytest.mark.parametrize("prefix", ["", "model.", "app.model.", "module.", "_orig_mod.", "any.thing."])
def test_the_prefix_of_names_is_found(prefix: str, tmp_path: Path) -> None:
    state = model(LLAMA)
    extra = {"optim.state.lm_head.weight.exp_avg": torch.ones(40, 16), "step": torch.tensor(3)}
    folder = save({**{prefix + name: one for name, one in state.items()}, **extra}, tmp_path / "step", LLAMA)
    engine.convert("transformers", folder, tmp_path / "out")
    assert equal(tmp_path / "out", state)


def test_what_wraps_layers_is_no_part_of_names(tmp_path: Path) -> None:
    state = model(LLAMA)

    def wrapped(name: str) -> str:
        for number, word in enumerate(("_orig_mod", "_checkpoint_wrapped_module._orig_mod")):
            name = name.replace(f"layers.{number}.", f"layers.{number}.{word}.")
        return name

    saved = {f"_fsdp_wrapped_module.{wrapped(name)}": one for name, one in state.items()}
    engine.convert("transformers", save(saved, tmp_path / "step", LLAMA), tmp_path / "out")
    assert equal(tmp_path / "out", state)
    theirs = {wrapped(name): one for name, one in titan(state, old=False).items()}
    engine.convert("torchtitan-llama", save(theirs, tmp_path / "step-3", LLAMA), tmp_path / "titan")
    assert equal(tmp_path / "titan", state)
    with pytest.raises(EngineError, match="twice") as caught:
        engine.convert("transformers", save(state | saved, tmp_path / "both", LLAMA), tmp_path / "no")
    assert caught.value.code == "E206"


def test_a_tensor_of_a_type_that_is_not_read_is_refused_by_its_type(tmp_path: Path) -> None:
    state = model(LLAMA)
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.complex64)
    with pytest.raises(EngineError, match="element type") as caught:
        engine.convert("transformers", save(state, tmp_path / "step", LLAMA), tmp_path / "out")
    assert caught.value.code == "E303"


def test_two_models_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    state = model(LLAMA)
    both = {f"model.{name}": one for name, one in state.items()} | {
        f"ema.{name}": one * 2 for name, one in state.items()
    }
    with pytest.raises(EngineError, match="holds 2 models") as caught:
        engine.convert("transformers", save(both, tmp_path / "step-3", LLAMA), tmp_path / "out")
    assert caught.value.code == "E206"


def test_xtuners_prefix_stands_in_the_place_of_the_models_own(tmp_path: Path) -> None:
    state = model(LLAMA)
    folder = save({"model": {n.removeprefix("model."): one for n, one in state.items()}}, tmp_path / "weights", LLAMA)
    engine.convert("transformers", folder, tmp_path / "out")
    assert equal(tmp_path / "out", state)


def test_another_epsilon_than_xtuners_queries_and_keys_have_is_asked_for(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "mlp_bias"}
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    state = model(config)
    engine.convert("transformers", save(state, tmp_path / "of transformers", config), tmp_path / "out")
    saved = {f"model.{name.removeprefix('model.')}": one for name, one in state.items()}
    folder = save(saved, tmp_path / "weights", config)
    for again in ({}, {"like": folder}):
        with pytest.raises(EngineError) as caught:
            if again:
                engine.reverse("transformers", tmp_path / "out", tmp_path / "no", **again)
            else:
                engine.convert("transformers", folder, tmp_path / "no")
        assert caught.value.code == "E202" and "--set norms=as_configured" in str(caught.value.fix)
    engine.convert("transformers", folder, tmp_path / "trained so", settings={"norms": "as_configured"})
    assert equal(tmp_path / "trained so", state)
    headless = {name.removeprefix("model."): one for name, one in state.items() if name != "lm_head.weight"}
    folder = save(headless, tmp_path / "base", config | {"architectures": ["Qwen3Model"]})
    engine.convert("transformers", folder, tmp_path / "base of transformers")  # XTuner's models have a head
    assert equal(tmp_path / "base of transformers", headless)


def test_a_tensor_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    state = model(LLAMA)
    few = {name: one for name, one in state.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(EngineError, match="up_proj") as caught:
        engine.convert("transformers", save(few, tmp_path / "few", LLAMA), tmp_path / "out")
    assert caught.value.code == "E207"
    with pytest.raises(EngineError) as caught:
        adam = {"optim.state.0.exp_avg": torch.ones(4)}
        engine.convert("transformers", save(adam, tmp_path / "optimizer_0", LLAMA), tmp_path / "out")
    assert (caught.value.code, caught.value.got) == ("E207", "no tensors of a model")
    many = {**state, "model.layers.1.self_attn.q_norm.weight": torch.ones(4)}
    with pytest.raises(EngineError, match="q_norm") as caught:
        engine.convert("transformers", save(many, tmp_path / "many", LLAMA), tmp_path / "out")
    assert caught.value.code == "E205"


@pytest.mark.parametrize("named", ["InternLM3ForCausalLM", "LlamaForCausalLM"])
def test_internlm3_is_read_as_its_own_code_and_as_transformers_name_it(named: str, tmp_path: Path) -> None:
    """transformers has its configuration and loads it as Llama, so it saves the one's type and the other's class."""
    config = LLAMA | {"model_type": "internlm3", "architectures": [named]}
    config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    state = model(config)
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)


@pytest.mark.parametrize("architecture", load_mapping("transformers").classes)
def test_what_is_told_of_a_class_is_what_the_class_says(architecture: str) -> None:
    """For one configuration after another; where a key is not declared, or a value does not fit, the class is asked."""
    generic = load_mapping("transformers")
    told = load_mapping(generic.classes[architecture])
    plain = {**LLAMA, "architectures": [architecture], "model_type": told.model_type}
    changes: list[dict[str, Any]] = [
        {}, {"head_dim": 6}, {"num_key_value_heads": 4}, {"num_hidden_layers": 3}, {"vocab_size": 51},
        {"intermediate_size": 17}, {"hidden_size": 24}, {"tie_word_embeddings": True}, {"rope_scaling": SCALED},
    ]  # fmt: skip
    whole = [json.loads(AutoConfig.for_model(**plain, dtype="float32").to_json_string(use_diff=False))]
    whole[0]["architectures"] = [architecture]
    for config in (*whole, *({**plain, **one} for one in changes)):
        assert wanted_by_mapping(told, config) == asked(config)
    unknown: list[dict[str, Any]] = [
        {"attention_bias": True}, {"mlp_bias": True}, {"num_experts": 4}, {"hidden_size": 18}, {"hidden_act": "swoosh"},
        {"vocab_size": "40"}, {"rope_scaling": {"rope_type": "llama3"}}, {"quantization_config": {}},
        {"pad_token_id": 40}, {"rms_norm_eps": None}, {"max_position_embeddings": None}, {"attention_dropout": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    ]  # fmt: skip
    assert {wanted_by_mapping(told, {**plain, **one}) for one in unknown} == {None}


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("axes: hidden ffn", "axes: ffn hidden"),
        ("tied_to", "keep: dtype  #"),
        ("tied_to: model.embed_tokens.weight", "tied_to: model.norm.weight"),
        ("nothing", ""),
    ],
)
def test_a_class_that_is_told_wrongly_is_not_proved(was: str, now: str, tmp_path: Path) -> None:
    text = Path(find_file("classes/llama")).read_text()
    (tmp_path / "told.yaml").write_text(text.replace(was, now))
    assert bool(check_classes({"LlamaForCausalLM": str(tmp_path / "told.yaml")})) is (was in text)


def test_a_tied_head_that_differs_is_refused_and_an_equal_one_left_out(tmp_path: Path) -> None:
    config = LLAMA | {"tie_word_embeddings": True}
    state = model(LLAMA)
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", save(state, tmp_path / "one", config), tmp_path / "out")
    assert caught.value.code == "E402"
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    engine.convert("transformers", save(state, tmp_path / "two", config), tmp_path / "out")
    del state["lm_head.weight"]
    assert equal(tmp_path / "out", state)


@pytest.mark.parametrize("mapping", ["transformers", "torchtitan-llama"])
@pytest.mark.parametrize("angles", [{"rope_type": "default"}, SCALED], ids=["plain", "scaled"])
def test_angles_are_also_written_where_transformers_before_5_has_them(
    mapping: str, angles: dict[str, Any], tmp_path: Path
) -> None:
    """A `config.json` that transformers 5 saved has them in `rope_parameters` only, which older ones do not read."""
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config["rope_parameters"] = {**angles, "rope_theta": 5e5}
    state = model(config)
    saved = state if mapping == "transformers" else titan(state, old=False)
    engine.convert(mapping, save(saved, tmp_path / "step", config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_parameters"] == config["rope_parameters"]
    assert all(type(written["rope_parameters"][key]) is type(value) for key, value in angles.items())
    assert written.get("rope_scaling") == (config["rope_parameters"] if angles is SCALED else None)
    again = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert {key: again[key] for key in config["rope_parameters"]} == config["rope_parameters"]


@pytest.mark.parametrize(("kind", "there"), [("gemma3_text", True), ("mellum", False)])
def test_angles_of_two_kinds_of_layers_are_written_there_too_where_programs_read_them_so(
    kind: str, there: bool, tmp_path: Path
) -> None:
    """Of Mellum and Gemma 4, transformers 5 takes them for those of all layers, beside `rope_parameters` too."""
    angles = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "mlp_bias", "hidden_act")}
    config |= {"model_type": kind, "architectures": [f"{kind[:6].title()}ForCausalLM"], "rope_parameters": angles}
    engine.convert("transformers", save(model(config), tmp_path / "step", config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (3e6, 2e4)
    assert written.get("rope_scaling") == (angles["full_attention"] if there else None)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == angles


def test_tensors_whose_shape_depends_on_a_number_in_their_name_are_each_their_own(tmp_path: Path) -> None:
    """`ffn.0` and `ffn.2` of each layer."""
    config = {"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"], "n_layer": 2, "n_head": 4}
    config |= {"n_embd": 32, "dff": 48, "vocab_size": 64, "n_positions": 32, "tie_word_embeddings": False}
    state = model(config)
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)


@pytest.mark.parametrize(("config", "since"), [(LLAMA, False), (MOE, True)], ids=["llama", "mixture"])
def test_stacked_experts_are_said_to_need_a_transformers_that_stacks_them(
    config: dict[str, Any], since: bool, tmp_path: Path
) -> None:
    """transformers 4 loads such a folder too, with experts at random."""
    state = model(config)
    engine.convert("transformers", save(state, tmp_path / "step", config), tmp_path / "out")
    assert equal(tmp_path / "out", state)
    assert ("transformers `>=5`" in (tmp_path / "out" / "README.md").read_text()) is since


def test_xtuners_experts_are_taken_apart(tmp_path: Path) -> None:
    state = model(MOE)
    saved, truth = {}, {}
    for name, one in state.items():
        own = name.removeprefix("model.")
        if name.endswith("experts.gate_up_proj"):
            saved[own.replace("mlp.experts.gate_up_proj", "experts.fused_w1w3.weight")] = one.reshape(-1, 16)
            for e, expert in enumerate(one):
                base = name.replace("gate_up_proj", f"{e}")
                truth[f"{base}.gate_proj.weight"], truth[f"{base}.up_proj.weight"] = expert.chunk(2)
        elif name.endswith("experts.down_proj"):
            saved[own.replace("mlp.experts.down_proj", "experts.fused_w2.weight")] = one.reshape(-1, 12)
            truth |= {name.replace("down_proj", f"{e}.down_proj.weight"): expert for e, expert in enumerate(one)}
        else:
            saved[own.replace("mlp.gate", "gate")] = truth[name] = one
    folder = save({"model": saved}, tmp_path / "weights", MOE)
    engine.convert("xtuner-moe", folder, tmp_path / "out")
    assert equal(tmp_path / "out", truth)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], one) for name, one in state.items())
    angles = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    said = {key: value for key, value in MOE.items() if key != "rope_theta"}
    said |= {"rms_norm_eps": 1e-5, "rope_parameters": angles}
    folder = save({"model": saved}, tmp_path / "of another", said)
    sure = {"rotary": "as_configured", "norms": "as_configured"}
    engine.convert("xtuner-moe", folder, tmp_path / "as said", settings=sure)
    written = json.loads((tmp_path / "as said" / "config.json").read_text())
    assert (written["rms_norm_eps"], written["rope_theta"], written["rope_scaling"]) == (1e-5, 5e5, angles)


@sampled(2, "code")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_local_experts": 2}, "E218"),  # which transformers takes for num_experts
        ({"use_sliding_window": True, "sliding_window": 8}, "E209"),
        ({"num_experts_per_tok": 4}, "E218"),
        ({"is_causal": False}, "E209"),
        ({"output_router_logits": 2}, "E218"),
        # angles that it may not have been trained with, or cannot
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "E209"),
        ({"rope_scaling": {"rope_theta": 5.0, "rope_type": "default"}, "rope_theta": 10000.0}, "E218"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "E202"),
        ({"original_max_position_embeddings": 32, "rope_scaling": SCALED}, "E218"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "E209"),
        ({"pad_token_id": 40}, "E202"),
        ({"rms_norm_eps": 1e-5}, "E202"),  # its queries and keys have 1e-6
    ],
    ids=str,
)
def test_a_model_that_xtuner_cannot_have_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    folder = save({"embed_tokens.weight": torch.ones(40, 16)}, tmp_path / "weights", MOE | change)
    with pytest.raises(EngineError, match=next(iter(change))) as caught:
        engine.convert("xtuner-moe", folder, tmp_path / "out")
    assert caught.value.code == code


def test_what_is_copied_of_a_given_configuration_is_written_as_transformers_takes_it(tmp_path: Path) -> None:
    odd = {"use_cache": None, "attention_bias": 0, "initializer_range": 0, "rope_theta": 10000}
    folder = save(titan(model(LLAMA), old=False), tmp_path / "step-3", LLAMA | odd)
    engine.convert("torchtitan-llama", folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "use_cache" not in written and written["attention_bias"] is False
    assert [repr(written[key]) for key in ("initializer_range", "rope_theta")] == ["0.0", "10000.0"]
    AutoConfig.from_pretrained(tmp_path / "out")


def test_a_payload_of_safetensors_is_read_by_its_own_header(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    state = model(LLAMA)
    folder = save(state, tmp_path / "step", LLAMA, serialization_format=SerializationFormat.SAFETENSORS)
    engine.convert("transformers", folder, tmp_path / "out")
    assert equal(tmp_path / "out", state)


UP = "model.layers.0.mlp.up_proj.weight"
UNLIKE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "another shape": (lambda state: {**state, UP: state[UP].T.contiguous()}, "unlike its directory"),
    "another type": (lambda state: {**state, UP: state[UP].half()}, "unlike its directory"),
    "one more": (lambda state: {**state, "more.weight": state[UP].clone()}, "unlike its directory"),
    "one less": (lambda state: {key: one for key, one in state.items() if key != UP}, "a tensor that it does not hold"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_payload_of_safetensors_that_its_directory_does_not_describe_is_refused(name: str, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    folder = save(model(LLAMA), tmp_path / "step", LLAMA, serialization_format=SerializationFormat.SAFETENSORS)
    change, told = UNLIKE[name]
    with safe_open(folder / "__0_0.distcp", "pt") as file:
        metadata, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    info, state = json.loads(metadata["DCP_SHARDING_INFO"]), change(state)
    said = {"DCP_SHARDING_INFO": json.dumps({key: info.get(key, info[UP]) for key in state})}
    save_file(state, folder / "__0_0.distcp", metadata | said)
    with pytest.raises(EngineError, match=f"E301(.|\\n)*{told}"):
        engine.plan("transformers", folder)


def test_one_file_for_every_entry_is_read(tmp_path: Path) -> None:
    state = model(LLAMA)
    folder = save(state, tmp_path / "step", LLAMA, single_file_per_rank=False)
    assert len(list(folder.glob("*.distcp"))) > 20
    engine.convert("transformers", folder, tmp_path / "out")
    assert equal(tmp_path / "out", state)


def test_deepspeeds_partitions_are_told_with_its_own_program(tmp_path: Path) -> None:
    folder = tmp_path / "global_step10"
    folder.mkdir()
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(EngineError, match=r"zero_to_fp32\.py"):
        engine.inspect(folder)
    universal = tmp_path / "global_step10_universal"
    (universal / "zero" / "norm.weight").mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero/norm.weight/fp32.pt"):
        (universal / name).touch()
    with pytest.raises(EngineError, match=r"without `_universal`"):
        engine.inspect(universal)


def test_directories_that_ranks_wrote_without_collectives_are_read(tmp_path: Path) -> None:
    state = model(LLAMA)
    dcp.save(state, checkpoint_id=tmp_path / "step-3", no_dist=True, use_collectives=False)
    (tmp_path / "step-3" / "config.json").write_text(json.dumps(LLAMA))
    assert not (tmp_path / "step-3" / ".metadata").exists()
    engine.convert("transformers", tmp_path / "step-3", tmp_path / "hf")
    assert equal(tmp_path / "hf", state)
    (tmp_path / "step-3" / "__0.metadata").unlink()
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", tmp_path / "step-3", tmp_path / "x")
    assert caught.value.code == "E201" and not (tmp_path / "x").exists()


def test_dtensors_on_a_mesh_of_one_rank_are_read(tmp_path: Path) -> None:
    state = model(LLAMA)
    (tmp_path / "actor").mkdir()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        saved = {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in state.items()}
        torch.save(saved, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    finally:
        torch.distributed.destroy_process_group()
    (tmp_path / "actor" / "config.json").write_text(json.dumps(LLAMA))
    engine.convert("transformers", tmp_path / "actor", tmp_path / "hf")
    assert equal(tmp_path / "hf", state)


@pytest.mark.parametrize("mapping", ["torchtitan-llama", "transformers"])
def test_a_model_that_is_not_tied_and_has_no_output_layer_is_refused(mapping: str, tmp_path: Path) -> None:
    saved = model(LLAMA) if mapping == "transformers" else titan(model(LLAMA), old=False)
    del saved["lm_head.weight"]
    folder = save(saved, tmp_path / "step-3", LLAMA)
    with pytest.raises(EngineError, match="head") as caught:
        engine.convert(mapping, folder, tmp_path / "hf")
    assert caught.value.code == "E207" and not (tmp_path / "hf").exists()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    engine.convert(mapping, folder, tmp_path / "hf")
    assert "lm_head.weight" not in weights(tmp_path / "hf")


def test_the_process_that_asks_transformers_takes_no_module_from_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may be a checkpoint's, and `torch.py` in it would be run."""
    (tmp_path / "torch.py").write_text("print('run')")
    called: list[Any] = []

    def instead(*_: Any) -> Any:
        called.append(call_apart(eval, "__import__('importlib.util').util.find_spec('torch').origin"))
        return "told"

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(meta_model, "call_apart", instead)
    assert asked({}) == "told" and str(tmp_path) not in called[0] and called[0].endswith("__init__.py")


@sampled(2)
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_internevos_own_names_in_a_distributed_checkpoint_are_read_as_its_rank_files_are(
    family: str, tmp_path: Path
) -> None:
    tiny = Model(family, groups=4 if family == "v1" else 2)
    shards.save(tiny, tmp_path / "ranks")
    state = torch.load(tmp_path / "ranks" / "model_tp0_pp0.pt")
    step = tmp_path / "step"
    dcp.save({f"model.{n}": one.clone() for n, one in state.items()}, checkpoint_id=str(step), no_dist=True)
    for name in ("model_config.pt", "config_file.pt", "context.pt"):
        (tmp_path / "ranks" / name).rename(step / name)
    torch.save({}, step / "optimizer_fsdp0.pt")
    found = engine.inspect(step)
    assert found.facts["layout"] == "internevo" and not found.facts["unknown"]
    report = engine.convert(tiny.mapping, step, tmp_path / "out")
    assert all("no tokenizer" in notice for notice in report.notices)
    shards.same(weights(tmp_path / "out"), shards.build(tiny)[3])
    (step / "model_config.pt").unlink()  # then it may be of any trainer
    with pytest.raises(EngineError, match="no weights files of layout `internevo`") as caught:
        engine.plan(tiny.mapping, step)
    assert "distcp beside model_config.pt" in str(caught.value.expected)
    assert "Hugging Face" not in str(caught.value.fix)
    with pytest.raises(EngineError) as caught:
        engine.plan(tiny.mapping, tmp_path / "out")
    assert str(caught.value.fix).startswith("It looks like a Hugging Face checkpoint, as `run` writes and")
    assert engine.inspect(step).facts["layout"] == "torch-dcp"
