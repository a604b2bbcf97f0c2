"""Two checkpoints compared: what is compared, what was found, and what it means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engine.comparing.diagnoses import diagnose, fold_verdicts
from engine.comparing.effects import Difference
from engine.comparing.settings import CONFIG, TOKENIZER, compare_settings
from engine.comparing.sides import Side
from engine.comparing.tensors import compare_tensors
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


def compare_sides(
    out: Side, ref: Side, names: tuple[str, str], advance: Callable[[int], None] = lambda _: None
) -> Comparison:
    """Compare everything that makes two models."""
    differences: tuple[Difference, ...] = ()
    unchecked: list[str] = []
    if out.small is None or ref.small is None:
        unchecked.append("only tensors were compared: a weight file was given, and not its folder")
    else:
        small = [dict(out.small), dict(ref.small)]
        for one, other, training in ((0, 1, out.training), (1, 0, ref.training)):
            if training and not small[one].keys() & set(TOKENIZER):  # training keeps none; another's is no mistake
                small[other] = {name: data for name, data in small[other].items() if name not in TOKENIZER}
        differences = compare_settings(small[0], small[1], dtypes=(out.dtype, ref.dtype))
        for what, files in (("configuration", (CONFIG,)), ("tokenizer", TOKENIZER)):
            if not any(side.keys() & set(files) for side in small):
                unchecked.append(f"the {what} was not compared: there is none on either side")
    verdicts = compare_tensors(out.tensors, ref.tensors, [out.config, ref.config], advance)
    if any(verdict.kind == "equal" and verdict.other is not None for verdict in verdicts):
        differences = tuple(map(_without_effect, differences))
    return Comparison(*names, verdicts, diagnose(verdicts), differences, tuple(unchecked))


def _without_effect(one: Difference) -> Difference:
    """A head that is tied on one side and stored, equal to the embedding, on the other is the same function."""
    if one.what != "tie_word_embeddings":
        return one
    return replace(one, grade="told", effect="the head that is stored equals the embedding, so nothing changes")
