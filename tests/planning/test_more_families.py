"""Llama, InternLM3, mixtures of experts and Meta's files: any layout gives the unsharded truth, bit for bit."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.errors import EngineError
from engine.language.expressions import evaluate
from engine.language.mapping_file import load_mapping
from tests.support.depth import examples, sampled
from tests.support.families import Experts, InternLM3, build_llama, expert_files, model_of, save_family
from tests.support.family_cases import Case, llamas, metas, mixtures, told
from tests.support.readers import read_pickled_mapping
from tests.support.reference_families import forward_experts, forward_llama, whole_experts, whole_llama
from tests.support.shards import Model, State, same, write

common = settings(deadline=None, max_examples=examples(25), suppress_health_check=list(HealthCheck))


def converted(model: Model, folder: Path, mapping: str = "") -> State:
    return dict(engine.iter_tensors(engine.plan(mapping or model.mapping, folder, settings=told(model))))


def proved(case: Case) -> None:
    model, layout = case
    with tempfile.TemporaryDirectory() as folder:
        expected = save_family(model, Path(folder) / "step", **layout)
        same(converted(model, Path(folder) / "step"), expected)


@common
@given(llamas("llama"))
def test_every_layout_of_a_llama_gives_the_unsharded_truth(case: Case) -> None:
    proved(case)


@common
@given(llamas("internlm3"))
def test_every_layout_of_an_internlm3_gives_the_unsharded_truth(case: Case) -> None:
    proved(case)


@common
@given(metas())
def test_metas_files_give_the_unsharded_truth_however_many_they_are(case: Case) -> None:
    proved(case)


def lost_layers(model: Experts, layout: dict[str, Any], survivor: str) -> list[int]:
    kept = {layer for layer, *_ in expert_files(model, survivor=survivor, **layout).values()}
    return sorted(set(range(model.layers)) - kept)


# 5 layers over 3 stages, 1 and 2 and 2: the second and the third stage both write number 2.
UNEVEN = model_of("moe", layers=5, hidden=8, heads=2, groups=2, ffn=6, vocab=8), {"pp": 3, "tp": 2}


@common
@given(mixtures(), st.sampled_from(["earlier", "later"]))
@example(UNEVEN, "earlier")
@example(UNEVEN, "later")
def test_experts_come_together_or_the_layer_lost_at_saving_is_named(case: Case, survivor: str) -> None:
    model, layout = case
    assert isinstance(model, Experts)
    with tempfile.TemporaryDirectory() as folder:
        expected = save_family(model, Path(folder) / "step", survivor=survivor, **layout)
        lost = lost_layers(model, layout, survivor)
        if not lost:
            same(converted(model, Path(folder) / "step"), expected)
            return
        with pytest.raises(EngineError) as caught:
            converted(model, Path(folder) / "step")
        assert caught.value.code in ("E207", "E211")
        assert any(f"layer {layer}" in str(caught.value) for layer in lost), str(caught.value)


@common
@given(mixtures())
def test_stacked_experts_are_the_same_numbers_fused(case: Case) -> None:
    model, layout = case
    assert isinstance(model, Experts)
    assume(not lost_layers(model, layout, "later"))
    with tempfile.TemporaryDirectory() as folder:
        expected = save_family(model, Path(folder) / "step", **layout)
        same(converted(model, Path(folder) / "step", "families/moe-stacked.yaml"), stacked(model, expected))


def stacked(model: Experts, each: State) -> State:
    """gate_up_proj [expert, gate then up, hidden] and down_proj [expert, hidden, ffn] per layer."""
    result = {name: tensor for name, tensor in each.items() if ".mlp." not in name}
    for i in range(model.layers):
        to = f"model.layers.{i}.mlp"
        gates, ups, downs = (
            [each[f"{to}.experts.{e}.{word}.weight"] for e in range(model.experts)]
            for word in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{to}.gate.weight"] = each[f"{to}.gate.weight"]
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        result[f"{to}.experts.gate_up_proj"] = torch.stack(both)
        result[f"{to}.experts.down_proj"] = torch.stack(downs)
    return result


SMALL = {"layers": 3, "hidden": 32, "heads": 4, "groups": 2, "ffn": 40, "vocab": 64, "dtype": torch.float32}
THIRD = {"embedding": "by_vocab", "rope_base": 500000.0}


def loaded(folder: Path) -> Any:
    """The model that stock transformers makes of a folder; no key may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[word] for word in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@sampled(3, "kind")
