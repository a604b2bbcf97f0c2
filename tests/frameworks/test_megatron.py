"""Genuine Megatron-Core checkpoints, legacy and torch_dist, convert to models with Megatron's own logits."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint.metadata import MetadataIndex

import engine
from engine.checkpoint.folder import read_configuration
from engine.commands.main import cli
from engine.errors import EngineError
from engine.language.expressions import evaluate
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning.config_keys import read_config, source_side, target_side
from engine.planning.reading import read_checkpoint
from engine.storage.local import LocalStore
from tests.support.depth import sampled
from tests.support.frameworks import logits_off, source_of, weights
from tests.support.megatron import FAMILIES, MEGATRON, convert, rewritten


@sampled(3, lambda row: FAMILIES[row["name"]])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_gives_megatrons_own_logits(name: str, tmp_path: Path) -> None:
    convert(name, tmp_path / "out")
    assert logits_off(tmp_path / "out", MEGATRON / name / "oracle.pt") < 1e-4


def test_an_output_that_holds_files_behind_links_to_rank_folders_is_refused(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(source_of(MEGATRON / "torch-tp1pp1-tied"), out)
    source.mkdir()
    (source / "mp_rank_00").symlink_to(out / "mp_rank_00")
    with pytest.raises(EngineError) as caught:
        convert("torch-tp1pp1-tied", out, source, overwrite=True)
    assert caught.value.code == "E404"


@sampled(2)
@pytest.mark.parametrize(("one", "other"), [("torch-tp2pp2-vpp2", "dist-tp2pp2"), ("torch-ep2-moe", "dist-ep2-moe")])
def test_a_model_is_the_same_files_from_either_format(one: str, other: str, tmp_path: Path) -> None:
    convert(one, tmp_path / "one")
    convert(other, tmp_path / "other")
    files = {path.name for path in (tmp_path / "one").iterdir()} - {"conversion.json", "README.md"}
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_the_vocabulary_without_its_padding_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="vocab_size") as caught:
        convert("torch-tp1pp1-tied", tmp_path / "out", config=None)
    assert caught.value.code == "E202"
    assert "not told" not in str(caught.value) and "one of told" not in str(caught.value)  # the question is enough
    convert("torch-tp1pp1-tied", tmp_path / "out", config=None, settings={"vocab_size": 259})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] is config["eos_token_id"] is None  # the class would take 1 and 2
    assert logits_off(tmp_path / "out", MEGATRON / "torch-tp1pp1-tied" / "oracle.pt") < 1e-4


SWIFT = argparse.Namespace(model="base", model_type="llama", tensor_model_parallel_size=2, moe_grouped_gemm=True)


@pytest.mark.parametrize(
    ("name", "common"),
    [
        ("dist-tp2pp2", None),
        ("dist-tp2pp2", {}),
        pytest.param("dist-tp2pp2", {"args": SWIFT, "checkpoint_version": 3.0, "iteration": 10}, id="ms-swift 4"),
        ("leg_t2_distopt", None),
    ],
    ids=str,
)
def test_without_arguments_the_models_configuration_counts_and_the_rest_is_asked_for(
    name: str, common: object, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """verl saves the model alone, and then core before 0.14 has nothing for its `common.pt`; ms-swift since 4.0 saves
    arguments of its own there, which describe no model."""
    source, told = copy(name), {"rotary": "halves"}
    rewritten(source, lambda args: args.clear())
    (source / "common.pt").unlink(missing_ok=True)
    if common is not None:
        torch.save(common, source / "common.pt")
    for code, options in (("E304", {"config": None}), ("E202", {})):
        with pytest.raises(EngineError) as caught:
            convert(name, tmp_path / "out", source, **options)
        assert caught.value.code == code and "common.pt" in str(caught.value)
    found = engine.inspect(source)
    assert found.facts["layout"] == "megatron" and {fit.code for fit in found.fitting} == {"E202"}
    convert(name, tmp_path / "out", source, settings=told)
    convert(name, tmp_path / "known")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "known" / file).read_bytes()


def test_arguments_that_lack_a_size_of_the_model_are_still_its_own(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(num_layers=4)}, tmp_path / "common.pt")
    found = read_configuration(LocalStore(tmp_path), load_layout("megatron"), needed=False)
    assert found == ("common.pt", {"num_layers": 4})


def test_a_directory_of_the_class_that_core_0_15_derives_from_torchs_is_read(tmp_path: Path) -> None:
    assert b"MCoreMetadata" in (source_of(MEGATRON / "td15_t1") / ".metadata").read_bytes()
    convert("td15_t1", tmp_path / "out")
    assert logits_off(tmp_path / "out", MEGATRON / "td15_t1" / "oracle.pt") < 1e-4


def test_layers_that_tensors_stack_are_all_in_the_one_stage() -> None:
    name = "dist-tp2pp2"
    plan = engine.plan("megatron-llama", source_of(MEGATRON / name), config=MEGATRON / name / "hf_config.json")
    assert list(plan.stages.counts.values()) == [plan.sizes["layer"]]


def test_a_run_may_be_shorter_than_the_longest_sequence_of_its_model(tmp_path: Path) -> None:
    folder = MEGATRON / "torch-tp1pp1-tied"
    config = json.loads((folder / "hf_config.json").read_text()) | {"max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = engine.plan("megatron-llama", source_of(folder), config=tmp_path / "config.json")
    assert plan.config["max_position_embeddings"] == 4096
    plan = engine.plan("megatron-llama", source_of(folder), settings={"vocab_size": 259})
    assert plan.config["max_position_embeddings"] == 64


@pytest.mark.parametrize(("mapping", "like"), [("llama", "torch-tp1pp1-tied"), ("mixtral", "torch-ep2-moe")])
def test_biases_that_the_target_would_leave_out_are_refused_where_no_argument_tells_them(
    mapping: str, like: str, copy: Callable[[str], Path]
) -> None:
    source = copy("dist-tp2pp1-bf16-qkvbias")
    rewritten(source, lambda args: args.clear())
    (source / "common.pt").unlink(missing_ok=True)
    config, told = MEGATRON / like / "hf_config.json", {"rotary": "halves", "vocabulary": "told"}
    with pytest.raises(EngineError, match="variant `biases`") as caught:
        engine.plan(f"megatron-{mapping}", source, config=config, settings=told)
    assert caught.value.code == "E202" and "Qwen2's have them" in str(caught.value)


def test_the_angles_that_core_before_0_4_saved_are_no_weights(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Megatron drops them when it loads such files."""
    folder = copy("torch-tp1pp1-tied")
    rewritten(folder, lambda args: None)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    saved["model"]["rotary_pos_emb.inv_freq"] = torch.ones(4)
    torch.save(saved, path)
    told = convert("torch-tp1pp1-tied", tmp_path / "out", folder).notices
    assert any("rotary_pos_emb.inv_freq" in one for one in told)


