"""`engine new`: a mapping for an unknown checkpoint, with marks where a person must decide.

A family that explains every tensor gives a release of a few lines. One that explains most gives a file that
renames its sources. Otherwise every pattern gets its own rule. Only what is clear becomes an active rule: the
rest is in comments, and a run refuses until a person has decided.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.discover import notes
from engine.discover.alone import stand_alone
from engine.discover.fits import planned
from engine.discover.names import Observed, observe
from engine.discover.near import Slot, compare_family, drop_contested
from engine.errors import EngineError, Lines
from engine.language.format import format_mapping
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout, MappingFile
from engine.language.search import spelled
from engine.planning.attempts import Checkpoint
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.stored import strip
from engine.proving.lint import lint_file
from engine.storage.json_text import as_data

# Findings that a person resolves later: the model class, and names that inherited conditions ask for.
DECIDED_LATER = ("L011", "L012")
_ENOUGH = 0.5  # share of all patterns that the nearest family must explain


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A drafted mapping.

    Attributes:
        kind: `release` of a family, `renamed` tensors of a family, or `own` rules for everything.
        parent: the family extended.
        decisions: (line, text) of everything marked `decide:`.
        state: the result of planning with the draft: None if it is complete, else code and message.
    """

    name: str
    kind: str
    parent: str | None
    text: str
    decisions: tuple[tuple[int, str], ...]
    state: Mapping[str, str] | None

    def as_dict(self) -> dict[str, Any]:
        return {**as_data(self), "decisions": [{"line": line, "text": text} for line, text in self.decisions]}


@dataclass(frozen=True, slots=True)
class Request:
    """The input of a draft: the checkpoint, and the families that it may extend, with the names to write."""

    checkpoint: Checkpoint
    layout: Layout
    families: Sequence[tuple[str, MappingFile]]
    name: str
    schema: str | None = None  # the schema's path relative to the file


def draft(request: Request) -> Scaffold:
    """Make the draft and lint it; E901 for findings, which would be an error of this module."""
    stored = strip(request.checkpoint.files, request.layout)
    observed, hopeless = observe(stored)
    if not stored or not observed:
        raise EngineError(
            "E304",
            "no rule can be written for this folder",
            got="no tensors" if not stored else f"tensors named {notes.list_of(hopeless[:3])}",
            expected="tensors with a shape, and names without braces",
            fix="Give the folder of one step, which holds the files themselves; `engine inspect DIR` says what DIR is.",
        )
    kind, parent, body = _release(request) or _renamed(request, observed) or _own(request, observed)
    head = [] if request.schema is None else [f"# yaml-language-server: $schema={request.schema}"]
    head += ["mapping: 1", *notes.block("name", request.name), "version: 0.1.0"]
    for reference, mapping in _ordered(request) if kind != "release" else ():
        if mapping.as_model and planned(mapping, request.layout, request.checkpoint)[0] is not None:
            head += notes.comment(f"decide: whether this mapping is needed. `{spelled(reference)}` fits as it is.")
    tail: list[str] = []
    for name in hopeless:
        told = f"decide: no pattern can express the tensor `{notes.shown(name)}`, so a run refuses this checkpoint."
        tail += notes.comment(told)
    text = format_mapping("\n".join([*head, *body, *tail]) + "\n")
    state, plan = _checked(text, request)
    if kind == "renamed" and plan is not None:
        text = format_mapping("\n".join([text, *notes.expect(plan.mapping, plan)]) + "\n")
    return Scaffold(request.name, kind, parent, text, _decisions(text), state)


Attempted = tuple[str, str | None, list[str]]  # kind, parent, lines