@pytest.mark.parametrize(
    ("kind", "facts", "layout"),
    [
        ("llama", {}, {"tp": 2, "pp": 2}),
        ("llama", {"key": "neither"}, {"tp": 2}),
        ("llama", {"rotary": "halves", "key": "adapt_hf", "letters": "w2_is_up"}, {"pp": 3}),
        ("llama", {"bias": True, "mlp_bias": True, "rope_base": 1e6}, {"tp": 2, "pp": 2}),
        ("internlm3", {}, {"mode": "isp_wp", "wp": 3, "pp": 2}),
        ("internlm3", {"rotary": "pairs", "bias": True, "mlp_bias": True}, {"mode": "isp", "tp": 1, "wp": 5}),
        ("meta", {}, {"tp": 2}),
        ("meta", {"groups": 4, "ffn_dim_multiplier": 1.3}, {"tp": 4}),
        ("meta", THIRD, {"tp": 2}),
        ("meta", THIRD, {"tp": 1}),
    ],
)
def test_stock_transformers_computes_what_the_training_tensors_compute(
    kind: str, facts: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(kind, **SMALL | facts)
    save_family(model, tmp_path / "step", **layout)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told(model))
    stock, wanted = logits(model, tmp_path / "hf")
    torch.testing.assert_close(stock, wanted, atol=1e-4, rtol=0)


