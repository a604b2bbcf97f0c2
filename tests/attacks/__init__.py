"""A corpus of attacks: each a function that turns a good checkpoint folder into a hostile one.

`tests/attacks/test_attacks.py` runs them all. An attack names the error that must come of it, and a word of
its message; None stands for a file that looks odd, is harmless, and converts as if it were not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Start = Literal["training", "hf", "mapping", "interrupted", "interrupted hf"]
Make = Callable[[Path], object]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        start: what `make` is given: a training checkpoint, a Hugging Face one, or a folder with
            `mapping.yaml` and `layout.yaml`; or a training or Hugging Face checkpoint of which a run
            was interrupted, to be resumed.
        codes: the errors that are right; empty when nothing is wrong, `ok` among them when it may be.
        word: what the message must say.
    """

    name: str
    start: Start
    make: Make
    codes: tuple[str, ...]
    word: str


CORPUS: dict[str, Attack] = {}


def add(name: str, start: Start, make: Make, code: str | None, word: str = "") -> None:
    if name in CORPUS:
        raise ValueError(f"two attacks are named {name}")
    CORPUS[name] = Attack(name, start, make, tuple(code.split()) if code else (), word)


def attack(start: Start, code: str | None, word: str = "") -> Callable[[Make], Make]:
    """Register a function under its own name; `code` may be several, separated by spaces."""

    def register(make: Make) -> Make:
        add(make.__name__, start, make, code, word)
        return make

    return register


def canary(folder: Path) -> Path:
    """A file that only code of a checkpoint would create."""
    return folder.parent / "ran"


def corpus(start: Start) -> Iterator[Attack]:
    from tests.attacks import faults, files, mappings, pickles, ranks, resumes, safetensors, zips  # noqa: F401

    return (one for one in CORPUS.values() if one.start == start)
