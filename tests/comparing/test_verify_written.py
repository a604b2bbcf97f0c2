"""`engine verify OUT`: what it did not check it says, and what does not belong in the folder is a problem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import engine
from engine.commands.main import cli
from engine.run.looks import Look, suspicious
from engine.run.written import extra_files
from engine.storage.local import LocalStore
from tests.support.depth import sampled
from tests.support.shards import Model, save

MODEL = Model("v2", layers=2, groups=2, bias=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save(MODEL, folder / "step", tp=2)
    engine.convert(MODEL.mapping, folder / "step", folder / "hf")
    engine.convert(MODEL.mapping, folder / "step", folder / "sharded", max_shard_size=2000)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "hf", tmp_path / "hf")
    return tmp_path / "hf"


def verify(out: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["verify", str(out), *more])


def edit(out: Path, change: Callable[[dict[str, Any]], Any], name: str = "conversion.json") -> None:
    data = json.loads((out / name).read_text())
    change(data)
    (out / name).write_text(json.dumps(data))


def strip(data: dict[str, Any]) -> None:
    for entry in data["tensors"].values():
        entry.pop("digest", None)


def emptied(data: dict[str, Any]) -> None:
    data.update(tensors={}, files={})


def whole_strip(data: dict[str, Any]) -> None:
    strip(data)
    data.pop("digest")
    data.pop("content_id")


def one_digest(data: dict[str, Any]) -> None:
    next(iter(data["tensors"].values())).pop("digest")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (strip, "the manifest was changed"),
        (whole_strip, "no tensor's content was checked"),
        (emptied, "config.json was not written by the engine"),
        (one_digest, "the manifest was changed"),
        (lambda data: data.pop("content_id"), "the manifest was changed"),
        (lambda data: (one_digest(data), data.pop("content_id")), "the manifest was changed"),
        (lambda data: data.update(content_id="0" * 64), "the manifest was changed"),
        (lambda data: data["tensors"].update(more=data["tensors"]["model.norm.weight"]), "more is missing"),
        (lambda data: data["files"].pop("config.json"), "config.json was not written by the engine"),
        (lambda data: data["tensors"].pop("model.norm.weight"), "model.norm.weight is not in the manifest"),
    ],
)
def test_a_manifest_that_says_less_is_no_proof(change: Callable[[dict[str, Any]], Any], words: str, out: Path) -> None:
    edit(out, change)
    result = verify(out)
    assert result.exit_code == 1
    assert words in result.output
    assert "as they were written" not in result.output


def test_a_manifest_that_names_no_configuration_is_no_proof_though_none_is_there(out: Path) -> None:
    for name in json.loads((out / "conversion.json").read_text())["files"]:
        (out / name).unlink()
    edit(out, lambda data: data.update(files={}))
    result = verify(out)
    assert result.exit_code == 1 and "names no file beside the weights" in result.output


def test_without_any_manifest_nothing_is_checked(out: Path) -> None:
    (out / "conversion.json").unlink()
    result = verify(out)
    assert result.exit_code == 1 and result.output.startswith("E304 there is no `conversion.json`")
    assert "got       README.md, config.json" in result.output
    shutil.rmtree(out)
    assert "there is no such checkpoint folder" in verify(out).output


def test_without_a_manifest_the_source_still_tells_and_what_was_not_checked_is_said(made: Path, out: Path) -> None:
    (out / "conversion.json").unlink()
    source = ["--src", str(made / "step"), "--mapping", MODEL.mapping]
    result = verify(out, *source)
    assert result.exit_code == 0, result.output
    assert "not checked conversion.json: there is none" in result.output
    (out / "adapter_model.safetensors").write_bytes(b"")
    assert verify(out, *source).exit_code == 1


PLANTED = (
    "model-00009-of-00009.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.gguf", "flax_model.msgpack",
    "tf_model.h5", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "modeling_llama.py",
    "configuration.pyc", "extra.so", "training_args.pkl", "model.joblib", "pytorch_model.bin.index.json",
    "model.safetensors.index.json", "other.safetensors.index.json", "tokenizer.json", "added_tokens.json",
    "chat_template.json", "preprocessor_config.json", "model_tp0_pp0.pt", "setup.sh", "weights.onnx", "x.distcp",
    "PYTORCH_MODEL.BIN", "quantize_config.json", "original/consolidated.00.pth", "draft/model.safetensors",
    "sub/deep/modeling.py", ".hidden.safetensors", "spiece.model", "model.tiktoken", "hf_quant_config.json",
    "modules.json", "sentence_bert_config.json",
)  # fmt: skip


@sampled(3)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_file_is_told_and_fails(name: str, out: Path) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"{}")
    result = verify(out)
    assert result.exit_code == 1
    assert name in result.output


def test_every_kind_of_planted_file_is_a_problem(tmp_path: Path) -> None:
    for number, name in enumerate({*PLANTED} - {"model.safetensors.index.json"}):  # the index is compared itself
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        file.touch()
        problems, beside = extra_files(LocalStore(tmp_path / str(number)), ())
        assert not beside and [name in one for one in problems] == [True], name


@pytest.mark.parametrize("metadata", [None, {"format": "tf"}, {"format": "pt", "more": "x"}], ids=str)
def test_weights_that_claim_another_framework_are_told(metadata: dict[str, str] | None, out: Path) -> None:
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata)
    for more in ([], ["--quiet"]):  # quiet of what is well, not of problems
        done = verify(out, *more)
        assert done.exit_code == 1 and "metadata was changed" in done.output


def test_a_planted_folder_of_templates_fails(out: Path) -> None:
    (out / "additional_chat_templates").mkdir()
    assert verify(out).exit_code == 1


def test_files_that_no_program_reads_are_said_to_be_beside(out: Path) -> None:
    for name in ("LICENSE", ".gitattributes", "figure.png"):
        (out / name).write_bytes(b"")
    result = verify(out)
    assert result.exit_code == 0
    assert "not checked LICENSE, figure.png: not the engine's" in result.output


@pytest.mark.parametrize("change", ["missing", "changed", "more", "total size", "metadata", "not json"])
def test_an_index_that_says_otherwise_is_told(change: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "sharded", tmp_path / "sharded")
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    assert verify(tmp_path / "sharded").exit_code == 0
    data = json.loads(index.read_text())
    if change == "missing":
        index.unlink()
    elif change == "not json":
        index.write_bytes(b"{")
    elif change in ("total size", "metadata"):
        data["metadata"]["total_size" if change == "total size" else "more"] = 1
        index.write_text(json.dumps(data))
    else:
        files = sorted(set(data["weight_map"].values()))
        name = "model.norm.weight" if change == "changed" else "more"
        data["weight_map"][name] = next(file for file in files if file != data["weight_map"].get(name))
        index.write_text(json.dumps(data))
    result = verify(tmp_path / "sharded")
    assert result.exit_code == 1
    assert "model.safetensors.index.json" in result.output


def test_rank_files_that_were_written_verify_too_and_a_stranger_is_told(made: Path, tmp_path: Path) -> None:
    engine.reverse(MODEL.mapping, made / "hf", tmp_path / "back", tp=2)
    assert verify(tmp_path / "back").exit_code == 0
    shutil.copy(tmp_path / "back" / "model_tp1_pp0.pt", tmp_path / "back" / "model_tp2_pp0.pt")
    assert "model_tp2_pp0.pt" in verify(tmp_path / "back").output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mapping", "ranks"), [("transformers", "dp=3"), ("megatron-llama", "tp=2")])
def test_files_of_other_frameworks_that_were_written_verify_too(
    mapping: str, ranks: str, made: Path, tmp_path: Path
) -> None:
    engine.reverse(mapping, made / "hf", tmp_path / "back", ranks=ranks)
    assert verify(tmp_path / "back").exit_code == 0
    path = next(path for path in sorted((tmp_path / "back").rglob("*")) if path.suffix in (".distcp", ".pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "has other bytes than were written" in verify(tmp_path / "back").output


def test_files_of_ranks_for_which_a_small_model_has_no_rows_are_the_engines_too(made: Path, tmp_path: Path) -> None:
    """torch writes them too, without a byte."""
    back = tmp_path / "back"
    engine.reverse("transformers", made / "hf", back, ranks="dp=20")
    assert (back / "__19_0.distcp").stat().st_size == 0
    assert verify(back).exit_code == 0
    engine.reverse("transformers", made / "hf", back, ranks="dp=2", overwrite=True)
    assert not (back / "__19_0.distcp").exists()


@pytest.mark.parametrize(
    ("mapping", "ranks", "gone"),
    [("transformers", "dp=3", "__1_0.distcp"), ("megatron-llama", "tp=2", "mp_rank_00/model_optim_rng.pt")],
)
def test_where_a_file_is_missing_the_others_are_still_the_engines(
    mapping: str, ranks: str, gone: str, made: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    engine.reverse(mapping, made / "hf", back, ranks=ranks)
    (back / gone).unlink()
    told = verify(back)
    assert told.exit_code == 1
    assert f"{gone}: " in told.output
    assert "1 problem in" in told.output
    engine.reverse(mapping, made / "hf", back, ranks=ranks, overwrite=True)
    assert verify(back).exit_code == 0


CONFIGS: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 10001.0, "rope_parameters": {"rope_theta": 10001.0, "rope_type": "default"}},
    "epsilon": {"rms_norm_eps": 1e-6},
    "activation": {"hidden_act": "gelu"},
    "eos": {"eos_token_id": 5},
    "tie": {"tie_word_embeddings": True},
    "heads": {"num_key_value_heads": 4},
    "architecture": {"architectures": ["MistralForCausalLM"]},
    "length": {"max_position_embeddings": 1},
}


@sampled(2)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_the_mapping_does_not_give_is_told(case: str, made: Path, out: Path) -> None:
    edit(out, lambda config: config.update(CONFIGS[case]), "config.json")
    (out / "conversion.json").unlink()
    source = ["--src", str(made / "step"), "--mapping", MODEL.mapping]
    result = verify(out, *source)
    assert result.exit_code == 1
    assert any(line.startswith("config: ") and "the mapping gives" in line for line in result.output.splitlines())


@pytest.mark.parametrize("change", ["generation", "lost generation", "a template"])
def test_generation_settings_and_templates_that_the_mapping_does_not_give_are_told(
    change: str, made: Path, out: Path
) -> None:
    if change == "generation":
        edit(out, lambda data: data.update(eos_token_id=7), "generation_config.json")
    elif change == "lost generation":
        edit(out, lambda config: config.update(eos_token_id=9), "config.json")
        (out / "generation_config.json").unlink()
    else:
        (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "conversion.json").unlink()
    assert verify(out, "--src", str(made / "step"), "--mapping", MODEL.mapping).exit_code == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_of_zeros_are_told_by_a_run_and_numbers_that_are_none_when_it_is_verified(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save(MODEL, tmp_path / "step", tp=2)
    for rank in range(2):
        path = tmp_path / "step" / f"model_tp{rank}_pp0.pt"
        state = {name: tensor.to(dtype) for name, tensor in torch.load(path).items()}
        state["layers.1.feed_forward.w1.weight"].zero_()
        state["layers.0.attention_norm.weight"].zero_()
        state["layers.1.ffn_norm.weight"][-1] = -torch.inf
        state["layers.0.feed_forward.w1.weight"][1, 1] = torch.nan * rank
        torch.save(state, path)
    report = engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf")
    zeros = "nothing but zeros: model.layers.0.input_layernorm.weight, model.layers.1.mlp.gate_proj.weight"
    assert [one for one in report.notices if "zeros" in one] == [zeros]
    found = engine.api.verify(tmp_path / "hf")
    wrong = "NaN or infinity: model.layers.0.mlp.gate_proj.weight, model.layers.1.post_attention_layernorm.weight"
    assert not found.problems and found.values == (wrong, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0, torch.nan])
@pytest.mark.parametrize("name", ["w1", "w2"])  # cut by rows and by columns
def test_the_slice_of_one_rank_that_is_zeros_or_no_numbers_is_told(
    name: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(MODEL, tmp_path / "step", tp=2)
    for rank in range(2):
        path = tmp_path / "step" / f"model_tp{rank}_pp0.pt"
        state = {name: tensor.to(dtype) for name, tensor in torch.load(path).items()}
        if rank:
            state[f"layers.1.feed_forward.{name}.weight"].fill_(value)
        torch.save(state, path)
    whole = f"model.layers.1.mlp.{'gate' if name == 'w1' else 'down'}_proj.weight"
    zeros = f"zeros in a part, as of padding tokens, or if a file was not copied completely: {whole} (50%)"
    told = f"NaN, infinity or far too large numbers: {whole}" if value else zeros
    report = engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf")
    assert told in report.notices
    assert engine.api.verify(tmp_path / "hf").values == (f"NaN or infinity: {whole}" if value else zeros,)
    back = engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", tp=1)
    assert any(told.split(":")[0] in one for one in back.notices)
    named = f"model_tp0_pp0.pt:layers.1.feed_forward.{name}.weight"
    wanted = f"NaN or infinity: {named}" if value else zeros.replace(whole, named)
    assert engine.api.verify(tmp_path / "back").values == (wanted,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_one_number_and_a_norm_that_another_layer_has_too_are_told(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Model("v2", layers=2, hidden=32, bias=False)
    save(model, tmp_path / "step", tp=2)
    for rank in range(2):
        path = tmp_path / "step" / f"model_tp{rank}_pp0.pt"
        state = {name: tensor.to(dtype) for name, tensor in torch.load(path).items()}
        state["layers.1.feed_forward.w1.weight"].fill_(0.02)
        state["layers.1.attention_norm.weight"] = state["layers.0.ffn_norm.weight"].clone()
        torch.save(state, path)
    told = (
        "nothing but one number: model.layers.1.mlp.gate_proj.weight",
        "equal to the last bit, as after upcycling, or if a file was copied: "
        "model.layers.0.post_attention_layernorm.weight and model.layers.1.input_layernorm.weight",
    )
    report = engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf")
    assert report.notices[-2:] == told
    assert engine.api.verify(tmp_path / "hf").values == told


def test_norms_that_training_has_hardly_changed_may_be_equal(tmp_path: Path) -> None:
    """In bfloat16 most stay at one for long, and the same few of all layers change."""
    model = Model("v2", layers=2, hidden=32, bias=False)
    save(model, tmp_path / "step", tp=2)
    for rank in range(2):
        path = tmp_path / "step" / f"model_tp{rank}_pp0.pt"
        state = torch.load(path)
        for norm in (one for name, one in state.items() if "norm" in name):
            norm.fill_(1)
            norm[5], norm[11] = 0.375, 1.0078125
        torch.save(state, path)
    assert not any("equal" in one for one in engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf").notices)


def save_changed(step: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The model on two ranks, each with a change of its tensors."""
    save(MODEL, step, tp=2)
    for rank in range(2):
        state = torch.load(step / f"model_tp{rank}_pp0.pt")
        change(state)
        torch.save(state, step / f"model_tp{rank}_pp0.pt")


