"""DCP checkpoints that the engine writes are those that torch reads, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

import engine
from engine.errors import EngineError
from tests.support.depth import deep, sampled
from tests.support.frameworks import FIXTURES, source_of, weights

DCP = FIXTURES / "dcp"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "hf"
    fixture = DCP / "fsdp4-f32-hf"
    engine.convert("transformers", source_of(fixture), out, config=fixture / "hf_config.json")
    return out


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder as torch loads it."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        name: torch.zeros(one.size, dtype=one.properties.dtype)
        for name, one in metadata.state_dict_metadata.items()
        if hasattr(one, "size")
    }
    dcp.load(state, checkpoint_id=str(folder))
    return state


def test_a_setting_of_the_layout_that_is_written_is_told_where_its_name_is_not_known(
    whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="Did you mean `--set under=model`") as caught:
        engine.reverse("transformers", whole, tmp_path / "dcp", settings={"undr": "model"})
    assert caught.value.code == "E001"


@sampled(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ranks", "under"), [("dp=8", ""), ("dp=3,tp=2", "model"), ("dp=1", "app.model")])
def test_torch_loads_what_is_written_and_it_converts_back_to_the_same_bytes(
    ranks: str, under: str, whole: Path, tmp_path: Path
) -> None:
    engine.reverse("transformers", whole, tmp_path / "dcp", ranks=ranks, settings={"under": under})
    prefix = f"{under}." if under else ""
    truth = weights(whole)
    state = loaded(tmp_path / "dcp")
    assert {prefix + name for name in truth} == set(state)
    assert all(torch.equal(state[prefix + name], one) for name, one in truth.items())
    engine.convert("transformers", tmp_path / "dcp", tmp_path / "again")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("ranks", "which"), [({"dp": 100_000}, "rows"), ({"dp": 2, "tp": 1 << 20}, "columns")])
def test_ranks_that_would_hold_nothing_are_refused_at_once(ranks: dict[str, int], which: str, whole: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.plan_reverse("transformers", whole, ranks=ranks)
    assert caught.value.code == "E214" and which in caught.value.message


@pytest.mark.filterwarnings("ignore")
def test_boxes_are_cut_as_torch_cuts_them(whole: Path, tmp_path: Path) -> None:
    fixture = DCP / "fsdp2tp2-f32-model"
    engine.convert("transformers", source_of(fixture), tmp_path / "hf", config=fixture / "hf_config.json")
    engine.reverse("transformers", tmp_path / "hf", tmp_path / "dcp", ranks="dp=3")
    embedding = next(
        one
        for name, one in dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata.items()
        if name.endswith("embed_tokens.weight")
    )
    wanted = [len(part) for part in torch.empty(embedding.size).chunk(3)]
    assert [chunk.sizes[0] for chunk in embedding.chunks] == wanted


def test_names_are_those_of_another_checkpoint(whole: Path, tmp_path: Path) -> None:
    like = DCP / "fsdp4-bf16-threads2"
    engine.reverse("transformers", whole, tmp_path / "dcp", ranks="dp=2", like=source_of(like))
    names = dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    assert all(name.startswith(("model.model.", "model.lm_head.")) for name in names)


@pytest.mark.parametrize(
    ("mapping", "config"),
    [("transformers", LlamaConfig), ("torchtitan-llama", LlamaConfig), ("xtuner-moe", Qwen3MoeConfig)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_model_has_its_embedding_again_as_the_head_that_trainers_load(
    mapping: str, config: Callable[..., PretrainedConfig], tmp_path: Path
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 8, "vocab_size": 24, "intermediate_size": 8, "tie_word_embeddings": True}  # fmt: skip
    AutoModelForCausalLM.from_config(config(**small)).save_pretrained(tmp_path / "hf")
    assert "lm_head.weight" not in weights(tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "dcp", ranks="dp=2")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "like", like=tmp_path / "dcp")
    for folder in (tmp_path / "dcp", tmp_path / "like"):
        state = loaded(folder)
        assert torch.equal(state["lm_head.weight"], next(one for name, one in state.items() if "embed" in name))
    engine.convert(mapping, tmp_path / "dcp", tmp_path / "again")
    assert {*weights(tmp_path / "again")} == {*weights(tmp_path / "hf")}


def test_a_checkpoint_with_an_optimizer_is_resharded_like_one_with_an_optimizer() -> None:
    fixture = DCP / "fsdp4-f32-optim"
    step, config = source_of(fixture), fixture / "hf_config.json"
    alike, asked = (
        engine.plan_reshard("transformers", step, config=config, **how) for how in ({"like": step}, {"ranks": "dp=1"})
    )
    assert alike.outputs == asked.outputs and alike.notices == asked.notices


def test_another_number_of_ranks_is_written_without_a_detour(whole: Path, tmp_path: Path) -> None:
    engine.reverse("transformers", whole, tmp_path / "one", ranks="dp=4")
    engine.reshard("transformers", tmp_path / "one", tmp_path / "other", ranks="dp=7")
    engine.reverse("transformers", whole, tmp_path / "direct", ranks="dp=7")
    for path in (tmp_path / "direct").glob("__*.distcp"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("mapping", "asked"),
    [("transformers", {"ranks": "pp=2"}), ("transformers", {"chunks": 2}), ("meta-llama", {"chunks": 2}),
     ("megatron-llama", {"chunks": 2, "mode": "torch_dist"})],
)  # fmt: skip
def test_ranks_and_chunks_that_a_layout_does_not_have_are_refused(
    mapping: str, asked: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        engine.reverse(mapping, whole, tmp_path / "dcp", **asked)
    assert caught.value.code == "E001"
    assert not (tmp_path / "dcp").exists()


def load(rank: int, made: Path, whole: Path, port: int) -> None:
    """As one of three ranks, each with some rows of every tensor."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "RANK": str(rank)}
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    truth = load_file(whole)
    state = {n: distribute_tensor(torch.zeros_like(t), mesh, [Shard(0)]) for n, t in truth.items()}
    dcp.load(state, checkpoint_id=made)
    assert all(torch.equal(state[n].full_tensor(), t) for n, t in truth.items())  # type: ignore[attr-defined]
    dist.destroy_process_group()


@deep
def test_processes_load_it_on_another_number_of_ranks(whole: Path, tmp_path: Path) -> None:
    engine.reverse("transformers", whole, tmp_path / "dcp", ranks="dp=4")
    arguments = (tmp_path / "dcp", whole / "model.safetensors", 20000 + os.getpid() % 20000)
    start_processes(load, arguments, nprocs=3, start_method="fork")
