"""Torch's own programs beside the engine, on one distributed checkpoint: time, peak memory, and what faults do.

    python -m benchmarks.dcp [MB] [FOLDER]

The checkpoint has the widths of Llama 3 8B, and as many layers as fit; with WIDTHS=small those of a model of 0.5B,
which has ten times as many boxes in as many bytes. It is there twice, as `.distcp` files and as torch's Hugging Face
writer saves it, both of eight ranks.
Each program is a process of its own: `cp -r`, the engine, torch's `dcp_to_torch_save`, the loop that people write (load
everything, then `save_file`), and torch's consolidation of Hugging Face shards. Then the checkpoint loses a file, or a
box of a tensor, or one of its boxes says that its rows lie twice as far apart.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = os.environ.get("WIDTHS") == "small"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8, "tie_word_embeddings": False,
    **({"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 32000} if SMALL else
       {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256}),
}  # fmt: skip
LAYER_MB, ENDS_MB = (24, 131) if SMALL else (436, 2101)  # in bfloat16: a layer; embedding and head
RANKS = 8
TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2] + "/model.pt")
"""
SCRIPT = """
import sys, torch, torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
found = dcp.FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata
state = {n: torch.empty(one.size, dtype=one.properties.dtype) for n, one in found.items()}
dcp.load(state, checkpoint_id=sys.argv[1])
save_file(state, sys.argv[2] + "/model.safetensors")
"""
CONSOLIDATE = """
import glob, sys
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
names = {name for file in glob.glob(sys.argv[1] + "/shard-*") for name in safe_open(file, "pt").keys()}
consolidate_safetensors_files(sys.argv[1], sys.argv[2], dict.fromkeys(names, 1))
"""


def make(folder: Path, megabytes: int) -> None:
    """A checkpoint of eight ranks in both forms: `dcp`, and `shards` as torch's Hugging Face writer saves them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import engine

    config = {**CONFIG, "num_hidden_layers": max(1, (megabytes - ENDS_MB) // LAYER_MB)}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    for name in ("hf", "shards"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    whole = {n: torch.randn(one.shape, dtype=torch.bfloat16) for n, one in shapes.items()}
    save_file(whole, folder / "hf/model.safetensors")
    engine.reverse("transformers", folder / "hf", folder / "dcp", ranks=f"dp={RANKS}")
    shutil.rmtree(folder / "hf")
    for rank in range(RANKS):
        boxes, starts = {}, {}
        for name, one in whole.items():
            step = -(-len(one) // RANKS)
            boxes[name] = one[rank * step : (rank + 1) * step].contiguous()
            starts[name] = {"saved_offsets": [rank * step, *[0] * (one.dim() - 1)]}
        told = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(starts), "format": "pt"}
        save_file(boxes, folder / "shards" / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", told)


def measured(words: list[str], out: Path) -> tuple[float, int, int]:
    """Seconds, peak MiB and exit code of a process that writes to a folder."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return time.monotonic() - started, usage.ru_maxrss >> 10, os.waitstatus_to_exitcode(status)


def ways(source: Path, out: Path) -> dict[str, list[str]]:
    """The programs for a form of the checkpoint, as words of a command line."""
    run = [sys.executable, "-m", "engine", "run", "-m", "transformers", "-s", str(source), "-o", str(out), "-q"]
    made = f"import os, sys; os.makedirs({str(out)!r})\n"

    def python(text: str) -> list[str]:
        return [sys.executable, "-c", made + text, str(source), str(out)]

    if source.name == "shards":
        return {"engine run, of shards": run, "torch: consolidate_safetensors_files": python(CONSOLIDATE)}
    return {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "engine run": run,
        "engine run, no digests": [*run, "--no-digests"],
        "torch: dcp_to_torch_save": python(TORCH),
        "dcp.load, save_file": python(SCRIPT),
    }


def without_a_file(folder: Path) -> None:
    """Take away what the fourth rank saved."""
    next(path for name in ("__3_0.distcp", "shard-00004-*") for path in folder.glob(name)).unlink()


