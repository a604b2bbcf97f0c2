"""Runs in a client's environment: folders converted and run by CTranslate2, against the oracle's logits."""

import json
import sys
from pathlib import Path

import ctranslate2
import numpy
import torch
from ctranslate2.converters import TransformersConverter


def result_of(given, out):
    TransformersConverter(given["folder"]).convert(str(out), force=True)
    generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
    asked = torch.load(given["oracle"], weights_only=True)
    logits = numpy.array(generator.forward_batch(asked["input_ids"].tolist()))
    return {"difference": float(abs(logits - asked["logits"].numpy()).max())}


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, given in asked["models"].items():
        try:
            results[name] = result_of(given, Path(asked["scratch"]) / f"{name}.ct2")
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    Path(sys.argv[2]).write_text(json.dumps({"version": ctranslate2.__version__, "results": results}))


main()
