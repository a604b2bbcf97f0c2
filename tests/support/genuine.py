"""The genuine checkpoints, and what stock transformers makes of their conversions."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.depth import SOAK

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"


FAMILIES = {
    "v1": "families/internlm.yaml",
    "old": "families/internlm.yaml",
    "llama": "families/llama.yaml",
    "moe": "families/internlm-moe.yaml",
}

GENUINE = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "model_config.pt").exists())

_OTHER_RANKS = {"old_v1_tp2_pp2", "v1_tp1_pp1", "v1_tp2_pp2_chunks2", "v1_tp2_pp2_l5", "v1_tp2_pp2_wrapped"}
# Each model on one grid of ranks, where the ranks matter to other tests; all in the soak.
MODELS = sorted(folder.name for folder in FIXTURES.iterdir() if SOAK or folder.name not in _OTHER_RANKS)


def family_of(fixture: str) -> str:
    return FAMILIES.get(fixture.split("_")[0], "families/internlm2.yaml")


AMBIGUOUS = ["v1_tp4_pp1", "v2_tp4_pp1_nohf"]


def settings_of(name: str) -> dict[str, str]:
    return {"mlp_letters": "w2_is_down"} if name in AMBIGUOUS else {}


def logits(out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Load with stock transformers, without remote code; no key may be missing or left over."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    reward = "LlamaForSequenceClassification" in AutoConfig.from_pretrained(out).architectures
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        if reward:
            result: torch.Tensor = model.score(model.model(ids).last_hidden_state)
        else:
            result = model(ids).logits
    return result