def without_a_box(folder: Path) -> None:
    """Take the second box of the first tensor away: out of the directory, or out of its file."""
    path = folder / ".metadata"
    if not path.exists():
        return _without_a_box_of_shards(next(folder.glob("shard-00002-*")))
    value = pickle.loads(path.read_bytes())
    name, one = next((n, t) for n, t in value.state_dict_metadata.items() if len(t.chunks) > 1)
    gone = one.chunks.pop(1)
    value.storage_data = {k: v for k, v in value.storage_data.items() if (k.fqn, k.offset) != (name, gone.offsets)}
    path.write_bytes(pickle.dumps(value))


def _without_a_box_of_shards(path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as opened:
        told = dict(opened.metadata())
    tensors, info = load_file(path), json.loads(told["DCP_SHARDING_INFO"])
    gone = next(iter(tensors))
    del tensors[gone], info[gone]
    save_file(tensors, path, {**told, "DCP_SHARDING_INFO": json.dumps(info)})


def wrong_stride(folder: Path) -> None:
    """Let the first box as wide as the model say that its rows lie twice as far apart, with the checksum that fits."""
    true, twice = (struct.pack("<cH3s", b"M", n * CONFIG["hidden_size"], b"K\x01\x86") for n in (1, 2))
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    stride = data.index(true)  # (width, 1), as a pickle has it
    begin, end = data.rindex(b"\x80\x02ctorch", 0, stride), data.index(b".", stride) + 1
    pickled = data[begin:end]
    wrong = pickled.replace(true, twice, 1)
    crcs = [zlib.crc32(one).to_bytes(4, "little") for one in (pickled, wrong)]
    path.write_bytes(data[:begin] + wrong + data[end:].replace(*crcs, 2))


FAULTS: dict[str, Callable[[Path], None]] = {
    "a file less": without_a_file, "a hole": without_a_box, "a wrong stride": wrong_stride,
}  # fmt: skip


def outcome(words: list[str], out: Path) -> str:
    """What a program made of a checkpoint with a fault."""
    code = measured(words, out)[2]
    left = out.is_dir() and any(out.iterdir())
    return "written" if not code else "an error, output begun" if left else "refused"


def made_apart(folder: Path, megabytes: int) -> None:
    """`make` in a process of its own: what this one holds would count for those that it starts."""
    subprocess.run([sys.executable, "-m", "benchmarks.dcp", "make", str(megabytes), str(folder)], check=True)


def main() -> int:
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[3]), int(sys.argv[2]))
        return 0
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder, out = Path(name), Path(name) / "out"
        made_apart(folder, megabytes)
        sources = [folder / "dcp", folder / "shards"]
        best: dict[str, tuple[float, int, int]] = {}
        for _ in range(int(os.environ.get("ROUNDS", "3"))):
            for source in sources:
                for way, words in ways(source, out).items():
                    seconds, peak, code = measured(words, out)
                    if code:
                        sys.exit(f"{way} failed")
                    best[way] = min(best.get(way, (1e9, 0, 0)), (seconds, peak, code))
        faults: dict[tuple[str, str], str] = {}
        for fault, harm in FAULTS.items():
            for source in sources:
                if (source.name, fault) == ("shards", "a wrong stride"):
                    continue  # safetensors has none
                broken = folder / "broken" / source.name
                shutil.copytree(source, broken)
                harm(broken)
                faults |= {(way, fault): outcome(words, out) for way, words in ways(broken, out).items()}
                shutil.rmtree(broken)
        print(f"| program | time, × `cp` | peak memory | {' | '.join(FAULTS)} |")
        print("|---|---|---|" + "---|" * len(FAULTS))
        for way, (seconds, peak, _) in best.items():
            told = [faults.get((way, fault), "") for fault in FAULTS]
            print(f"| {way} | {seconds / best['cp -r'][0]:.2f} | {peak} MiB | {' | '.join(told)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
