"""Model classes whose tensors a mapping tells, so that transformers is not asked: held against transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.planning.as_model import Wanted, told_by
from engine.proving.meaning import usual_world
from engine.proving.meta_model import asked, load_classes
from engine.proving.proof import Failure
from engine.proving.tiny import Worlds


def check_told(told: MappingFile) -> list[Failure]:
    """In what a told class differs from transformers' own, at a tiny size, with a head of its own and a tied one."""
    layout = load_layout(told.layout, told.layout_place)
    world = usual_world(told, Worlds(told))
    if world is None:
        return [Failure("no set of tensors shows any combination of choices", str(told.place))]
    failures: list[Failure] = []
    for ties in (False, True):
        config = {**world.config, "tie_word_embeddings": ties}
        known, model = told_by(told, layout, config), asked(config)
        message = _difference(known, model)
        if message:
            failures.append(Failure(f"{told.architecture}: {message}", str(told.place), f"tie_word_embeddings: {ties}"))
    return failures


def check_classes(classes: Mapping[str, str]) -> list[Failure]:
    """The same for every class that a mapping tells."""
    load_classes()  # once, and not for each question
    failures: list[Failure] = []
    for name, file in classes.items():
        told = load_mapping(file)
        if told.architecture != name:
            failures.append(Failure(f"{file} tells {told.architecture}, not {name}", str(told.place)))
        failures += check_told(told)
    return failures


def _difference(known: Wanted | None, model: Wanted) -> str:
    """The first thing in which they differ; empty where they are equal."""
    if known is None:
        return "it does not know a configuration of its own, so that it is never used"
    sides: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = (
        (known.shapes, model.shapes), (known.tied, model.tied),
    )  # fmt: skip
    for one, other in sides:
        for name in (*one, *other):
            if one.get(name) != other.get(name):
                got, expected = one.get(name, "not there"), other.get(name, "not there")
                return f"`{name}` is told as {got}, transformers has {expected}"
    return ""
