"""Rank files to write: their tensors, the copies that fill them, and the small files beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid
from engine.errors import EngineError, Place, first_of
from engine.formats.dcp import DIRECTORY
from engine.formats.pickling import WRITABLE, Global, Made, with_dtypes
from engine.language.axes import extent
from engine.language.expressions import evaluate, render_tree
from engine.language.model import ConfigFile, Layout, MappingFile, Mode, Variant
from engine.language.names import pattern
from engine.planning.agreement import check_returns, with_parts
from engine.planning.attempts import claims
from engine.planning.completeness import check_known
from engine.planning.config_keys import declared, read_config, read_training, shown, source_side
from engine.planning.destination import Destination, flag
from engine.planning.facts import UNASKED, present_in, render_known
from engine.planning.likeness import Like, destination_of
from engine.planning.model import Output, OutputFile, Plan
from engine.planning.rank_groups import RankGroups
from engine.planning.request import Request
from engine.planning.sides import keys_at
from engine.planning.source import Source
from engine.planning.variants import decide
from engine.planning.written import Wanted, Written, configuration, fill, main_dtype


def rank_outputs(source: Source, asked: Request, like: Like) -> Written:
    """Lay out the rank files of a training checkpoint, with the copies that fill them.

    Args:
        like: facts taken from another checkpoint, or from the source itself.

    Raises:
        EngineError: E214 when the model cannot be cut this way, E216 when reading it back would give another model,
            and as for `fill`.
    """
    mapping, layout, sizes = source.mapping, source.layout, source.side.sizes
    check_known(source.used, sizes, source.unread)
    destination = destination_of(mapping, layout, asked, like, sizes.get("layer", 0))
    back = source.checkpoint.end == "whole"
    invented = RankGroups(destination, source.used, sizes, like.spelt, pads=back)
    wanted = [one for held in invented.held for _, one in held]
    outputs, copies = fill(
        wanted, invented.groups, keys_at("training", source.used, source.pieces), source, asked.dtype
    )
    _check_dtypes(wanted, outputs)
    names = {**source.names, **destination.names, "dtype": f"torch.{main_dtype(outputs)}"}
    names["options"] = {**destination.names["options"], **source.options}
    known = declared(mapping, layout, "source")
    apart = ("options", "training", "model_type")  # names that say nothing of how the model is cut
    grid = {key: value for key, value in destination.counts().items() if key not in apart}
    config = configuration(source, "training", mapping.training_config, names, known, grid)
    if layout.config_of_target:  # it is written as it was read
        config = dict(source.checkpoint.config)
    _check_mode(destination, config)
    place = _inside(layout, destination.mode)
    around = None if place is None else around_of(place, config)  # each weights file holds the configuration
    spans = pairwise(accumulate(map(len, invented.held), initial=0))
    files = tuple(
        OutputFile(file.name, destination.mode.format, tuple(range(*span)), around)
        for file, span in zip(invented.files, spans, strict=True)
    )
    written = Written(
        tuple(outputs),
        copies,
        files,
        config,
        names,
        grid=RankGrid(destination.mode, destination.sizes, tuple(invented.files), staged=destination.stages.dims),
        stages=destination.stages,
        beside=small_files(destination, invented.files, config) | directory_of(destination, files, wanted, outputs),
        notices=_unlike_rows(invented, sizes),
    )
    if back:
        _check_again(source, written, destination)
    else:
        _check_kept(source, destination)
    return written


def _check_dtypes(wanted: Sequence[Wanted], outputs: Sequence[Output]) -> None:
    """E209 for the first tensor of a type that rank files cannot hold."""
    for one, output in zip(wanted, outputs, strict=True):
        if output.dtype not in WRITABLE:
            raise EngineError(
                "E209",
                f"rank files cannot hold `{output.name}`",
                place=one.group.instance.rule.place,
                got=output.dtype,
                expected=", ".join(sorted(WRITABLE)),
                fix="Give --dtype bfloat16.",
            )


def _check_mode(destination: Destination, config: Mapping[str, Any]) -> None:
    """E214 if the configuration that is written says that files of these names are another mode's."""
    when = destination.mode.when
    if when is not None and not evaluate(when, config):
        raise EngineError(
            "E214",
            f"mode `{destination.mode.name}` is not that of these ranks",
            place=when.place,
            got=", ".join(f"{dim} {count}" for dim, count in destination.sizes.items()),
            expected=when.text,
            fix="Leave --mode out: the ranks say which it is.",
        )


