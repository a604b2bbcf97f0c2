"""Genuine checkpoints of other frameworks, with the trainers' own logits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"


def source_of(fixture: Path) -> Path:
    """The folder of a fixture that holds the weights."""
    places = ("step-10", "actor", "ckpt/iter_0000010", "iter_0000010")
    return next(fixture / place for place in places if (fixture / place).is_dir())


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint."""
    return {name: one for file in sorted(out.glob("*.safetensors")) for name, one in load_file(file).items()}


def logits_off(out: Path, oracle: Path) -> float:
    """The largest difference between the logits that stock transformers computes and the trainer's."""
    saved = torch.load(oracle, weights_only=False)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(saved["tokens"]).logits
    return float((logits - saved["logits"].float()).abs().max())
