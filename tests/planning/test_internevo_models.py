"""InternEvo's other models: Qwen2, its mixture, Qwen3's mixture, Mixtral and Baichuan2.

The fixtures were saved by InternEvo's own code of May 2025, with the logits of its own forward pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.formats.configs import read_pickled_mapping
from engine.storage.local import LocalStore
from engine.storage.store import File
from tests.support.depth import sampled
from tests.support.frameworks import FIXTURES

GENUINE = FIXTURES / "internevo_2025"
MODELS = {
    "qwen2_tp2": "internevo-qwen2",
    "qwen2_moe_isp_wp2_ep2": "internevo-qwen2-moe",
    "qwen3_moe_isp_wp2_ep2": "internevo-qwen3-moe",
    "mixtral_tp2": "internevo-mixtral",
    "baichuan2_isp_wp2": "internevo-baichuan2",
}
WEIGHTS = "model.safetensors"
EXPERT = dict.fromkeys(MODELS, ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")) | {
    "mixtral_tp2": ("block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.w3")
}
CASES = pytest.mark.parametrize(("fixture", "mapping"), MODELS.items(), ids=list(MODELS))


def rank_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    paths = (one for one in sorted(folder.glob("model_*.pt")) if one.name != "model_config.pt")
    return {one.name: dict(torch.load(one, weights_only=False)) for one in paths}


def configured(fixture: str, folder: Path, **changed: Any) -> Path:
    """A copy of a fixture whose configuration has other values; None takes a key away.

    config_file.pt, which would contradict it, is left out.
    """
    shutil.copytree(GENUINE / fixture, folder, ignore=shutil.ignore_patterns("config_file.pt"))
    config = dict(read_pickled_mapping(File(LocalStore(folder), "model_config.pt")))
    config |= changed
    said = {key: value for key, value in config.items() if value is not None}
    (folder / "model_config.pt").unlink()
    torch.save(said, folder / "model_config.pt")
    return folder


@CASES
def test_transformers_computes_internevos_own_logits(fixture: str, mapping: str, tmp_path: Path) -> None:
    import transformers

    engine.convert(mapping, GENUINE / fixture, tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    kind = getattr(transformers, config.architectures[0])
    model, loaded = kind.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(loaded.values())
    oracle = torch.load(GENUINE / fixture / "oracle.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(oracle["input_ids"]).logits, oracle["logits"], atol=1e-5, rtol=0)


@sampled(2, lambda row: "moe" in row["fixture"] or "mixtral" in row["fixture"])
@pytest.mark.parametrize("fixture", MODELS)
def test_an_output_is_compared_with_training_as_these_models_compute(fixture: str, tmp_path: Path) -> None:
    source = GENUINE / fixture
    engine.convert(MODELS[fixture], source, tmp_path / "hf")
    if "moe" in fixture or "mixtral" in fixture:
        with pytest.raises(EngineError, match="forward pass is not known"):
            engine.verify(tmp_path / "hf", src=source, mapping=MODELS[fixture], logits=True)
        return
    found = engine.verify(tmp_path / "hf", src=source, mapping=MODELS[fixture], logits=True)
    assert found.logits is not None and found.problems == ()


@sampled(3)
@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
@CASES
def test_transformers_scales_the_angles_that_are_asked_for(
    fixture: str, mapping: str, scaling: str, tmp_path: Path
) -> None:
    import transformers

    engine.convert(mapping, GENUINE / fixture, tmp_path / "hf", settings={"rope_scaling": scaling})
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.model.rotary_emb.rope_type == scaling


@CASES
def test_it_comes_back_bit_for_bit(fixture: str, mapping: str, tmp_path: Path) -> None:
    engine.convert(mapping, GENUINE / fixture, tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", like=GENUINE / fixture)
    engine.convert(mapping, tmp_path / "back", tmp_path / "again")  # experts may be on other ranks there
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "hf" / WEIGHTS).read_bytes()
    ours, theirs = rank_files(tmp_path / "back"), rank_files(GENUINE / fixture)
    for name in (one for one in theirs if "expert" not in one):
        assert ours[name].keys() == theirs[name].keys()
        assert all(torch.equal(ours[name][key], tensor) for key, tensor in theirs[name].items())


@pytest.mark.parametrize("fixture", ["mixtral_tp2", "qwen2_moe_isp_wp2_ep2"])
def test_the_width_of_heads_comes_back_as_transformers_saves_it(fixture: str, tmp_path: Path) -> None:
    """Null, no key and the number mean the same to its classes; `compare` knows it of the last two."""
    engine.convert(MODELS[fixture], GENUINE / fixture, tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    for other in (config | {"head_dim": None}, config):
        (tmp_path / "other" / "config.json").write_text(json.dumps(other))
        assert engine.plan_reverse(MODELS[fixture], tmp_path / "other").outputs
    assert engine.compare(tmp_path / "other", tmp_path / "hf").same()


@CASES
def test_no_other_mapping_fits_even_without_the_training_configuration(
    fixture: str, mapping: str, tmp_path: Path
) -> None:
    step = configured(fixture, tmp_path / "step", sliding_window=None)  # which InternLM2 does not have
    assert [one.name for one in engine.inspect(step).fitting] == [mapping]


@sampled(3)
@pytest.mark.parametrize(
    ("fixture", "changed", "code", "told"),
    [
        ("qwen2_tp2", {"use_sliding_window": True}, "E209", "use_sliding_window"),
        ("qwen2_tp2", {"norm_head": True}, "E209", "normalised"),
        ("qwen2_tp2", {"qkv_bias": False}, "E209", "qkv_bias"),
        ("mixtral_tp2", {"qkv_bias": True}, "E209", "qkv_bias"),
        ("qwen3_moe_isp_wp2_ep2", {"qkv_bias": True}, "E209", "qkv_bias"),
        ("qwen2_moe_isp_wp2_ep2", {"num_shared_experts": 0}, "E218", "num_shared_experts"),
        ("qwen2_moe_isp_wp2_ep2", {"moe_type": "MegaBlock"}, "E209", "moe_type"),
        ("qwen2_moe_isp_wp2_ep2", {"moe_type": "GShard", "top_k": 1}, "E202", "probability"),
        ("qwen3_moe_isp_wp2_ep2", {"moe_type": "GShard"}, "E209", "no other"),
        ("qwen2_moe_isp_wp2_ep2", {"moe_layer_kwargs": {"routed_scaling_factor": 2.5}}, "E209", "scale"),
        ("qwen2_moe_isp_wp2_ep2", {"top_k": 5}, "E218", "no size"),
        ("qwen3_moe_isp_wp2_ep2", {"layer_norm_epsilon": 1e-5}, "E209", "epsilon"),
        ("qwen3_moe_isp_wp2_ep2", {"layer_norm_epsilon": None}, "E202", "epsilon"),
        ("qwen3_moe_isp_wp2_ep2", {"num_shared_experts": 1}, "E209", "shared"),
        ("mixtral_tp2", {"top_k": 1, "moe_type": "GShard"}, "E202", "probability"),
        ("mixtral_tp2", {"moe_layer_kwargs": {"normalize_expert_weights": False}}, "E209", "add up to 1"),
        ("mixtral_tp2", {"moe_type": "MegaBlock"}, "E209", "moe_type"),
    ],
)
def test_what_the_target_would_compute_otherwise_is_refused(
    fixture: str, changed: dict[str, Any], code: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        engine.plan(MODELS[fixture], configured(fixture, tmp_path / "step", **changed))
    assert caught.value.code == code and told in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("fixture", "changed"),
    [
        ("qwen2_moe_isp_wp2_ep2", {"mlp_ratio": 48.5 / 32, "multiple_of": 1}),  # 48, of which the shared one has two
        ("mixtral_tp2", {"moe_type": "GShard", "top_k": 2}),  # only a single expert is weighed in another way
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_the_target_computes_alike_is_taken(fixture: str, changed: dict[str, Any], tmp_path: Path) -> None:
    steps = GENUINE / fixture, configured(fixture, tmp_path / "step", **changed)
    plans = (engine.plan(MODELS[fixture], step) for step in steps)
    one, other = ({key: size for key, size in plan.sizes.items() if key != "multiple"} for plan in plans)
    assert one == other


def without_biases(state: dict[str, torch.Tensor]) -> None:
    for name in [one for one in state if one.endswith(".bias")]:
        del state[name]


def with_a_bias_of_wo(state: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        state[f"model.layers.{layer}.attention.wo.bias"] = torch.zeros(32)


@pytest.mark.parametrize("change", [without_biases, with_a_bias_of_wo])
def test_a_qwen2_has_biases_of_queries_keys_and_values_and_no_others(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    shutil.copytree(GENUINE / "qwen2_tp2", tmp_path / "step")
    for name, state in rank_files(tmp_path / "step").items():
        change(state)
        torch.save(state, tmp_path / "step" / name)
    with pytest.raises(EngineError, match="bias") as caught:
        engine.plan("internevo-qwen2", tmp_path / "step")
    assert caught.value.code in ("E202", "E207", "E209"), caught.value


@pytest.mark.parametrize("stored", ["apart", "grouped"])
def test_the_written_configuration_says_how_experts_are_stored(stored: str, tmp_path: Path) -> None:
    engine.convert("internevo-mixtral", GENUINE / "mixtral_tp2", tmp_path / "hf")
    engine.reverse("internevo-mixtral", tmp_path / "hf", tmp_path / "step", settings={"experts": stored})
    config = torch.load(tmp_path / "step" / "model_config.pt", weights_only=False)
    assert config["moe_layer_kwargs"]["use_grouped_mlp"] == (stored == "grouped")


def test_a_mixture_without_said_weights_is_normalised_as_internevo_does(tmp_path: Path) -> None:
    """GShard, the only kind of InternEvo's first Qwen2 mixtures, knows nothing else for several experts."""
    kinds = (("plain", {}), ("told", {"normalize_expert_weights": False}), ("GShard", {}))
    for name, said in kinds:
        kind = {"moe_type": name} if name == "GShard" else {}
        step = configured("qwen2_moe_isp_wp2_ep2", tmp_path / name, moe_layer_kwargs=said, **kind)
        assert engine.plan("internevo-qwen2-moe", step).config["norm_topk_prob"] is not bool(said)


