"""A checkpoint that is opened is a lazy state dict: the tensors of a run, read when they are asked for."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import engine
from engine.formats.headers import ITEM_SIZES
from engine.serve import readers as reading
from engine.serve import tensors as lazy_tensors
from engine.serve.readers import Once
from engine.serve.tensors import Tensors, torch_types
from tests.language import test_features as features
from tests.support.depth import sampled
from tests.support.forked import run
from tests.support.frameworks import source_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
DCP = Path(__file__).parents[1] / "fixtures" / "dcp"
GENUINE = [
    ("v1_tp2_pp2", "families/internlm.yaml"),
    ("v2_tp2_pp2", "families/internlm2.yaml"),
    ("llama_tp2_pp1_default", "families/llama.yaml"),
]


def config_of(tensors: Tensors) -> Any:
    config = dict(tensors.config)
    return AutoConfig.for_model(config.pop("model_type"), **config)


@sampled(2)
@pytest.mark.parametrize(("folder", "mapping"), GENUINE)
@pytest.mark.parametrize("lazy", [False, True], ids=["tensors", "slices"])
def test_transformers_takes_it_as_a_state_dict_and_computes_the_trainers_logits(
    folder: str, mapping: str, lazy: bool
) -> None:
    oracle = torch.load(FIXTURES / folder / "oracle.pt", weights_only=True)
    with engine.open(FIXTURES / folder, mapping=mapping, dtype="float32") as tensors:
        how = {"dtype": torch.float32, "output_loading_info": True}
        if lazy:
            model, loading = tensors.model(**how)
        else:
            kind = getattr(transformers, tensors.config["architectures"][0])
            model, loading = kind.from_pretrained(None, config=config_of(tensors), state_dict=tensors, **how)
    assert not any(loading.values())
    with torch.no_grad():
        assert (model(oracle["input_ids"]).logits - oracle["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("mapping", ["internlm2", "a-chat"])
def test_a_model_ends_its_answers_as_the_one_that_a_run_writes(
    mapping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-chat.yaml").write_text(
        "mapping: 1\nname: a-chat\nversion: 1.0.0\ndescription: A chat model of its own\n"
        "extends: families/internlm2.yaml\ngeneration: {eos_token_id: [2, 92], temperature: 0.5, do_sample: true}\n"
    )
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    engine.convert(mapping, FIXTURES / GENUINE[1][0], tmp_path / "hf")
    with engine.open(FIXTURES / GENUINE[1][0], mapping=mapping) as tensors:
        opened = tensors.model()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert opened.generation_config.to_dict() == written.generation_config.to_dict()


@pytest.mark.parametrize("ends", [{"eos_token_id": [2, 7], "temperature": 0.5}, None, "wrong"])
def test_a_model_ends_its_answers_as_the_tokenizer_beside_it_says(ends: Any, tmp_path: Path) -> None:
    """And one whose configuration names no end has none: its class's own is another model's."""
    model = DCP / "hf_verl_fsdp4"
    step = shutil.copytree(source_of(model), tmp_path / "step")
    (step / "huggingface").mkdir(exist_ok=True)
    config = json.loads((model / "hf_config.json").read_text())
    config = {key: value for key, value in config.items() if ends or not key.endswith("_token_id")}
    (step / "huggingface" / "config.json").write_text(json.dumps(config))
    if ends:
        words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
        (step / "huggingface" / "tokenizer.json").write_text(json.dumps({"model": words}))
        (step / "huggingface" / "generation_config.json").write_text(json.dumps(ends))  # text in it is refused
    engine.convert("transformers", step, tmp_path / "hf")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with engine.open(step, mapping="transformers") as tensors:
        opened = tensors.model()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "temperature"):
        assert getattr(opened.generation_config, key) == getattr(written.generation_config, key), key


def test_a_model_that_generates_nothing_opens_too() -> None:
    with engine.open(FIXTURES / "v1_tp2_pp1_reward", mapping="internlm") as tensors:
        assert type(tensors.model()).__name__ == "LlamaForSequenceClassification"


def test_the_automatic_class_takes_it_as_soon_as_it_takes_any_state_dict() -> None:
    with engine.open(FIXTURES / GENUINE[1][0], mapping=GENUINE[1][1], dtype="float32") as tensors:
        config = config_of(tensors)
        try:
            AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
        except TypeError:
            return  # as in transformers 5.23, which looks at the path: docs/serving.md says so
        assert AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=tensors.slices)


def test_torch_takes_it_as_a_state_dict_and_the_parameters_are_its_tensors() -> None:
    folder, mapping = GENUINE[1]
    oracle = torch.load(FIXTURES / folder / "oracle.pt", weights_only=True)
    with engine.open(FIXTURES / folder, mapping=mapping, dtype="float32") as tensors:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(tensors), dtype=torch.float32)
        result = model.load_state_dict(tensors, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # holds no weights
    with torch.no_grad():
        assert (model(oracle["input_ids"]).logits - oracle["logits"]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("written") / "out"
    engine.convert(GENUINE[1][1], FIXTURES / GENUINE[1][0], out, dtype="bfloat16")
    return safe_open(str(out / "model.safetensors"), "pt")


@pytest.fixture(scope="module")
def opened() -> Any:
    with engine.open(FIXTURES / GENUINE[1][0], mapping=GENUINE[1][1], dtype="bfloat16") as tensors:
        yield tensors


def test_it_is_a_mapping_of_the_tensors_that_a_run_writes(opened: Tensors, written: Any) -> None:
    assert isinstance(opened, Mapping) and set(opened) == set(written.keys()) and len(opened) == len(opened.slices)
    with ThreadPoolExecutor(8) as users:
        found = dict(zip(opened, users.map(opened.get_tensor, opened), strict=True))
    for name, tensor in found.items():
        one, other = opened.get_slice(name), written.get_slice(name)
        assert tensor.dtype == one.dtype and tensor.shape == one.shape
        assert tensor.equal(written.get_tensor(name))
        assert one.get_shape() == other.get_shape() and one.get_dtype() == other.get_dtype()
    assert "nothing" not in opened
    with pytest.raises(KeyError):
        opened["nothing"]
    assert "tensors of" in repr(opened)


INDEX = st.one_of(
    st.integers(-130, 130),
    st.slices(128).filter(lambda one: one.step is None or one.step > 0),
    st.just(slice(None)),
    st.just(...),
)


SEVERAL = st.lists(INDEX, max_size=3).filter(lambda ones: ones.count(...) < 2).map(tuple)
NAMES = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]


@given(name=st.sampled_from(NAMES), index=st.one_of(INDEX, SEVERAL))
def test_a_slice_is_that_of_the_whole_tensor(opened: Tensors, written: Any, name: str, index: Any) -> None:
    try:
        expected = written.get_tensor(name)[index]
    except (IndexError, ValueError):
        with pytest.raises((IndexError, ValueError)):
            opened.get_slice(name)[index]
        return
    assert opened.get_slice(name)[index].equal(expected)


@pytest.mark.parametrize(
    "index",
    [-1, np.int64(-1), 0, (0, ..., 1), (slice(np.int64(1), 3), 2), (slice(None, None, 2), slice(None), 1), (..., 0)],
)
def test_a_slice_of_stacked_experts_is_that_of_the_whole_tensor(index: Any) -> None:
    with engine.open(FIXTURES / "moe_tp2_pp2_dp1", mapping="families/moe-stacked.yaml") as opened:
        name = next(name for name in opened if name.endswith("gate_up_proj"))
        assert opened.get_slice(name)[index].equal(opened.get_tensor(name)[index])


@pytest.mark.parametrize("part", [1, 1 << 10])
@pytest.mark.parametrize(
    "index", [slice(None, None, 3), (slice(None), 1), (slice(1, 50, 2), slice(2, 5)), slice(5, 5, 2)]
)
def test_a_slice_that_is_read_in_several_parts_has_all_its_rows(
    part: int, index: Any, opened: Tensors, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_tensors, "PART_BYTES", part)
    name = "model.embed_tokens.weight"
    assert opened.get_slice(name)[index].equal(written.get_tensor(name)[index])


@pytest.mark.parametrize(
    "index", [None, "a", 1.0, True, [1], torch.tensor([1]), slice(None, None, -1), (0, 0, 0), (..., ...)]
)
def test_what_is_no_index_is_refused(opened: Tensors, index: Any) -> None:
    with pytest.raises((TypeError, IndexError, ValueError)):
        opened.get_slice("model.norm.weight")[index]


def test_a_slice_reads_only_its_rows(opened: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    readers = opened.readers
    read = readers.read_into

    def counted(output: int, start: int, target: memoryview) -> None:
        asked.append(len(target))
        read(output, start, target)

    monkeypatch.setattr(readers, "read_into", counted)
    shape = opened.get_slice("model.embed_tokens.weight").get_shape()
    opened.get_slice("model.embed_tokens.weight")[3:5]
    assert asked == [2 * shape[1] * 2]


def test_who_waits_for_a_result_that_fails_gets_the_error_and_the_next_one_tries_again() -> None:
    awaited: list[Any] = []

    def compute(key: str) -> str:
        awaited.append(once._known[key])
        if len(awaited) == 1:
            raise ValueError("at first")
        return key

    once = Once(compute)
    with pytest.raises(ValueError, match="at first"):
        once("a")
    assert isinstance(awaited[0].exception(0), ValueError)
    assert once("a") == once("a") == "a" and len(awaited) == 2


def test_an_interrupt_as_a_result_is_kept_stays_one_and_the_result_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once became an error of the standard library, about the state of a future."""

    class Interrupted(reading.Future[Any]):
        def set_result(self, result: Any) -> None:
            super().set_result(result)
            raise KeyboardInterrupt

    once = Once[int, int](lambda key: key)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reading, "Future", Interrupted)
        once(1)
    assert once(1) == 1


