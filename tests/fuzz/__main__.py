"""`make fuzz`: the fuzz tests again and again with other inputs, until the minutes are over or one fails."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = "2000"  # of every test, in each round


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    deadline = time.monotonic() + minutes * 60
    rounds = 0
    while time.monotonic() < deadline:
        seed, rounds = random.SystemRandom().randrange(1 << 32), rounds + 1
        print(f"round {rounds}, seed {seed}", flush=True)
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/fuzz",
            f"--hypothesis-seed={seed}",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "FUZZ_EXAMPLES": EXAMPLES}, check=False)
        if done.returncode:
            print(f"again with: FUZZ_EXAMPLES={EXAMPLES} pytest tests/fuzz --hypothesis-seed={seed}")
            return done.returncode
    print(f"{rounds} rounds of {EXAMPLES} inputs for every test: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
