"""Megatron checkpoints that the engine writes hold what the genuine ones hold, tensor by tensor and bit by bit."""

from __future__ import annotations

import json
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM

import engine
from engine.errors import EngineError
from tests.support.depth import crossed, sampled
from tests.support.frameworks import source_of
from tests.support.frameworks import weights as engine_weights
from tests.support.megatron import FAMILIES, MEGATRON

PADDED = ("word_embeddings.weight", "output_layer.weight")
ARGS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "rotary_base", "rotary_percent", "rotary_interleaved", "position_embedding_type", "normalization",
    "swiglu", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights",
    "padded_vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "num_experts",
)  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """A rank file, with classes of Megatron as nothing."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return (lambda *_: None) if module.startswith("megatron") else super().find_class(module, name)

    module = types.SimpleNamespace(__name__="stubs", Unpickler=Unpickler, load=pickle.load)
    loaded: dict[str, Any] = torch.load(path, weights_only=False, pickle_module=module)
    return loaded


def whole(name: str, family: str, out: Path) -> Path:
    fixture = MEGATRON / name
    engine.convert(family, source_of(fixture), out, config=fixture / "hf_config.json")
    return out


def names(step: Path) -> set[str]:
    """Those of the weights in a distributed checkpoint."""
    metadata = FileSystemReader(step).read_metadata().state_dict_metadata
    return {name for name in metadata if name.endswith((".weight", ".bias"))}


@sampled(2, "family")
@pytest.mark.parametrize(
    ("name", "family", "asked"),
    [
        ("torch-tp2pp2-vpp2", "megatron-llama", {"ranks": "tp=2,pp=2", "chunks": 2}),
        ("torch-ep2-moe", "megatron-mixtral", {"ranks": "ep=2"}),
        ("leg_t4_g2", "megatron-llama", {"ranks": "tp=4", "settings": {"vocab_multiple": 8}}),
        ("torch-tp1pp1-tied", "megatron-llama", {}),
        ("leg_p2_uneven", "megatron-llama", {"like": True}),
        ("torch-qwen3-moe", "megatron-qwen3-moe", {}),
        ("torch-tp2-qwen2-moe", "megatron-qwen2-moe", {"ranks": "tp=2", "settings": {"vocab_multiple": 8}}),
        ("torch-p2-layout", "megatron-llama", {"like": True}),  # its last stage has no layer
    ],
)
def test_legacy_files_hold_what_megatron_saved(name: str, family: str, asked: dict[str, Any], tmp_path: Path) -> None:
    source = source_of(MEGATRON / name)
    if asked.pop("like", False):
        asked |= {"like": source, "settings": {"vocab_multiple": 8}}
    engine.reverse(family, whole(name, family, tmp_path / "hf"), tmp_path / "back", **asked)
    files = sorted(path.relative_to(source) for path in source.glob("mp_rank_*/model_optim_rng.pt"))
    assert files == sorted(path.relative_to(tmp_path / "back") for path in (tmp_path / "back").glob("mp_rank_*/*"))
    vocab = next(
        len(one) for key, one in engine_weights(tmp_path / "hf").items() if key.endswith("embed_tokens.weight")
    )
    for file in files:
        genuine, made = load(source / file), load(tmp_path / "back" / file)
        states = [key for key in genuine if key.startswith("model")]
        assert states and states == [key for key in made if key.startswith("model")]
        assert made["checkpoint_version"] == genuine["checkpoint_version"]
        for key in states:
            tensors = {n: one for n, one in genuine[key].items() if one is not None}
            assert set(tensors) == set(made[key])
            for tensor, one in tensors.items():
                if not tensor.endswith(PADDED):
                    assert torch.equal(one, made[key][tensor]), tensor
                    continue
                tp = made["args"].tensor_model_parallel_size
                rank = int(str(file).split("_")[2].split("/")[0])
                held = max(0, min(len(one), vocab - rank * len(one))) if tp > 1 else vocab
                assert one.shape == made[key][tensor].shape and torch.equal(one[:held], made[key][tensor][:held])
                assert not made[key][tensor][held:].any()
        told = {k: v for k in ARGS if (v := getattr(genuine["args"], k, None)) is not None}
        if "num_experts" in told:  # then the width of dense layers is that of none
            del told["ffn_hidden_size"]
        assert told.items() <= {k: v for k, v in vars(made["args"]).items() if v is not None}.items()


def test_experts_of_one_layer_may_lie_in_several_files(tmp_path: Path) -> None:
    fixture = MEGATRON / "torch-ep2-moe"
    for size in ("2GB", "40kB"):
        hf, back = tmp_path / f"hf-{size}", tmp_path / size
        engine.convert(
            "megatron-mixtral", source_of(fixture), hf, config=fixture / "hf_config.json", max_shard_size=size
        )
        engine.reverse("megatron-mixtral", hf, back, ranks="ep=2")
    one, several = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*.pt")}
        for n in ("2GB", "40kB")
    )
    assert len(list(hf.glob("*.safetensors"))) > 2 and one == several


@pytest.mark.parametrize(
    ("model", "asked"),
    crossed(
        [
            ("dist-tp2pp1-bf16-qkvbias", "megatron-qwen2"),
            ("dist-ep2-moe", "megatron-mixtral"),
            ("torch-qwen3-moe", "megatron-qwen3-moe"),
            ("dist-ep2-qwen2-moe", "megatron-qwen2-moe"),
            ("td19_t2", "megatron-llama"),
        ],
        [{"ranks": "tp=2"}, {"mode": "torch_dist", "ranks": "dp=2"}, {"ranks": "tp=1,pp=2"}],
    ),
)
def test_what_is_written_in_any_form_converts_back_to_the_same_bytes(
    model: tuple[str, str], asked: dict[str, Any], tmp_path: Path
) -> None:
    name, family = model
    first = whole(name, family, tmp_path / "hf")
    engine.reverse(family, first, tmp_path / "back", **asked)
    if "mode" in asked and "moe" not in name:  # each implementation names a mixture's norms in its own way
        assert names(tmp_path / "back") == names(source_of(MEGATRON / name))
    vocab = engine_weights(first)["model.embed_tokens.weight"].shape[0]
    engine.convert(family, tmp_path / "back", tmp_path / "again", settings={"vocab_size": vocab})
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


@sampled(3)
@pytest.mark.parametrize(
    ("asked", "folders"),
    [
        ({"ranks": "pp=1"}, ["mp_rank_00", "mp_rank_01"]),
        ({"ranks": "tp=1"}, ["mp_rank_00_000", "mp_rank_00_001"]),
        ({"mode": "torch", "ranks": "tp=1"}, ["mp_rank_00"]),
        ({"ranks": "tp=1,pp=1"}, ["mp_rank_00"]),
    ],
)
def test_folders_are_named_by_the_ranks_that_are_written_and_not_by_those_that_were_read(
    asked: dict[str, Any], folders: list[str], tmp_path: Path
) -> None:
    fixture = MEGATRON / "torch-tp2pp2-vpp2"
    told = {"config": fixture / "hf_config.json"}
    first = whole("torch-tp2pp2-vpp2", "megatron-llama", tmp_path / "hf")
    engine.reshard("megatron-llama", source_of(fixture), tmp_path / "back", **asked, **told)
    assert sorted(path.name for path in (tmp_path / "back").glob("mp_rank_*")) == folders
    engine.convert("megatron-llama", tmp_path / "back", tmp_path / "again", **told)
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


@sampled(2)
@pytest.mark.parametrize("ranks", [{}, {"ranks": {"dp": 2}}])
def test_what_is_resharded_keeps_its_form_stages_and_padding_without_being_told_the_vocabulary(
    ranks: dict[str, Any], tmp_path: Path
) -> None:
    told = {"config": MEGATRON / "dist-tp2pp2" / "hf_config.json"}
    engine.reshard("megatron-llama", source_of(MEGATRON / "dist-tp2pp2"), tmp_path / "made", **ranks)
    assert len(list((tmp_path / "made").glob("__*_0.distcp"))) == max(2 * len(ranks), 1)
    engine.convert("megatron-llama", tmp_path / "made", tmp_path / "back", **told)
    first = whole("dist-tp2pp2", "megatron-llama", tmp_path / "hf")
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    tied = whole("torch-tp1pp1-tied", "megatron-llama", tmp_path / "tied")
    engine.reverse("megatron-llama", tied, tmp_path / "ranks", pp=2)
    engine.reshard("megatron-llama", tmp_path / "ranks", tmp_path / "more", tp=2)
    assert len(list((tmp_path / "more").glob("mp_rank_*_001"))) == 2


def test_what_a_reshard_of_torch_dist_to_ranks_is_told_to_do_works(tmp_path: Path) -> None:
    source, told = source_of(MEGATRON / "dist-tp2pp2"), {"config": MEGATRON / "dist-tp2pp2" / "hf_config.json"}
    asked: dict[str, Any] = {"tp": 2, "pp": 2}
    for code, fix, more in (
        ("E001", "--mode torch_pp or --mode torch_pp_ep", {"mode": "torch_pp"}),
        ("E214", "Give --to megatron-llama", {"to": "megatron-llama"}),
    ):
        with pytest.raises(EngineError) as caught:
            engine.reshard("megatron-llama", source, tmp_path / "made", **asked, **told)
        assert caught.value.code == code and fix in str(caught.value.fix)
        asked |= more
    engine.reshard("megatron-llama", source, tmp_path / "made", **asked, **told)
    assert len(list((tmp_path / "made").glob("mp_rank_*_*"))) == 4


@sampled(2, "starts")
@pytest.mark.parametrize(
    ("name", "config", "starts"),
    [
        ("dist-ep2-moe", {}, False),
        ("dist-ep2-moe", {"num_local_experts": 1}, False),
        ("torch-qwen3-moe", {"norm_topk_prob": True}, False),
        ("torch-qwen3-moe", {"norm_topk_prob": False}, True),
    ],
)
def test_a_router_of_one_expert_is_written_only_where_it_weighs_it_by_its_probability(
    name: str, config: dict[str, Any], starts: bool, tmp_path: Path
) -> None:
    """Megatron does not start with another, as its router would learn nothing."""
    family = FAMILIES[name]
    first = whole(name, family, tmp_path / "hf")
    told = json.loads((first / "config.json").read_text()) | {"num_experts_per_tok": 1, **config}
    (first / "config.json").write_text(json.dumps(told))
    if told.get("num_local_experts") == 1:
        tensors = {name: one for name, one in engine_weights(first).items() if ".experts." not in name}
        alone = {name: one for name, one in engine_weights(first).items() if ".experts.0." in name}
        gates = {name: one[:1].clone() for name, one in tensors.items() if name.endswith(".gate.weight")}
        save_file(tensors | alone | gates, first / "model.safetensors", {"format": "pt"})
    if starts:
        assert engine.plan_reverse(family, first).config["moe_router_pre_softmax"] is True
        return
    with pytest.raises(EngineError, match=r"`num_experts_per_tok` of .* would be lost: .* weighs it by its") as caught:
        engine.plan_reverse(family, first)
    assert caught.value.code == "E209"


@pytest.mark.parametrize("name", ["dist-ep2-moe", "torch-qwen3-moe"])
def test_more_experts_for_a_token_than_there_are_are_told_with_both_numbers(name: str, tmp_path: Path) -> None:
    first = whole(name, FAMILIES[name], tmp_path / "hf")
    told = json.loads((first / "config.json").read_text()) | {"num_experts_per_tok": 99}
    (first / "config.json").write_text(json.dumps(told))
    with pytest.raises(EngineError, match=r"chosen = 99 from .* has num_experts \d") as caught:
        engine.plan_reverse(FAMILIES[name], first)
    assert caught.value.code == "E218"


def test_a_mode_of_other_ranks_than_are_written_is_refused(tmp_path: Path) -> None:
    first = whole("leg_t4_g2", "megatron-llama", tmp_path / "hf")
    with pytest.raises(EngineError, match="not that of these ranks") as caught:
        engine.reverse("megatron-llama", first, tmp_path / "back", mode="torch_pp", ranks="tp=2")
    assert caught.value.code == "E214" and not (tmp_path / "back").exists()


@sampled(2)
@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (6, 2), (8, 2), (4, 4), (12, 1)])
def test_attention_is_cut_over_the_ranks_that_megatron_starts_with_and_no_others(
    heads: int, groups: int, tmp_path: Path
) -> None:
    """Heads divide by ranks, and of the groups of queries and the ranks one divides by the other."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=heads, head_dim=32,
        num_key_value_heads=groups, vocab_size=48,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    works = [tp for tp in range(1, 13) if heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)]
    works = [tp for tp in works if (heads + 2 * groups) * 32 % tp == 0]  # the rows of queries, keys and values
    for tp in range(1, 13):
        if tp in works:
            engine.plan_reverse("megatron-llama", tmp_path, tp=tp)
            continue
        with pytest.raises(EngineError) as caught:
            engine.plan_reverse("megatron-llama", tmp_path, tp=tp)
        assert caught.value.code == "E214" and str(caught.value.expected) == f"--tp {', '.join(map(str, works))}"