def _unlike_rows(invented: RankGroups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The notice that ranks hold unlike numbers of rows of a tensor: training gathers as many from each."""
    unlike: dict[str, str] = {}
    whole: dict[str, set[int]] = {}  # by rank dimension: the rows of all tensors
    for group in invented.groups:
        held = [shard[0] for shard in group.shards.values()]
        roles = invented.files[held[0].file].pattern.cuts.get(group.instance.stage_class, {})
        dim = next((dim for dim, role in roles.items() if role == "rows"), None)
        if dim is not None and group.cut.rows == dim:
            whole.setdefault(dim, set()).add(extent(group.instance.axes.dims[group.cut.at], sizes))
            if len({one.header.shape[group.cut.at] for one in held}) > 1:
                unlike.setdefault(dim, group.instance.sources[0].text)
    return tuple(
        f"{dim} ranks hold unlike numbers of rows of `{text}`, and training gathers as many from each: it loads these "
        f"files, but cannot take a step. These cut every tensor evenly: {flag(dim)}{first_of(even, 12)}"
        for dim, text in unlike.items()
        for even in [[n for n in range(1, gcd(*whole[dim]) + 1) if gcd(*whole[dim]) % n == 0]]
    )


def directory_of(
    destination: Destination, files: Sequence[OutputFile], wanted: Sequence[Wanted], outputs: Sequence[Output]
) -> dict[str, tuple[str, Any]]:
    """The file that lists the boxes, if the mode's format has one: name → (format, content)."""
    if destination.mode.format != "dcp":
        return {}
    every = ((file.name, i) for file in files for i in file.outputs)
    return {DIRECTORY: ("dcp", [(name, replace(wanted[i].stored.header, dtype=outputs[i].dtype)) for name, i in every])}


def around_data(plan: Plan) -> Any:
    """What weights files hold besides tensors, as JSON data: the index of its place, and the configuration."""
    place = None if plan.written is None else _inside(plan.layout, plan.written.mode)
    return None if place is None else [plan.layout.configs.index(place), dict(plan.config)]


def _inside(layout: Layout, mode: Mode) -> ConfigFile | None:
    """The configuration's place in the mode's weights files."""
    first = pattern(mode.files[0].name)
    return next((place for place in layout.configs if first.match(place.file) is not None), None)


def around_of(place: ConfigFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as in its file: under its key, with neighbouring keys separate."""
    values = {key: value for key, value in config.items() if key not in place.beside}
    made: Any = Made(Global("argparse", "Namespace"), with_dtypes(values)) if place.kind == "namespace" else values
    if place.key is None:
        return dict(values)
    return {place.key: made, **{key: config[key] for key in place.beside if key in config}}


def small_files(
    destination: Destination, files: Sequence[RankFile], config: Mapping[str, Any]
) -> dict[str, tuple[str, Any]]:
    """Name → (format, content) of the configurations and of the small files beside each rank file."""
    layout = destination.layout
    found: dict[str, tuple[str, Any]] = {}
    if _inside(layout, destination.mode) is None:
        found[layout.config_file] = (layout.configs[0].format, around_of(layout.configs[0], config))
    if layout.training_file is not None and layout.training_write:
        found[layout.training_file] = ("python_source", training_text(destination))
    for beside in destination.mode.beside:
        for file in files:
            if file.pattern.name == destination.mode.files[0].name:
                name = pattern(beside.file).format(file.ranks)
                found[name] = (beside.format, render_tree(beside.content, destination.counts()))
    return found


def training_text(destination: Destination) -> dict[str, Any]:
    """The training configuration that the layout writes."""
    rendered: dict[str, Any] = render_tree(destination.layout.training_write, destination.counts())
    return rendered


def _training_again(source: Source, destination: Destination) -> dict[str, Any]:
    """The written training configuration, as it will be read."""
    return read_training(source.mapping, destination.layout, training_text(destination))


def _check_kept(source: Source, destination: Destination) -> None:
    """E216 for the first key of the model's configuration that the training configuration sets and would lose."""
    before = render_known(source.mapping.config, source.names)
    after = render_known(source.mapping.config, {**source.names, "training": _training_again(source, destination)})
    lost = next((key for key in {**before, **after} if before.get(key) != after.get(key)), None)
    if lost is not None:
        raise EngineError(
            "E216",
            f"`{lost}` would be lost",
            place=Place(source.layout.training_file or source.layout.config_file),
            got=f"{lost}: {shown(after.get(lost))}, as what is written would be read",
            expected=shown(before.get(lost)),
            fix="Let `training.write` of the layout write what the mapping reads of the training configuration.",
        )


def _check_again(source: Source, written: Written, destination: Destination) -> None:
    """Check that the output, when read again, gives the same model.

    Raises:
        EngineError: E216 unless its configuration and names give the same choices and sizes; E209 when a key of
            the source's configuration is lost.
    """
    mapping, sizes = source.mapping, source.side.sizes
    config = source.read.config if source.layout.config_of_target else written.config
    choices = {name: decision.choice for name, decision in source.decisions.items()}
    scope = {**config, "options": source.options, "training": {}, "present": present_in(_names(written, destination))}
    scope |= {"given": source.read.config, "mode": destination.mode.name}
    asked = {n: mapping.variants[n] for n, one in source.decisions.items() if one.evidence != UNASKED}
    # variants of one choice may be open, but are never read as another one: what is lost is told before
    alone = {name: variant for name, variant in asked.items() if len(variant.choices) == 1}
    _check_choices({n: v for n, v in asked.items() if n not in alone}, scope, choices)
    _check_sizes(mapping, {**scope, **choices}, sizes)
    if source.layout.config_of_target:
        decide(alone, {}, scope)
        with_parts(source.read.config, mapping, source.layout)  # their own spellings must agree too
        return
    names_then = {**scope, **choices, **sizes, "training": _training_again(source, destination)}

    def forth(options: Mapping[str, Any]) -> Any:
        return render_known(mapping.config, {**names_then, "options": options})

    check_returns(source.read, forth, mapping, source.options)
    decide(alone, {}, scope)
    try:
        read_config(written.config, source_side(mapping, source.layout), expressed=True)
    except EngineError as error:
        raise EngineError(
            "E216",
            f"what is written would be refused: {error.message}",
            place=error.place,
            got=error.got,
            expected=error.expected,
            fix="Use a mapping that can express it, or let `training_config` not write it.",
        ) from error


def _names(written: Written, destination: Destination) -> set[str]:
    """The names of the written tensors, without prefixes."""
    prefixes = sorted({destination.prefix(chunk) for chunk in range(destination.stages.chunks)}, key=len, reverse=True)
    names: set[str] = set()
    for output in written.outputs:
        prefix = next(p for p in prefixes if output.name.startswith(p))
        names.add(output.name[len(prefix) :])
    return names


def _check_choices(variants: Mapping[str, Variant], scope: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """E216 for the first variant that would be read as another choice."""
    for name, decision in decide(variants, {}, scope).items():
        if decision.choice != choices[name]:
            raise EngineError(
                "E216",
                f"variant `{name}` would be read as {decision.choice}",
                place=variants[name].place,
                got=f"{decision.choice}: {decision.evidence}",
                expected=choices[name],
                fix="Let `training_config` write what the variant's expressions read.",
            )


def _check_sizes(mapping: MappingFile, scope: dict[str, Any], sizes: Mapping[str, int]) -> None:
    """E216 for the first axis whose size would be computed otherwise."""
    facts, _ = claims(mapping, scope, "the written configuration")
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
