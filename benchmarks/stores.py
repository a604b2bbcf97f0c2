"""A conversion between prefixes of a real object store on this machine, beside a plain copy through the same library.

    python -m benchmarks.stores [--gb 0.6] [--windows 16,8] [--milliseconds 40 --rate 10]

Each way runs in a process of its own, against the same server, one after the other. Only ratios mean anything: the
server shares the processor, and is slower than the engine. A store far away is slow for another reason: each answer
takes a while, and each connection carries so much and no more. `--milliseconds` and `--rate` make this one like it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import memory
from benchmarks.generate import generate
from benchmarks.shapes import Shape, Spec
from benchmarks.slow_link import link
from tests.support.object_server import BUCKET, options, server

MAPPING = "families/internlm2.yaml"
SOURCE, MIB = f"s3://{BUCKET}/step", 1 << 20


def client(url: str, port: int) -> Any:
    from obstore.store import from_url

    return from_url(url, client_options={"allow_http": True}, **options(port))


def copy(port: int) -> int:
    """Copies every object as a stream; returns bytes read."""
    import obstore

    source, target = client(SOURCE, port), client(f"s3://{BUCKET}/copy", port)
    total = 0
    for one in source.list().collect():
        with obstore.open_writer(target, one["path"], buffer_size=8 * MIB) as writer:
            for block in source.get(one["path"]).stream(min_chunk_size=8 * MIB):
                writer.write(block)
                total += len(block)
    return total


def convert(port: int, window: int, shard: str) -> int:
    """Converts to the store; returns bytes read."""
    import engine
    from engine.storage.objects import ObjectStore
    from engine.storage.places import store_options

    read, get = [0], ObjectStore.get

    def counting(store: ObjectStore, name: str, state: Any, start: int, end: int) -> memoryview:
        read[0] += end - start
        return get(store, name, state, start, end)

    ObjectStore.get = counting  # type: ignore[method-assign]
    with store_options(options(port), window=window):
        engine.convert(MAPPING, SOURCE, f"s3://{BUCKET}/hf-{window}-{shard}", max_shard_size=int(shard))
    return read[0]


def child(way: str, port: str, *more: str) -> None:
    started = time.monotonic()
    read = copy(int(port)) if way == "copy" else convert(int(port), int(more[0]), more[1])
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {"seconds": time.monotonic() - started, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}
    print(json.dumps({**told, "read": read}))


def measured(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.stores", "--child", *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def wide(nbytes: float) -> Shape:
    """One layer as wide as a 7B model's, whose rows are long as there, and as much of a vocabulary as is left."""
    layer = Shape(1, vocab=256)
    return Shape(1, vocab=max(256, int(nbytes - layer.layer_bytes) // (4 * layer.hidden) // 256 * 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.6)
    parser.add_argument("--windows", default="16,8", help="in MiB (default: %(default)s)")
    parser.add_argument("--milliseconds", type=float, default=0, help="that each answer takes longer")
    parser.add_argument("--rate", type=float, default=0, help="MB/s that a connection carries; 0: as much as it can")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory(dir=memory()) as made:
        folder = Path(made)
        generate(folder / "step", Spec(wide(given.gb * 1e9)))
        size = sum(path.stat().st_size for path in (folder / "step").iterdir())
        (folder / "server").mkdir()
        with server(folder / "server") as near, link(near, given.milliseconds, given.rate) as port:
            store = client(SOURCE, near)
            for path in sorted((folder / "step").iterdir()):
                store.put(path.name, path)
            plain = measured("copy", port)
            print(f"| way, {size / 1e9:.2f} GB, tp 4 | × plain copy | peak | bytes read / useful |\n|---|---|---|---|")
            print(f"| plain copy | 1.00 | {plain['peak']:.0f} MiB | {plain['read'] / size:.3f} |")
            for window in given.windows.split(","):
                for files in (1, 4):
                    found = measured("convert", port, int(window) * MIB, size // files + MIB)
                    ratio, read = found["seconds"] / plain["seconds"], found["read"] / size
                    name = f"run, window {window} MiB, {files} file{'s' * (files > 1)}"
                    print(f"| {name} | {ratio:.2f} | {found['peak']:.0f} MiB | {read:.3f} |", flush=True)


if __name__ == "__main__":
    main()