def test_every_element_type_has_torchs() -> None:
    assert {name: kind.itemsize for name, kind in torch_types().items()} == ITEM_SIZES


def test_a_checkpoint_that_changes_or_is_closed_is_not_read(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / GENUINE[0][0], tmp_path / "src")
    with engine.open(tmp_path / "src", mapping=GENUINE[0][1]) as tensors:
        assert tensors["lm_head.weight"].numel()
        (tmp_path / "src" / "model_tp0_pp1.pt").touch()
        with pytest.raises(engine.EngineError, match="E405"):
            tensors["lm_head.weight"]
        assert tensors["model.embed_tokens.weight"].numel()  # of files that did not change
    with pytest.raises(engine.EngineError, match="closed"):
        tensors["model.embed_tokens.weight"]


def test_no_tensor_is_handed_out_that_another_is_tied_to_and_differs_from(tmp_path: Path) -> None:
    whole = {"embed.weight": torch.randn(8, 4), "head.weight": torch.randn(8, 4)}
    whole |= {f"layers.{i}.mlp.weight": torch.randn(6, 4) for i in range(2)}
    features.shards(whole, tmp_path)
    data = {**features.rule("head", tied_to="embed.weight"), "config": {"tie_word_embeddings": True}}
    with engine.open(tmp_path / "step", features.write(data, tmp_path)) as tensors:
        assert torch.equal(tensors["h.0.mlp.weight"], whole["layers.0.mlp.weight"])
        with pytest.raises(engine.EngineError, match="E402"):
            tensors["embed.weight"]