def _release(request: Request) -> Attempted | None:
    """A release of a family that fits completely, with its sizes."""
    kind = request.checkpoint.training.get("model_type")
    fitting: list[tuple[str, MappingFile, Plan, EngineError | None]] = []
    for reference, mapping in _ordered(request):
        plan, question = (None, None) if mapping.as_model else planned(mapping, request.layout, request.checkpoint)
        if plan is not None:
            fitting.append((reference, mapping, plan, question))
    if not fitting:
        return None
    reference, mapping, plan, question = fitting[0]
    body = notes.block("description", f"{notes.size_in_words(plan.sizes)}, to {mapping.architecture}")
    others = [r for r, m, _, _ in fitting[1:] if not (kind in mapping.model_types and kind not in m.model_types)]
    if others:
        verb = "fits" if len(others) == 1 else "fit"
        told_by = f"engine diff {spelled(reference)} {spelled(others[0])}"
        names = notes.list_of([spelled(one) for one in others])
        body += notes.comment(f"decide: the family. {names} {verb} as well; `{told_by}` tells the difference.")
    body += notes.extends(reference, mapping, request.checkpoint)
    if question is not None:
        body += notes.comment(f"decide: {question.message}. A run asks for it with --set.")
    body += notes.expect(mapping, plan, () if question is None else question.answers)
    return "release", reference, body


def _renamed(request: Request, observed: Sequence[Observed]) -> Attempted | None:
    """The family that explains most tensors, with other sources."""
    kind = request.checkpoint.training.get("model_type")
    ordered = _ordered(request)
    named = [(r, m) for r, m in ordered if kind in m.model_types]
    compared = [
        compare_family(mapping, reference, request.layout, request.checkpoint, observed)
        for reference, mapping in named or ordered
    ]
    best = max(compared, key=lambda near: near.share(), default=None)
    if best is None or best.share() < _ENOUGH:
        return None
    drop_contested(best, [other for other in compared if other is not best])
    body = notes.block("description", f"a model near {best.mapping.name}, to {best.mapping.architecture}")
    share = f"decide: the family. {best.reference} explains {best.share():.0%} of the names, by shape and similarity."
    body += notes.comment(share)
    body += notes.extends(best.reference, best.mapping, request.checkpoint)
    for key, part in notes.overrides(best).items():
        body += ["", *notes.comment("This asks for tensors by name: change it together with the rules."), f"{key}:"]
        body += [line for name, value in part.items() for line in notes.block(name, value, "  ")]
    body += ["", "rules:"] if best.pairings else []
    for pairing in best.pairings:
        body += notes.comment(f"decide: {notes.doubt(pairing)}", "  ")
        body += [f"  - {notes.flow(rule)}" for rule in notes.renamed_rules(pairing.slot, pairing.stem)]
    body += notes.left_over(best)
    return "renamed", best.reference, body


def _own(request: Request, observed: Sequence[Observed]) -> Attempted:
    slots = [
        (reference, Slot((rule.sources[0],), (rule,), tuple(t.name for t in rule.targets)))
        for reference, mapping in sorted(request.families, key=lambda family: len(family[1].files))
        for rule in mapping.rules
    ]
    body = notes.block("description", f"a draft for a checkpoint of layout {request.layout.name}")
    body += stand_alone(request.checkpoint, request.layout, observed, slots)
    return "own", None, body


def _ordered(request: Request) -> list[tuple[str, MappingFile]]:
    """Families for this layout: those that name the model type first, then those that others extend."""
    kind = request.checkpoint.training.get("model_type")
    fitting = [(r, m) for r, m in request.families if m.layout == request.layout.name]
    return sorted(fitting, key=lambda f: (kind not in f[1].model_types, len(f[1].files)))


def _checked(text: str, request: Request) -> tuple[Mapping[str, str] | None, Plan | None]:
    """Lint the draft, then plan with it: the plan, or the first error that keeps a run from starting."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.yaml"
        path.write_text(text, encoding="utf-8")
        findings = [one for one in lint_file(str(path)) if one.code not in DECIDED_LATER]
        if findings:
            listed = Lines.of(f"{f.code} {f.message}" for f in findings)
            raise EngineError("E901", "the drafted mapping does not lint clean", got=listed, fix="Please report it.")
        try:
            return None, make_plan(load_mapping(path), request.layout, request.checkpoint)
        except EngineError as error:
            return {"code": error.code, "message": error.message}, None


def _decisions(text: str) -> tuple[tuple[int, str], ...]:
    """Every comment marked `decide:`, with the lines that continue it."""
    return tuple(
        (text.count("\n", 0, one.start()) + 1, " ".join(re.sub(r"\n *#", " ", one[1]).split()))
        for one in re.finditer(r"^ *# decide:(.*(?:\n *#   .*)*)", text, re.MULTILINE)
    )
