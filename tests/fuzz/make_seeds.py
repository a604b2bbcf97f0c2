"""Write the seeds again: `python -m tests.fuzz.make_seeds`. The same torch gives the same bytes."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save

FOLDER = Path(__file__).parent / "seeds"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    base = torch.arange(6.0).bfloat16()
    state = OrderedDict(a=base[:4].view(2, 2), b=base[4:], c=torch.tensor([1, 2]), n=3)
    marked = torch.nn.Parameter(torch.ones(2))
    marked.is_tensor_parallel = True
    for name, value, zipped in (
        ("views.pt", state, True),
        ("views_legacy.pt", state, False),
        ("parameter.pt", {"w": marked}, True),
        ("config.pt", {"num_layers": 2, "dtype": torch.bfloat16, "betas": (0.9, 0.95), "nested": {"x": [None]}}, True),
        ("source.pt", "parallel = dict(tensor=dict(size=2), pipeline=dict(size=1))\n", True),
    ):
        torch.save(value, FOLDER / name, _use_new_zipfile_serialization=zipped)
    for protocol in (2, 4, 5):
        (FOLDER / f"plain{protocol}.pkl").write_bytes(pickle.dumps({"a": [1, 2.5, "x", {3}], "b": None}, protocol))
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1).to(torch.int8)}
    (FOLDER / "three.safetensors").write_bytes(save(tensors, {"format": "pt"}))


if __name__ == "__main__":
    main()