@pytest.mark.filterwarnings("ignore")
def test_names_behind_nemos_prefix_are_the_same_tensors(tmp_path: Path) -> None:
    source = source_of(MEGATRON / "dist-tp2pp2")
    listed = dcp.FileSystemReader(str(source)).read_metadata().state_dict_metadata
    state = {name: torch.empty(one.size) for name, one in listed.items() if hasattr(one, "size")}
    dcp.load(state, checkpoint_id=str(source), no_dist=True)
    dcp.save({f"module.{n}": one for n, one in state.items()}, checkpoint_id=str(tmp_path / "nemo"), no_dist=True)
    shutil.copy(source / "metadata.json", tmp_path / "nemo")
    convert("dist-tp2pp2", tmp_path / "out", tmp_path / "nemo", settings={"rotary": "halves"})
    convert("dist-tp2pp2", tmp_path / "known")
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "known"))
    assert one.read_bytes() == other.read_bytes()


@sampled(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dcp-tp1", "dist-ep2-moe"])
def test_what_megatrons_own_fsdp_saves_is_the_same_tensors(name: str, tmp_path: Path) -> None:
    """`--ckpt-format fsdp_dtensor`: behind its wrapper's name, gate and up apart, experts numbered over all ranks."""
    source = source_of(MEGATRON / name)
    listed = dcp.FileSystemReader(str(source)).read_metadata().state_dict_metadata
    state = {n: torch.empty(one.size) for n, one in listed.items() if hasattr(one, "size") and "rng" not in n}
    dcp.load(state, checkpoint_id=str(source), no_dist=True)
    held_args = read_checkpoint(source, load_layout("megatron")).config
    args = {key: value for key, value in held_args.items() if type(value).__module__ == "builtins"}
    saved: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 10}
    for n, whole in ((n.removeprefix("model."), one) for n, one in state.items()):
        stacked = n.startswith("decoder.layers.") and not n[15].isdigit()
        for layer, one in enumerate(whole) if stacked else [(None, whole)]:
            own = n.replace("layers.", f"layers.{layer}.") if stacked else n
            each = enumerate(one) if ".experts.experts." in own else [("", one)]
            for expert, held in each:
                key = "model.module." + own.replace("experts.experts", "experts") + str(expert)
                halves = zip(("_w", "_v"), held.chunk(2), strict=True) if "linear_fc1.weight" in key else [("", held)]
                saved |= {key + half: part.clone() for half, part in halves}
    dcp.save(saved, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    convert(name, tmp_path / "out", tmp_path / "step")
    convert(name, tmp_path / "known")
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "known"))
    assert one.read_bytes() == other.read_bytes()


