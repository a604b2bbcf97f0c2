"""InternEvo's Gemma, computed from its training tensors as the facts about InternEvo's code say."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import embedding, gelu, linear, silu

import engine
from engine.errors import EngineError
from tests.support.reference import attend

NAME = "internevo-gemma"
LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, VOCAB = 2, 16, 4, 2, 6, 24, 32
State = dict[str, torch.Tensor]


def tensors(biases: bool) -> State:
    """The whole training tensors; norms are near zero, since one is added to them."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(5))
    whole = {"embed_tokens.weight": draw(VOCAB, HIDDEN), "norm.weight": draw(HIDDEN) / 4}
    whole["output.weight"] = draw(VOCAB, HIDDEN)
    for i in range(LAYERS):
        at, mlp = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        for name, heads in (("wq", HEADS), ("wk", GROUPS), ("wv", GROUPS)):
            whole[f"{at}.{name}.weight"] = draw(heads * HEAD_DIM, HIDDEN) / 4
            whole |= {f"{at}.{name}.bias": draw(heads * HEAD_DIM)} if biases else {}
        whole[f"{at}.wo.weight"] = draw(HIDDEN, HEADS * HEAD_DIM) / 4
        whole |= {f"{at}.wo.bias": draw(HIDDEN)} if biases else {}
        whole |= {f"{mlp}.w1.weight": draw(FFN, HIDDEN), f"{mlp}.w3.weight": draw(FFN, HIDDEN)}
        whole[f"{mlp}.w2.weight"] = draw(HIDDEN, FFN)
        whole |= {f"layers.{i}.{norm}.weight": draw(HIDDEN) / 4 for norm in ("attention_norm", "ffn_norm")}
    return whole


def logits(t: State, ids: torch.Tensor, gate: Any, rotary: str) -> torch.Tensor:
    """What training computes: its embedding is scaled, and one is added to the weights of its norms."""
    m: Any = SimpleNamespace(rotary=rotary, heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM)

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + t[f"{name}.weight"])

    def through(name: str, y: torch.Tensor) -> torch.Tensor:
        return linear(y, t[f"{name}.weight"], t.get(f"{name}.bias"))

    x = embedding(ids, t["embed_tokens.weight"]) * HIDDEN**0.5
    for i in range(LAYERS):
        at, mlp = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = norm(f"layers.{i}.attention_norm", x)
        q, k, v = (through(f"{at}.{one}", y).view(*y.shape[:2], -1, HEAD_DIM) for one in ("wq", "wk", "wv"))
        x = x + through(f"{at}.wo", attend(m, q, k, v, 10000.0))
        y = norm(f"layers.{i}.ffn_norm", x)
        x = x + through(f"{mlp}.w2", gate(through(f"{mlp}.w1", y)) * through(f"{mlp}.w3", y))
    return linear(norm("norm", x), t["output.weight"])


def save(folder: Path, whole: State, **said: Any) -> Path:
    """The files of two tensor ranks."""
    folder.mkdir()
    for rank in range(2):
        state = dict(whole)
        for name, tensor in whole.items():
            cut = 1 if name.endswith(("wo.weight", "w2.weight")) or name.startswith("embed_tokens") else 0
            if not name.endswith(("norm.weight", "wo.bias")):
                state[name] = tensor.chunk(2, cut)[rank].clone()
            elif name.endswith("wo.bias") and rank:
                del state[name]
        torch.save(state, folder / f"model_tp{rank}_pp0.pt")
    config = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_attention_heads": HEADS,
        "num_kv_attention_heads": GROUPS, "head_dim": HEAD_DIM, "mlp_ratio": FFN / HIDDEN, "multiple_of": 8,
        "layer_norm_epsilon": 1e-5, "norm_type": "rmsnorm", "add_unit_offset": True, "num_chunks": 1,
        "no_bias": "layers.0.attention.wq.bias" not in whole,
    }  # fmt: skip
    torch.save({key: value for key, value in (config | said).items() if value is not None}, folder / "model_config.pt")
    torch.save("model_type = 'GEMMA'\n", folder / "config_file.pt")
    return folder


