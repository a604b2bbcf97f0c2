"""Runs in a client's environment: lm-evaluation-harness scores continuations; transformers' own sums are known."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def result_of(given):
    told = json.loads(Path(given["texts"]).read_text())["texts"]
    pairs = [(a, b) for a, b in zip(told[30:90], told[90:150], strict=True) if a.strip() and b.strip()]
    harness = HFLM(pretrained=given["folder"], device="cpu", dtype="float32", batch_size=4)
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers = harness.loglikelihood(asked, disable_tqdm=True)
    worst = 0.0
    for (context, text), (score, _) in zip(pairs, answers, strict=True):
        whole, start = harness._encode_pair(context, text)
        ids = (whole + start)[-harness.max_length :]
        with torch.no_grad():
            logits = harness.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(start), len(ids)))
        worst = max(worst, abs(score - expected) / len(start))
    return {"requests": len(pairs), "difference": worst}


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(given)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": version("lm-eval"), "results": results}))


main()
