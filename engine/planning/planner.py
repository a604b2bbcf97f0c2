"""The planner: mapping × layout × headers → plan. Pure: no tensor data, no files, no torch.

Source and target are each one of two kinds, rank files or a Hugging Face checkpoint; a plan joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.checkpoint.hf_folder import BESIDE
from engine.errors import EngineError, first_of, printable
from engine.language.expressions import names_in
from engine.language.model import Layout, MappingFile
from engine.planning.attempts import Checkpoint
from engine.planning.likeness import Like, cut_of_model, laid_out_as, like_of
from engine.planning.model import Departure, Plan
from engine.planning.rank_outputs import rank_outputs
from engine.planning.release import check_asked, check_release, not_the_release
from engine.planning.request import Request
from engine.planning.source import Source, read_source
from engine.planning.stored import Stored
from engine.planning.variants import check_settings, decide
from engine.planning.whole_outputs import whole_configuration, whole_outputs
from engine.planning.written import Written, summed
from engine.planning.zeros import padded
from engine.storage.folders import one_of_two


def make_plan(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    asked: Request | None = None,
    *,
    like: Checkpoint | None = None,
) -> Plan:
    """Compile a plan.

    Args:
        checkpoint: the source; its kind overrides `reads` of the request.
        asked: what to write, and how; default: a Hugging Face checkpoint without settings.
        like: a training checkpoint that gives mode, ranks, names and choices which the request leaves open; what it
            leaves open too is taken from `checkpoint`, else is one rank.

    Raises:
        EngineError: E2xx for the first problem that keeps the plan from being complete and exact.
    """
    asked = asked or Request(mapping)
    theirs = (*layout.options, *layout.layers.variants) if asked.writes == "training" else ()
    mine = {name: value for name, value in asked.settings.items() if name not in theirs}
    check_settings(mapping, asked.settings, theirs)
    crosses = checkpoint.end != asked.writes
    lossy = asked.lossy if crosses and asked.writes == "training" else None
    if lossy is not None:
        _check_writes_training(mapping, layout)
    other = Like()
    if like is not None:
        with one_of_two(like.folder, "--like "):
            other = like_of(_held(read_source(mapping, layout, like, mine)))
    cut = cut_of_model(mapping, layout, asked, other) if crosses and asked.writes == "training" else None
    if cut is not None:
        mode = cut["mode"]
        mine |= choices_of_mode(layout, mode, mapping, mine, "Leave that setting out, or choose another --mode.")
    source = read_source(mapping, layout, checkpoint, mine, like=other.choices, expressed=crosses, lossy=lossy, cut=cut)
    for name in mine.keys() - asked.settings.keys():
        by_mode = replace(source.decisions[name], how="default", evidence=f"as mode {mode} has it")
        source = replace(source, decisions={**source.decisions, name: by_mode})
    if lossy is not None:
        source = padded(source)
    own = like_of(source)
    taken = own if like is None else laid_out_as(other, own, mapping)
    if asked.writes == "training":
        cut = cut or cut_of_model(mapping, layout, asked, taken)
        made = {name: decision.choice for name, decision in source.decisions.items()}
        choices_of_mode(layout, cut["mode"], mapping, made, f"Give --to {mapping.name}: then it is decided anew.")
        if not crosses:
            _check_stays(_held(source), cut)
    written = whole_outputs(source, asked) if asked.writes == "whole" else rank_outputs(source, asked, taken)
    departures = check_release(mapping, source.side.sizes, strict=asked.strict)
    if crosses and checkpoint.end == "training":
        check_asked(mapping, source.names, mine, departures)
    told = (*_notices(source, crosses=crosses), *_told_of(source, asked, taken))
    return _joined(source, written, asked, told, departures)


def _joined(
    source: Source, written: Written, asked: Request, told: Sequence[str], departures: tuple[Departure, ...]
) -> Plan:
    """The plan that fills what is written from a source.

    Args:
        told: the notices about the source.
    """
    checkpoint, mapping = source.checkpoint, source.mapping
    whole = checkpoint.end == "whole"  # which has no ranks of its own
    return Plan(
        mapping=mapping,
        layout=source.layout,
        folder=checkpoint.folder,
        grid=written.grid if whole and written.grid is not None else checkpoint.grid,
        stages=written.stages if whole and written.stages is not None else source.stages,
        files=checkpoint.files,
        sources=source.side.stored,
        outputs=written.outputs,
        copies=written.copies,
        replicas=source.replicas(),
        slices=source.slices(),
        tied=written.tied,
        decisions=source.decisions,
        sizes=source.side.sizes,
        options=source.options,
        config=written.config,
        names={name: value for name, value in written.names.items() if name != "present"},  # a function, not data
        ignored=source.ignored,
        notices=(*told, *summed(written.outputs), *written.notices, *not_the_release(mapping, departures)),
        dtype=asked.dtype,
        max_shard_size=written.max_shard_size,
        shards=written.files,
        reads=checkpoint.end,
        written=written.grid,
        noted=source.read.noted if checkpoint.end != asked.writes else {},
        beside=written.beside,
        departures=departures,
    )


def _check_writes_training(mapping: MappingFile, layout: Layout) -> None:
    """E215 for a mapping that cannot compute the training configuration from the target's."""
    if not mapping.training_config and not layout.config_of_target:
        raise EngineError(
            "E215",
            f"mapping `{mapping.name}` does not say how to write the training configuration",
            place=mapping.place,
            expected="a `training_config` block",
            fix="Write the keys of the training configuration as expressions over config.json.",
        )


