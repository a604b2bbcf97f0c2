"""Which mappings fit a training checkpoint, and how those that fit differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError
from engine.language.mapping_file import digest_of
from engine.language.model import Layout, MappingFile
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.request import Request
from engine.proving.meta_model import fitted
from engine.storage.json_text import as_data

# Parts of a mapping that no tensor shows: two mappings that differ only in these both fit.
_NO_TENSORS = ("name", "version", "description", "extends", "expect", "generation", "chat_template", "tokenizer")


@dataclass(frozen=True, slots=True)
class Fit:
    """How one mapping relates to a checkpoint.

    Attributes:
        fits: whether a run would convert it as this release or family.
        code, why: what keeps it from fitting, or what must be `--set` before it runs.
        differing: axis → (the checkpoint's size, the release's).
        traits: facts of the mapping that the checkpoint does not show.
    """

    name: str
    description: str
    fits: bool
    code: str | None = None
    why: str = ""
    differing: Mapping[str, tuple[int | None, int]] = field(default_factory=dict)
    traits: Mapping[str, str] = field(default_factory=dict)
    family: bool = False  # of any size
    answers: tuple[str, ...] = ()  # what to set before it runs; `config` is a file to give

    def as_dict(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return {name: value for name, value in as_data(self).items() if name not in ("family", "answers")}


def find_fits(checkpoint: Checkpoint, layout: Layout, mappings: Iterable[MappingFile]) -> tuple[list[Fit], Plan | None]:
    """Check every mapping of the layout against the checkpoint; returns also a plan with one that can be planned.

    Releases come before families, and a family before what extends it for another target. Mappings that differ
    only in what no tensor tells are planned once.
    """
    ranked = sorted(
        (m for m in mappings if m.layout == layout.name), key=lambda m: (not m.expect, len(m.files), m.name)
    )
    plans: dict[str, tuple[Plan | None, EngineError | None]] = {}
    found: list[Fit] = []
    for mapping in ranked:
        kind = checkpoint.training.get("model_type")
        if isinstance(kind, str) and mapping.model_types and kind not in mapping.model_types:
            why = f"it is for model_type {' or '.join(mapping.model_types)}, this is {kind}"
            found.append(Fit(mapping.name, mapping.description, False, "E212", why))
            continue
        key = digest_of({k: v for k, v in mapping.resolved.items() if k not in _NO_TENSORS})
        if key not in plans:
            plans[key] = planned(mapping, layout, checkpoint)
        found.append(_fit(mapping, *plans[key], told=kind in mapping.model_types))
    ok = [plan for plan, error in plans.values() if plan is not None and error is None]
    return found, ok[0] if ok else None


def planned(mapping: MappingFile, layout: Layout, checkpoint: Checkpoint) -> tuple[Plan | None, EngineError | None]:
    """A plan, or why there is none; both if a person must decide, and there is a plan for some answer."""
    try:
        mapping, layout, checkpoint = fitted(replace(mapping, expect={}), layout, checkpoint)
    except EngineError as error:
        return None, error
    return _planned(mapping, layout, checkpoint, {})


def _planned(
    mapping: MappingFile, layout: Layout, checkpoint: Checkpoint, settings: Mapping[str, str]
) -> tuple[Plan | None, EngineError | None]:
    try:
        return make_plan(mapping, layout, checkpoint, Request(mapping, settings=settings)), None
    except EngineError as error:
        asked = {one.name: tuple(one.choices) for one in mapping.variants.values() if one.place == error.place}
        found: EngineError | None = None
        for name, choices in (error.answers or asked).items() if error.code == "E202" else ():
            for choice in choices if name not in settings else ():
                plan, found = _planned(mapping, layout, checkpoint, {**settings, name: choice})
                if plan is not None:
                    return plan, error
        return None, found or error


def _fit(mapping: MappingFile, plan: Plan | None, error: EngineError | None, *, told: bool) -> Fit:
    sizes = {} if plan is None else plan.sizes
    differing = {axis: (sizes.get(axis), n) for axis, n in mapping.expect.items() if plan and sizes.get(axis) != n}
    why = ", ".join(f"{axis} {got}, not {wanted}" for axis, (got, wanted) in differing.items())
    if error is None or differing:
        return Fit(mapping.name, mapping.description, not differing, None, why, differing, traits(mapping))
    # the mapping is the right one, once a person has decided
    asks = error.code == "E202" and (told or plan is not None or "config" in error.answers)
    why = f"{error.message}. {error.fix}" if asks else error.message
    more: dict[str, Any] = {"traits": traits(mapping), "family": not mapping.expect, "answers": tuple(error.answers)}
    return Fit(mapping.name, mapping.description, asks, error.code, why, **more)


def traits(mapping: MappingFile) -> dict[str, str]:
    """What a mapping adds to a model that no weight shows: the target, the chat format, and the context length.

    >>> from engine.language.mapping_file import load_mapping
    >>> traits(load_mapping("internlm2-chat-7b"))
    {'target': 'llama', 'chat': 'internlm2-chat', 'stops at': '2, 92542', 'length': '32768'}
    >>> [traits(load_mapping(name))["stops at"] for name in ("llama", "internlm3")]
    ['', '2']
    """
    length = mapping.options.get("max_position_embeddings")
    said = length.default if length is not None else mapping.config.get("max_position_embeddings", "")
    stops = (mapping.generation or {}).get("eos_token_id", "")
    stops = mapping.config.get("eos_token_id") if stops is None else stops  # null: as in config.json
    stops = [stops] if isinstance(stops, int) else stops if isinstance(stops, list | tuple) else []
    return {
        "target": mapping.model_type + (", remote code" if mapping.remote_code else ""),
        "chat": mapping.chat_template or "no, base model",
        "stops at": ", ".join(map(str, stops)),
        "length": str(said) if isinstance(said, int | str) else "",
    }