CASES = pytest.mark.parametrize(
    ("gate", "rotary", "biases"), [(gelu, "halves", False), (silu, "pairs", True)], ids=["gelu", "silu"]
)


def step(folder: Path, gate: Any, rotary: str, biases: bool) -> Path:
    return save(folder, tensors(biases), use_swiglu=gate is silu, qk_interleaved=rotary == "pairs")


@CASES
def test_transformers_computes_what_a_gemma_of_internevo_does(
    gate: Any, rotary: str, biases: bool, tmp_path: Path
) -> None:
    import transformers

    engine.convert(NAME, step(tmp_path / "step", gate, rotary, biases), tmp_path / "hf")
    model, loaded = transformers.GemmaForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded.values())
    ids = torch.arange(2 * 9).view(2, 9) * 5 % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits(tensors(biases), ids, gate, rotary), atol=2e-5, rtol=1e-5)


@CASES
def test_a_gemma_comes_back_bit_for_bit(gate: Any, rotary: str, biases: bool, tmp_path: Path) -> None:
    source = step(tmp_path / "step", gate, rotary, biases)
    engine.convert(NAME, source, tmp_path / "hf")
    engine.reverse(NAME, tmp_path / "hf", tmp_path / "back", like=source)
    for name in ("model_tp0_pp0.pt", "model_tp1_pp0.pt"):
        theirs, ours = (torch.load(folder / name) for folder in (source, tmp_path / "back"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config, back = (torch.load(folder / "model_config.pt") for folder in (source, tmp_path / "back"))
    assert {key: back[key] for key in ("use_swiglu", "add_unit_offset", "head_dim", "qk_interleaved")} == {
        key: config[key] for key in ("use_swiglu", "add_unit_offset", "head_dim", "qk_interleaved")
    }


def test_tokens_that_no_training_file_holds_are_those_of_a_given_configuration(tmp_path: Path) -> None:
    source = save(tmp_path / "step", tensors(False))
    told = {"bos_token_id": 11, "eos_token_id": [13, 14], "pad_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(engine.plan(NAME, source).config | told))
    found = engine.plan(NAME, source, config=tmp_path / "config.json").config
    assert {key: found[key] for key in told} == told


@pytest.mark.parametrize("said", [{"add_unit_offset": None}, {"add_unit_offset": False}, {"use_glu": False}])
def test_another_kind_of_gemma_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be expressed") as caught:
        engine.plan(NAME, save(tmp_path / "step", tensors(False), **said))
    assert caught.value.code == "E209"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"tie_word_embeddings": None}, "its head is the embedding"),
        ({"tie_word_embeddings": True}, "its head is the embedding"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "exact GELU"),
        ({"hidden_act": None, "hidden_activation": None}, "exact GELU"),
        ({"hidden_act": "gelu_python", "hidden_activation": "gelu_pytorch_tanh"}, None),
    ],
)
def test_a_gemma_that_training_does_not_have_is_not_written(
    said: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    engine.convert(NAME, save(tmp_path / "step", tensors(False)), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | said
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(EngineError, match=why) as caught:
        engine.plan_reverse(NAME, tmp_path / "hf")
    assert caught.value.code == ("E209" if why else "E218")


def test_no_other_mapping_takes_a_gemma(tmp_path: Path) -> None:
    source = save(tmp_path / "step", tensors(False))
    assert [one.name for one in engine.inspect(source).fitting] == [NAME]
    with pytest.raises(EngineError):
        engine.plan("internevo-qwen2", source)


@CASES
def test_an_output_is_compared_with_training_s_own_forward_pass(
    gate: Any, rotary: str, biases: bool, tmp_path: Path
) -> None:
    source = step(tmp_path / "step", gate, rotary, biases)
    engine.convert(NAME, source, tmp_path / "hf")
    found = engine.verify(tmp_path / "hf", src=source, mapping=NAME, logits=True)
    assert found.problems == () and found.logits is not None
    path = tmp_path / "hf" / "config.json"
    other = json.loads(path.read_text()) | {"hidden_act": "relu", "hidden_activation": "relu"}
    path.write_text(json.dumps(other))
    assert engine.verify(tmp_path / "hf", src=source, mapping=NAME, logits=True).problems
