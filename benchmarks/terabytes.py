"""Planning at a size that no machine here holds: 2 TB in the files of 2,048 ranks, all of it holes.

    python -m benchmarks.terabytes [--layers 64] [--experts 64] [--tp 8] [--pp 16] [--ep 16] [--parts 64]

The files are sparse: their headers are genuine, their tensors take no room. Each step runs in a process of its own.
Then a table projects run times from what was counted, with the assumptions said.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAPPING = "megatron-mixtral"
HIDDEN, FFN, HEADS, GROUPS, VOCAB = 6144, 13312, 48, 8, 128_000
MIB, WINDOW = 1 << 20, 16 << 20
BETWEEN = " of two mappings"  # steps of a reshard that reads with one and writes with another, for these ranks
RANKS = {"tp": 4, "pp": 16, "ep": 16}

# Assumptions of the projection.
LATENCY = 0.05  # seconds that a request takes besides its bytes
AT_ONCE = 16  # requests of a machine
NIC = 25e9 / 8  # bytes a second of a machine
ENGINE = 1.0e9  # bytes a second that four threads move, digests included
FIXED = 3.0  # seconds to start a part and to end it
STORES = (10, 25, 100, 400)  # Gb/s that a store gives, and takes, in all


def tensors(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The model's tensors as transformers names them."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    head = HIDDEN // HEADS
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows * head, HIDDEN)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.block_sparse_moe.gate.weight", (experts, HIDDEN)
        for expert in range(experts):
            for name, shape in (("w1", (FFN, HIDDEN)), ("w2", (HIDDEN, FFN)), ("w3", (FFN, HIDDEN))):
                yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def holes(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> None:
    """A file of zeros that take no room, and some bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces:
            file.seek(at)
            file.write(data)


def make(work: Path, given: argparse.Namespace) -> None:
    """A Hugging Face checkpoint, and of the rank files that `reverse` would write everything but the tensors."""
    import engine
    from engine import api
    from engine.api.outputs import small_files
    from engine.run.schedule import layout_of

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors(given.layers, given.experts):
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    holes(work / "hf" / "model.safetensors", 8 + len(text) + end, [(0, struct.pack("<Q", len(text)) + text)])
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": given.layers, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "head_dim": HIDDEN // HEADS, "vocab_size": VOCAB,
        "num_local_experts": given.experts, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "hidden_act": "silu",
        "sliding_window": None, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (work / "hf" / "config.json").write_text(json.dumps(config))
    ranks = {"tp": given.tp, "pp": given.pp, "ep": given.ep}
    plan = api.plan_reverse(MAPPING, work / "hf", ranks=ranks)
    for file in plan.shards:
        layout = layout_of(plan, file)
        count = len(file.outputs)
        behind = [piece for number in range(count) for piece in layout.after(number, number + 1)]
        largest = max(range(count), key=lambda number: plan.outputs[file.outputs[number]].nbytes)
        unlike = [(layout.offsets[largest], file.name.encode())]  # or files of zeros would be held against each other
        pieces = [*layout.start(), *behind, *unlike, *layout.finish(range(1, count + 1))]
        holes(work / "step" / file.name, layout.size, pieces)
    for name, data in small_files(plan, None, None).files.items():
        (work / "step" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "step" / name).write_bytes(data)
    print(json.dumps({"bytes": plan.nbytes, "files": len(plan.shards), "tensors": len(plan.outputs)}))
    assert engine


