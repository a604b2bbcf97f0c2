"""Runs in a client's environment: mergekit merges folders; of linear and slerp the result is known."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file


def merged(document, out):
    config = MergeConfiguration.model_validate(document)
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, lazy_unpickle=False, write_model_card=False))
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def slerp(one, other, t):
    """The middle of the arc from one tensor to the other, as mergekit measures it: by directions."""
    a, b = one.double().flatten(), other.double().flatten()
    cosine = float((a / a.norm()) @ (b / b.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * one.double() + t * other.double()
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    return (
        torch.sin((1 - t) * angle) * one.double() + torch.sin(t * angle) * other.double()
    ) / torch.sin(angle)  # fmt: skip


def weights(folder):
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def result_of(a, b, scratch):
    one, other = weights(a), weights(b)
    linear = merged({
        "merge_method": "linear", "dtype": "float32", "parameters": {"normalize": False},
        "models": [{"model": a, "parameters": {"weight": 0.25}}, {"model": b, "parameters": {"weight": 0.75}}],
    }, scratch / "merged_linear")  # fmt: skip
    arc = merged({
        "merge_method": "slerp", "dtype": "float32", "base_model": a, "parameters": {"t": 0.5},
        "models": [{"model": a}, {"model": b}],
    }, scratch / "merged_slerp")  # fmt: skip
    return {
        "tensors": len(one),
        "missing": sorted((one.keys() ^ linear.keys()) | (one.keys() ^ arc.keys())),
        "apart": max(float((one[name] - other[name]).abs().max()) for name in one),
        "linear": max(float((linear[name] - 0.25 * one[name] - 0.75 * other[name]).abs().max()) for name in linear),
        "slerp": max(float((arc[name].double() - slerp(one[name], other[name], 0.5)).abs().max()) for name in arc),
    }


def main():
    asked = json.loads(Path(sys.argv[1]).read_text())
    try:
        results = {"pair": result_of(*(given["folder"] for given in asked["models"].values()), Path(asked["scratch"]))}
    except Exception as error:
        results = {"pair": {"error": f"{type(error).__name__}: {error}"[:400]}}
    Path(sys.argv[2]).write_text(json.dumps({"version": version("mergekit"), "results": results}))


main()
