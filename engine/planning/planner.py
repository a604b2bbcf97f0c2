"""The planner: mapping × layout × headers → plan. Pure: no tensor data, no files, no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, Place, printable
from engine.formats.safetensors import shard_names, split_shards
from engine.language.expressions import render_tree
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.language.names import pattern
from engine.planning import DEFAULT_SHARD_SIZE
from engine.planning.attempts import Attempt, Checkpoint, Question, decide_by_shapes
from engine.planning.classes import CopyTable
from engine.planning.completeness import check_repeated, check_slices, used_instances
from engine.planning.config_keys import as_declared, read_config, source_side, training_side, with_given
from engine.planning.copies import Copy
from engine.planning.matching import Matches, check_names, check_refused, check_spellings, find_candidates, stages_of
from engine.planning.model import Output, OutputFile, Plan, Replicas, Tied
from engine.planning.pieces import Pieces, match_pieces
from engine.planning.release import check_release, not_the_release
from engine.planning.sides import Side, training_keys, whole_keys
from engine.planning.sizes import size_error
from engine.planning.stages import Stages, laid_out
from engine.planning.stored import Instance, Stored, instances, strip
from engine.planning.variants import check_settings, decide, options_of
from engine.planning.whole import DTYPES, whole_groups, whole_instances, whole_output

__all__ = ["DTYPES", "Checkpoint", "make_plan"]


@dataclass(frozen=True, slots=True)
class Understood:
    """A training checkpoint as a mapping reads it: every decision taken, every size known."""

    attempt: Attempt
    used: tuple[Instance, ...]
    pieces: Pieces
    stages: Stages
    matches: Matches
    options: Mapping[str, Any]
    names: Mapping[str, Any]  # all that expressions see
    noted: Mapping[str, Any]  # keys of the configuration that nothing reads

    def side(self) -> Side:
        sizes = self.attempt.sizes.values()
        return Side(tuple(self.attempt.groups.values()), training_keys(self.used, self.pieces), sizes)


def understand(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    *,
    expressed: bool = False,
) -> Understood:
    """Match, decide and solve a training checkpoint; E2xx for the first thing that does not fit.

    Args:
        expressed: whether it is to be written as something else, so that its configuration must be expressible.
    """
    options = options_of(mapping, settings)
    stored = strip(checkpoint.files, layout)
    rules = instances(mapping)
    matches = find_candidates([s.name for s in stored], rules, mapping)
    check_refused(stored, matches, checkpoint.grid.files)
    _check_any(stored, matches, mapping, checkpoint)
    read = read_config(checkpoint.config, source_side(mapping, layout), expressed=expressed)
    names: dict[str, Any] = {
        **read.config,
        "options": options,
        "given": dict(checkpoint.target_config),
        "training": read_config(checkpoint.training, training_side(mapping, layout), expressed=False).config,
        "present": present_in({one.name for one in stored}),
    }
    layout_choices = {n: d.choice for n, d in decide(layout.layers.variants, {}, names).items()}
    decisions = decide(mapping.variants, settings, names, checkpoint.config_name)
    stages = stages_of(stored, matches, checkpoint.grid, layout, {**names, **layout_choices})
    question = Question(mapping, layout, checkpoint, stored, matches, rules, stages, names)
    attempt = decide_by_shapes(question, decisions)
    choices = {n: d.choice for n, d in attempt.decisions.items()}
    check_names(stored, matches, choices, checkpoint.grid.files)
    check_spellings(stored, attempt.active)
    check_slices(attempt, checkpoint, layout.lone_rank)
    if attempt.sizes.contradictions:
        check_repeated(attempt, checkpoint)
        raise size_error(attempt.sizes.contradictions[0])
    used = tuple(used_instances(attempt))
    if not stages.layers and len(stages.counts) == 1:  # no name has a layer's number: tensors stack them
        layers = attempt.sizes.values().get("layer", 0)
        stages = laid_out([(stage, layers) for stage in stages.counts], stages.chunks, stages.dims)
    all_names = {**attempt.names, **attempt.sizes.values()}
    return Understood(attempt, used, match_pieces(used), stages, matches, options, all_names, read.noted)


def make_plan(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    *,
    settings: Mapping[str, Any],
    dtype: str = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    strict: bool = False,
) -> Plan:
    """Compile a plan that converts a training checkpoint.

    Args:
        settings: variants and options given by the user.
        dtype: `auto` keeps each tensor's own type; else the type every float tensor is written in.
        max_shard_size: bytes of tensors per output file.
        strict: refuse when a size differs from the release's `expect`.

    Raises:
        EngineError: E2xx, with the first thing that keeps the plan from being total and exact.
    """
    check_settings(mapping, settings)
    understood = understand(mapping, layout, checkpoint, settings, expressed=True)
    attempt, pieces = understood.attempt, understood.pieces
    sizes = attempt.sizes.values()
    source = understood.side()
    whole = whole_instances(pieces)
    listed = whole_groups(pieces, whole, sizes, attempt.unread)
    target = Side(tuple(group for _, group in listed), whole_keys(whole), sizes)
    every = CopyTable(tuple((group, 0) for _, group in listed), target, source)
    names_of = [file.name for file in checkpoint.grid.files]
    written = [
        whole_output(spec, group, every.dtype(i, group.name, names_of, spec.instances[0].rule.place), dtype)
        for i, (spec, group) in enumerate(listed)
    ]
    config = as_declared(render_tree(mapping.config, understood.names), mapping.keys.get("target", {}))
    config = with_given(config, checkpoint.target_config, mapping)
    ties = bool(config.get("tie_word_embeddings"))
    tied_to = [spec.instances[0].rule.tied_to if ties else None for spec, _ in listed]
    kept = [i for i, to in enumerate(tied_to) if to is None]
    outputs = tuple(written[i] for i in kept)
    copies = every.subset(kept)
    tied = _tied([(written[i], every(i), to) for i, to in enumerate(tied_to) if to is not None], outputs)
    config |= dict.fromkeys(("dtype", "torch_dtype"), main_dtype(outputs))  # as transformers 5 and 4 spell it
    departures = check_release(mapping, sizes, strict=strict)
    notices = (*overruled(attempt), *not_the_release(mapping, departures), *_notices(checkpoint, mapping))
    notices += noted_keys(understood.noted, layout)
    split = split_shards([(o.name, o.nbytes) for o in outputs], max_shard_size)
    index = {o.name: i for i, o in enumerate(outputs)}
    shards = tuple(
        OutputFile(name, "safetensors", tuple(index[t] for t in group))
        for name, group in zip(shard_names(len(split)), split, strict=True)
    )
    return Plan(
        mapping,
        layout,
        checkpoint.folder,
        checkpoint.grid,
        understood.stages,
        checkpoint.files,
        source.stored,
        outputs,
        copies,
        replicas_of(source),
        tied,
        attempt.decisions,
        sizes,
        understood.options,
        config,
        data_only(understood.names),
        dict(understood.matches.ignored),
        notices,
        dtype,
        max_shard_size,
        shards,
        noted=understood.noted,
        departures=departures,
    )


def data_only(names: Mapping[str, Any]) -> dict[str, Any]:
    """What expressions see without its one function."""
    return {name: value for name, value in names.items() if name != "present"}


def replicas_of(side: Side) -> tuple[Replicas, ...]:
    """Sets of tensors that several ranks hold and that must be equal."""
    return tuple(
        Replicas(tuple(numbers), group.name, group.instance.rule.name)
        for group in side.groups
        for numbers in side.numbers(group)
        if len(numbers) > 1
    )


def _tied(listed: Sequence[tuple[Output, list[Copy], str]], outputs: Sequence[Output]) -> tuple[Tied, ...]:
    """Pair each tensor that the config ties with the one it equals."""
    index = {output.name: i for i, output in enumerate(outputs)}
    result: list[Tied] = []
    for output, copies, name in listed:
        if name not in index or outputs[index[name]].shape != output.shape:
            raise EngineError(
                "E209",
                f"`{output.name}` cannot be tied to `{name}`",
                place=Place(output.place),
                got=f"{output.shape} and {outputs[index[name]].shape}" if name in index else "no such target",
                expected="a target of the same shape",
                fix="Correct `tied_to`, or let `tie_word_embeddings` be false.",
            )
        result.append(Tied(output, tuple(copies), index[name]))
    return tuple(result)


def present_in(names: Collection[str]) -> Callable[[str], bool]:
    """`present(pattern)`: whether some training tensor has a name of that pattern."""

    def present(text: str) -> bool:
        compiled = pattern(text)
        return any(compiled.match(name) is not None for name in names)

    return present


def _check_any(stored: Sequence[Stored], matches: Matches, mapping: MappingFile, checkpoint: Checkpoint) -> None:
    """When hardly anything matches, say that the mapping is wrong instead of naming one tensor."""
    names = {one.name for one in stored}
    if names and sum(name in matches.candidates for name in names) * 4 < len(names):
        kind = checkpoint.training.get("model_type")
        said = f"; its training config says model_type {kind}" if kind else ""
        raise EngineError(
            "E212",
            f"mapping `{mapping.name}` is not the one for this checkpoint",
            place=Place(checkpoint.folder),
            got=", ".join(sorted(names)[:3]) + f", …{said}",
            expected=", ".join(rule.sources[0] for rule in mapping.rules[:3]) + ", …",
            fix="`engine inspect` tells which bundled mappings fit.",
        )


def main_dtype(outputs: Sequence[Output]) -> str:
    """The type of most written elements, as config.json spells it."""
    count: dict[str, int] = {}
    for output in outputs:
        count[output.dtype] = count.get(output.dtype, 0) + output.elements
    best = max(count, key=lambda d: (count[d], d))
    return {v: k for k, v in DTYPES.items()}.get(best, best.lower())


def noted_keys(noted: Mapping[str, Any], layout: Layout) -> tuple[str, ...]:
    """What is left behind of the configuration, by name."""
    told = ", ".join(f"{name} = {value}" for name, value in noted.items())
    return (f"nothing reads these keys of {layout.config_file}: {told}",) if noted else ()


def overruled(attempt: Attempt) -> tuple[str, ...]:
    """Settings that say something else than the configuration."""
    return tuple(
        f"`{d.evidence}` overrules the checkpoint's configuration, which says {d.instead_of}"
        for d in attempt.decisions.values()
        if d.instead_of is not None
    )


def _notices(checkpoint: Checkpoint, mapping: MappingFile) -> tuple[str, ...]:
    notices: list[str] = []
    kind = checkpoint.training.get("model_type")
    if isinstance(kind, str) and mapping.model_types and kind not in mapping.model_types:
        wanted = " or ".join(mapping.model_types)
        notices.append(
            f"the training config says model_type {printable(kind)}; mapping `{mapping.name}` is for {wanted}"
        )
    tokenizer = (mapping.tokenizer or {}).get("file")
    unknown = [name for name in checkpoint.grid.unknown if name != tokenizer]
    if unknown:
        notices.append("not part of the checkpoint, left alone: " + ", ".join(map(printable, unknown)))
    left = sorted({name for file in checkpoint.files for name in file.left})
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        notices.append("not of the model, left behind: " + ", ".join(map(printable, left[:4])) + more)
    return tuple(notices)