@sampled(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alone", [False, True], ids=["--moe-layer-freq [1,1,1,1]", "singleton_local_shards"])
def test_layers_of_experts_that_are_not_stacked_are_the_same_tensors(alone: bool, tmp_path: Path) -> None:
    source = source_of(MEGATRON / "dist-ep2-moe")
    listed = dcp.FileSystemReader(str(source)).read_metadata().state_dict_metadata
    state = {name: torch.empty(one.size) for name, one in listed.items() if hasattr(one, "size")}
    dcp.load(state, checkpoint_id=str(source), no_dist=True)
    for name in [name for name in state if name.startswith("decoder.layers.")]:
        for layer, whole in enumerate(state.pop(name)):
            own = name.replace("layers.", f"layers.{layer}.")
            experts = enumerate(whole) if alone and ".experts." in name else ()
            for e, one in experts:
                each = own.replace("experts.experts", f"experts.experts.{e}")
                state |= {f"{each}_w": one.chunk(2)[0], f"{each}_v": one.chunk(2)[1]} if "fc1" in name else {each: one}
            state |= {} if alone and ".experts." in name else {own: whole}
    shutil.copytree(source, tmp_path / "step", ignore=shutil.ignore_patterns("__*", ".metadata"))
    dcp.save({name: one.clone() for name, one in state.items()}, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    rewritten(tmp_path / "step", lambda args: args.update(moe_layer_freq=[1] * 4))
    convert("dist-ep2-moe", tmp_path / "out", tmp_path / "step")
    convert("dist-ep2-moe", tmp_path / "known")
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "known"))
    assert one.read_bytes() == other.read_bytes()


