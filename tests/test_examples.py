"""The examples are complete: their files lint, their commands run, and they convert what they say they convert."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import engine
from engine.commands.main import cli
from tests.support.depth import sampled
from tests.support.shards import same

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CHECKPOINT = ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2"
PAGES = sorted(EXAMPLES.rglob("README.md"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ENGINE_MAPPINGS", "examples/own-family")


def commands() -> list[str]:
    """Every command of the pages, those aside that need a checkpoint which the tests make."""
    lines = [line for page in PAGES for line in re.findall(r"^\$ (engine .+)$", page.read_text(), re.MULTILINE)]
    return [line for line in lines if "CHECKPOINT" not in line and "model-hf" not in line]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_an_example_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[1:]
    if "--out" in words:
        words[words.index("--out") + 1] = str(tmp_path / "out")
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\(([\w-]+)/README\.md\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


def test_the_fine_tuned_release_writes_what_it_adds_to_the_family(tmp_path: Path) -> None:
    engine.convert(EXAMPLES / "fine-tuned" / "tiny-chat.yaml", CHECKPOINT, tmp_path / "chat")
    engine.convert("families/internlm2.yaml", CHECKPOINT, tmp_path / "base")
    same(load_file(tmp_path / "chat" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors"))
    assert json.loads((tmp_path / "chat" / "generation_config.json").read_text())["eos_token_id"] == [2, 254]
    assert json.loads((tmp_path / "chat" / "config.json").read_text())["max_position_embeddings"] == 4096


def test_the_renamed_model_converts_and_comes_back_under_its_own_names(tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    fork.mkdir()
    for path in CHECKPOINT.iterdir():
        if not re.fullmatch(r"model_tp\d_pp\d\.pt", path.name):
            (fork / path.name).write_bytes(path.read_bytes())
            continue
        state = torch.load(path, weights_only=True)
        torch.save({renamed(name): tensor for name, tensor in state.items()}, fork / path.name)
    mapping = EXAMPLES / "renamed" / "forked-internlm2.yaml"
    same(dict(engine.iter_tensors(engine.plan(mapping, fork))), family_tensors())
    engine.convert(mapping, fork, tmp_path / "hf")
    engine.reverse(mapping, tmp_path / "hf", tmp_path / "back", like=fork)
    for path in fork.glob("model_tp*.pt"):
        same(torch.load(tmp_path / "back" / path.name, weights_only=True), torch.load(path, weights_only=True))


def renamed(name: str) -> str:
    return name.replace("attention.wqkv", "attn.fused").replace("attention.wo", "attn.out")


def family_tensors() -> dict[str, torch.Tensor]:
    return dict(engine.iter_tensors(engine.plan("families/internlm2.yaml", CHECKPOINT)))


@sampled(2)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_own_family_joins_fused_gate_and_up_and_goes_back(ranks: int, tmp_path: Path) -> None:
    truth = llama(layers=2, hidden=32, heads=4, groups=4, ffn=48, vocab=64)
    source = tmp_path / "source"
    source.mkdir()
    for rank in range(ranks):
        torch.save(shard(truth, rank, ranks), source / f"weights.{rank}.pt")
    config = {"depth": 2, "width": 32, "q_heads": 4, "kv_heads": 4, "mlp_width": 48, "tokens": 64}
    (source / "shop.json").write_text(json.dumps({**config, "rms_eps": 1e-6, "theta": 500000}))
    engine.convert("shop-llama", source, tmp_path / "hf")
    same(load_file(tmp_path / "hf" / "model.safetensors"), truth)
    engine.reverse("shop-llama", tmp_path / "hf", tmp_path / "back", like=source)
    for path in source.glob("*.pt"):
        same(torch.load(tmp_path / "back" / path.name, weights_only=True), torch.load(path, weights_only=True))
    assert json.loads((tmp_path / "back" / "shop.json").read_text()) == json.loads((source / "shop.json").read_text())


def llama(*, layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int) -> dict[str, torch.Tensor]:
    """The truth, under Hugging Face names."""
    torch.manual_seed(0)
    width = hidden // heads * groups
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden),
            "self_attn.v_proj": (width, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def shard(truth: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Any]:
    """What one rank of the trainer holds, cut by hand."""

    def part(name: str, dim: int) -> torch.Tensor:
        return truth[name].chunk(ranks, dim)[rank].clone()

    state: dict[str, Any] = {
        "module.embed.weight": part("model.embed_tokens.weight", 0),
        "module.head.weight": part("lm_head.weight", 0),
        "module.norm.weight": truth["model.norm.weight"],
    }
    for layer in range(sum(name.endswith("q_proj.weight") for name in truth)):
        theirs, ours = f"model.layers.{layer}.", f"module.blocks.{layer}."
        for letter in "qkv":
            state[f"{ours}{letter}.weight"] = part(f"{theirs}self_attn.{letter}_proj.weight", 0)
        state[f"{ours}o.weight"] = part(f"{theirs}self_attn.o_proj.weight", 1)
        state[f"{ours}down.weight"] = part(f"{theirs}mlp.down_proj.weight", 1)
        fused = [part(f"{theirs}mlp.{name}_proj.weight", 0) for name in ("gate", "up")]
        state[f"{ours}gate_up.weight"] = torch.cat(fused)
        state[f"{ours}norm1.weight"] = truth[f"{theirs}input_layernorm.weight"]
        state[f"{ours}norm2.weight"] = truth[f"{theirs}post_attention_layernorm.weight"]
    return state


def test_the_diff_of_the_pull_request_tells_the_reviewer_of_theta() -> None:
    files = [str(EXAMPLES / "pull-request" / f"{name}.yaml") for name in ("before", "after")]
    result = CliRunner().invoke(cli, ["diff", *files])
    assert "rope_theta" in result.output and "5000000" in result.output
