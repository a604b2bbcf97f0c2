"""Two checkpoints compared: what is compared, what was found, and what it means."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from engine.comparing.diagnoses import fold_verdicts
from engine.comparing.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints compared: verdicts in order of name, and what they mean together."""

    out: str
    ref: str
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[str, ...]

    def same(self, *, allow_cast: bool = False) -> bool:
        """Whether every tensor is equal, or with `allow_cast` equal after casting."""
        fine = ("equal", "cast") if allow_cast else ("equal",)
        return all(verdict.kind in fine for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "ref": self.ref,
            "equal": self.same(),
            "equal_after_casting": self.same(allow_cast=True),
            "counts": dict(Counter(verdict.kind for verdict in self.verdicts)),
            "diagnoses": list(self.diagnoses),
            "rows": fold_verdicts(self.verdicts),
            "tensors": [verdict.as_dict() for verdict in self.verdicts],
        }
