"""Runs in a client's environment: folders run by mlx-lm on the CPU, against the oracle's logits."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
import torch
from mlx_lm.utils import load_model


def result_of(given):
    model = load_model(Path(given["folder"]))[0]
    asked = torch.load(given["oracle"], weights_only=True)
    logits = numpy.array(model(mx.array(asked["input_ids"].numpy())).astype(mx.float32))
    return {"difference": float(abs(logits - asked["logits"].numpy()).max())}


def main():
    mx.set_default_device(mx.cpu)
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(given)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": version("mlx-lm"), "results": results}))


main()
