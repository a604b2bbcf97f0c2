"""`make demo`: a genuine checkpoint, trained tp 2 × pp 2, converted and answering in transformers."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT = Path("tests/fixtures/internevo/v1_tp2_pp2")
OUT = Path("demo-out")
TOLERANCE = 1e-4


def engine(*arguments: str | Path) -> None:
    """Run the command line as a user would, showing the command."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ engine {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "engine", *words], cwd=ROOT, check=True)


def largest_difference(model_folder: Path, oracle_file: Path) -> float:
    """How far transformers' logits are from those of the trainer's own forward."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    oracle = torch.load(oracle_file, weights_only=True)
    model, loading = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, output_loading_info=True)
    problems = {kind: keys for kind, keys in loading.items() if keys}
    if problems:
        raise SystemExit(f"transformers loaded it with complaints: {problems}")
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits
        prompt = oracle["input_ids"][:1, :4]
        mask = torch.ones_like(prompt)
        answer = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{type(model).__name__}, {parameters:,} parameters, loaded with no key missing or left over")
    print(f"prompt {prompt[0].tolist()} goes on {answer[0, prompt.shape[1] :].tolist()}")
    return float((logits - oracle["logits"]).abs().max())


def main() -> None:
    engine("inspect", CHECKPOINT)
    engine("run", "--mapping", "internlm", "--src", CHECKPOINT, "--out", OUT, "--dtype", "float32",
           "--overwrite")  # fmt: skip
    difference = largest_difference(ROOT / OUT, ROOT / CHECKPOINT / "oracle.pt")
    print(f"largest difference from the trainer's own logits: {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"that is more than {TOLERANCE}")


if __name__ == "__main__":
    main()
