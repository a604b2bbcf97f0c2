"""Checkpoints to convert: of random bits by torch.save, one rank at a time, or sparse and of any size.

    python -m benchmarks.generate FOLDER SPEC

The random ones are made in a process of their own, so that the memory they take is given back.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

from benchmarks.shapes import Spec, config, rank_files, rank_tensors
from engine.formats.pickling import with_dtypes
from engine.formats.torch_files import encode_torch, torch_file

ROOT = Path(__file__).parent.parent
NOISE = 1 << 22  # elements that are random; a tensor is a stretch of them, repeated, from anywhere


def generate(folder: Path, spec: Spec) -> None:
    """A checkpoint of random bits, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generate", str(folder), json.dumps(spec.as_dict())]
    subprocess.run(command, check=True, cwd=ROOT)


def write_random(folder: Path, spec: Spec) -> None:
    """Rank files as training writes them: replicas alike, everything else unlike."""
    import torch

    folder.mkdir(parents=True)
    write_config(folder, spec)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).bfloat16()

    def make(shape: tuple[int, ...], seed: str) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16)
        flat, at = made.view(-1), 0
        start = random.Random(zlib.crc32(seed.encode())).randrange(NOISE)
        while at < len(flat):
            count = min(NOISE - start, len(flat) - at)
            flat[at : at + count] = noise[start : start + count]
            at, start = at + count, 0
        return made

    for file, p in rank_files(spec.ranks):
        state: dict[str, torch.Tensor] = OrderedDict()
        for name, shape, replicated in rank_tensors(spec, p):
            state[name] = make(shape, f"{p} {name}" if replicated else f"{file} {name}")
        torch.save(state, folder / file)


def write_sparse(folder: Path, spec: Spec) -> int:
    """Rank files whose payload is holes, and takes no room. No checksums of it are given, as torch may leave them out.

    Returns:
        Bytes of all files, as they would be read.
    """
    folder.mkdir(parents=True)
    write_config(folder, spec)
    nbytes = 0
    for name, p in rank_files(spec.ranks):
        tensors = [(tensor, "BF16", shape) for tensor, shape, _ in rank_tensors(spec, p)]
        layout = torch_file(tensors, Path(name).stem)
        with (folder / name).open("wb") as file:
            records = [one for number in range(len(tensors)) for one in layout.after(number, 0)]
            for offset, data in (*layout.start(), *records, *layout.finish([0] * len(tensors))):
                file.seek(offset)
                file.write(data)
            nbytes += file.seek(0, os.SEEK_END)
    return nbytes


def write_config(folder: Path, spec: Spec) -> None:
    (folder / "model_config.pt").write_bytes(encode_torch(with_dtypes(config(spec)), "model_config"))


if __name__ == "__main__":
    write_random(Path(sys.argv[1]), Spec.of(json.loads(sys.argv[2])))
