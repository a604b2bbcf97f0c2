"""Finds out what a folder is: a training checkpoint of some layout, a Hugging Face checkpoint, or a folder of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from engine.assets.ready import is_ready, ready_beside
from engine.checkpoint.folder import list_folder
from engine.checkpoint.grid import NoWeights
from engine.checkpoint.hf_folder import BESIDE, WEIGHTS, is_whole, read_hf_config, read_hf_folder
from engine.checkpoint.manifests import read_manifest
from engine.discover.fits import Fit, find_fits
from engine.discover.steps import HUGGING_FACE, MOST_STEPS, find_steps, one_of, read_any
from engine.errors import EngineError, Lines, Place
from engine.formats.headers import FileHeader
from engine.language.documents import grouped
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout, MappingFile
from engine.language.search import layout_names, list_names, spelled
from engine.planning.as_model import class_named
from engine.planning.attempts import Checkpoint
from engine.planning.stored import strip
from engine.storage.places import store_at
from engine.storage.store import Store

# Errors of the checkpoint, not of the choice of the mapping.
_OF_THE_CHECKPOINT = ("E201", "E202", "E203", "E207", "E208", "E209", "E210", "E211", "E218", "E219")

_AXES = ("layer", "hidden", "heads", "groups", "ffn", "vocab", "expert", "labels")  # in this order


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder is.

    Attributes:
        kind: `training`, `whole` (a Hugging Face checkpoint) or `steps` (a folder of checkpoints).
        facts: layout, ranks, sizes and so on, JSON-ready; which ones depends on the kind.
        fits: for a training checkpoint, the result of every mapping; for a whole one, the mappings that write it back.
    """

    folder: str
    kind: Literal["training", "whole", "steps"]
    facts: Mapping[str, Any]
    fits: tuple[Fit, ...] = field(default=())

    @property
    def fitting(self) -> tuple[Fit, ...]:
        """The mappings that fit, the most specific first."""
        return tuple(fit for fit in self.fits if fit.fits)

    @property
    def blocked(self) -> tuple[Fit, ...]:
        """Families for models of this kind that do not fit because of the checkpoint itself: it is damaged, or holds
        more than they can express. Another mapping would not help."""
        of_kind = [fit for fit in reversed(self.fits) if fit.family and fit.code in _OF_THE_CHECKPOINT]
        return () if self.fitting else tuple({fit.code: fit for fit in of_kind}.values())

    @property
    def differences(self) -> tuple[str, ...]:
        """The traits in which the mappings that fit differ."""
        names = dict.fromkeys(name for fit in self.fitting for name in fit.traits)
        return tuple(name for name in names if len({fit.traits.get(name) for fit in self.fitting}) > 1)

    @property
    def step(self) -> str:
        """Of a folder of steps, the one to look at next."""
        return one_of(self.facts)

    def as_dict(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return {
            "folder": self.folder,
            "kind": self.kind,
            **self.facts,
            "differences": list(self.differences),
            "mappings": [fit.as_dict() for fit in self.fits],
        }


def inspect(src: str | Path, config: str | Path | None, *, every: bool = False) -> Inspection:
    """Find out what a folder is; reads only headers and configurations.

    Args:
        config: a file of the target's configuration, for facts that a checkpoint does not hold.
        every: look at every step of a folder of steps, not only at the newest.

    Raises:
        EngineError: E304 when it is none of these; E2xx and E3xx for an incomplete checkpoint.
    """
    try:
        layout, checkpoint = read_any(src, config=config)
    except EngineError as error:
        folder = store_at(src, "the checkpoint")
        if error.code != "E304":
            raise
        names = list_folder(folder)
        if is_whole(names):
            return describe_whole(folder, names)
        steps = find_steps(folder, config, most=None if every else MOST_STEPS)
        if steps is None:
            raise (_nothing(folder, names) if isinstance(error, NoWeights) else error) from None
        return Inspection(str(src), "steps", steps)
    return describe_training(checkpoint, layout)


def load_all() -> tuple[list[MappingFile], list[Fit]]:
    """Every mapping of the search folders, and the errors of those that cannot be read."""
    good: list[MappingFile] = []
    bad: list[Fit] = []
    for name in list_names():
        try:
            good.append(load_mapping(name))
        except EngineError as error:
            bad.append(Fit(spelled(name), "", False, error.code, error.message))
    return good, bad


def _nothing(folder: Store, names: Sequence[str]) -> EngineError:
    kinds = [f"{load_layout(name).modes[0].files[0].name} ({name})" for name in layout_names()]
    return EngineError(
        "E304",
        "this folder is not a checkpoint",
        place=Place(folder.place()),
        got=", ".join(names[:6]) + (f", and {len(names) - 6} more" if len(names) > 6 else "") or "an empty folder",
        expected=Lines.of([*kinds, f"config.json with {WEIGHTS[0]} (Hugging Face)", "or a folder of such folders"]),
        fix="Give the folder that holds the files of one step, or the folder of the steps. docs/frameworks.md says "
        "which trainers' files are read, and what converts those of some others.",
    )


def describe_training(checkpoint: Checkpoint, layout: Layout) -> Inspection:
    """Facts about a training checkpoint, and how every mapping of its layout fits."""
    stored = strip(checkpoint.files, layout)
    mappings, unread = load_all()
    fits, plan = find_fits(checkpoint, layout, mappings)
    present = {*checkpoint.grid.unknown, *checkpoint.grid.skipped}
    wanted = dict.fromkeys(str(m.tokenizer["file"]) for m in mappings if m.tokenizer and "file" in m.tokenizer)
    beside = ready_beside(checkpoint.files[0].file.store, layout)
    ready = [name for names in beside for name in names if is_ready([name])]
    facts: dict[str, Any] = {
        "layout": layout.name,
        "mode": checkpoint.grid.mode.name,
        "ranks": dict(checkpoint.grid.sizes),
        "chunks": 1 + max((one.chunk for one in stored), default=0),
        "stages": None,
        "model_type": checkpoint.training.get("model_type"),
        "parameters": None,
        "sizes": {},
        "tokenizer": next((name for name in (*wanted, *ready) if name in {*present, *ready}), None),
        "config_missing": layout.config_of_target and not checkpoint.config and not checkpoint.target_config,
        "files": len(checkpoint.files),
        "tensors": len(stored),
        "bytes": sum(file.size for file in checkpoint.files),
        "dtypes": _types(checkpoint.files),
        "uneven": _uneven(checkpoint),
        "skipped": list(checkpoint.grid.skipped),
        "unknown": [n for n in checkpoint.grid.unknown if n not in wanted and not (ready and BESIDE.fullmatch(n))],
        "config": {k: v for k, v in checkpoint.config.items() if isinstance(v, (str, int, float, bool))},
    }
    if plan is not None:
        facts["parameters"] = sum(output.elements for output in plan.outputs)
        used = {axis for group in plan.copies.target.groups for axis in group.instance.axes.names()}
        unused = {axis for rule in plan.mapping.rules for axis in rule.axes.names()} - used  # such as a reward head's
        facts["sizes"] = {axis: plan.sizes[axis] for axis in _AXES if axis in plan.sizes.keys() - unused}
        facts["stages"] = [
            {"chunk": stage[0], **plan.stages.ranks(stage), "first": first, "layers": plan.stages.counts[stage]}
            for stage, first in sorted(plan.stages.starts.items(), key=lambda item: item[1])
        ]
    return Inspection(checkpoint.folder, "training", facts, (*fits, *unread))


def describe_whole(folder: Store, names: Sequence[str]) -> Inspection:
    """Facts about a Hugging Face checkpoint, and which mappings write it back as rank files."""
    files, config = read_hf_folder(folder), read_hf_config(folder)
    kind = config.get("model_type")
    families = [m for m in load_all()[0] if (m.model_type == kind or kind in m.also) and not m.expect]
    roots = [m for m in families if len(m.files) == 1]  # those that extend others only if there are no roots
    fits = [Fit(m.name, m.description, True) for m in roots or families]
    facts = {
        "model_type": kind,
        "architecture": class_named(config) or None,
        "parameters": sum(prod(tensor.shape) for file in files for tensor in file.tensors),
        "tokenizer": next((n for n in ("tokenizer.json", "tokenizer.model") if n in names), None),
        "chat_template": "chat_template.jinja" in names,
        "made_by": _made_by(folder),
        "files": len(files),
        "tensors": sum(len(file.tensors) for file in files),
        "bytes": sum(file.size for file in files),
        "dtypes": _types(files),
    }
    return Inspection(folder.place(), "whole", facts, tuple(fits))


def _made_by(folder: Store) -> str | None:
    """The mapping that an output of the engine was made with, by its manifest."""
    try:
        made = read_manifest(folder).get("mapping")
    except EngineError:
        return None
    return str(made.get("name")) if isinstance(made, dict) else None


def _types(files: Sequence[FileHeader]) -> dict[str, int]:
    """Bytes of each element type."""
    sizes = grouped((tensor.dtype, tensor.nbytes) for file in files for tensor in file.tensors)
    return {dtype: sum(sizes[dtype]) for dtype in sorted(sizes)}


def _uneven(checkpoint: Checkpoint) -> list[str]:
    """Names whose shards have different shapes on different ranks of a stage."""
    held = ((checkpoint.grid.stage(i, 0), one) for i, file in enumerate(checkpoint.files) for one in file.tensors)
    shapes = grouped(((tensor.name, stage), tensor.whole) for stage, tensor in held)
    return sorted({name for (name, _), seen in shapes.items() if len({*seen}) > 1})


def find_mapping(src: str | Path = ".", config: str | Path | None = None) -> Fit:
    """The only bundled mapping that fits a training checkpoint.

    >>> engine.find_mapping("ckpt/1000").name
    'internlm'

    Raises:
        EngineError: E003 when none fits, or several do, with their differences; else as for `inspect`.
    """
    found = inspect(src, config)
    if found.kind != "training":
        raise _not_one(found)
    fitting = found.fitting
    if len(fitting) == 1:
        return fitting[0]
    told = [
        f"{fit.name}: " + ", ".join(f"{name} {fit.traits.get(name)}" for name in found.differences) for fit in fitting
    ]
    if fitting:
        raise EngineError(
            "E003",
            f"{len(fitting)} mappings fit, and the files do not tell which one to use",
            place=Place(found.folder),
            got=Lines.of(told),
            expected="one of them by --mapping",
            fix="Choose by what they differ in; `engine inspect` explains each of these.",
        )
    raise EngineError(
        "E003",
        "no bundled mapping fits",
        place=Place(found.folder),
        got=Lines.of(f"{fit.name} would, but {fit.why} ({fit.code})" for fit in found.blocked) or None,
        expected="a mapping, by --mapping FILE",
        fix="`engine explain CODE` says what to do about that."
        if found.blocked
        else "`engine inspect --all` says why each does not fit; `engine new` drafts one.",
    )


def _not_one(found: Inspection) -> EngineError:
    """E304 for a folder of steps or a Hugging Face checkpoint, if one step of a training run is needed."""
    place = Place(found.folder)
    steps = [one for one in found.facts.get("steps", ()) if one["layout"] != HUGGING_FACE]
    if not steps:
        told = (
            "this is a Hugging Face checkpoint"
            if found.kind != "steps"
            else "this folder holds Hugging Face checkpoints"
        )
        fix = "`engine reverse` writes one as training files."
        return EngineError("E304", told, place=place, expected="a training checkpoint", fix=fix)
    names = [one["name"] for one in steps]
    whole = [one["name"] for one in steps if one["complete"]]
    return EngineError(
        "E304",
        "this folder holds checkpoints and is none itself",
        place=place,
        got=", ".join(names[-6:]),
        expected="the folder of one step",
        fix=f"Give one of them to --src, like {found.folder.rstrip('/')}/{(whole or names)[-1]}.",
    )
