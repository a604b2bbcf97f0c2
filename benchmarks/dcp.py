"""Torch's own programs beside the engine, on one distributed checkpoint: time, peak memory, and what faults do.

    python -m benchmarks.dcp [MB] [FOLDER]

Each runs as a process of its own: `cp -r`, the engine, torch's `dcp_to_torch_save`, and the loop that people write
(load everything, then `save_file`). Then the checkpoint loses a file, and a box of a tensor.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_MB = 24  # of one layer in bfloat16
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


def make(folder: Path, megabytes: int) -> None:
    """A checkpoint of eight ranks, written by the engine and read by torch."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import engine

    config = {**CONFIG, "num_hidden_layers": max(1, (megabytes - 131) // LAYER_MB)}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    (folder / "hf").mkdir(parents=True)
    save_file(
        {n: torch.randn(one.shape, dtype=torch.bfloat16) for n, one in shapes.items()}, folder / "hf/model.safetensors"
    )
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    engine.reverse("transformers", folder / "hf", folder / "dcp", ranks="dp=8")
    shutil.rmtree(folder / "hf")


def measured(words: list[str], out: Path) -> tuple[float, int, int]:
    """Seconds, peak MiB and exit code of a process that writes to a folder."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return time.monotonic() - started, usage.ru_maxrss >> 10, os.waitstatus_to_exitcode(status)


def ways(source: Path, out: Path) -> dict[str, list[str]]:
    """The programs, as words of a command line."""
    run = [sys.executable, "-m", "engine", "run", "-m", "transformers", "-s", str(source), "-o", str(out), "-q"]
    python = [sys.executable, "-c"]
    made = f"import os, sys; os.makedirs({str(out)!r})\n"
    return {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "engine run": run,
        "engine run, no digests": [*run, "--no-digests"],
        "torch: dcp_to_torch_save": [*python, made + TORCH, str(source), str(out)],
        "dcp.load, save_file": [*python, made + SCRIPT, str(source), str(out)],
    }


def without_a_box(folder: Path) -> None:
    """Take the second box of the first tensor out of the directory."""
    path = folder / ".metadata"
    value = pickle.loads(path.read_bytes())
    name, one = next((n, t) for n, t in value.state_dict_metadata.items() if len(t.chunks) > 1)
    gone = one.chunks.pop(1)
    value.storage_data = {k: v for k, v in value.storage_data.items() if (k.fqn, k.offset) != (name, gone.offsets)}
    path.write_bytes(pickle.dumps(value))


def made_apart(folder: Path, megabytes: int) -> None:
    """`make` in a process of its own: what this one holds would count for those that it starts."""
    subprocess.run([sys.executable, "-m", "benchmarks.dcp", "make", str(megabytes), str(folder)], check=True)


def main() -> int:
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[3]), int(sys.argv[2]))
        return 0
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        made_apart(folder, megabytes)
        source, out = folder / "dcp", folder / "out"
        best: dict[str, tuple[float, int, int]] = {}
        for _ in range(int(os.environ.get("ROUNDS", "3"))):
            for way, words in ways(source, out).items():
                best[way] = min(best.get(way, (1e9, 0, 0)), measured(words, out))
        copied = best["cp -r"][0]
        faults = {}
        for fault, harm in (("a file less", lambda: (source / "__3_0.distcp").unlink()), ("a hole", None)):
            if harm is None:
                shutil.rmtree(source)
                made_apart(folder, megabytes)
                without_a_box(source)
            else:
                harm()
            for way, words in ways(source, out).items():
                code = measured(words, out)[2]
                left = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
                faults[way, fault] = "refused" if code and not left else "an error, output begun" if code else "written"
        print("| program | time, × `cp` | peak memory | a file less | a hole |\n|---|---|---|---|---|")
        for way, (seconds, peak, _) in best.items():
            told = [faults[way, fault] for fault in ("a file less", "a hole")]
            print(f"| {way} | {seconds / copied:.2f} | {peak} MiB | {' | '.join(told)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
