"""Planning a training checkpoint: from a Hugging Face checkpoint, or from another parallel layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid, counts_of
from engine.errors import EngineError, Place
from engine.language.expressions import render_tree
from engine.language.model import Layout, Mode
from engine.language.model import Mapping as MappingFile
from engine.language.transforms import TRANSFORMS
from engine.planning.attempts import Checkpoint, claims
from engine.planning.backward import (
    WholeCheckpoint,
    check_names_back,
    decide_back,
    grid_only,
    groups_back,
    names_back,
    render_known,
    used_back,
)
from engine.planning.config_keys import as_declared, check_returns, declared, read_config, shown, target_side
from engine.planning.destination import Destination, Request
from engine.planning.groups import Group
from engine.planning.likeness import Like, destination_of, grid_of, like_of, spellings_of
from engine.planning.matching import is_active
from engine.planning.model import Plan, Replicas
from engine.planning.pieces import match_pieces
from engine.planning.planner import data_only, main_dtype, overruled, present_in, replicas_of, understand
from engine.planning.rank_outputs import (
    RankOutputs,
    directory_of,
    rank_outputs,
    small_files,
    training_text,
    with_configuration,
)
from engine.planning.release import check_release, not_the_release
from engine.planning.sides import Side, training_keys, whole_keys
from engine.planning.sizes import Fact, Sizes, size_error, solve, unknown_error
from engine.planning.stages import Stages
from engine.planning.stored import Instance, instances
from engine.planning.variants import check_settings, decide, options_of
from engine.planning.whole import whole_instances
from engine.planning.zeros import ZEROS, zero_groups


def make_reverse_plan(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: WholeCheckpoint,
    request: Request,
    *,
    settings: Mapping[str, Any],
    like: Checkpoint | None = None,
    dtype: str = "auto",
    lossy: Sequence[str] = (),
) -> Plan:
    """Compile a plan that writes a training checkpoint from a Hugging Face one.

    Args:
        request: how to cut it; what it leaves open is as in `like`, or one rank.
        settings: variants and options of the mapping and of the layout.
        like: a training checkpoint whose mode, grid, names and variants to copy.
        lossy: names of rules that do not invert and may be written all the same.

    Raises:
        EngineError: E2xx; E215 for a rule that does not invert, E216 when reading the result back
            would not give the same sizes and choices.
    """
    mine = _settings(mapping, layout, settings)
    if not mapping.training_config and not layout.config_of_target:
        raise EngineError(
            "E215",
            f"mapping `{mapping.name}` says nothing of the training configuration",
            place=mapping.place,
            expected="a `training_config` block",
            fix="Write the keys of the training configuration as expressions over config.json.",
        )
    options = options_of(mapping, mine)
    _check_kind(mapping, checkpoint)
    read = read_config(checkpoint.config, target_side(mapping))
    own = checkpoint.config if layout.config_of_target else None  # what is written is what was read
    checkpoint = replace(checkpoint, config=read.config)

    def training(names: Mapping[str, Any]) -> dict[str, Any]:
        return dict(read.config) if own is not None else render_known(mapping.training_config, names)

    shared = like_of(understand(mapping, layout, like, mine), like, layout) if like is not None else Like()
    mode, ranks = grid_of(layout, request, shared)
    mine |= chosen_by(mode, mapping, mine)
    rules = instances(mapping)
    tensors = checkpoint.tensors()
    back = names_back(list(tensors), rules)
    cut = {**counts_of(layout, ranks), "mode": mode.name, "chunks": request.chunks or shared.chunks}
    seen = {**checkpoint.config, **cut, "options": options, "present": present_in(back)}
    first = {**training(seen), "options": options, "present": seen["present"]}
    decisions = decide_back(
        mapping.variants, mine, shared.choices, {**first, **cut, "training": {}, "given": checkpoint.config}
    )
    choices = {n: d.choice for n, d in decisions.items()}
    active = [one for one in rules if is_active(one, choices)]
    used = used_back(active, list(tensors), checkpoint.folder)
    _check_invertible(used, lossy)
    pieces = match_pieces(used)
    ignored = check_names_back(checkpoint, pieces, mapping, choices)
    whole = whole_instances(pieces)
    found = groups_back(checkpoint, pieces, whole, None)
    scope = {**training({**seen, **choices}), "options": options, **choices}
    scope |= {**cut, "training": {}, "present": seen["present"], "given": checkpoint.config}
    files = [RankFile(f.name, layout.modes[0].files[0], {}) for f in checkpoint.files]
    state, unread = _solve(mapping, found, scope, files, pieces.dropped)
    sizes = state.values()
    for instance in (*used, *whole.values()):
        for axis in (*instance.axis_names(), *instance.axes.names()):
            if axis not in sizes:
                raise unread.get(axis) or unknown_error(axis, instance.rule.place)
    held = groups_back(checkpoint, pieces, whole, sizes)
    types = {one.instance.key: next(iter(one.shards.values()))[0].header.dtype for one in held}
    zeros, padding = zero_groups(used, sizes, len(checkpoint.files), types)
    source = Side((*held, *zeros), {**whole_keys(whole), **padding}, sizes)
    files_read = (*checkpoint.files, *((ZEROS,) if zeros else ()))
    destination = destination_of(mapping, layout, request, shared, settings, sizes.get("layer", 0))
    keys = training_keys(used, pieces)
    written = rank_outputs(
        destination, used, keys, spellings_of(used, shared), source, [f.name for f in files_read], dtype
    )
    names = {**seen, **choices, **sizes, **destination.names}
    names["options"] = {**destination.names["options"], **options}
    names["dtype"] = f"torch.{main_dtype(written.outputs)}"
    if own is not None:
        config = dict(own)
        _check_again(mapping, read.config, options, choices, sizes, written, destination, read.config)
    else:
        config = as_declared(render_tree(mapping.training_config, names), declared(mapping, layout, "source"))
        forth = _check_again(mapping, config, options, choices, sizes, written, destination, read.config)
        check_returns(read, forth, mapping)
    plan = _plan(
        mapping, layout, checkpoint.folder, files_read, source, written, destination, config, decisions=decisions,
        options=options, names=names, ignored=ignored, notices=(), dtype=dtype, grid=written.grid,
        stages=destination.stages,
    )  # fmt: skip
    return replace(plan, replicas=(*plan.replicas, *_ties(used, source, checkpoint)))


def chosen_by(mode: Mode, mapping: MappingFile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a mapping's variants that a mode alone has; E214 where a setting says another."""
    found = {name: choice for name, choice in mode.choices.items() if name in mapping.variants}
    for name, choice in found.items():
        if settings.get(name, choice) != choice:
            raise EngineError(
                "E214",
                f"mode `{mode.name}` is not written with {name}={settings[name]}",
                place=mapping.variants[name].place,
                got=f"--set {name}={settings[name]}",
                expected=f"{name}={choice}",
                fix="Leave the setting out, or choose another --mode.",
            )
    return found


