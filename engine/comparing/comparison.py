"""Compares two whole checkpoints: each a Hugging Face checkpoint, or a training checkpoint as a mapping converts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.checkpoint.hf_folder import read_hf_config, read_hf_folder
from engine.comparing.diagnoses import diagnose, fold_verdicts
from engine.comparing.effects import Difference
from engine.comparing.settings import CONFIG, GENERATION, TOKENIZER, compare_settings, small_files
from engine.comparing.tensors import Verdict, compare_tensors
from engine.errors import EngineError
from engine.formats.configs import json_object
from engine.formats.headers import FLOATS, TORCH_NAMES, FileHeader, TensorHeader
from engine.planning.model import Output, Plan
from engine.storage.json_text import as_data
from engine.storage.store import File, Store


@dataclass(frozen=True, slots=True)
class Side:
    """One of two checkpoints.

    Attributes:
        tensors: files, or the plan that would write them.
        small: the files beside the weights by name; None for a weights file given alone.
        training: whether a plan represents it.
    """

    tensors: Sequence[FileHeader] | Plan
    config: Mapping[str, Any]
    small: Mapping[str, bytes] | None

    @property
    def training(self) -> bool:
        return isinstance(self.tensors, Plan)

    @property
    def listed(self) -> Sequence[TensorHeader | Output]:
        """Its tensors, as stored or as they would be written."""
        if isinstance(self.tensors, Plan):
            return self.tensors.outputs
        return [tensor for file in self.tensors for tensor in file.tensors]

    @property
    def dtype(self) -> str | None:
        """The element type of its first tensor, as configurations spell it."""
        return next((TORCH_NAMES[one.dtype] for one in self.listed if one.dtype in FLOATS), None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing two checkpoints: tensors, and everything else that defines a model.

    Attributes:
        verdicts: one for every tensor, in order of name.
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
        """Whether both compute the same function: every tensor equal, or with `allow_cast` equal after casting."""
        fine = {"equal", "told", *(["cast"] if allow_cast else [])}
        return fine.issuperset([*(one.kind for one in self.verdicts), *(one.grade for one in self.differences)])

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "ref": self.ref,
            "equal": self.same(),
            "equal_after_casting": self.same(allow_cast=True),
            "counts": dict(Counter(verdict.kind for verdict in self.verdicts)),
            "diagnoses": list(self.diagnoses),
            "differences": as_data(self.differences),
            "unchecked": list(self.unchecked),
            "rows": fold_verdicts(self.verdicts),
            "tensors": [verdict.as_dict() for verdict in self.verdicts],
        }


def read_side(where: Store | File, planned: Callable[[], tuple[Plan, Mapping[str, bytes]]] | None) -> Side:
    """One side of a comparison.

    Args:
        planned: makes the plan of a training checkpoint, and the small files that it would write; None
            without a mapping.

    Raises:
        EngineError: E304 for anything but a Hugging Face checkpoint if there is no mapping; E2xx and E3xx.
    """
    try:
        files = read_hf_folder(where)
    except EngineError as error:
        if error.code != "E304" or isinstance(where, File):
            raise
        if planned is None:
            error.fix = f"{error.fix} A training checkpoint is compared as a mapping converts it: give --mapping."
            raise
        plan, small = planned()
        return Side(plan, plan.config, small)
    beside = None if isinstance(where, File) else small_files(where)
    if beside is not None and GENERATION in beside:
        json_object(beside[GENERATION], GENERATION)  # refused here, where the folder is known
    return Side(files, read_hf_config(where), beside)


def compare_sides(
    out: Side, ref: Side, names: tuple[str, str], advance: Callable[[int], None] = lambda _: None
) -> Comparison:
    """Compare all that defines two models."""
    differences: tuple[Difference, ...] = ()
    unchecked: list[str] = []
    if out.small is None or ref.small is None:
        unchecked.append("only tensors were compared: a weights file was given, not its folder")
    else:
        small = [dict(out.small), dict(ref.small)]
        for one, other, training in ((0, 1, out.training), (1, 0, ref.training)):
            if training and not small[one].keys() & set(TOKENIZER):  # training keeps none: that is no error
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
    """Without an effect if the head is tied on one side, and stored equal to the embedding on the other."""
    if one.what != "tie_word_embeddings":
        return one
    return replace(one, grade="told", effect="the stored head equals the embedding, so nothing changes")
