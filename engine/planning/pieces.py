"""Pieces: the target of each source piece of the rules, proved one to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import EngineError, Lines
from engine.language.names import Pattern, pattern
from engine.planning.stored import Instance

# A piece of a rule: the target name pattern it is written to, and its set of axes.
Key = tuple[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A target as a whole tensor, and the rules that write it."""

    own: Instance
    instances: tuple[Instance, ...]

    @property
    def name(self) -> Pattern:
        return self.own.sources[0]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The target of each source piece; `match_pieces` proves that they are one to one."""

    targets: Mapping[str, TargetSpec]
    by_source: Mapping[tuple[str, frozenset[str]], Key]


def match_pieces(active: Sequence[Instance]) -> Pieces:
    """Pair source pieces with target pieces; E107 for the first that does not occur exactly once on either side."""
    targets: dict[str, TargetSpec] = {}
    for instance in active:
        for own in instance.wholes:
            known = targets.get(own.key, TargetSpec(own, ()))
            if known.own.axes.dims != own.axes.dims:
                raise _piece_error(
                    instance, f"`{own.key}` is written with different axes: `{known.own.axes}` and `{own.axes}`"
                )
            if any(one.rule.changes != instance.rule.changes for one in known.instances):
                raise _piece_error(
                    instance,
                    f"`{own.key}` has values that another rule changes differently",
                    fix="Write the same `transform` in every rule that fills this target.",
                )
            if instance not in known.instances:
                targets[own.key] = TargetSpec(known.own, (*known.instances, instance))
    keys_of = {name: [(name, piece) for piece in spec.own.pieces] for name, spec in targets.items()}
    owners: dict[Key, Instance] = {}
    by_source: dict[tuple[str, frozenset[str]], Key] = {}
    for instance in active:
        wanted = {key for name, _ in instance.targets for key in keys_of[name.text]}
        for piece in instance.pieces:
            keys = [key for key in wanted if key[1] == piece]
            if not keys and not piece.isdisjoint(instance.rule.drop):
                continue
            if len(keys) != 1:
                told = "no target" if not keys else f"{len(keys)} targets"
                raise _piece_error(instance, f"source piece {_braces(piece)} occurs in {told}", piece)
            if keys[0] in owners:
                other = owners[keys[0]].rule.name
                raise _piece_error(
                    instance,
                    f"target piece {_braces(piece)} is also written by rule `{other}`",
                    fix="Change the target's name in one of the two rules, or give them different `when`.",
                )
            owners[keys[0]] = instance
            by_source[instance.key, piece] = keys[0]
    for text, every in keys_of.items():
        for key in every:
            if key not in owners:
                told = f"target piece {_braces(key[1])} of `{text}` has no source"
                raise _piece_error(targets[text].instances[0], told)
    return Pieces(targets, by_source)


def _piece_error(
    instance: Instance, message: str, piece: frozenset[str] = frozenset(), fix: str | None = None
) -> EngineError:
    return EngineError(
        "E107",
        f"rule `{instance.rule.name}`: {message}",
        place=instance.rule.place,
        got=Lines.of([f"source `{instance.axes}`", *(f"{n.text} `{a}`" for n, a in instance.targets)]),
        expected="every source piece in exactly one target, every target piece in exactly one source",
        fix=fix
        or _other_axes(instance, piece)
        or "Pieces are matched by their set of axes, placeholders included: check the axis names on both sides.",
    )


def _other_axes(instance: Instance, piece: frozenset[str]) -> str | None:
    """A fix that names the target which a source piece almost matches, and the axes that differ."""
    sources = instance.pieces
    held = [
        (name, frozenset(p) | frozenset(name.placeholders)) for name, axes in instance.targets for p in axes.pieces()
    ]
    spare = [(name, p) for name, p in held if p not in sources or sum(p == other for _, other in held) > 1]
    count = min((len(p ^ piece) for _, p in spare), default=0)
    near = [(name.text, p) for name, p in spare if len(p ^ piece) == count]
    if not piece or not near or count > 2 or len({p for _, p in near}) > 1:
        return None
    text, found = near[0]
    target, source = ", ".join(sorted(found - piece)), ", ".join(sorted(piece - found))
    if not source or not target:
        lacks, has = ("the source", target) if target else (f"`{text}`", source)
        braces = (
            f"`{{{has}}}`" if has in {*instance.sources[0].placeholders, *pattern(text).placeholders} else f"`{has}`"
        )
        return f"{lacks} lacks {braces}, which the other side has: write it on both sides."
    if len(near) > 1:
        names = " and ".join(f"`{name}`" for name, _ in near)
        return f"{names} have the same axes: write `{source}` instead of `{target}` in the one that takes this piece."
    return f"`{text}` has the axis `{target}` where the source has `{source}`: write the same name on both sides."


def _braces(piece: frozenset[str]) -> str:
    return "{" + ", ".join(sorted(piece)) + "}"
