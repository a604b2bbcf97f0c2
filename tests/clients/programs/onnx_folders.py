"""Runs in a client's environment: folders exported to ONNX by optimum and run by onnxruntime, against the oracle."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            model = ORTModelForCausalLM.from_pretrained(
                given["folder"], export=True, use_cache=False, use_io_binding=False
            )
            oracle = torch.load(given["oracle"], weights_only=True)
            ids = oracle["input_ids"]
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
            results[name] = {"difference": float((logits - oracle["logits"]).abs().max())}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": version("optimum"), "results": results}))


main()
