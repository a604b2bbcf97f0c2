"""A whole `engine run` beside `cp -r` of the same bytes: wall and CPU time, peak memory, as ratios.

    python benchmarks/bench.py [--dir FOLDER] [--gb 3] [--rounds 5] [--json FILE]

Generates an InternLM2-7B-shaped checkpoint (tp 4, bfloat16) in FOLDER, by default in memory-backed
storage where there is room, and interleaves the ways round by round, so that a slow moment of the
machine meets all of them alike. Only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

HIDDEN, FFN, VOCAB, HEADS, GROUPS, TP = 4096, 14336, 92544, 32, 8, 4
LAYER_BYTES = 2 * (HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * GROUPS // HEADS + 3 * HIDDEN * FFN)


@dataclass(frozen=True)
class Measured:
    """One finished process: seconds of wall and processor time, peak resident memory in MiB."""

    wall: float
    cpu: float
    peak: float


def generate(folder: Path, layers: int) -> None:
    """Rank files of random bits, one rank at a time; runs in its own process to free its memory."""
    import torch

    folder.mkdir()
    torch.save(
        {
            "num_layers": layers,
            "hidden_size": HIDDEN,
            "vocab_size": VOCAB,
            "num_attention_heads": HEADS,
            "num_kv_attention_heads": GROUPS,
            "mlp_ratio": FFN / HIDDEN,
            "layer_norm_epsilon": 1e-5,
            "rope_base": 1000000,
            "dtype": "torch.bfloat16",
            "adapt_hf": True,
        },
        folder / "model_config.pt",
    )
    noise = torch.randn(1 << 22).bfloat16()
    head = HIDDEN // HEADS

    def make(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].view(shape).clone()

    norm = make(HIDDEN)
    for rank in range(TP):
        state: dict[str, torch.Tensor] = OrderedDict()
        state["tok_embeddings.weight"] = make(VOCAB, HIDDEN // TP)
        for i in range(layers):
            name = f"layers.{i}."
            state[name + "attention.wqkv.weight"] = make((HEADS + 2 * GROUPS) // TP * head, HIDDEN)
            state[name + "attention.wo.weight"] = make(HIDDEN, HIDDEN // TP)
            state[name + "attention_norm.weight"] = norm.clone()
            state[name + "ffn_norm.weight"] = norm.clone()
            state[name + "feed_forward.w1.weight"] = make(FFN // TP, HIDDEN)
            state[name + "feed_forward.w2.weight"] = make(HIDDEN, FFN // TP)
            state[name + "feed_forward.w3.weight"] = make(FFN // TP, HIDDEN)
        state["norm.weight"] = norm.clone()
        state["output.weight"] = make(VOCAB // TP, HIDDEN)
        torch.save(state, folder / f"model_tp{rank}_pp0.pt")


def measure(command: list[str]) -> Measured:
    """Run a process to its end; the kernel's own account of it."""
    started = time.perf_counter()
    # As for a user: compiled modules are cached after the first run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\n{said.read().decode()}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work (default: memory-backed storage if it has room)")
    parser.add_argument("--gb", type=float, default=3, help="size of the checkpoint in GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="ways whose name has this text in it")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.generate:
        generate(given.generate, given.layers)
        return
    layers = max(1, round((given.gb * 1e9 - 4 * HIDDEN * VOCAB) / LAYER_BYTES))
    room = Path("/dev") / "shm"
    fits = room.is_dir() and shutil.disk_usage(room).free > 4 * given.gb * 1e9
    base = given.dir or (room if fits else Path(tempfile.gettempdir()))
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
    try:
        source = work / "step"
        subprocess.run([sys.executable, __file__, "--generate", str(source), "--layers", str(layers)], check=True)
        engine = [sys.executable, "-m", "engine", "run", "--mapping", "families/internlm2.yaml", "--quiet"]
        engine += ["--src", str(source), "--out", str(work / "hf")]
        ways = {
            "cp -r": ["cp", "-r", str(source), str(work / "copy")],
            "engine run, one file": [*engine, "--max-shard-size", "1TB"],
            "engine run, four files": [*engine, "--max-shard-size", f"{given.gb / 3.9:.2f}GB"],
            "engine run, rotary pairs": [*engine, "--set", "rotary=pairs"],
            "engine run, to float32": [*engine, "--dtype", "float32"],
        }
        subprocess.run([*engine[:-1], str(work / "whole")], check=True)
        back = [sys.executable, "-m", "engine", "reverse", "--mapping", "families/internlm2.yaml", "--quiet"]
        back += ["--src", str(work / "whole"), "--out", str(work / "back")]
        again = [sys.executable, "-m", "engine", "reshard", "--mapping", "families/internlm2.yaml", "--quiet"]
        again += ["--src", str(source), "--out", str(work / "back")]
        ways |= {
            "engine reverse, tp 4": [*back, "--tp", "4"],
            "engine reverse, tp 8 pp 2": [*back, "--tp", "8", "--pp", "2"],
            "engine reshard, tp 4 to 2": [*again, "--tp", "2"],
            "engine reshard, tp 4 to 8": [*again, "--tp", "8"],
            "engine reshard, to isp wp 8": [*again, "--mode", "isp", "--tp", "8", "--wp", "8"],
        }
        if given.only:
            ways = {name: way for name, way in ways.items() if name == "cp -r" or given.only in name}
        results: dict[str, list[Measured]] = {name: [] for name in ways}
        for round_ in range(given.rounds + 1):
            turn = list(ways.items())  # each way comes first, and after each other, in turn
            for name, command in turn[round_ % len(turn) :] + turn[: round_ % len(turn)]:
                measured = measure(command)
                if round_:  # the first round warms caches
                    results[name].append(measured)
                for made in ("copy", "hf", "back"):
                    shutil.rmtree(work / made, ignore_errors=True)
        report(results, sum(f.stat().st_size for f in source.iterdir()), base, given)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def report(results: dict[str, list[Measured]], size: int, base: Path, given: argparse.Namespace) -> None:
    plain = [m.wall for m in results["cp -r"]]
    print(f"{size / 1e9:.2f} GB, {given.rounds} rounds, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'way':<26}{'wall s':>8}{'min–max':>14}{'ratio to cp':>13}{'of best':>9}{'cpu s':>8}{'peak MiB':>10}")
    for name, runs in results.items():
        walls = [m.wall for m in runs]
        ratio = statistics.median(walls) / statistics.median(plain)
        cpu, peak = statistics.median(m.cpu for m in runs), max(m.peak for m in runs)
        spread = f"{min(walls):.2f}–{max(walls):.2f}"
        best = min(walls) / min(plain)
        line = f"{name:<26}{statistics.median(walls):>8.2f}{spread:>14}{ratio:>13.2f}{best:>9.2f}"
        print(f"{line}{cpu:>8.2f}{peak:>10.0f}")
    if given.json:
        data = {"bytes": size, "cores": os.cpu_count(), "machine": platform.machine()}
        data |= {"runs": {name: [asdict(m) for m in runs] for name, runs in results.items()}}
        given.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