@pytest.mark.parametrize("fixture", [one for one in MODELS if "moe" in one or "mixtral" in one])
def test_fused_gate_and_up_of_experts_of_their_own_are_joined_over_weight_ranks(fixture: str, tmp_path: Path) -> None:
    """InternEvo saves a rank's rows of that linear in halves, as w1 and w3, where it trains with mlp_layer_fusion."""
    mapping, settings = MODELS[fixture], {"experts": "apart", "gates": "joined"}
    engine.convert(mapping, GENUINE / fixture, tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", mode="isp_wp", wp=2, settings=settings)
    rows: dict[str, list[torch.Tensor]] = {}
    for name, state in rank_files(tmp_path / "back").items():
        for key in [key for key in state if "fused_w1_w3" in key]:
            rows.setdefault(name[:-7] + key, []).append(state.pop(key))
            halves = zip(("w1", "w3"), rows[name[:-7] + key][-1].chunk(2), strict=True)
            state.update({key.replace("fused_w1_w3", half): one.clone() for half, one in halves})
        torch.save(state, tmp_path / "back" / name)
    whole = load_file(tmp_path / "hf" / WEIGHTS)
    (last,) = (torch.cat(each) for key, each in rows.items() if "layer1_expert3" in key)
    gate, up = (next(key for key in whole if f"layers.1.{at}" in key) for at in EXPERT[fixture])
    assert torch.equal(last, torch.cat([whole[gate], whole[up]]))
    engine.convert(mapping, tmp_path / "back", tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("fixture", ["v2_tp2_pp2", "llama_tp2_pp1_default"])
def test_an_internlm2_or_llama_without_its_training_configuration_is_none_of_them(fixture: str, tmp_path: Path) -> None:
    source = FIXTURES / "internevo" / fixture
    shutil.copytree(source, tmp_path / "step", ignore=shutil.ignore_patterns("config_file.pt"))
    assert not [one.name for one in engine.inspect(tmp_path / "step").fitting if one.name in MODELS.values()]


def test_a_llama_of_unknown_kind_with_biases_of_queries_alone_is_told_that(tmp_path: Path) -> None:
    source = FIXTURES / "internevo" / "llama_tp2_pp1_default"
    shutil.copytree(source, tmp_path / "step", ignore=shutil.ignore_patterns("config_file.pt"))
    for name, state in rank_files(tmp_path / "step").items():
        more = {key[:-6] + "bias": state[key][:, 0].clone() for key in state if key.endswith("wq.weight")}
        torch.save({**state, **more}, tmp_path / "step" / name)
    found = engine.inspect(tmp_path / "step")
    assert not found.fitting and any("attention_biases" in one.why for one in found.blocked)


def test_a_baichuan2_with_biases_is_more_than_llama_expresses(tmp_path: Path) -> None:
    shutil.copytree(GENUINE / "baichuan2_isp_wp2", tmp_path / "step")
    for name, state in rank_files(tmp_path / "step").items():
        more = {f"model.layers.{layer}.attention.wqkv.bias": torch.zeros(48) for layer in range(2)}
        torch.save({**state, **more}, tmp_path / "step" / name)
    with pytest.raises(EngineError, match="none behind attention") as caught:
        engine.plan("internevo-baichuan2", tmp_path / "step")
    assert caught.value.code == "E209"


def test_a_normalised_head_of_baichuan2_is_computed_also_beside_qk_interleaved(tmp_path: Path) -> None:
    """Its first code did it; InternLM2, which is older, must be asked about."""
    step = configured("baichuan2_isp_wp2", tmp_path / "step", norm_head=True)
    engine.convert("internevo-baichuan2", step, tmp_path / "hf")
    parts = [state["model.output.weight"] for state in rank_files(GENUINE / "baichuan2_isp_wp2").values()]
    wanted = torch.nn.functional.normalize(torch.cat(parts))
    torch.testing.assert_close(load_file(tmp_path / "hf" / WEIGHTS)["lm_head.weight"], wanted)


@sampled(4)
@pytest.mark.parametrize("fixture", [one for one in MODELS if one != "baichuan2_isp_wp2"])
def test_tokens_that_no_training_file_holds_are_those_of_a_given_configuration(fixture: str, tmp_path: Path) -> None:
    """They were dropped, so that generation did not end."""
    source = GENUINE / fixture
    config = engine.plan(MODELS[fixture], source).config
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)
    every = {"bos_token_id": 11, "eos_token_id": [13, 14], "pad_token_id": 3}
    for told, kept in ((every, True), ({"pad_token_id": 64}, False)):  # the last is beyond the vocabulary
        (tmp_path / "config.json").write_text(json.dumps({**config, **told}))
        found = engine.plan(MODELS[fixture], source, config=tmp_path / "config.json").config
        assert ({**found, **told} == found) == kept
