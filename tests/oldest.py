"""The lower bounds of `pyproject.toml` are true: commands work with the oldest of each package; `make soak` runs it.

    python -m tests.oldest

Of the extra `model` transformers is the oldest, and torch the one that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEP = ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2"
MAPPING = ("-m", "internlm2")
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("--version",),
    ("lint",),
    ("env",),
    ("mappings",),
    ("explain", "E202"),
    ("inspect", str(STEP)),
    ("run", *MAPPING, "--src", str(STEP), "--out", "model"),
    ("verify", "model", "--src", str(STEP), *MAPPING),
    ("reverse", *MAPPING, "--src", "model", "--out", "ranks", "--tp", "2"),
    ("reshard", *MAPPING, "--src", "ranks", "--out", "one", "--tp", "1"),
    ("run", *MAPPING, "--src", "one", "--out", "again"),
    ("compare", "model", "again"),
    ("plan", *MAPPING, "--src", "one", "-o", "plan.json"),
    ("part", "1/2", "--plan", "plan.json", "--out", "parts"),
    ("part", "2/2", "--plan", "plan.json", "--out", "parts"),
    ("commit", "--plan", "plan.json", "--out", "parts"),
    ("run", "--plan", "plan.json", "--executor", "dask", "--out", "dealt"),
    ("prove", "internlm2"),
    ("verify", "model", "--load"),
    ("verify", "model", "--logits", "--src", str(STEP), *MAPPING),
)


def oldest() -> list[str]:
    """transformers as its bound says, and torch as it is installed."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["model"]
    (bound,) = (one.partition(">=")[2] for one in extra if one.startswith("transformers>="))
    return [f"transformers=={bound}", f"torch=={_version('torch')}"]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).partition("+")[0]


def installed(folder: Path) -> Path:
    """The engine in an environment of its own, with the oldest of what it depends on."""
    uv, python = [sys.executable, "-m", "uv"], folder / "bin" / "python"
    subprocess.run([*uv, "venv", "-q", folder], check=True)
    lowest = [*uv, "pip", "install", "-q", "-p", str(python), "--resolution", "lowest-direct"]
    subprocess.run([*lowest, f"{ROOT}[store,dask,mount]"], check=True)
    click = subprocess.run(
        [python, "-c", "import click; print(click.__version__)"], check=True, capture_output=True, text=True
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    subprocess.run([*pip, *oldest(), f"click=={click.stdout.strip()}"], check=True)
    return folder / "bin" / "engine"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        engine = installed(Path(scratch, "venv"))
        work = Path(scratch, "work")
        work.mkdir()
        wrong = 0
        for command in COMMANDS:
            done = subprocess.run(
                [engine, *command], cwd=work, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
            )
            if done.returncode:
                wrong += 1
                print(f"engine {' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
        if wrong:
            raise SystemExit(f"{wrong} of {len(COMMANDS)} commands do not work with the oldest packages")
        print(f"{len(COMMANDS)} commands work with the oldest packages")


if __name__ == "__main__":
    main()