def logits(model: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(what stock transformers computes from a converted folder, what the training tensors compute)."""
    ids = torch.randint(model.vocab, (2, 12), generator=torch.Generator().manual_seed(3))
    stock = loaded(folder)
    assert stock.config.model_type == ("internlm3" if isinstance(model, InternLM3) else "llama")
    with torch.no_grad():
        return stock(ids).logits, forward_llama(model, whole_llama(model), ids)


GENUINE = Path(__file__).parents[1] / "fixtures" / "internevo" / "llama_tp2_pp1_default"
TRAINED = model_of("llama", layers=4, hidden=64, heads=8, groups=4, ffn=256, vocab=256, key="neither")


def rank_files(folder: Path) -> dict[str, State]:
    return {p.name: torch.load(p, weights_only=True) for p in sorted(folder.glob("model_tp*.pt"))}


def test_the_sharder_cuts_genuine_llama_weights_into_the_very_bytes_training_wrote(tmp_path: Path) -> None:
    ranks = rank_files(GENUINE)
    whole = genuine_llama()
    layers, first, last, _ = build_llama(TRAINED)
    refilled = [[replace(w, data=whole[f"layers.{i}.{w.name}"]) for w in one] for i, one in enumerate(layers)]
    write(
        TRAINED,
        tmp_path / "step",
        refilled,
        *([replace(w, data=whole[w.name]) for w in e] for e in (first, last)),
        tp=2,
    )
    written = rank_files(tmp_path / "step")
    assert written.keys() == ranks.keys()
    for file, state in ranks.items():
        same(written[file], state)


def genuine_llama() -> State:
    """The fixture's two ranks put together: rows of column linears and head, columns of the others, norms once."""
    one, two = rank_files(GENUINE).values()
    columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    return {
        n: t if "norm" in n else torch.cat([t, two[n]], dim=1 if n.endswith(columns) else 0) for n, t in one.items()
    }


def test_the_llama_forward_gives_internevos_own_logits() -> None:
    oracle = torch.load(GENUINE / "oracle.pt", weights_only=True)
    ours = forward_llama(TRAINED, genuine_llama(), oracle["input_ids"])
    torch.testing.assert_close(ours, oracle["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "said", "other"), [("llama", "pairs", "halves"), ("internlm3", "halves", "pairs")])
def test_the_other_reading_of_rotary_pairs_gives_other_logits(kind: str, said: str, other: str, tmp_path: Path) -> None:
    model = model_of(kind, **SMALL, rotary=said)
    save_family(model, tmp_path / "step", tp=2)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told(model) | {"rotary": other})
    stock, wanted = logits(model, tmp_path / "hf")
    assert (stock - wanted).abs().max() > 0.01  # a hundred times what a right one may differ


BIASES = [{"bias": True}, {"mlp_bias": True}]


@pytest.mark.parametrize("facts", BIASES)
def test_internlm3_with_biases_in_part_is_more_than_transformers_expresses(
    facts: dict[str, bool], tmp_path: Path
) -> None:
    model = model_of("internlm3", **SMALL, **facts)
    save_family(model, tmp_path / "step", tp=2)
    with pytest.raises(EngineError, match="in every linear of a layer, or in none") as caught:
        converted(model, tmp_path / "step")
    assert caught.value.code == "E202"


@pytest.mark.parametrize(("rotary", "letters"), [("halves", "w2_is_down"), ("pairs", "w2_is_up")])
def test_stacked_experts_compute_in_stock_mixtral_what_training_computes(
    rotary: str, letters: str, tmp_path: Path
) -> None:
    """Without biases a mixture is a Mixtral; loading strictly, gate before up is what its experts expect."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"layers": 2, "hidden": 16, "heads": 2, "groups": 2, "ffn": 24, "vocab": 32, "experts": 4}
    model = model_of("moe", **sizes, bias=False, rotary=rotary, letters=letters, dtype=torch.float32)
    save_family(model, tmp_path / "step", tp=2, pp=2)
    engine.convert("families/moe-stacked.yaml", tmp_path / "step", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    words = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shared = {word: written[word] for word in (*words, "vocab_size", "rms_norm_eps", "rope_parameters")}
    stock = MixtralForCausalLM(MixtralConfig(**shared, num_local_experts=written["num_experts"], num_experts_per_tok=2))
    stock.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"), strict=True)
    ids = torch.randint(model.vocab, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = stock.eval()(ids).logits
    torch.testing.assert_close(ours, forward_experts(model, whole_experts(model), ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "of"), [("internlm3", "InternLM3"), ("moe", "experts")])
def test_a_reward_model_that_nothing_loads_is_refused(kind: str, of: str, tmp_path: Path) -> None:
    model = model_of(kind, **SMALL | {"groups": 4}, head="reward")
    save_family(model, tmp_path / "step", tp=2)
    with pytest.raises(EngineError, match=f"no reward model of {of}") as caught:
        converted(model, tmp_path / "step")
    assert caught.value.code == "E202"


@sampled(3)
@pytest.mark.parametrize(
    "line",
    [
        "moe = dict(top_k=int(K))", "moe = Moe(top_k=2)", "if K:\n    moe = dict(top_k=2)", "from base import *",
        "from base import moe", "moe = dict(top_k=1)\nm = moe\nm.update(top_k=2)", "moe = dict(top_k=1)\nfix(moe)",
    ],
)  # fmt: skip
def test_how_many_experts_serve_a_token_is_asked_where_the_text_leaves_it_open(line: str, tmp_path: Path) -> None:
    """The trainer's default counts only where the text is sure not to say another."""
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step")
    lines = torch.load(tmp_path / "step" / "config_file.pt", weights_only=True)
    torch.save(f"{lines}{line}\n", tmp_path / "step" / "config_file.pt")
    with pytest.raises(EngineError, match="routing") as caught:
        engine.plan(model.mapping, tmp_path / "step")
    assert caught.value.code == "E202"
    with pytest.raises(EngineError, match="num_experts_per_tok") as caught:  # it would be the default then
        engine.plan_reshard(model.mapping, tmp_path / "step", settings={"num_experts_per_tok": 2})
    assert caught.value.code == "E216"


def test_a_choice_of_one_is_held_against_the_configuration(tmp_path: Path) -> None:
    """1 is not true, to which an expression that reads it comes."""
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step")
    lines = torch.load(tmp_path / "step" / "config_file.pt", weights_only=True)
    torch.save(f"{lines}moe = dict(top_k=2)\n", tmp_path / "step" / "config_file.pt")
    with pytest.raises(EngineError, match="contradicts the configuration") as caught:
        engine.plan(model.mapping, tmp_path / "step", settings={"num_experts_per_tok": 1})
    assert caught.value.code == "E001"


@pytest.mark.parametrize(
    ("line", "said"),
    [("moe = dict(top_k=2)", 2), ("moe = dict(top_k=1, use_fused_gating=True)", 1), ("moe = dict(top_k=3)", 3)],
)
def test_how_many_experts_serve_a_token_is_read_off_the_training_configuration(
    line: str, said: int, tmp_path: Path
) -> None:
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step")
    lines = torch.load(tmp_path / "step" / "config_file.pt", weights_only=True)
    torch.save(f"{lines}{line}\n", tmp_path / "step" / "config_file.pt")
    config = engine.plan(model.mapping, tmp_path / "step").config
    assert config["num_experts_per_tok"] == said
    assert (config["num_experts"], config["num_shared_experts"], config["bias"]) == (3, 0, True)
    (tmp_path / "step" / "config_file.pt").unlink()
    with pytest.raises(EngineError, match="routing") as caught:  # every program has a default of its own
        engine.plan(model.mapping, tmp_path / "step")
    assert caught.value.code == "E202" and "num_experts_per_tok=N" in str(caught.value.fix)
    config = engine.plan(model.mapping, tmp_path / "step", settings={"num_experts_per_tok": 2}).config
    assert config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("line", ["moe = dict()", "moe = dict(top_k=1)", "moe = dict(top_k=1, use_fused_gating=False)"])
def test_the_only_expert_of_a_token_that_gshard_weighs_by_its_probability_is_asked_about(
    line: str, tmp_path: Path
) -> None:
    """InternEvo 0.4.9 gives other logits with use_fused_gating, with which the weights of a token add up to 1."""
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step")
    lines = torch.load(tmp_path / "step" / "config_file.pt", weights_only=True)
    torch.save(f"{lines}{line}\n", tmp_path / "step" / "config_file.pt")
    for mapping in (model.mapping, "families/moe-stacked"):
        with pytest.raises(EngineError, match="weighing") as caught:
            engine.plan(mapping, tmp_path / "step")
        assert caught.value.code == "E202" and "by its probability" in str(caught.value.fix)
    config = engine.plan(model.mapping, tmp_path / "step", settings={"weighing": "shared"}).config
    assert config["num_experts_per_tok"] == 1


@pytest.mark.parametrize("family", ["internlm-moe", "moe-stacked", "moe-grouped"])
@pytest.mark.parametrize(
    ("said", "known"),
    [
        ({}, False),
        ({"moe_type": None}, False),
        ({"moe_type": "GShard"}, False),
        ({"moe_type": "Dropless"}, True),
        ({"moe_type": "MegaBlock"}, True),
        ({"moe_type": "GShard", "moe_layer_kwargs": {"use_fused_gating": True}}, True),
        ({"moe_layer_kwargs": {"use_fused_gating": False}}, False),
    ],
)
def test_only_gshard_without_fused_gating_weighs_a_tokens_only_expert(
    family: str, said: dict[str, Any], known: bool
) -> None:
    shared = load_mapping(f"families/{family}").variants["weighing"].choices["shared"]
    assert shared is not None and bool(evaluate(shared, {"top_k": 1, "training": {}, **said})) is known
    assert evaluate(shared, {"top_k": 2, "training": {}, **said})


@pytest.mark.parametrize("family", ["internlm-moe", "moe-stacked"])
def test_dropless_experts_with_tensors_of_their_own_are_read_as_gshards(family: str, tmp_path: Path) -> None:
    """InternEvo has had no others from September to October 2024, and later has them with use_grouped_mlp=False."""
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step", tp=2)
    mapping, step = f"families/{family}", tmp_path / "step"
    gshard = engine.plan(mapping, step, settings=told(model))
    expected = dict(engine.iter_tensors(gshard))
    config = read_pickled_mapping(step / "model_config.pt")
    for kwargs in ({}, {"use_grouped_mlp": False, "token_dispatch_policy": "alltoall"}):
        torch.save(config | {"moe_type": "Dropless", "moe_layer_kwargs": kwargs}, step / "model_config.pt")
        plan = engine.plan(mapping, step, settings=told(model))
        same(dict(engine.iter_tensors(plan)), expected)
        assert plan.config == gshard.config


def test_one_expert_per_token_is_written_back_with_the_gating_that_weighs_it_by_1(tmp_path: Path) -> None:
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8)
    save_family(model, tmp_path / "step")
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", settings=told(model))
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    written = engine.plan_reverse(model.mapping, tmp_path / "hf").config
    assert written["top_k"] == 1 and written["moe_layer_kwargs"] == {"use_fused_gating": True}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gate_stays_in_float32_whatever_the_others_become(dtype: str, tmp_path: Path) -> None:
    model = model_of("moe", layers=2, hidden=8, heads=2, groups=2, ffn=6, vocab=8, dtype=torch.float32)
    expected = save_family(model, tmp_path / "step", tp=2)
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf", dtype=dtype, settings=told(model))
    wide = {n: t if ".gate.weight" in n else t.to(getattr(torch, dtype)) for n, t in expected.items()}
    same(load_file(tmp_path / "hf" / "model.safetensors"), wide)


def config_of(model: Any, folder: Path, **more: Any) -> dict[str, Any]:
    save_family(model, folder)
    params = json.loads((folder / "params.json").read_text()) | more
    (folder / "params.json").write_text(json.dumps(params))
    return dict(
        engine.plan(model.mapping, folder, settings={"rope_factor": 8.0} if "use_scaled_rope" in more else {}).config
    )


TINY = {"layers": 1, "hidden": 8, "heads": 2, "groups": 1, "dtype": torch.bfloat16}


def test_llama_3s_vocabulary_brings_its_own_first_and_last_token(tmp_path: Path) -> None:
    second = config_of(model_of("meta", **TINY, vocab=32000), tmp_path / "2")
    third = config_of(model_of("meta", **TINY, **THIRD, vocab=128256), tmp_path / "3")
    more = config_of(model_of("meta", **TINY, **THIRD, vocab=128264), tmp_path / "more")  # a few tokens of one's own
    assert (more["bos_token_id"], more["eos_token_id"]) == (128000, 128001)
    assert (second["bos_token_id"], second["eos_token_id"], second["vocab_size"]) == (1, 2, 32000)
    assert (third["bos_token_id"], third["eos_token_id"], third["vocab_size"]) == (128000, 128001, 128256)
    assert second["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000}
    assert third["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(("vocab", "tokens"), [(128255, (1, 2)), (128256, (128000, 128001)), (151936, (None, None))])
def test_internevos_llama_with_a_large_vocabulary_is_not_given_sentencepieces_tokens(
    vocab: int, tokens: tuple[int | None, int | None], tmp_path: Path
) -> None:
    model = model_of("llama", **TINY, vocab=vocab)
    save_family(model, tmp_path / "step")
    engine.convert(model.mapping, tmp_path / "step", tmp_path / "hf")
    config, generation = (
        json.loads((tmp_path / "hf" / f).read_text()) for f in ("config.json", "generation_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == tokens
    assert (generation.get("bos_token_id"), generation.get("eos_token_id")) == tokens


def test_a_rotary_base_that_params_json_does_not_have_is_of_the_code_that_wrote_the_files_or_asked_for(
    tmp_path: Path,
) -> None:
    """The code of Llama 1 and 2 has 10000, and saved `rope.freqs`; that of Llama 3 has 500000."""
    for name, more in (("2", {}), ("3", THIRD)):
        save_family(model_of("meta", **TINY, **more, vocab=16), tmp_path / name)
    for lost in ("vocab_size", "rope_theta"), ("rope_theta",):  # -1 is Llama 1's and 2's, an absent number is not
        for name in ("2", "3"):
            params = json.loads((tmp_path / name / "params.json").read_text()) | {
                "vocab_size": -1 if name == "2" else 16
            }
            (tmp_path / name / "params.json").write_text(json.dumps({k: params[k] for k in params if k not in lost}))
        assert engine.plan("meta-llama", tmp_path / "2").config["rope_theta"] == 10000
        with pytest.raises(EngineError, match="rope_theta") as caught:
            engine.plan("meta-llama", tmp_path / "3")
        assert caught.value.code == "E202"
    assert engine.plan("meta-llama", tmp_path / "3", settings={"rope_theta": 1e6}).config["rope_theta"] == 1e6
    for said in ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}):
        (tmp_path / "config.json").write_text(json.dumps(said))
        found = engine.plan("meta-llama", tmp_path / "3", config=tmp_path / "config.json")
        assert found.config["rope_theta"] == 1e6
    with pytest.raises(EngineError, match="not release `meta-llama-3-8b`, which decides it"):  # it has other sizes
        engine.plan("meta-llama-3-8b", tmp_path / "3")
    engine.reshard("meta-llama", tmp_path / "3", tmp_path / "again", tp=1)  # which needs to know no base


def test_llama_3_1s_scaled_rope_is_not_lost(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(model_of("meta", **TINY, **THIRD, vocab=16), tmp_path / "3.1", use_scaled_rope=True)
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).rope_type == "llama3"


@sampled(2)
@pytest.mark.parametrize("said", [2, 8], ids=["the model's heads", "as many heads as ranks"])
def test_metas_key_and_value_heads_may_be_repeated_over_more_ranks_than_there_are(said: int, tmp_path: Path) -> None:
    """As in Llama 3.1 405B on 16 ranks, whose `n_kv_heads` is 8 in some copies of `params.json` and 16 in others."""
    model = model_of("meta", **TINY | {"heads": 8, "groups": 2, "hidden": 32, "layers": 2}, **THIRD, vocab=64)
    expected = save_family(model, tmp_path / "two", tp=2)
    files = [torch.load(tmp_path / "two" / f"consolidated.0{rank}.pth", weights_only=True) for rank in range(2)]
    source = tmp_path / "eight"

    def save(rank: int, change: dict[str, torch.Tensor]) -> None:
        across = ("wo.weight", "w2.weight")
        state = {
            name: one.clone() if "norm" in name or ".wk." in name or ".wv." in name
            else one.chunk(4, 1 if name.endswith(across) else 0)[rank % 4].clone()
            for name, one in files[rank // 4].items()
        }  # fmt: skip
        torch.save({**state, **change}, source / f"consolidated.0{rank}.pth")

    source.mkdir()
    for rank in range(8):
        save(rank, {})
    params = json.loads((tmp_path / "two" / "params.json").read_text()) | {"n_kv_heads": said}
    (source / "params.json").write_text(json.dumps(params))
    engine.convert("meta-llama", source, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_key_value_heads"] == said
    for name, one in load_file(tmp_path / "hf" / "model.safetensors").items():
        again = name.endswith(("k_proj.weight", "v_proj.weight")) and said == 8
        assert torch.equal(one, expected[name].unflatten(0, (2, -1)).repeat_interleave(4, 0).flatten(0, 1) if again
                           else expected[name]), name  # fmt: skip
    engine.reshard("meta-llama", source, tmp_path / "one", tp=1)
    drifted = files[0]["layers.1.attention.wk.weight"] + 1
    for name, changed, code in (
        ("layers.1.attention.wk.weight", drifted, "E402"),  # a copy that drifted
        ("layers.0.attention.wk.weight", files[1]["layers.0.attention.wk.weight"], "E203"),  # another head
    ):
        save(3, {name: changed})
        with pytest.raises(EngineError, match="wk") as caught:
            engine.convert("meta-llama", source, tmp_path / "bad")
        assert caught.value.code == (code if said == 2 else "E306") and not (tmp_path / "bad").exists()


def test_the_scaling_of_a_release_is_not_that_of_a_model_of_other_sizes(tmp_path: Path) -> None:
    """Llama 3.2 has 32 where Llama 3.1 has 8, and no file says either."""
    config_of(model_of("meta", **TINY, **THIRD, vocab=16), tmp_path / "3.2", use_scaled_rope=True)
    with pytest.raises(EngineError, match="not release `meta-llama-3_1-8b`") as caught:
        engine.plan("meta-llama-3_1-8b", tmp_path / "3.2")
    assert caught.value.code == "E202" and [*caught.value.answers] == ["rope_factor", "config"]
    for factor in (8.0, 32.0):
        plan = engine.plan("meta-llama-3_1-8b", tmp_path / "3.2", settings={"rope_factor": factor})
        assert plan.config["rope_scaling"]["factor"] == factor


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_a_given_configuration_ties_is_left_out_if_it_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    """Llama 3.2's is, and Meta's files hold it too."""
    model, source = model_of("meta", **TINY | {"groups": 2}, vocab=16), tmp_path / "step"
    save_family(model, source)
    for path in source.glob("*.pth") if tied else ():
        state = torch.load(path)
        state["output.weight"] = state["tok_embeddings.weight"].clone()
        torch.save(state, path)
    config = engine.plan("meta-llama", source).config
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    if not tied:
        with pytest.raises(EngineError, match=r"E402.*lm_head"):
            engine.convert("meta-llama", source, tmp_path / "out", config=tmp_path / "config.json")
        return
    engine.convert("meta-llama", source, tmp_path / "out", config=tmp_path / "config.json")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        "lm_head.weight" not in held
        and json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    )
    engine.reverse("meta-llama", tmp_path / "out", tmp_path / "back")
    (path,) = source.glob("*.pth")
    known, back = torch.load(path), torch.load(tmp_path / "back" / path.name)
    assert back and all(torch.equal(one, known[name]) for name, one in back.items()) and "output.weight" in back


@pytest.mark.parametrize(("padding", "known"), [(15, True), (-1, True), (16, False), (-17, False)])
def test_a_padding_token_of_a_given_configuration_with_which_transformers_does_not_load_the_model_is_refused(
    padding: int, known: bool, tmp_path: Path
) -> None:
    config = config_of(model_of("meta", **TINY, vocab=16), tmp_path / "2")  # -1 is in releases of Llama 1
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": padding}))
    if known:
        found = engine.plan("meta-llama", tmp_path / "2", config=tmp_path / "config.json").config
        assert found["pad_token_id"] == padding
        return
    with pytest.raises(EngineError, match="token for padding is beyond the vocabulary") as refused:
        engine.plan("meta-llama", tmp_path / "2", config=tmp_path / "config.json")
    assert refused.value.code == "E218"


def test_the_tokens_at_which_a_given_configuration_ends_are_its_own(tmp_path: Path) -> None:
    """Llama 3.1 Instruct's has three, and params.json has none."""
    config_of(model_of("meta", **TINY, **THIRD, vocab=16), tmp_path / "3.1", use_scaled_rope=True)
    told = {"rope_factor": 8.0, "max_position_embeddings": 131072}
    config = engine.plan("meta-llama", tmp_path / "3.1", settings=told).config
    ends = {"bos_token_id": 3, "eos_token_id": [4, 5, 6]}
    (tmp_path / "config.json").write_text(json.dumps({**config, **ends}))
    plan = engine.plan("meta-llama", tmp_path / "3.1", settings=told, config=tmp_path / "config.json")
    assert {**plan.config, **ends} == plan.config and (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("lines", "gone"),
    [({"n_kv_heads": None, "ffn_dim_multiplier": None}, []), ({"later": {"key": [1]}}, ["multiple_of", "vocab_size"])],
)
def test_params_json_need_not_say_what_the_tensors_do(lines: dict[str, Any], gone: list[str], tmp_path: Path) -> None:
    model = model_of("meta", **TINY | {"groups": 2}, vocab=16)
    expected = save_family(model, tmp_path / "step", tp=2)
    params = json.loads((tmp_path / "step" / "params.json").read_text()) | lines
    (tmp_path / "step" / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k not in gone}))
    same(converted(model, tmp_path / "step"), expected)


def test_a_missing_file_of_metas_is_named(tmp_path: Path) -> None:
    model = model_of("meta", **TINY | {"groups": 2}, vocab=16)
    save_family(replace(model, heads=4, groups=4, hidden=16).sized(), tmp_path / "step", tp=4)
    (tmp_path / "step" / "consolidated.01.pth").unlink()
    with pytest.raises(EngineError, match=r"consolidated\.01\.pth") as caught:
        converted(model, tmp_path / "step")
    assert caught.value.code == "E201"


def test_a_ffn_that_params_json_does_not_give_is_another_models(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ffn") as caught:
        config_of(model_of("meta", **TINY, vocab=16), tmp_path / "step", ffn_dim_multiplier=2.0)
    assert caught.value.code == "E203"
