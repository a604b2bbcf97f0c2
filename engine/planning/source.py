"""Sources: a checkpoint of either side as a mapping reads it, with all decisions made and all sizes known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from engine.errors import EngineError, Place, first_of, printable
from engine.language.documents import completed
from engine.language.model import Layout, MappingFile
from engine.language.names import pattern
from engine.language.rules import loses
from engine.planning.attempts import Checkpoint, Question, decide_by_shapes
from engine.planning.completeness import check_known, check_repeated, check_slices, used_rules
from engine.planning.config_keys import Read, shown
from engine.planning.facts import facts_of
from engine.planning.matching import Matches, check_names, check_refused, check_spellings, find_candidates, stages_of
from engine.planning.model import Replicas, Slices
from engine.planning.pieces import Pieces, match_pieces
from engine.planning.sides import Side, keys_at
from engine.planning.sizes import size_error
from engine.planning.stages import Stages, laid_out
from engine.planning.stored import Instance, Stored, at_end, instances, strip
from engine.planning.variants import Decision, options_of


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint after matching, deciding and solving.

    Attributes:
        used: the rules that have tensors.
        side: its tensors, with the sizes of all axes.
        unread: for each axis of unknown size, why it could not be computed.
        read: its configuration.
        names: all names for expressions, without functions.
        ignored: tensors that the mapping leaves out, and why.
    """

    mapping: MappingFile
    layout: Layout
    checkpoint: Checkpoint
    used: tuple[Instance, ...]
    pieces: Pieces
    side: Side
    unread: Mapping[str, EngineError]
    stages: Stages
    decisions: Mapping[str, Decision]
    options: Mapping[str, Any]
    read: Read
    names: Mapping[str, Any]
    ignored: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        return [file.name for file in self.checkpoint.grid.files]

    @property
    def tied(self) -> dict[str, str]:
        """Targets that the configuration of a checkpoint without ranks ties: name → the tensor that it equals."""
        ties = self.checkpoint.end == "whole" and self.read.config.get("tie_word_embeddings")
        return _tied_names(self.used) if ties else {}

    def replicas(self) -> tuple[Replicas, ...]:
        """Sets of stored tensors that must be equal: replicas of several ranks, and tied tensors."""
        found = [
            Replicas(tuple(numbers), group.name, group.instance.rule.name)
            for group in self.side.groups
            for numbers in self.side.numbers(group)
            if len(numbers) > 1
        ]
        stored = {one.header.name: number for number, one in enumerate(self.side.stored)}
        rules = {name.text: one.rule.name for one in self.used for name, _ in one.targets}
        found += [
            Replicas((stored[to], stored[name]), name, rules[name])
            for name, to in self.tied.items()
            if name in stored and to in stored
        ]
        return tuple(found)

    def slices(self) -> tuple[Slices, ...]:
        """Sets of slices that different ranks hold of one tensor.

        A slice that is a separate tensor on the other side, like each expert of a stack, may equal its neighbours; and
        so may one whose number is in its name. Where boxes are recorded, such slices of a layer may all be equal.
        """
        result: list[Slices] = []
        units = {
            (len(group.instance.axes.dims), group.instance.pieces[0])
            for group in self.side.groups
            if {*group.instance.axes.names()[:1]} & {*self.mapping.even} and len(group.instance.pieces) == 1
        }
        # What holds nothing but units, as key and value heads: queries have more axes, and outputs have units last.
        alone = {one for one in units if not any(one[0] == other[0] and other[1] < one[1] for other in units)}
        for group in self.side.groups:
            if len(group.shards) < 2:
                continue
            axes = group.instance.axes
            heads = (len(axes.dims), group.instance.pieces[0]) in alone and any(
                axis in axes.names()[:1] and self.side.sizes[axis] == len(group.shards) for axis in group.cut.axes
            )
            own = {axis for target in group.instance.rule.targets for axis in pattern(target.name).placeholders}
            own |= {*group.instance.numbered}
            at = [position for position, (_, axis) in enumerate(group.cut.dims) if axis in own]
            boxed = [place for place, node in enumerate(axes.dims) if str(node) in own - {"layer"} and group.cut.boxes]
            found: dict[tuple[object, ...], dict[tuple[int, ...], list[int]]] = {}
            for numbers, (ranks, stored) in zip(self.side.numbers(group), group.shards.items(), strict=True):
                row = tuple(n for place, n in enumerate(ranks) if place not in boxed) if boxed else ()
                rows = found.setdefault((stored[0].header.shape, *(ranks[position] for position in at)), {})
                rows.setdefault(row, []).append(numbers[0])
            for rows in found.values():  # of each layer one after the other
                alike = tuple(chain.from_iterable(rows.values()))
                repeats = max(map(len, rows.values())) if boxed else 0 if heads else 1
                result += [Slices(alike, group.name, repeats)] if len(alike) > 1 else []
        return tuple(result)