@pytest.mark.parametrize("rows", [100, 250, 4000])  # of 256 bytes: each word is looked at, or one of many
def test_a_page_that_is_a_hole_is_told_wherever_it_begins(rows: int) -> None:
    for begin in range(0, 4096, 89):
        data = bytearray(b"\1") * (rows * 256)
        data[begin : begin + 4096] = bytes(4096)
        look = Look().and_at(memoryview(data), len(data))
        assert suspicious([("w", "F16", (rows, 128), "digest", look)]), begin
    zeros = xxhash.xxh3_128(bytes((1 << 20) + 6)).hexdigest()
    assert suspicious([("w", "F16", (1, (1 << 19) + 3), zeros, Look())]) == ["nothing but zeros: w"]
    few = Look().and_at(memoryview(bytes(1024) + b"\1" * (len(data) - 1024)), len(data))
    assert not suspicious([("w", "F16", (4000, 128), "digest", few)])


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_page_that_is_a_hole_in_the_columns_of_one_rank_is_told_wherever_it_begins(ranks: int) -> None:
    for row, begin in product((1024, 2752, 4096), range(0, 4096, 89)):
        data = np.full((8192 * ranks // row + 2, row), 1, np.uint8)
        held = data[:, row // ranks : 2 * row // ranks]
        places = np.arange(held.size).reshape(held.shape)
        held[(begin <= places) & (places < begin + 4096)] = 0
        look = Look().and_at(memoryview(data).cast("B"), 4096 * 4096)
        assert suspicious([("w", "F16", (4096, 2048), "digest", look)]), (row, begin)


def test_a_few_zeros_are_not_told(tmp_path: Path) -> None:
    save_changed(tmp_path / "step", lambda state: state["layers.1.feed_forward.w1.weight"][1, 2:6].zero_())
    assert not any("zeros" in one for one in engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf").notices)


def test_two_linears_that_are_equal_are_told_but_not_an_embedding_that_is_also_the_head(tmp_path: Path) -> None:
    save_changed(
        tmp_path / "step",
        lambda state: state["layers.1.feed_forward.w3.weight"].copy_(state["layers.1.feed_forward.w1.weight"]),
    )
    engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf")
    model = load_file(tmp_path / "hf" / "model.safetensors")
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    save_file(model, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    names = "model.layers.1.mlp.gate_proj.weight and model.layers.1.mlp.up_proj.weight"
    told = f"equal to the last bit, as after upcycling, or if a file was copied: {names}"
    assert engine.api.verify(tmp_path / "hf").values == (told,)


def test_a_matrix_that_another_layer_has_too_is_told(tmp_path: Path) -> None:
    save_changed(
        tmp_path / "step",
        lambda state: state["layers.1.feed_forward.w1.weight"].copy_(state["layers.0.feed_forward.w1.weight"]),
    )
    report = engine.convert(MODEL.mapping, tmp_path / "step", tmp_path / "hf")
    told = "equal to the last bit, as after upcycling, or if a file was copied: model.layers.{0…1}.mlp.gate_proj.weight"
    assert [one for one in report.notices if "equal" in one] == [told]
    assert engine.api.verify(tmp_path / "hf").values == (told,)
    back = engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", tp=2)
    assert not any("equal" in one for one in back.notices)  # ranks may hold the same