def test_tensors_are_read_where_they_were_opened_wherever_the_program_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FIXTURES)
    with engine.open(GENUINE[0][0], mapping=GENUINE[0][1]) as tensors:
        monkeypatch.chdir(tmp_path)
        assert tensors["lm_head.weight"].numel()


def test_a_fork_is_told_that_it_lacks_the_threads_that_read(opened: Tensors, tmp_path: Path) -> None:
    """Where large tensors once were waited for without end."""
    assert opened["lm_head.weight"].numel()
    ended = run(lambda: opened["lm_head.weight"], tmp_path)
    assert ended.returncode == 1 and b"E001 tensors cannot be used in a fork" in ended.stderr


@pytest.mark.parametrize("what", [lambda it: it, lambda it: it.slices, lambda it: it.get_slice("lm_head.weight")])
def test_it_says_why_it_is_not_sent_to_another_process(opened: Tensors, what: Any) -> None:
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="open it there"):
            send(what(opened))


def test_a_fork_of_a_process_that_has_read_nothing_yet_may_read(tmp_path: Path) -> None:
    """As workers of a torch DataLoader do."""
    with engine.open(FIXTURES / GENUINE[0][0], mapping=GENUINE[0][1]) as tensors:
        ended = [run(lambda: tensors["lm_head.weight"].numel(), tmp_path) for _ in range(2)]
        assert [one.returncode for one in ended] == [0, 0], ended[0].stderr
        assert tensors["lm_head.weight"].numel()


def test_a_plan_can_be_opened_and_rank_files_have_their_files_names(tmp_path: Path) -> None:
    plan = engine.plan_reshard("families/internlm.yaml", FIXTURES / "v1_tp2_pp2", tp=1, pp=2)
    with engine.open(plan) as tensors:
        assert tensors["model_tp0_pp1.pt:norm.weight"].numel()
