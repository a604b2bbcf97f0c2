"""A mapping of its own for a checkpoint that no family explains: one rule per pattern, names kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.discover.cuts import KEYS, Known, Reading, known_sizes, read_cuts
from engine.discover.names import Observed
from engine.discover.near import Slot, similarity
from engine.discover.notes import block, comment, flow
from engine.errors import Place
from engine.language.documents import grouped
from engine.language.expressions import names_in
from engine.language.model import Expression, Layout
from engine.planning.attempts import Checkpoint

_ALIKE = 0.45


def stage_of(observed: Observed, checkpoint: Checkpoint) -> tuple[str, bool]:
    """The pipeline stage of a tensor without `{layer}`, and whether the files tell it."""
    if checkpoint.grid.pipelined:
        held = {checkpoint.grid.stage(one.file, one.chunk) for one in observed.stored}
        if len(held) == 1:
            return ("last", True) if any(next(iter(held))) else ("first", True)
    name = observed.text.lower()
    return ("first" if any(word in name for word in ("embed", "wte", "wpe", "tok")) else "last"), False


def stand_alone(
    checkpoint: Checkpoint, layout: Layout, observed: Sequence[Observed], slots: Sequence[tuple[str, Slot]]
) -> list[str]:
    """The lines from `source` on.

    Every rule writes the tensor under its own name, whole. That is right as far as it goes, whatever
    the tensors mean; what they are called at the target is left to a person. So is which of several rules is
    right: they stand in comments.
    """
    known = known_sizes(checkpoint.config)
    rules: list[str] = []
    live = False
    for stem, listed in _paired(observed, checkpoint, known).items():
        one = listed[0]
        readings, doubt, stage = _read(one, checkpoint, known)
        rules += comment(f"decide: {_notes(one, doubt, stage, checkpoint, slots)}", "  ")
        for reading in readings:
            rule: dict[str, Any] = {"source": stem, "target": stem, "axes": _axes(reading, stem)}
            if reading.split is not None:
                rule["split"] = reading.split
            if not one.layered:
                rule["stage"] = stage[0]
            rules.append(f"{'#' if doubt else ''}  - {flow(rule)}")  # which formatting makes a block, if it is long
        live |= not doubt
    kind = checkpoint.training.get("model_type")
    source = {"layout": layout.name} | ({"model_types": [kind]} if isinstance(kind, str) and kind else {})
    lines = block("source", source)
    lines += comment("decide: the model class of the target. Until it is named, nothing loads the output.")
    lines += ["target: {model_type: unknown, architecture: Unknown}", ""]
    lines += _declared(known, checkpoint, layout)
    lines += block("dims", known.dims) if known.dims else []
    config = {KEYS[axis][0]: "{{ " + axis + " }}" for axis in known.dims}
    lines += ["", "rules:" if live else "#rules:", *rules, ""]
    lines += block("config", {"model_type": "unknown", "architectures": ["Unknown"], **config})
    lines += comment("decide: the other keys of config.json, and `training_config`, which `engine reverse` needs", "  ")
    return lines


def _declared(known: Known, checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """`keys` of what sizes are computed from, where the layout does not say what these may be."""
    read = {key for text in known.dims.values() for key in names_in(Expression(text, Place("the draft")))}
    told = layout.keys.get("source", {})
    untold = [key for key in checkpoint.config if key in read and key not in told]
    keys = {key: {"type": "integer", "min": 1} for key in untold}
    return [*block("keys", {"source": keys}), ""] if keys else []


def _read(one: Observed, checkpoint: Checkpoint, known: Known) -> tuple[list[Reading], str, tuple[str, bool]]:
    stage = ("layers", True) if one.layered else stage_of(one, checkpoint)
    return *read_cuts(one, checkpoint.grid, known, stage[0]), stage


def _paired(observed: Sequence[Observed], checkpoint: Checkpoint, known: Known) -> dict[str, list[Observed]]:
    """Source pattern → what it reads: weight and bias together where one rule can read both."""
    result: dict[str, list[Observed]] = {}
    for stem, listed in grouped((one.stem, one) for one in observed).items():
        both = sorted(listed, key=lambda one: one.param != "weight")
        if len(both) == 2 and _together(both[0], both[1], checkpoint, known):
            result[stem] = both
        else:
            result |= {one.text: [one] for one in listed}
    return result


def _together(weight: Observed, bias: Observed, checkpoint: Checkpoint, known: Known) -> bool:
    """Whether the bias has the weight's first axis and is cut as the weight's rule would cut it."""
    (one, doubt, _), (two, other, _) = (_read(o, checkpoint, known) for o in (weight, bias))
    if doubt or other or weight.placeholders != bias.placeholders:
        return False
    ranks = {tuple(checkpoint.grid.slices(s.file).items()) for s in bias.stored}
    return _one_rule(one[0], two[0], len(ranks))


def _one_rule(weight: Reading, bias: Reading, ranks: int) -> bool:
    """Whether `a | b`, split as the weight is, also says where the bias lies."""
    if len(bias.axes) != 1 or len(weight.axes) > 2 or weight.axes[0] != bias.axes[0]:
        return False
    if len(weight.axes) == 2 and weight.cut == 1:
        return bias.cut is None and ranks == 1
    return weight.cut == bias.cut and weight.split == bias.split


def _axes(reading: Reading, stem: str) -> str:
    if stem.endswith(".{param}") and len(reading.axes) == 2:
        return f"{reading.axes[0]} | {reading.axes[1]}"
    return " ".join(reading.axes)


def _notes(
    one: Observed,
    doubt: str,
    stage: tuple[str, bool],
    checkpoint: Checkpoint,
    slots: Sequence[tuple[str, Slot]],
) -> str:
    """What a person must say of one pattern."""
    best = max(((similarity(one.stem, slot), name, slot) for name, slot in slots), key=lambda b: b[0], default=None)
    told = "the target's name"
    if best is not None and best[0] >= _ALIKE:
        names = sorted({target.name for target in best[2].rules[0].targets})
        told += f"; the name is like that of {best[2].sources[0]} in {best[1]}, which becomes {', '.join(names)}"
    notes = [told, *([doubt] if doubt else [])]
    if not one.layered and not stage[1]:
        notes.append(f"the stage; {stage[0]} is a guess from the name, or all ranks hold it")
    grid = checkpoint.grid
    if all(size == 1 for dim, size in grid.sizes.items() if dim not in grid.staged):
        notes[-1] += "; what ranks would cut (`split`) does not show with one rank"
    return "; and ".join(notes)