def read_source(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    *,
    like: Mapping[str, str] | None = None,
    expressed: bool = False,
    lossy: Sequence[str] | None = None,
    cut: Mapping[str, Any] | None = None,
) -> Source:
    """Match, decide and solve a checkpoint; E2xx for the first problem.

    Args:
        like: choices of another checkpoint, for what this one does not show.
        expressed: whether it will be written in another form, so that its configuration must be expressible there.
        lossy: rules that may be applied although they cannot be inverted; None if no rule needs to be inverted.
        cut: the names for training-configuration expressions about how rank files will be cut.
    """
    options, rules, end = options_of(mapping, settings), instances(mapping), checkpoint.end
    if end == "whole":
        checkpoint = _of_type(checkpoint, mapping)
    held, files = at_end(rules, end), checkpoint.grid.files
    stored = strip(checkpoint.files, layout if end == "training" else None)
    tied = _tied_names([one for one in rules if not one.rule.optional]) if end == "whole" else {}
    matches = find_candidates([*(one.name for one in stored), *tied], held, mapping, end)
    check_refused(stored, matches, files, end)
    _check_kind(stored, matches, mapping, checkpoint, layout)
    facts = facts_of(mapping, layout, checkpoint, options, rules, stored, settings, like, cut or {}, expressed)
    stages = stages_of(stored, matches, checkpoint.grid, layout, facts.names)
    decided = {n: d.choice for n, d in facts.decisions.items()}
    if facts.read.config.get("tie_word_embeddings"):
        stored = _with_tied(stored, tied, matches, decided)
    question = Question(mapping, layout, checkpoint, stored, matches, held, stages, facts.names)
    attempt = decide_by_shapes(question, facts.decisions)
    choices = {n: d.choice for n, d in attempt.decisions.items()}
    check_names(stored, matches, choices, files)
    check_spellings(stored, attempt.active)
    check_slices(attempt, checkpoint, layout)
    active = [one.under(choices) for one in rules if one.rule.active(choices)]
    if lossy is not None:
        used = used_rules(attempt, active, checkpoint, each=False)
        check_invertible(used, lossy)
    if attempt.sizes.contradictions:
        check_repeated(attempt, checkpoint)
        raise size_error(attempt.sizes.contradictions[0], checkpoint.grid)
    used = used_rules(attempt, active, checkpoint)
    pieces, sizes = match_pieces(used), attempt.sizes.values()
    check_known(at_end(used, end), sizes, attempt.unread)
    if not stages.layers and len(stages.counts) == 1:  # no name has a layer number: tensors stack the layers
        stages = laid_out([(stage, sizes.get("layer", 0)) for stage in stages.counts], stages.chunks, stages.dims)
    return Source(
        mapping=mapping,
        layout=layout,
        checkpoint=checkpoint,
        used=used,
        pieces=pieces,
        side=Side(tuple(attempt.groups.values()), keys_at(end, used, pieces), sizes),
        unread=attempt.unread,
        stages=stages,
        decisions=attempt.decisions,
        options=options,
        read=facts.read,
        names={**facts.seen, **choices, **sizes},
        ignored=matches.ignored,
    )


def _of_type(checkpoint: Checkpoint, mapping: MappingFile) -> Checkpoint:
    """A checkpoint of another model type for the same model, as one of the mapping's type.

    Keys that only other types' code reads are left out for the mapping's own type, whose class does not read them.
    """
    config = checkpoint.config
    other = mapping.also.get(str(config.get("model_type")))
    if other is None or config.get("architectures") != [other["architecture"]]:
        others = {name for one in mapping.also.values() for name in one.get("absent", {})}
        read = {name: value for name, value in config.items() if name not in others}
        return checkpoint if read == config else replace(checkpoint, config=read, target_config=read)
    said = {"model_type": mapping.model_type, "architectures": [mapping.architecture]}
    config = completed({n: v for n, v in config.items() if n != "auto_map"} | said, other.get("absent", {}))
    return replace(checkpoint, config=config, target_config=config)