def _told_of(source: Source, asked: Request, like: Like) -> Iterable[str]:
    """The notices of rules that write training tensors under the first of their names, if nobody asked for these."""
    if asked.writes == source.checkpoint.end or asked.writes == "whole":
        return ()
    told = (one for one in source.used if not asked.settings.keys() & one.rule.when.keys())
    first = (one for one in told if not like.spelt & {name.text for name in one.sources})
    return dict.fromkeys(one.rule.notice for one in first if one.rule.notice is not None)


def choices_of_mode(
    layout: Layout, mode: str, mapping: MappingFile, choices: Mapping[str, Any], fix: str
) -> dict[str, str]:
    """The choices of a mapping's variants that a mode prescribes; E214 if another choice is set."""
    held = next(one.choices for one in layout.modes if one.name == mode)
    found = {name: choice for name, choice in held.items() if name in mapping.variants}
    for name, choice in found.items():
        if choices.get(name, choice) != choice:
            raise EngineError(
                "E214",
                f"mode `{mode}` is not written with {name}={choices[name]}",
                place=mapping.variants[name].place,
                got=f"{name}={choices[name]}",
                expected=f"{name}={choice}",
                fix=fix,
            )
    return found


def _held(source: Source) -> Source:
    """A source to reshard, checked against the target's configuration if one was given."""
    if source.checkpoint.target_config and not source.layout.config_of_target:
        whole_configuration(source)
    return source


def _check_stays(source: Source, cut: Mapping[str, Any]) -> None:
    """E214 if the set of tensors depends on how the model is cut, and a reshard would change it."""
    variants = source.mapping.variants.items()
    held = {name: one for name, one in variants if any(set(cut) & names_in(e) for e in one.choices.values() if e)}
    for name, then in decide(held, {}, {**source.names, **cut}).items():
        now = source.decisions[name]
        if now.choice != then.choice:
            raise EngineError(
                "E214",
                f"files that are cut in this way hold other tensors: {name}={then.choice}",
                place=source.mapping.variants[name].place,
                got=f"{name}={now.choice}, as {source.checkpoint.folder} is cut",
                expected=f"{name}={then.choice}: {then.evidence}",
                fix=f"Give --to {source.mapping.name}: it decides anew which tensors are written.",
            )


def _notices(source: Source, *, crosses: bool) -> tuple[str, ...]:
    """Notices about the source, except its sizes."""
    checkpoint, mapping = source.checkpoint, source.mapping
    notices = [
        f"`{d.evidence}` overrides the configuration, by which it is {d.instead_of}"
        for d in source.decisions.values()
        if d.instead_of is not None
    ]
    tokenizer = (mapping.tokenizer or {}).get("file")
    own = (name for name in checkpoint.grid.unknown if name != tokenizer)
    unknown = [name for name in own if not (crosses and BESIDE.fullmatch(name))]  # a run reports those
    left = sorted({name for file in checkpoint.files for name in file.left})
    replaced = [f"{name} in {file.name}" for file in checkpoint.files for name in file.replaced]
    moved = "each stored where the other belongs: another program exchanged or moved names"
    for what, names, most in (
        ("not part of the checkpoint, left alone", unknown, 12),
        ("not part of the model, not converted", left, 4),
        ("another program replaced these tensors after training had saved them", replaced, 4),
        (moved, checkpoint.renamed, 4),
        ("the given configuration is taken, where one beside the weights has another value", checkpoint.passed_over, 4),
    ):
        more = f" and {len(names) - most} more" if len(names) > most else ""
        if names:
            notices.append(f"{what}: {', '.join(map(printable, names[:most]))}{more}")
    if source.read.noted and crosses:
        told = ", ".join(f"{name} = {value}" for name, value in source.read.noted.items())
        notices.append(f"nothing reads these keys of {source.read.side.file}: {told}")
    notices += _unlike_types(source)
    if source.ignored and not crosses:
        notices.append(f"not written, as the mapping ignores them: {first_of(sorted(source.ignored), 3)}")
    return tuple(notices)


def _unlike_types(source: Source) -> list[str]:
    """The notice that layers have several element types, or tensors both of 16 bits, of which training has one."""
    held: dict[str, dict[str, Stored]] = {}
    halves: dict[str, Stored] = {}
    for group in source.side.groups:
        dtype = group.first.header.dtype
        held.setdefault(group.instance.key, {}).setdefault(dtype, group.first)
        if dtype in ("F16", "BF16"):
            halves.setdefault(dtype, group.first)
    unlike = [types for types in (*held.values(), halves) if len(types) > 1]
    if not unlike:
        return []
    told = ", ".join(f"{one.header.name} in {source.files[one.file]} is {dtype}" for dtype, one in unlike[0].items())
    more = f", and {len(unlike) - 1} more kinds" if len(unlike) > 1 else ""
    return [printable(f"element types differ where training has one: {told}{more}; are all files from one run?")]