def _experts_as(folder: Path, of: Callable[[int], int]) -> None:
    """Write, in a genuine `torch_dist`, the weights of another expert in the place of each."""
    held = dcp.FileSystemReader(str(folder)).read_metadata().storage_data
    files = {path.name: bytearray(path.read_bytes()) for path in folder.glob("__*.distcp")}
    for index, place in sorted(held.items(), key=lambda one: tuple(one[0].offset or ())):
        if ".experts." in index.fqn and index.offset is not None:
            layer, expert, *rest = index.offset
            key = MetadataIndex(index.fqn, torch.Size([layer, of(expert), *rest]))
            other = next(info for one, info in held.items() if one == key)
            assert other.length == place.length
            data = files[other.relative_path][other.offset : other.offset + other.length]
            files[place.relative_path][place.offset : place.offset + place.length] = data
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_experts_may_all_be_equal_as_after_upcycling(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """`--moe-use-upcycling` saves copies of the dense model's MLP; a rank's file over another's is still refused."""
    upcycled = copy("dist-ep2-moe")
    _experts_as(upcycled, lambda expert: 0)
    told = [one for one in convert("dist-ep2-moe", tmp_path / "out", upcycled).notices if "if a file was copied" in one]
    assert ["experts.{0…3}.w1.weight" in one for one in told] == [True]  # a rank's only expert may be a copied file
    found = {name: one for name, one in weights(tmp_path / "out").items() if ".experts." in name}
    assert found and all(one.equal(found[re.sub(r"experts\.\d", "experts.0", name)]) for name, one in found.items())
    shutil.rmtree(upcycled)
    copied = copy("dist-ep2-moe")
    _experts_as(copied, lambda expert: expert % 2)
    with pytest.raises(EngineError, match="hold the same slice") as caught:
        convert("dist-ep2-moe", tmp_path / "copied", copied)
    assert caught.value.code == "E306"


@pytest.mark.parametrize(
    ("same_as", "ranks_told", "taken"),
    [
        (lambda expert: 0, False, True),
        (lambda expert: expert % 2, False, False),
        (lambda expert: expert % 2, True, True),
    ],
    ids=["all", "as of a copied file", "as of a granularity of 2, where arguments tell ranks"],
)
def test_files_of_expert_ranks_may_be_equal_as_after_upcycling(
    same_as: Callable[[int], int], ranks_told: bool, taken: bool, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    rewritten(folder := copy("torch-ep2-moe"), lambda args: None)
    saved = [torch.load(folder / f"mp_rank_00_00{ep}" / "model_optim_rng.pt", weights_only=False) for ep in (0, 1)]
    held = {(name, ep): one.clone() for ep in (0, 1) for name, one in saved[ep]["model"].items() if one is not None}
    for ep, one in enumerate(saved):
        for name in (name for name, tensor in one["model"].items() if tensor is not None and "local_experts" in name):
            of, number = divmod(same_as(ep * 2 + int(name.split("local_experts.")[1][0])), 2)
            one["model"][name] = held[re.sub(r"local_experts\.\d", f"local_experts.{number}", name), of]
        one["args"].rank = ep if ranks_told else 0
        torch.save(one, folder / f"mp_rank_00_00{ep}" / "model_optim_rng.pt")
    with nullcontext() if taken else pytest.raises(EngineError, match=r"E306 .* hold the same tensors"):
        told = convert("torch-ep2-moe", tmp_path / "out", folder).notices
        assert any("as after upcycling, or if a file was copied" in one for one in told)
        found = {name: one for name, one in weights(tmp_path / "out").items() if ".experts." in name}
        pairs = ((name, re.sub(r"(?<=experts\.)\d", lambda n: str(same_as(int(n[0]))), name)) for name in found)
        assert found and all(torch.equal(found[name], found[other]) for name, other in pairs)


def test_each_command_that_reads_a_training_checkpoint_takes_its_config_json(tmp_path: Path) -> None:
    """Messages of any of them say to give it."""
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    taken = [{flag for one in command.params for flag in one.opts} for command in commands if command is not None]
    assert all("--config" in flags for flags in taken if "--mapping" in flags)
    convert("dist-tp2pp2", tmp_path / "out")
    given = ("-m", FAMILIES["dist-tp2pp2"], "--config", str(MEGATRON / "dist-tp2pp2" / "hf_config.json"))
    done = CliRunner().invoke(cli, ["compare", str(tmp_path / "out"), str(source_of(MEGATRON / "dist-tp2pp2")), *given])
    assert done.exit_code == 0 and "39 equal" in done.output


def test_without_arguments_a_second_number_of_a_folder_is_not_guessed(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copy("torch-ep2-moe")
    rewritten(source, lambda args: args.clear())
    with pytest.raises(EngineError, match="pipeline stages or experts") as caught:
        convert("torch-ep2-moe", tmp_path / "out", source)
    assert caught.value.code == "E303"


def test_a_folder_for_each_tensor_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "step" / "embedding.word_embeddings.weight").mkdir(parents=True)
    (tmp_path / "step" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(EngineError, match="zarr") as caught:
        engine.inspect(tmp_path / "step")
    assert caught.value.code == "E303"


def test_a_vocabulary_larger_than_the_padded_one_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="correct it there") as caught:
        convert("leg_t2_distopt", tmp_path / "out", config=None, settings={"vocab_size": 145})
    assert caught.value.code == "E202"


@pytest.mark.parametrize(("name", "tokens"), [("leg_t4_g2", 100), ("dist-ep2-moe", 100), ("leg_t2_distopt", 130)])
def test_a_vocabulary_of_fewer_tokens_than_megatron_had_is_asked_for(name: str, tokens: int, tmp_path: Path) -> None:
    """Tokens would be dropped as padding: of a model that was extended, by the configuration from before.

    Megatron would not have padded 100 so far. It would have padded 130 as far as the 131 of `args.vocab_size`, to which
    a tokenizer may add but from which it takes nothing.
    """
    told: dict[str, Any] = json.loads((MEGATRON / name / "hf_config.json").read_text()) | {"vocab_size": tokens}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for options in ({"config": None, "settings": {"vocab_size": tokens}}, {"config": tmp_path / "config.json"}):
        with pytest.raises(EngineError, match="vocabulary") as caught:
            convert(name, tmp_path / "out", **options)
        assert caught.value.code == "E202"


@pytest.mark.parametrize("began", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("tokens", [259, 5000, 92544])
def test_a_vocabulary_padded_for_the_ranks_that_training_began_with_is_as_megatron_keeps_it(
    began: int, tokens: int
) -> None:
    """`--use-checkpoint-args` takes the padded size of the files, on however few ranks it goes on."""
    told = load_mapping("megatron-llama").variants["vocabulary"].choices["told"]
    assert told is not None
    padded = -(-tokens // (128 * began)) * 128 * began
    names = {
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "given": {"vocab_size": tokens},
        "options": {"vocab_size": None},
    }
    for size, expected in ((padded, True), (padded + 8192, False)):
        assert evaluate(told, {**names, "padded_vocab_size": size}) is expected, size


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        convert("leg_t2_distopt", tmp_path / "out", config=MEGATRON / "torch-tp1pp1-tied" / "hf_config.json")
    assert caught.value.code == "E202" and "if config.json has more" in str(caught.value)


@sampled(2, "code")
@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("hidden_act", "gelu", "E209"), ("sliding_window", 16, "E209"), ("partial_rotary_factor", 0.5, "E209"),
        ("quantization_config", {"quant_method": "fp8"}, "E209"), ("unheard_of", 1, "E219"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "E218"), ("pad_token_id", 5000, "E202"),
    ],
)  # fmt: skip
def test_what_training_cannot_have_is_not_taken_from_a_given_configuration(
    key: str, value: Any, code: str, tmp_path: Path
) -> None:
    """It would complete the written one: the mapping writes no such key."""
    given = json.loads((MEGATRON / "leg_t2_distopt" / "hf_config.json").read_text())
    given.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(given))
    convert("leg_t2_distopt", tmp_path / "well", config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(given | {key: value}))
    with pytest.raises(EngineError) as caught:
        convert("leg_t2_distopt", tmp_path / "out", config=tmp_path / "config.json")
    assert caught.value.code == code and not (tmp_path / "out").exists()


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(source_of(MEGATRON / name), tmp_path / "copy"))