def _tied_names(rules: Sequence[Instance]) -> dict[str, str]:
    return {name.text: one.rule.tied_to for one in rules if one.rule.tied_to is not None for name, _ in one.targets}


def _with_tied(
    stored: Sequence[Stored], tied: Mapping[str, str], matches: Matches, choices: Mapping[str, str]
) -> tuple[Stored, ...]:
    """The tensors; each one that a rule needs but that is left out as tied is represented by the one it equals.

    A tied tensor that no rule needs, since rank files leave it out, is a copy of the one it equals.
    """
    held = {one.name: one for one in stored}

    def needed(name: str) -> bool:
        return any(one.rule.active(choices) for one, _ in matches.candidates[name])

    spare = (name for name in tied if name in held and name in matches.candidates and not needed(name))
    copies = {name: tied[name] for name in spare if tied[name] in held}
    return (
        *(one._replace(name=copies.get(one.name, one.name)) for one in stored),
        *(
            held[to]._replace(name=name)
            for name, to in tied.items()
            if name not in held and to in held and needed(name)
        ),
    )


def _check_kind(
    stored: Sequence[Stored], matches: Matches, mapping: MappingFile, checkpoint: Checkpoint, layout: Layout
) -> None:
    """E212 when the mapping is for another architecture, or almost nothing matches, not an error for one tensor."""

    def wrong(place: str, got: str, expected: str, fix: str) -> EngineError:
        told = f"mapping `{mapping.name}` is not the one for this checkpoint"
        return EngineError("E212", told, place=Place(place), got=got, expected=expected, fix=fix)

    alike = "Tensors of the same names and shapes are not the same model."
    kind = checkpoint.config.get("model_type") if checkpoint.end == "whole" else mapping.model_type
    if kind != mapping.model_type:
        told = f"model_type: {shown(mapping.model_type)}"
        fix = f"{alike} Use a mapping for its architecture."
        raise wrong("config.json", f"model_type: {shown(kind)}", told, fix)
    kind = checkpoint.training.get("model_type")
    names = {one.name for one in stored}
    if names and sum(name in matches.candidates for name in names) * 4 < len(names):
        said = f"; its training config says model_type {printable(kind)}" if kind else ""
        ends = [
            rule.sources[:1] if checkpoint.end == "training" else [t.name for t in rule.targets]
            for rule in mapping.rules
        ]
        wanted = first_of([name for names_of in ends for name in names_of], 3)
        fix = "`engine inspect` shows which bundled mappings fit."
        raise wrong(checkpoint.folder, first_of(sorted(names), 3) + said, wanted, fix)
    if isinstance(kind, str) and mapping.model_types and kind not in mapping.model_types:
        told = f"model_type: {' or '.join(map(shown, mapping.model_types))}"
        fix = (
            f"{alike} Use the mapping for it. If it is that under another name, a mapping says so: "
            f"`extends: {mapping.name}`, `source: {{model_types: [its name]}}`."
        )
        raise wrong(layout.training_file or "", f"model_type: {shown(kind)}", told, fix)


def check_invertible(used: Sequence[Instance], lossy: Sequence[str]) -> None:
    """E215 for the first rule that changes or drops values, unless `--lossy` names it."""
    lossily: set[str] = set()
    for instance in used:
        rule = instance.rule
        dropped = {axis: why for axis, why in rule.drop.items() if axis not in rule.zeros}
        gone = loses(rule.transform)
        if gone is None and not dropped:
            continue
        lossily.add(rule.name)
        if rule.name in lossy:
            continue
        lost = f"drop {', '.join(dropped)}: {'; '.join(dropped.values())}"
        if rule.transform is not None and gone is not None:
            lost = f"transform {rule.transform[0]}, which loses {gone}"
        raise EngineError(
            "E215",
            f"rule `{rule.name}` does not invert",
            place=rule.place,
            got=lost,
            expected="rules that only move elements",
            fix=f"What it changed or dropped cannot be restored. To write the tensor as it is, give --lossy {rule.name}"
            " or choose another variant with --set.",
        )
    known = {instance.rule.name for instance in used}
    for name in lossy:
        if name not in lossily:
            told = "a rule that inverts, and has no effect" if name in known else "no active rule"
            raise EngineError(
                "E001",
                f"--lossy names `{name}`, which is {told}",
                expected=", ".join(sorted(lossily)) or "no --lossy: every active rule inverts",
                fix="Leave it out." if name in known else None,
            )