def make_reshard_plan(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    request: Request,
    *,
    settings: Mapping[str, Any],
    like: Checkpoint | None = None,
    dtype: str = "auto",
) -> Plan:
    """Compile a plan that writes a training checkpoint for other ranks, from shards to shards.

    What `request` and `like` leave open stays as it is.
    """
    mine = _settings(mapping, layout, settings)
    understood = understand(mapping, layout, checkpoint, mine)
    own = like_of(understood, checkpoint, layout)
    shared = own
    if like is not None:
        other = like_of(understand(mapping, layout, like, mine), like, layout)
        shared = Like(
            other.mode,
            other.sizes,
            other.stages,
            own.choices,
            own.spelt,
            other.prefix,
            {**own.training, **other.training},
        )
    source = understood.side()
    destination = destination_of(mapping, layout, request, shared, settings, source.sizes.get("layer", 0))
    files = [file.name for file in checkpoint.grid.files]
    spellings = spellings_of(understood.used, own)
    written = rank_outputs(destination, understood.used, source.keys, spellings, source, files, dtype)
    config = {**checkpoint.config, **grid_only(mapping.training_config, destination.grid_names())}
    ignored = dict(understood.matches.ignored)
    notices = [*overruled(understood.attempt)]
    if ignored:
        notices.append(f"not written, as the mapping ignores them: {', '.join(sorted(ignored)[:3])}, …")
    return _plan(
        mapping, layout, checkpoint.folder, checkpoint.files, source, written, destination, config,
        decisions=understood.attempt.decisions, options=understood.options, names=understood.names, ignored=ignored,
        notices=tuple(notices), dtype=dtype, grid=checkpoint.grid, stages=understood.stages,
    )  # fmt: skip


def _plan(
    mapping: MappingFile,
    layout: Layout,
    folder: str,
    files: Any,
    source: Side,
    written: RankOutputs,
    destination: Destination,
    config: Mapping[str, Any],
    *,
    decisions: Any,
    options: Mapping[str, Any],
    names: Mapping[str, Any],
    ignored: Mapping[str, str],
    notices: tuple[str, ...],
    dtype: str,
    grid: RankGrid,
    stages: Stages,
) -> Plan:
    departures = check_release(mapping, source.sizes)
    return Plan(
        mapping=mapping,
        layout=layout,
        folder=folder,
        grid=grid,
        stages=stages,
        files=files,
        sources=source.stored,
        outputs=written.outputs,
        copies=written.copies,
        replicas=replicas_of(source),
        tied=(),
        decisions=decisions,
        sizes=source.sizes,
        options=options,
        config=config,
        names=data_only(names),
        ignored=ignored,
        notices=(*notices, *not_the_release(mapping, departures)),
        dtype=dtype,
        max_shard_size=0,
        shards=with_configuration(destination, written.shards, config),
        written=written.grid,
        beside=small_files(destination, written.grid.files, config) | directory_of(destination, written),
        departures=departures,
    )


