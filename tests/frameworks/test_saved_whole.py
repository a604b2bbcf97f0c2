"""A whole state in one file that torch saved is read as the distributed checkpoint that it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import engine
from engine.errors import EngineError
from engine.formats import rank_files
from tests.support.frameworks import FIXTURES

GENUINE = FIXTURES / "dcp" / "fsdp4-f32-optim"
State = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch's own program makes of a genuine checkpoint, and what the engine converts that to."""
    folder = tmp_path_factory.mktemp("saved")
    dcp_to_torch_save(str(GENUINE / "step-10"), str(folder / "model.pt"))
    convert(GENUINE / "step-10", folder / "hf")
    return folder


def convert(source: Path, out: Path, **options: Any) -> engine.Report:
    return engine.convert("transformers", source, out, config=GENUINE / "hf_config.json", **options)


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def model(state: State) -> State:
    found: State = state["app"]["model"]
    return found


FORMS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "torch's program": ("checkpoint.pt", dict),
    "a state dict": ("model.pt", model),
    "torch.save in a loop": ("ckpt.pt", lambda s: {"model": model(s), "optimizer": s["app"]["optim"], "step": 10}),
    "accelerate": ("pytorch_model_fsdp.bin", model),
    "without a configuration beside it": ("pytorch_model.bin", model),
    "DistributedDataParallel": ("model.pth", lambda s: {f"module.{k}": v for k, v in model(s).items()}),
    "a compiled model": ("model.pth", lambda s: {"model": {f"_orig_mod.{k}": v for k, v in model(s).items()}}),
    "DeepSpeed without ZeRO, by another name": (
        "model.pt",
        lambda s: {
            "module": model(s),
            "buffer_names": ["rotary_emb.inv_freq"],
            "optimizer": None,
            "param_shapes": None,
            "sparse_tensor_module_names": set(),
            "ds_config": {"zero_optimization": {"stage": 0}},
        },
    ),
    "Lightning": (
        "epoch=1-step=10.ckpt",
        lambda s: {
            "state_dict": {f"model.{k}": v for k, v in model(s).items()},
            "optimizer_states": [s["app"]["optim"]],
            "loops": {},
            "lr_schedulers": [],
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_state_in_one_file_is_read_as_the_checkpoint_that_it_was_made_from(
    form: str, saved: Path, tmp_path: Path
) -> None:
    name, change = FORMS[form]
    (tmp_path / "step").mkdir()
    torch.save(change(torch.load(saved / "model.pt", weights_only=False)), tmp_path / "step" / name)
    convert(tmp_path / "step", tmp_path / "out")
    assert same(tmp_path / "out", saved / "hf")


def test_a_whole_state_in_several_files_is_read_and_a_missing_one_told(saved: Path, tmp_path: Path) -> None:
    state, step = model(torch.load(saved / "model.pt", weights_only=False)), tmp_path / "step"
    step.mkdir()
    for number, names in enumerate((list(state)[:10], list(state)[10:]), 1):
        torch.save({name: state[name] for name in names}, step / f"pytorch_model-{number:05}-of-00002.bin")
    convert(step, tmp_path / "out")
    assert same(tmp_path / "out", saved / "hf")
    (step / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(EngineError) as caught:
        convert(step, tmp_path / "other")
    assert caught.value.code == "E207" and not (tmp_path / "other").exists()


TWO_STATES = {
    "Lightning's last one, and its copy": ("last.ckpt", "epoch=1-step=10.ckpt"),
    "two steps": ("epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt"),
    "two programs": ("model.pt", "checkpoint.pt"),
    "a whole one and one in files": ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"),
    "one in two files and one in three": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00001-of-00003.bin"),
}


@pytest.mark.parametrize("two", TWO_STATES)
def test_of_several_whole_states_in_a_folder_one_must_be_taken_out(two: str, tmp_path: Path) -> None:
    for name in TWO_STATES[two]:
        torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / name)
    with pytest.raises(EngineError, match="2 whole states lie in one folder") as caught:
        convert(tmp_path, tmp_path / "out")
    assert caught.value.code == "E304" and "a folder of its own" in str(caught.value)


def test_a_state_under_a_name_that_is_not_known_is_told_how_to_call_it(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(3)}, tmp_path / "epoch=0-val_loss=2.31.ckpt")
    with pytest.raises(EngineError, match=r"A state in one file is read if it is called model\.pt\."):
        convert(tmp_path, tmp_path / "out")


def test_a_whole_state_beside_the_ranks_files_is_an_unknown_file(saved: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(GENUINE / "step-10", tmp_path / "step"))
    torch.save({"model.embed_tokens.weight": torch.ones(3)}, step / "model.pt")
    convert(step, tmp_path / "out")
    assert same(tmp_path / "out", saved / "hf")
    assert engine.inspect(step).facts["unknown"] == ["model.pt"]


def test_a_flipped_bit_of_a_whole_state_is_found(saved: Path, tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.mkdir()
    shutil.copy(saved / "model.pt", step)
    plan = engine.plan("transformers", step, config=GENUINE / "hf_config.json")
    at, raw = plan.files[0].tensors[-1].offset + 1, bytearray((step / "model.pt").read_bytes())
    raw[at] ^= 1
    (step / "model.pt").write_bytes(raw)
    with pytest.raises(EngineError, match="CRC-32"):
        convert(step, tmp_path / "out", check_source=True)


def nested(levels: int, times: int) -> State:
    """Mappings that hold the same mapping several times, level by level."""
    state: State = {"weight": torch.ones(1)}
    for _ in range(levels):
        state = dict.fromkeys("abcdefgh"[:times], state)
    return state


ODD: dict[str, tuple[Any, str]] = {
    "mappings that double at each level": (nested(14, 8), "nested without end"),
    "mappings that never end": (nested(40, 1), "nested without end"),
    "two names that become one": ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors are called a.b"),
    "no tensors": ({"model": {"step": 1}}, "not a state dict"),
    "a list": ([torch.ones(1)], "not a state dict"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_state_that_is_none_is_refused_soon(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, told = ODD[odd]
    monkeypatch.setattr(rank_files, "_MOST", 10_000)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(EngineError, match=told):
        convert(tmp_path, tmp_path / "out")


def test_a_model_beside_its_average_is_refused_with_how_to_take_one_out(saved: Path, tmp_path: Path) -> None:
    state, step = model(torch.load(saved / "model.pt", weights_only=False)), tmp_path / "step"
    step.mkdir()
    torch.save({"ema": {name: one * 2 for name, one in state.items()}, "model": state}, step / "model.pt")
    with pytest.raises(EngineError) as caught:
        convert(step, tmp_path / "out")
    assert caught.value.code == "E206" and 'torch.save(torch.load(FILE)["model"], "ONE/model.pt")' in str(caught.value)
    (tmp_path / "ONE").mkdir()
    torch.save(torch.load(step / "model.pt")["model"], tmp_path / "ONE" / "model.pt")
    convert(tmp_path / "ONE", tmp_path / "out")
    assert same(tmp_path / "out", saved / "hf")


NOT_WHOLE: dict[str, tuple[Callable[[State], State], str]] = {
    "peft": (
        lambda s: {
            f"base_model.model.{name.replace('.weight', f'{end}.weight')}": one
            for name, one in s.items()
            for end in ((".base_layer", ".lora_A.default", ".lora_B.default") if "q_proj" in name else ("",))
        },
        "adapter",
    ),
    "adapters alone": (
        lambda s: {f"base_model.model.{n[:-6]}lora_B.weight": one for n, one in s.items() if "_proj" in n},
        "adapter",
    ),
    "torchtune": (lambda s: {**s, "layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 8)}, "adapter"),
    "FSDP's local state": (
        lambda s: {"model.layers.0._flat_param": torch.ones(9), "_flat_param": torch.ones(5)},
        "flat",
    ),
}


@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_adapters_and_flat_parameters_are_told_as_that(kind: str, saved: Path, tmp_path: Path) -> None:
    change, told = NOT_WHOLE[kind]
    torch.save(change(model(torch.load(saved / "model.pt", weights_only=False))), tmp_path / "model.pt")
    with pytest.raises(EngineError, match=f"these are .*{told}") as caught:
        convert(tmp_path, tmp_path / "out")
    assert caught.value.code == "E303" and caught.value.fix
    with pytest.raises(EngineError, match=f"these are .*{told}"):
        engine.inspect(tmp_path)


def test_an_adapter_in_files_of_its_own_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)},
        tmp_path / "adapter_model.bin",
    )
    for command in (engine.inspect, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(EngineError, match="adapter") as caught:
            command(tmp_path)
        assert caught.value.code == "E303"


def test_a_file_in_place_of_a_folder_is_told_with_what_to_call_it(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"model\.pt in a folder of its own"):
        convert(saved / "model.pt", tmp_path / "out")


def test_stages_in_folders_of_their_own_are_read_as_files_of_one_folder(saved: Path, tmp_path: Path) -> None:
    state, step = model(torch.load(saved / "model.pt", weights_only=False)), tmp_path / "step"
    step.mkdir()
    for stage, names in enumerate((list(state)[:10], list(state)[10:])):
        dcp.save({"model": {name: state[name] for name in names}}, checkpoint_id=str(tmp_path / f"stage{stage}"))
        dcp_to_torch_save(str(tmp_path / f"stage{stage}"), str(step / f"pytorch_model-{stage + 1:05}-of-00002.bin"))
    convert(step, tmp_path / "out")
    assert same(tmp_path / "out", saved / "hf")


def test_a_step_that_is_a_folder_named_as_a_file_is_found_in_the_folder_of_the_steps(tmp_path: Path) -> None:
    """Lightning gives a sharded checkpoint, which is a folder, the name of one that is a file."""
    step = tmp_path / "epoch=0-step=10.ckpt"
    shutil.copytree(GENUINE / "step-10", step)
    torch.save({"epoch": 0, "global_step": 10}, step / "meta.pt")
    found = engine.inspect(tmp_path)
    assert found.kind == "steps" and found.facts["newest"] == step.name
    with pytest.raises(EngineError, match=r"E304(.|\n)*epoch=0-step=10\.ckpt"):
        convert(tmp_path, tmp_path / "out")
    convert(step, tmp_path / "out")