def step(work: Path, what: str, parts: int) -> dict[str, Any]:
    """One step, measured; what it counted."""
    from engine import api

    source, saved = work / "step", work / ("between.json" if what.endswith(BETWEEN) else "plan.json")
    if what == "inspect":
        return {"fits": len(api.inspect(source, work / "hf" / "config.json").fitting)}
    if what == "plan":
        return {"outputs": len(api.plan(MAPPING, source, config=work / "hf" / "config.json").outputs)}
    if what.startswith("save"):
        other: Any = {"job": "reshard", "to": MAPPING, "ranks": RANKS} if what.endswith(BETWEEN) else {}
        api.save_plan(saved, MAPPING, source, config=work / "hf" / "config.json", overwrite=True, **other)
        return {"bytes": saved.stat().st_size}
    if what == "load":
        return {"outputs": len(api.load_plan(saved).outputs)}
    from engine.api.parts import loaded_part
    from engine.api.plans import read_saved
    from engine.run.parts import Part

    if what == "count":
        return counted(api.load_plan(saved), parts)
    work, _ = loaded_part(read_saved(saved), Part(parts // 2, parts), positioned=not what.startswith("store"))
    return {"files": sum(file.state is not None for file in work.files)}


def counted(plan: Any, parts: int) -> dict[str, Any]:
    """How the work is dealt: the largest part by the mean, and the requests of one in the middle."""
    from engine.move.reader import windows
    from engine.run.parts import Part, share
    from engine.run.schedule import schedule
    from engine.storage.sources import join, split

    found: dict[str, Any] = {}
    for name, positioned in (("file system", True), ("store", False)):
        jobs = schedule(plan, positioned=positioned)
        sizes = [sum(job.nbytes for job in share(jobs, Part(n + 1, parts), cut=positioned)) for n in range(parts)]
        found[name] = max(sizes) * parts / sum(sizes)
        mine = share(jobs, Part(parts // 2, parts), cut=positioned)
    wanted = [(output, 0) for job in mine for unit in job.units for output in unit.outputs]
    found["requests"] = sum(
        len(list(split(join(ranges), 8 * MIB)))
        for window in windows(plan, wanted, WINDOW)
        for ranges in window.ranges.values()
    )
    found["part"] = sum(job.nbytes for job in mine)
    return found


def project(nbytes: int, requests: int, parts: int) -> None:
    """Run times of stores and machines, from what was counted."""
    machines = (1, 8, parts)
    print("| store | " + " | ".join(f"{n} machine{'s' * (n > 1)}" for n in machines) + " |")
    print("|---|" + "---|" * len(machines))
    for gigabits in STORES:
        told = []
        for count in machines:
            each = nbytes / count
            rate = min(gigabits * 1e9 / 8 / count, NIC, ENGINE)
            waiting = requests * parts / count * LATENCY / AT_ONCE
            told.append(f"{(FIXED + max(each / rate, waiting)) / 60:.0f} min")
        print(f"| {gigabits} Gb/s | " + " | ".join(told) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 64), ("experts", 64), ("tp", 8), ("pp", 16), ("ep", 16), ("parts", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", type=Path, help="a folder to keep (default: a temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child == "make":
        make(given.work, given)
    elif given.child:
        started = time.monotonic()
        found = step(given.work, given.child, given.parts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        print(json.dumps({**found, "seconds": time.monotonic() - started, "cpu": cpu, "peak": peak}))
    else:
        with tempfile.TemporaryDirectory() as made:
            report(given, given.work or Path(made))


def report(given: argparse.Namespace, work: Path) -> None:
    def child(what: str) -> dict[str, Any]:
        options = [f"--{name}={getattr(given, name)}" for name in ("layers", "experts", "tp", "pp", "ep", "parts")]
        command = [sys.executable, "-m", "benchmarks.terabytes", "--child", what, f"--work={work}", *options]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found

    made = child("make") if not (work / "step").exists() else {"bytes": 0, "files": 0, "tensors": 0}
    print(f"{made['bytes'] / 1e12:.2f} TB, {made['files']:,} files, {made['tensors']:,} stored tensors\n")
    print("| step | seconds | of the processor | peak memory |\n|---|---|---|---|")
    plain = ("inspect", "plan", "save", "load", "part", "store part")
    for what in (*plain, *(f"{one}{BETWEEN}" for one in ("save", "part", "store part")), "count"):
        found = child(what)
        print(f"| {what} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['peak']:.0f} MiB |", flush=True)
    balance = f"{found['file system']:.3f} on a file system, {found['store']:.3f} in a store"
    print(f"\nlargest of {given.parts} parts / mean: {balance}")
    print(f"{found['requests']:,} requests for a part of {found['part'] / 1e9:.1f} GB\n")
    project(made["bytes"], found["requests"], given.parts)


if __name__ == "__main__":
    main()