def test_ranks_that_megatron_cannot_have_are_refused(tmp_path: Path) -> None:
    first = whole("leg_t4_g2", "megatron-llama", tmp_path / "hf")
    with pytest.raises(EngineError) as caught:
        engine.reverse("megatron-llama", first, tmp_path / "back", ranks="tp=5")
    assert caught.value.code == "E214"
    with pytest.raises(EngineError, match="vocab_size contradicts the configuration"):
        engine.reverse("megatron-llama", first, tmp_path / "back", settings={"vocab_size": 99})
    config = json.loads((first / "config.json").read_text())
    engine.plan_reverse("megatron-llama", first, settings={"vocab_size": config["vocab_size"]})  # says the same
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for scaled in ({"rope_scaling": scaling}, {"rope_parameters": {**scaling, "rope_theta": 10000.0}}):
        with pytest.raises(EngineError, match="original_max_position_embeddings"):
            (first / "config.json").write_text(json.dumps({**config, "rope_parameters": None, **scaled}))
            engine.reverse("megatron-llama", first, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_megatron_would_be_refused_for_when_it_is_read_is_not_written(tmp_path: Path) -> None:
    first = whole("torch-qwen3-moe", "megatron-qwen3-moe", tmp_path / "hf")
    config = json.loads((first / "config.json").read_text())
    scaled = {**config["rope_parameters"], "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    (first / "config.json").write_text(json.dumps({**config, "rope_parameters": scaled, "rope_scaling": None}))
    with pytest.raises(EngineError, match="what is written would be refused: what `use_rope_scaling`") as caught:
        engine.plan_reverse("megatron-qwen3-moe", first)
    assert caught.value.code == "E216"


def test_a_tied_model_has_its_embedding_again_on_the_last_of_several_stages(tmp_path: Path) -> None:
    first = whole("torch-tp1pp1-tied", "megatron-llama", tmp_path / "hf")
    engine.reverse("megatron-llama", first, tmp_path / "back", tp=2, pp=2)
    for tp in range(2):
        embedding = load(tmp_path / "back" / f"mp_rank_0{tp}_000" / "model_optim_rng.pt")["model"]
        last = load(tmp_path / "back" / f"mp_rank_0{tp}_001" / "model_optim_rng.pt")["model"]
        assert torch.equal(last["output_layer.weight"], embedding["embedding.word_embeddings.weight"])
    vocab = engine_weights(first)["model.embed_tokens.weight"].shape[0]
    engine.convert("megatron-llama", tmp_path / "back", tmp_path / "again", settings={"vocab_size": vocab})
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    with pytest.raises(EngineError) as caught:  # one stage holds another set of tensors
        engine.reshard(
            "megatron-llama", tmp_path / "back", tmp_path / "one", tp=1, pp=1, settings={"vocab_size": vocab}
        )
    assert caught.value.code == "E214" and "--to megatron-llama" in str(caught.value.fix)
    engine.reshard(
        "megatron-llama", tmp_path / "back", tmp_path / "one", tp=1, pp=1, to="megatron-llama",
        settings={"vocab_size": vocab},
    )  # fmt: skip
    assert "output_layer.weight" not in load(tmp_path / "one" / "mp_rank_00" / "model_optim_rng.pt")["model"]


@sampled(2)
@pytest.mark.parametrize("asked", [{"ranks": "tp=2"}, {"ranks": "pp=2"}, {"mode": "torch_dist"}])
def test_a_stored_head_of_a_tied_model_is_written_where_it_belongs_if_it_is_a_copy(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    first = whole("torch-tp1pp1-tied", "megatron-llama", tmp_path / "hf")
    tensors, file = engine_weights(first), first / "model.safetensors"
    engine.reverse("megatron-llama", first, tmp_path / "without", **asked)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    engine.reverse("megatron-llama", first, tmp_path / "copy", **asked)
    for one in (path for path in (tmp_path / "without").rglob("*") if path.suffix in (".pt", ".distcp")):
        assert one.read_bytes() == (tmp_path / "copy" / one.relative_to(tmp_path / "without")).read_bytes()
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(EngineError) as caught:
        engine.reverse("megatron-llama", first, tmp_path / "other", **asked)
    assert caught.value.code == "E402" and not (tmp_path / "other").exists()