@sampled(2, "code")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"apply_layernorm_1p": True}, "E202"), ({"heterogeneous_layers_config_encoded_json": "{}"}, "E209"),
        ({"normalization": "LayerNorm"}, "E209"), ({"swiglu": False}, "E209"),
        ({"multi_latent_attention": True}, "E209"), ({"rotary_percent": 0.5}, "E209"), ({"num_layers": 5}, "E203"),
        ({"make_vocab_size_divisible_by": 0}, "E218"),
        ({"hidden_size": 32}, "E203"), ({"padded_vocab_size": 128}, "E202"), ({"add_bias_linear": True}, "E209"),
    ],
)  # fmt: skip
def test_arguments_that_mean_another_model_are_refused(
    change: dict[str, Any], code: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("leg_t2_distopt")
    rewritten(folder, lambda args: args.update(change))
    with pytest.raises(EngineError) as caught:
        convert("leg_t2_distopt", tmp_path / "out", folder, config=None, settings={"vocab_size": 131})
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


SILENT: dict[str, Any] = {  # what changes the model and no tensor's name, as Megatron's own arguments are called
    "activation_func_clamp_value": 7.0, "apply_residual_connection_post_layernorm": True, "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net", "glu_linear_offset": 1.0, "is_hybrid_model": True,
    "linear_attention_freq": 4, "moe_apply_probs_on_input": True,
    "moe_expert_capacity_factor": 1.5, "moe_latent_size": 64, "moe_layer_freq": [0, 1], "moe_router_force_biased": 1.0,
    "moe_mlp_glu_interleave_size": 32, "moe_router_enable_expert_bias": True, "moe_router_force_load_balancing": True,
    "moe_router_load_balancing_type": "sinkhorn", "moe_router_num_groups": 4, "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5, "no_rope_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 24, "mtp_num_layers": 1, "position_embedding_type": "none",
    "qk_l2_norm": True, "quick_geglu": True, "rotary_seq_len_interpolation_factor": 2, "softmax_scale": 0.5,
    "softmax_type": "learnable", "squared_relu": True, "use_mup": True, "window_size": [128, 0],
    "moe_router_topk_limited_devices": 2, "rope_scaling_type": "yarn", "scale_emb": 12, "geglu": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        *(("mixtral", *setting) for setting in SILENT.items()),
        ("qwen3-moe", "norm_topk_prob", True),
        ("qwen3-moe", "moe_shared_expert_intermediate_size", 24),
        ("qwen2-moe", "moe_shared_expert_gate", False),
        ("qwen2-moe", "qk_layernorm", True),
        ("qwen2-moe", "add_qkv_bias", False),
    ],
)
def test_a_setting_that_no_name_shows_is_refused_by_its_own(family: str, key: str, value: Any) -> None:
    mapping, layout = load_mapping(f"megatron-{family}"), load_layout("megatron")
    with pytest.raises(EngineError, match=key) as caught:
        read_config({key: value}, source_side(mapping, layout))
    assert caught.value.code == "E209"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_seq_len_interpolation_factor", 1),
        ("heterogeneous_block_specs", False),
        ("moe_router_topk_scaling_factor", 1.0),
        ("no_rope_freq", [0, 0]),
        ("moe_router_num_groups", 1),
        ("moe_router_group_topk", 1),
        ("moe_expert_capacity_factor", -1.0),
    ],
)
def test_a_setting_that_changes_nothing_is_accepted(key: str, value: Any) -> None:
    """As positions that are divided by one in Megatron-LM's example of Qwen3."""
    config = dict(read_checkpoint(source_of(MEGATRON / "dist-tp2pp2"), load_layout("megatron")).config)
    read_config(config | {key: value}, source_side(load_mapping("megatron-llama"), load_layout("megatron")))


