"""Two checkpoints compared: what is compared, what was found, and what it means."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from engine.comparing.diagnoses import fold_verdicts
from engine.comparing.effects import Difference
from engine.comparing.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints compared: tensors, and everything else that makes a model.

    Attributes:
        verdicts: on every tensor, in order of name.
        diagnoses: what the verdicts mean together.
        differences: in configuration, generation settings, tokenizer, chat template and code.
        unchecked: what could not be compared, and why.
    """

    out: str
    ref: str
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[str, ...]
    differences: tuple[Difference, ...] = ()
    unchecked: tuple[str, ...] = ()

    def same(self, *, allow_cast: bool = False) -> bool:
        """Whether both are the same function: every tensor equal, or with `allow_cast` equal after casting."""
        fine = ("equal", "cast") if allow_cast else ("equal",)
        grades = ("told", "cast") if allow_cast else ("told",)
        return all(verdict.kind in fine for verdict in self.verdicts) and all(
            difference.grade in grades for difference in self.differences
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "ref": self.ref,
            "equal": self.same(),
            "equal_after_casting": self.same(allow_cast=True),
            "counts": dict(Counter(verdict.kind for verdict in self.verdicts)),
            "diagnoses": list(self.diagnoses),
            "differences": [difference.as_dict() for difference in self.differences],
            "unchecked": list(self.unchecked),
            "rows": fold_verdicts(self.verdicts),
            "tensors": [verdict.as_dict() for verdict in self.verdicts],
        }