def _settings(mapping: MappingFile, layout: Layout, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are the mapping's; the rest must be the layout's."""
    theirs = {*layout.options, *layout.layers.variants}
    mine = {name: value for name, value in settings.items() if name not in theirs}
    check_settings(mapping, mine)
    return mine


def _check_invertible(used: Sequence[Instance], lossy: Sequence[str]) -> None:
    """E215 for the first rule that changes or drops values, unless `--lossy` names it."""
    for instance in used:
        rule = instance.rule
        dropped = {axis: why for axis, why in rule.drop.items() if axis not in rule.zeros}
        if (rule.transform is None and not dropped) or rule.name in lossy:
            continue
        lost = f"drop {', '.join(dropped)}: {'; '.join(dropped.values())}"
        if rule.transform is not None:
            lost = f"transform {rule.transform[0]}, which loses {TRANSFORMS[rule.transform[0]].lost}"
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
        if name not in known:
            raise EngineError(
                "E001", f"--lossy names `{name}`, which is no active rule", expected=", ".join(sorted(known))
            )


def _solve(
    mapping: MappingFile,
    found: Sequence[Group],
    scope: dict[str, Any],
    files: Sequence[RankFile],
    dropped: Mapping[tuple[str, frozenset[str]], str],
) -> tuple[Sizes, dict[str, EngineError]]:
    """Sizes from dims, names and shapes; dropped pieces are not restored, so their axis is 0."""
    facts, unread = claims(mapping, scope, "the training configuration")
    counted: dict[str, int] = {}
    for group in found:
        for axis, value in group.fixed.items():
            counted[axis] = max(counted.get(axis, 0), value + 1)
    for axis, count in counted.items():
        known = facts.get(axis)
        if known is not None and known.value != count:
            raise EngineError(
                "E203",
                f"sizes disagree: axis `{axis}`",
                place=known.place,
                got=f"{count} counted over the tensors' names",
                expected=f"{known.value} from {known.why}",
                fix="config.json and the weights are of different models, or a file is missing.",
            )
        facts.setdefault(axis, Fact(axis, count, f"{{{axis}}} in tensor names"))
    for _, piece in dropped:
        for axis in piece:
            if any(axis in rule.drop and axis not in rule.zeros for rule in mapping.rules):
                facts.setdefault(axis, Fact(axis, 0, "dropped, and not restored"))
    state = solve(list(found), facts, files)
    if state.contradictions:
        raise size_error(state.contradictions[0])
    return state, unread


def _check_again(
    mapping: MappingFile,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    choices: Mapping[str, str],
    sizes: Mapping[str, int],
    written: RankOutputs,
    destination: Destination,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """E216 unless the written configuration and names, read forwards, give the same choices and sizes.

    Returns the config.json that is made of them.
    """
    prefixes = sorted({destination.prefix(chunk) for chunk in range(destination.stages.chunks)}, key=len, reverse=True)
    names: set[str] = set()
    for output in written.outputs:
        prefix = next(p for p in prefixes if output.name.startswith(p))
        names.add(output.name[len(prefix) :])
    scope = {**config, "options": options, "training": {}, "present": present_in(names)}
    scope["given"] = given
    for name, decision in decide(mapping.variants, {}, scope).items():
        if decision.choice != choices[name]:
            variant = mapping.variants[name]
            raise EngineError(
                "E216",
                f"variant `{name}` would be read as {decision.choice}",
                place=variant.place,
                got=f"{decision.choice}: {decision.evidence}",
                expected=choices[name],
                fix="Let `training_config` write what the variant's expressions read.",
            )
    facts, _ = claims(mapping, {**scope, **choices}, "the written configuration")
    for axis, fact in facts.items():
        if sizes.get(axis, fact.value) != fact.value:
            raise EngineError(
                "E216",
                f"axis `{axis}` would be read as {fact.value}",
                place=fact.place,
                got=f"{fact.value} from {fact.why}",
                expected=f"{sizes[axis]}, as in the tensors",
                fix="Let `training_config` write values from which `dims` compute the sizes again.",
            )
    names_then = {**scope, **choices, **sizes, "training": training_text(destination)}
    forth: dict[str, Any] = render_known(mapping.config, names_then)
    return forth


def _ties(used: Sequence[Instance], source: Side, checkpoint: WholeCheckpoint) -> list[Replicas]:
    """Tensors that the configuration ties to others and that are stored all the same: a run compares the two."""
    stored = {one.header.name: number for number, one in enumerate(source.stored)}
    tied = [(one.rule, name.text, one.rule.tied_to) for one in used for name, _ in one.targets]
    if not checkpoint.config.get("tie_word_embeddings"):
        return []
    return [
        Replicas((stored[to], stored[name]), name, rule.name)
        for rule, name, to in tied
        if to is not None and name in stored and to in stored
    ]


def _check_kind(mapping: MappingFile, checkpoint: WholeCheckpoint) -> None:
    """E212 when config.json is of another architecture than the mapping's target."""
    kind = checkpoint.config.get("model_type")
    if kind != mapping.model_type:
        raise EngineError(
            "E212",
            f"mapping `{mapping.name}` is not the one for this checkpoint",
            place=Place("config.json"),
            got=f"model_type: {shown(kind)}",
            expected=f"model_type: {shown(mapping.model_type)}",
            fix="Tensors of the same names and shapes are not the same model. Use a mapping for its architecture.",
        )