@sampled(3)
@pytest.mark.parametrize(
    "key",
    [
        "rotary_base", "rotary_percent", "rotary_interleaved", "use_rope_scaling",
        "swiglu", "normalization", "position_embedding_type", "add_bias_linear", "moe_router_topk",
        "moe_router_pre_softmax", "num_attention_heads", "layernorm_epsilon",
    ],
)  # fmt: skip
def test_an_argument_that_no_tensor_shows_is_not_assumed_where_it_is_absent(
    key: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """All of a run's arguments are written together: one that is not there was lost, or means Megatron's default."""
    folder = copy("torch-ep2-moe")
    rewritten(folder, lambda args: args.pop(key))
    with pytest.raises(EngineError, match=key) as caught:
        convert("torch-ep2-moe", tmp_path / "out", folder)
    assert caught.value.code in ("E105", "E209", "E218") and not (tmp_path / "out").exists()


def test_the_arguments_of_core_0_6_and_0_7_had_no_rotary_base_and_the_model_10000(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    later = ("rotary_base", "cross_entropy_loss_fusion", "moe_layer_freq", "multi_latent_attention", "use_rope_scaling",
             "rope_scaling_factor", "moe_router_score_function", "moe_router_pre_softmax")  # fmt: skip
    folder = copy("torch-ep2-moe")
    rewritten(folder, lambda args: [args.pop(key, None) for key in later])
    convert("torch-ep2-moe", tmp_path / "out", folder)
    assert logits_off(tmp_path / "out", MEGATRON / "torch-ep2-moe" / "oracle.pt") < 1e-4
    rewritten(folder, lambda args: args.update(moe_router_topk=1))  # weighed by 1 then, as Mixtral's; refused since 0.8
    mapping, config = FAMILIES["torch-ep2-moe"], MEGATRON / "torch-ep2-moe" / "hf_config.json"
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 1}))
    assert engine.plan(mapping, folder, config=tmp_path / "config.json").config["num_experts_per_tok"] == 1


def test_a_factor_of_scaled_angles_that_megatron_does_not_pass_to_its_model_is_asked_for(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPTModel is built with `rope_scaling=args.use_rope_scaling` alone (0.10 to 0.19), and has 8."""
    source, told = copy("leg_t4_g2"), {"vocab_size": 131}
    rewritten(source, lambda args: args.update(use_rope_scaling=True))
    config = engine.plan("megatron-llama", source, settings=told).config
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8
    given = json.loads((MEGATRON / "leg_t4_g2" / "hf_config.json").read_text())
    given = {key: value for key, value in given.items() if "rope" not in key}
    for spelling in ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000.0}}):
        (tmp_path / "config.json").write_text(json.dumps(given | spelling))
        with pytest.raises(EngineError, match=r"does not belong to this checkpoint: `rope_parameters\.rope_type`"):
            engine.plan("megatron-llama", source, config=tmp_path / "config.json")
    rewritten(source, lambda args: args.update(use_rope_scaling=True, rope_scaling_factor=32.0))
    with pytest.raises(EngineError, match="rope_factor") as caught:
        convert("leg_t4_g2", tmp_path / "out", source, config=None, settings=told)
    assert caught.value.code == "E202"
    convert("leg_t4_g2", tmp_path / "out", source, config=None, settings={**told, "rope_factor": 8})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8
    engine.reverse("megatron-llama", tmp_path / "out", tmp_path / "back", tp=1, pp=1)
    for path, part in ((config, "rope_parameters"), (config, "rope_scaling")):
        path[part]["factor"] = 32.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"  rope_scaling_factor is not 8.*--set rope_factor=8") as caught:
        engine.reverse("megatron-llama", tmp_path / "out", tmp_path / "again", tp=1, pp=1)
    assert "scaling=told" not in str(caught.value) and caught.value.answers  # which decides nothing here
    told = {"rope_factor": 32}
    engine.reverse("megatron-llama", tmp_path / "out", tmp_path / "again", tp=1, pp=1, settings=told)


@pytest.mark.parametrize("name", ["rope_theta_local", "use_moe_gate_norm", "embedding_scale"])
def test_an_argument_of_a_fork_that_sounds_like_the_model_is_told(name: str) -> None:
    side = source_side(load_mapping("megatron-llama"), load_layout("megatron"))
    args = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False}
    assert set(read_config({**args, name: 2, "lr": 1.0}, side).noted) == {name}


def test_code_of_its_own_beside_a_model_is_refused() -> None:
    with pytest.raises(EngineError, match="auto_map") as caught:
        read_config({"auto_map": {"AutoModel": "own.X"}}, target_side(load_mapping("megatron-qwen3")))
    assert caught.value.code == "E209"


def test_both_forms_of_a_checkpoint_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    for name in ("torch-tp1pp1-tied", "dist-tp2pp2"):
        shutil.copytree(source_of(MEGATRON / name), folder, dirs_exist_ok=True)
    with pytest.raises(EngineError, match="two parallel modes"):
        convert("dist-tp2pp2", tmp_path / "out", folder)


def test_an_old_order_of_queries_keys_and_values_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("leg_t2_distopt")
    rewritten(folder, lambda args: None, checkpoint_version=1.0)
    with pytest.raises(EngineError, match="checkpoint_version"):
        convert("leg_t2_distopt", tmp_path / "out", folder)


@pytest.mark.parametrize(
    ("name", "lost", "claim"),
    [
        ("torch-tp2pp2-vpp2", "mp_rank_01_000", "of a grid of tp 2 × pp 2"),
        ("torch-ep2-moe", "mp_rank_00_001", "in mp_rank_00_000/model_optim_rng.pt"),
        ("leg_t4_g2", "mp_rank_03", "in mp_rank_00/model_optim_rng.pt"),
    ],
)
def test_a_missing_rank_is_refused_by_its_name_and_with_what_claims_it(
    name: str, lost: str, claim: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy(name)
    shutil.rmtree(folder / lost)
    with pytest.raises(EngineError, match=lost) as caught:
        convert(name, tmp_path / "out", folder)
    assert claim in str(caught.value)
    assert caught.value.code == "E201"


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("leg_p2_uneven", "mp_rank_00_000", "mp_rank_00_001"), ("leg_t4_g2", "mp_rank_01", "mp_rank_02"),
        ("torch-ep2-moe", "mp_rank_00_000", "mp_rank_00_001"),
        ("torch-tp2pp2-vpp2", "mp_rank_00_001", "mp_rank_01_001"),
    ],
)  # fmt: skip
def test_exchanged_ranks_are_refused_by_what_they_say_of_themselves(
    name: str, one: str, other: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy(name)
    (folder / one).rename(folder / "x")
    (folder / other).rename(folder / one)
    (folder / "x").rename(folder / other)
    with pytest.raises(EngineError, match=f"was saved as `{other}/") as caught:
        convert(name, tmp_path / "out", folder)
    assert caught.value.code == "E306"


def test_files_named_for_other_ranks_than_the_arguments_tell_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("torch-ep2-moe")
    rewritten(folder, lambda args: args.update(expert_model_parallel_size=1))
    with pytest.raises(EngineError, match="E304 the configuration does not belong to these files"):
        engine.plan("megatron-mixtral", folder, config=MEGATRON / "torch-ep2-moe" / "hf_config.json")


def test_ranks_that_all_say_the_same_say_nothing(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Megatron's converter writes all rank files in one process."""
    folder = copy("leg_t4_g2")
    rewritten(folder, lambda args: args.update(rank=0, world_size=1))
    convert("leg_t4_g2", tmp_path / "out", folder)
    assert logits_off(tmp_path / "out", MEGATRON / "leg_t4_g2" / "oracle.pt") < 1e-4


def test_a_rank_of_another_step_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("leg_t4_g2")
    kept = (folder / "mp_rank_02" / "model_optim_rng.pt").read_bytes()
    rewritten(folder, lambda args: None, iteration=20)
    (folder / "mp_rank_02" / "model_optim_rng.pt").write_bytes(kept)
    with pytest.raises(EngineError, match="not of the same save") as caught:
        convert("leg_t4_g2", tmp_path / "out", folder)
    assert caught.value.code == "E306" and "iteration 10" in str(caught.value)


@pytest.mark.parametrize("told", [{"seed": 8}, {"lr": 0.5}, {"consumed_train_samples": 9}, None])
def test_a_stage_of_another_run_is_refused(told: dict[str, Any] | None, copy: Callable[[str], Path]) -> None:
    """No replica contradicts a whole stage, but its arguments do, also if it alone has none."""
    folder = copy("leg_p2_uneven")
    first, *_ = sorted(folder.glob("mp_rank_*/*"))
    kept = first.read_bytes()
    rewritten(folder, dict.clear if told is None else lambda args: args.update(told))
    first.write_bytes(kept)
    with pytest.raises(EngineError, match="not of the same save"):
        engine.plan("megatron-llama", folder, config=MEGATRON / "leg_p2_uneven" / "hf_config.json")


def test_a_rank_whose_arguments_are_of_another_model_is_refused_and_what_lies_beside_the_model_told(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("leg_t4_g2")
    rewritten(folder, lambda args: None, ema={"weight": torch.zeros(2)}, optimizer={"exp_avg": torch.zeros(2)})
    told = convert("leg_t4_g2", tmp_path / "out", folder).notices
    assert "not part of the model, not converted: ema" in told
    kept = (folder / "mp_rank_02" / "model_optim_rng.pt").read_bytes()
    for told, change in (("args.rotary_base 500000", {"rotary_base": 500000}), ("", {"checkpoint_version": 1.0})):
        rewritten(folder, lambda args, change=change: args.update(change), **change)
        (folder / "mp_rank_02" / "model_optim_rng.pt").write_bytes(kept)
        with pytest.raises(EngineError, match="not of the same save") as caught:
            convert("leg_t4_g2", tmp_path / "out", folder)
        assert caught.value.code == "E306" and told in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_epsilon", math.nan), ("pipeline_model_parallel_size", None), ("num_experts", "4")],
    ids=["no number", "a number of ranks", "what tells a folder that is refused"],
)
def test_a_value_that_cannot_be_is_told_with_its_key_also_if_the_layout_reads_it(
    key: str, value: Any, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("leg_t4_g2")
    rewritten(folder, lambda args: args.update({"norm_epsilon": 1e-5, key: value}))
    with pytest.raises(EngineError, match=f"`{key}` of mp_rank_00/model_optim_rng.pt cannot be") as caught:
        convert("leg_t4_g2", tmp_path / "out", folder)
    assert caught.value.code == "E218"


def test_dense_copies_that_differ_between_expert_ranks_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("torch-ep2-moe")
    path = folder / "mp_rank_00_001" / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    plan = engine.plan("megatron-mixtral", folder, config=MEGATRON / "torch-ep2-moe" / "hf_config.json")
    file = next(f for f in plan.files if f.name == "mp_rank_00_001/model_optim_rng.pt")
    header = next(t for t in file.tensors if t.name.endswith("final_layernorm.weight"))
    data[header.offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError) as caught:
        convert("torch-ep2-moe", tmp_path / "out", folder)
    assert caught.value.code == "E402"


def test_expert_ranks_of_a_stage_without_experts_may_be_equal(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The embedding is a stage of its own, as with `--pipeline-model-parallel-layout "E|ttttL"`."""
    folder = copy("torch-ep2-moe")
    rewritten(folder, lambda args: args.update(pipeline_model_parallel_size=2, world_size=4))
    for ep in (0, 1):
        shutil.move(path := folder / f"mp_rank_00_00{ep}", held := tmp_path / path.name)
        saved = torch.load(held / "model_optim_rng.pt", weights_only=False)
        for pp, first in enumerate((True, False)):
            model = {name: one for name, one in saved["model"].items() if name.startswith("embedding.") == first}
            saved["args"].rank = 0  # so that only what files hold tells them apart
            (path := folder / f"mp_rank_00_00{pp}_00{ep}").mkdir()
            torch.save({**saved, "model": model}, path / "model_optim_rng.pt")
    convert("torch-ep2-moe", tmp_path / "out", folder)
    assert logits_off(tmp_path / "out", MEGATRON / "torch-ep2-moe" / "oracle.pt") < 1e-4
    shutil.copytree(folder / "mp_rank_00_001_000", folder / "mp_rank_00_001_001", dirs_exist_ok=True)
    with pytest.raises(EngineError, match=r"E306 .* hold the same tensors"):
        convert("torch-ep2-moe", tmp_path / "again", folder)


def test_experts_in_one_transposed_tensor_are_refused_with_what_to_do(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("torch-ep2-moe")
    rewritten(folder, lambda args: None)
    for path in folder.glob("mp_rank_*/model_optim_rng.pt"):
        saved = torch.load(path, weights_only=False)
        saved["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(64, 8)
        torch.save(saved, path)
    with pytest.raises(EngineError, match="torch_dist") as caught:
        convert("torch-ep2-moe", tmp_path / "out", folder)
    assert caught.value.code == "E209"


@pytest.mark.parametrize("files", [{}, {"mp_rank_00_000": "mp_rank_00", "mp_rank_01_001": ""}])
def test_experts_that_are_cut_over_other_ranks_than_the_rest_are_refused_by_that_name(
    files: dict[str, str], tmp_path: Path
) -> None:
    fixture = MEGATRON / "torch-ep2-etp1"
    if files:  # as Megatron names them of one expert rank, and then saves the first of two
        fixture = Path(shutil.copytree(fixture, tmp_path / "copy"))
        rewritten(source_of(fixture), lambda args: args.update(expert_model_parallel_size=1))
    for old, new in files.items():
        folder = next(fixture.rglob(old))
        folder.rename(folder.with_name(new)) if new else shutil.rmtree(folder)
    with pytest.raises(EngineError, match="other tensor parallel ranks than the rest") as caught:
        engine.convert("megatron-mixtral", source_of(fixture), tmp_path / "out", config=fixture / "hf_config.json")
    assert caught.value.code == "E303" and "torch_dist" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("held", "told"), [([1], "list"), ({}, "an empty dict"), (None, "NoneType")], ids=["list", "empty", "none"]
)
def test_arguments_that_are_no_settings_are_refused(held: Any, told: str, tmp_path: Path) -> None:
    folder = shutil.copytree(MEGATRON / "dist-tp2pp2" / "ckpt" / "iter_0000010", tmp_path / "step")
    torch.save({"args": held, "checkpoint_version": 3.0, "iteration": 10}, folder / "common.pt")
    with pytest.raises(EngineError, match="E303 the configuration holds no settings") as caught:
        engine.plan("megatron-llama", folder)
    assert caught.value.got == f"{told} under args"
