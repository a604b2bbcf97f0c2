"""The planner: mapping × layout × headers → plan. Pure: no tensor data, no files, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any

from engine.checkpoint.headers import FileHeader
from engine.checkpoint.safetensors_files import shard_names, split_shards
from engine.errors import EngineError, Place
from engine.language.axes import extent
from engine.language.expressions import OMIT, evaluate, render_tree
from engine.language.model import Layout, Mapping as MappingFile
from engine.language.names import pattern
from engine.plan.boxes import Part, regions
from engine.plan.copies import Copy
from engine.plan.groups import Group, group_shards
from engine.plan.matching import (
    Matches,
    assign,
    check_names,
    check_spellings,
    find_candidates,
    is_active,
    stages_of,
)
from engine.plan.model import Output, Plan, Replicas, SourceTensor
from engine.plan.ranks import RankGrid
from engine.plan.sides import Key, Pieces, Side, TargetSpec, copies_into, match_pieces
from engine.plan.sizes import Fact, Sizes, extents, size_error, solve, unknown_error
from engine.plan.stored import Instance, Stages, Stored, instances, strip
from engine.plan.variants import Decision, check_settings, decide, options_of

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = ("BF16", "F16", "F32", "F64")
_MAX_COMBINATIONS = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is read of a training checkpoint before planning: grid, headers and configurations."""

    folder: str
    grid: RankGrid
    files: tuple[FileHeader, ...]  # parallel to grid.files
    config: Mapping[str, Any]
    training: Mapping[str, Any]
    config_name: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One combination of variant choices, matched and solved."""

    decisions: Mapping[str, Decision]
    active: tuple[Instance, ...]
    groups: Mapping[tuple[Instance, tuple[int, ...]], Group]
    sizes: Sizes
    names: Mapping[str, Any]
    unread: Mapping[str, EngineError]


def make_plan(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    *,
    settings: Mapping[str, Any],
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
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
    options = options_of(mapping, settings)
    stored = strip(checkpoint.files, layout)
    matches = find_candidates([s.name for s in stored], all_instances := instances(mapping), mapping)
    names: dict[str, Any] = {
        **checkpoint.config,
        "options": options,
        "training": checkpoint.training,
        "present": _present(stored),
    }
    layout_choices = {n: d.choice for n, d in decide(layout.layers.variants, {}, names).items()}
    decisions = decide(mapping.variants, settings, names)
    choices = {n: d.choice for n, d in decisions.items()}
    _check_any(stored, matches, mapping, checkpoint)
    stages = stages_of(stored, matches, checkpoint.grid, layout, {**names, **layout_choices})
    attempt = _decide_by_shapes(
        mapping, layout, checkpoint, stored, matches, all_instances, decisions, stages, names
    )
    choices = {n: d.choice for n, d in attempt.decisions.items()}
    check_names(stored, matches, choices, checkpoint.grid.files)
    check_spellings(stored, attempt.active)
    if attempt.sizes.contradictions:
        raise size_error(attempt.sizes.contradictions[0])
    used = _used_instances(attempt, stages, checkpoint)
    pieces = match_pieces(used)
    builder = _Builder(mapping, checkpoint, attempt, pieces, dtype)
    outputs, targets = builder.outputs()
    side = builder.side()
    plan_copies = _Copies(targets, side)
    _prove_total(outputs, targets, plan_copies)
    sizes = attempt.sizes.values()
    notices = _expectations(mapping, sizes, strict) + _notices(checkpoint)
    all_names = {**attempt.names, **sizes}
    config = render_tree(mapping.config, all_names)
    config["dtype"] = _main_dtype(outputs)
    split = split_shards([(o.name, o.nbytes) for o in outputs], max_shard_size)
    index = {o.name: i for i, o in enumerate(outputs)}
    shards = tuple(
        (name, tuple(index[t] for t in group)) for name, group in zip(shard_names(len(split)), split, strict=True)
    )
    return Plan(
        mapping, layout, checkpoint.folder, checkpoint.grid, stages, checkpoint.files, tuple(builder.sources),
        outputs, plan_copies, builder.replicas(), attempt.decisions, sizes, options, config, all_names,
        dict(matches.ignored), notices, dtype, max_shard_size, shards,
    )  # fmt: skip


def _present(stored: Sequence[Stored]) -> Any:
    """`present(pattern)`: whether some training tensor has a name of that pattern."""
    names = {one.name for one in stored}

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


def _decide_by_shapes(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    stored: Sequence[Stored],
    matches: Matches,
    all_instances: Sequence[Instance],
    decisions: Mapping[str, Decision],
    stages: Stages,
    names: Mapping[str, Any],
) -> _Attempt:
    """Try the combinations of the variants that only shapes decide; exactly one plan may fit."""
    open_variants = [v for v in mapping.variants.values() if v.name not in decisions]
    combinations = list(product(*(v.choices for v in open_variants)))
    if len(combinations) > _MAX_COMBINATIONS:
        raise EngineError("E202", f"{len(combinations)} combinations of variants are too many to try", place=mapping.place,
                          fix="Set some of them with --set.")  # fmt: skip
    attempts: list[_Attempt] = []
    for combination in combinations:
        chosen = dict(decisions)
        for variant, choice in zip(open_variants, combination, strict=True):
            told = "the only choice under which all sizes agree over all shards"
            chosen[variant.name] = Decision(variant.name, choice, "shapes", told)
        attempts.append(_attempt(mapping, layout, checkpoint, stored, matches, all_instances, chosen, stages, names))
    fitting = [a for a in attempts if not a.sizes.contradictions]
    if not fitting:
        return min(attempts, key=lambda a: len(a.sizes.contradictions))
    distinct: list[_Attempt] = []
    for attempt in fitting:
        if all(_reach(attempt) != _reach(other) for other in distinct):
            distinct.append(attempt)
    if len(distinct) > 1:
        raise _ambiguous(open_variants, distinct, mapping)
    return distinct[0]


def _reach(attempt: _Attempt) -> frozenset[tuple[object, ...]]:
    """What an attempt would copy where: source names, cuts and targets, without rule names."""
    return frozenset(
        (group.name, group.instance.axes, group.cut if len(group.shards) > 1 else None,
         tuple((name.text, axes) for name, axes in group.instance.targets), group.instance.rule.transform)
        for group in attempt.groups.values()
    )  # fmt: skip


def _ambiguous(variants: Sequence[Any], fitting: Sequence[_Attempt], mapping: MappingFile) -> EngineError:
    differ = [v for v in variants if len({a.decisions[v.name].choice for a in fitting}) > 1]
    variant = differ[0]
    rules = [r for r in mapping.rules if variant.name in r.when]
    seen: dict[str, str] = {}
    for group in fitting[0].groups.values():
        if any(group.instance.sources[0].text in r.sources for r in rules):
            shapes = sorted({stored[0].header.shape for stored in group.shards.values()})
            seen[group.instance.sources[0].text] = ", ".join(" × ".join(map(str, s)) for s in shapes)
    sizes = ", ".join(f"{n} = {f.value}" for n, f in fitting[0].sizes.facts.items() if n in _axes_of(rules))
    return EngineError(
        "E202",
        f"variant `{variant.name}` cannot be decided: {len(fitting)} choices fit every shape",
        place=variant.place,
        got="\n".join(f"{name} is {shape} in every rank" for name, shape in seen.items()) + f"\nwith {sizes}",
        expected=f"one of {', '.join(variant.choices)}",
        fix=f"{variant.help}. Say which: "
        + " or ".join(f"--set {variant.name}={c}" for c in variant.choices)
        + ". A wrong choice gives a model that loads and talks nonsense, so it is not guessed.",
    )


def _axes_of(rules: Sequence[Any]) -> set[str]:
    return {name for rule in rules for name in rule.axes.names()}


def _attempt(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    stored: Sequence[Stored],
    matches: Matches,
    all_instances: Sequence[Instance],
    decisions: Mapping[str, Decision],
    stages: Stages,
    names: Mapping[str, Any],
) -> _Attempt:
    choices = {n: d.choice for n, d in decisions.items()}
    active = tuple(i for i in all_instances if is_active(i, choices))
    usable = Matches(
        {n: kept for n, f in matches.candidates.items() if (kept := tuple(c for c in f if is_active(c[0], choices)))},
        matches.ignored,
        matches.refused,
    )
    matched = assign(stored, usable, choices, checkpoint.grid, stages)
    groups = group_shards(matched, checkpoint.grid.files, layout)
    facts: dict[str, Fact] = {}
    scope = {**names, **choices}
    unread: dict[str, EngineError] = {}
    for axis, expression in mapping.dims.items():
        try:
            value = evaluate(expression, scope)
        except EngineError as error:
            unread[axis] = error  # a key the config lacks: the size may still be read off the tensors
            continue
        if value is OMIT:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise EngineError("E105", f"dim `{axis}` is not a whole number", place=expression.place,
                              got=repr(value), expected="an integer", fix=f"`{expression.text}` reads {checkpoint.config_name}.")  # fmt: skip
        scope[axis] = value
        why = f"`{expression.text}` on {checkpoint.config_name}" if not expression.text.isdigit() else "its definition"
        facts[axis] = Fact(axis, value, why, expression.place)
    sizes = Sizes()
    counted = f"{stages.layers} layers counted over {len(stages.counts)} pipeline stages"
    known = facts.get("layer")
    if stages.layers:
        facts.setdefault("layer", Fact("layer", stages.layers, counted))
    sizes = solve(list(groups.values()), facts, checkpoint.grid.files)
    if known is not None and stages.layers and known.value != stages.layers:
        from engine.plan.sizes import Contradiction

        per = ", ".join(f"chunk {c} pp {p}: {n}" for (c, p), n in sorted(stages.counts.items()))
        sizes.contradictions.insert(
            0, Contradiction("layer", f"{counted} ({per})", f"{known.value} from {known.why}", known.place, "layer", "a stage")
        )
    for axis in {p for i in active for p in i.axis_names()} - {"layer"}:
        seen = [fixed for (instance, _), g in groups.items() if (fixed := g.fixed.get(axis)) is not None]
        if seen and axis not in sizes.facts:
            sizes.facts[axis] = Fact(axis, max(seen) + 1, f"{{{axis}}} in tensor names")
    return _Attempt(decisions, active, groups, sizes, scope, unread)


def _used_instances(attempt: _Attempt, stages: Stages, checkpoint: Checkpoint) -> list[Instance]:
    """Active rules that matched; the first tensor that a rule or a rank lacks is named."""
    found: dict[int, dict[tuple[int, ...], Group]] = {}
    for (instance, key), group in attempt.groups.items():
        found.setdefault(id(instance), {})[key] = group
    used: list[Instance] = []
    sizes = attempt.sizes.values()
    for instance in attempt.active:
        groups = found.get(id(instance))
        if groups is None:
            if instance.param != "bias" and not instance.rule.optional:
                raise EngineError("E207", f"rule `{instance.rule.name}` matches no tensor", place=instance.rule.place,
                                  got=f"no tensor named {' or '.join(s.text for s in instance.sources)}",
                                  expected="one for every layer", fix="Is it the mapping for this checkpoint? "
                                  "`engine inspect` tells which fit. A rule that may be absent is `optional: true`.")  # fmt: skip
            continue
        used.append(instance)
        for values in product(*(range(sizes[axis]) for axis in instance.axis_names())):
            fixed = dict(zip(instance.axis_names(), values, strict=True))
            key = tuple(next(iter(groups.values())).fixed.keys())
            group = groups.get(tuple(fixed[axis] for axis in key))
            if group is None:
                where = ", ".join(f"{a} {v}" for a, v in fixed.items())
                others = next(iter(groups.values()))
                raise EngineError("E207", f"a tensor that a rule needs is missing: {instance.sources[0].format(fixed)}",
                                  place=instance.rule.place, got=f"nothing for {where}",
                                  expected=f"one tensor for each, as for {others.fixed}",
                                  fix="A rule's tensors must be there for all layers and experts. If two stages of an expert "
                                  "checkpoint wrote the same file number, that layer was lost at saving.")  # fmt: skip
            _check_ranks(group, checkpoint)
    return used


def _check_ranks(group: Group, checkpoint: Checkpoint) -> None:
    dims = group.cut.rank_dims()
    if not dims:
        return
    wanted = list(product(*(range(checkpoint.grid.sizes.get(d, 1)) for d in dims)))
    missing = [ranks for ranks in wanted if ranks not in group.shards]
    if missing:
        some = next(iter(group.shards.values()))[0]
        lack = ", ".join(f"{d}{r}" for d, r in zip(dims, missing[0], strict=True))
        raise EngineError("E207", f"tensor `{some.name}` is missing on rank {lack}", place=group.instance.rule.place,
                          got=f"{len(group.shards)} of {len(wanted)} slices; one is {some.header.name} in "
                          f"{checkpoint.grid.files[some.file].name}", expected=f"a slice on every rank of {' and '.join(dims)}",
                          fix="The rank's file is from another run or damaged.")  # fmt: skip


class _Copies:
    """`Plan.copies`: computed when asked for, nothing kept."""

    def __init__(self, targets: Sequence[Sequence[tuple[Key, Part]]], side: Side) -> None:
        self._targets = targets
        self._side = side

    def __call__(self, output: int) -> list[Copy]:
        return copies_into(self._targets[output], self._side)


def _prove_total(outputs: Sequence[Output], targets: Sequence[object], copies: _Copies) -> None:
    """Source boxes are disjoint by construction, so a full count proves each element written once."""
    for index, output in enumerate(outputs):
        count = sum(copy.volume() for copy in copies(index))
        if count != output.elements:
            raise EngineError("E208", f"shards of `{output.name}` overlap or leave a gap", place=Place(output.place),
                              got=f"{count} elements", expected=f"{output.elements} elements, {' × '.join(map(str, output.shape))}",
                              fix="A rank file is missing or from another run; compare the sizes of the rank files.")  # fmt: skip


class _Builder:
    """Turns groups into the two sides of the plan."""

    def __init__(
        self, mapping: MappingFile, checkpoint: Checkpoint, attempt: _Attempt, pieces: Pieces, dtype: str
    ) -> None:
        self.mapping, self.checkpoint, self.attempt, self.pieces, self.dtype = mapping, checkpoint, attempt, pieces, dtype
        self.sizes = attempt.sizes.values()
        self.sources: list[SourceTensor] = []
        self._ids: dict[int, int] = {}
        self._groups = {(id(i), key): g for (i, key), g in attempt.groups.items()}
        self._orders = {id(i): tuple(g.fixed) for (i, _), g in attempt.groups.items()}
        for group in attempt.groups.values():
            for stored in group.shards.values():
                for one in stored:
                    self._ids[id(one)] = len(self.sources)
                    self.sources.append(SourceTensor(one.file, one.header))
        self._last: tuple[int, dict[frozenset[str], list[Part]]] = (0, {})

    def replicas(self) -> tuple[Replicas, ...]:
        return tuple(
            Replicas(tuple(self._ids[id(one)] for one in stored), group.name, group.instance.rule.name)
            for group in self.attempt.groups.values()
            for stored in group.shards.values()
            if len(stored) > 1
        )

    def outputs(self) -> tuple[tuple[Output, ...], list[list[tuple[Key, Part]]]]:
        """Every tensor to write, in the order of the model, with its parts."""
        listed: list[tuple[tuple[object, ...], TargetSpec, dict[str, int]]] = []
        for order, spec in enumerate(self.pieces.targets.values()):
            for axis in (*spec.name.placeholders, *spec.axes.names()):
                if axis not in self.sizes:
                    error = unknown_error(axis, spec.instances[0].rule.place)
                    if axis in self.attempt.unread:
                        error = self.attempt.unread[axis]
                    raise error
            stage = {"first": 0, "layers": 1, "last": 2}[spec.instances[0].stage_class]
            for values in product(*(range(self.sizes[p]) for p in spec.name.placeholders)):
                fixed = dict(zip(spec.name.placeholders, values, strict=True))
                listed.append(((stage, fixed.get("layer", -1), order, values), spec, fixed))
        listed.sort(key=lambda entry: entry[0])  # type: ignore[arg-type,return-value]
        outputs: list[Output] = []
        targets: list[list[tuple[Key, Part]]] = []
        for index, (_, spec, fixed) in enumerate(listed):
            shape = tuple(extent(dim, self.sizes) for dim in spec.axes.dims)
            strides = [1] * len(shape)
            for i in range(len(shape) - 2, -1, -1):
                strides[i] = strides[i + 1] * shape[i + 1]
            parts = regions(spec.axes, self.sizes, strides, fixed=fixed)
            targets.append([((spec.name.text, r.piece), Part(index, r)) for r in parts])
            outputs.append(self._output(spec, fixed, shape))
        _unique(outputs)
        return tuple(outputs), targets

    def _output(self, spec: TargetSpec, fixed: Mapping[str, int], shape: tuple[int, ...]) -> Output:
        name = spec.name.format(fixed)
        dtypes: dict[str, Stored] = {}
        for instance in spec.instances:
            for group in self._matching(instance, fixed):
                for stored in group.shards.values():
                    dtypes.setdefault(stored[0].header.dtype, stored[0])
        rule = spec.instances[0].rule
        if len(dtypes) > 1:
            told = [f"{d} in {self.checkpoint.grid.files[s.file].name}:{s.header.name}" for d, s in dtypes.items()]
            raise EngineError("E210", f"element types differ inside `{name}`", place=rule.place, got="\n".join(told),
                              expected="one type", fix="The rank files are of different runs or one was cast by hand.")  # fmt: skip
        read = next(iter(dtypes))
        cast = self.dtype != "auto" and not rule.keep_dtype and read in _FLOATS
        wanted = DTYPES[self.dtype] if cast else read
        dim = None
        if rule.transform is not None:
            axis = rule.transform[1]
            dim = next(i for i, node in enumerate(spec.axes.dims) if str(node) == axis)
        names = " + ".join(i.rule.name for i in spec.instances)
        return Output(name, wanted, read, shape, names, str(rule.place), spec.name.text, rule.transform, dim)

    def _matching(self, instance: Instance, fixed: Mapping[str, int]) -> list[Group]:
        """Groups of a rule under the target's placeholders (all of those the target stacks)."""
        ranges = [[fixed[a]] if a in fixed else range(self.sizes[a]) for a in self._orders[id(instance)]]
        return [self._groups[id(instance), values] for values in product(*ranges)]

    def side(self) -> Side:
        def fixed(key: Key) -> tuple[str, ...]:
            return self._orders[id(self.pieces.owners[key])]

        def parts(key: Key, values: tuple[int, ...]) -> Sequence[Part]:
            instance = self.pieces.owners[key]
            group = self._groups[id(instance), values]
            if self._last[0] != id(group):
                self._last = (id(group), self._parts(group))
            return self._last[1].get(key[1], ())

        return Side(fixed, parts)

    def _parts(self, group: Group) -> dict[frozenset[str], list[Part]]:
        """Place every shard of a group: offsets are running sums of what the ranks before hold."""
        found: dict[frozenset[str], list[Part]] = {}
        local = extents(group, self.sizes) or {}
        starts = {axis: _running(by_rank) for axis, by_rank in local.items()}
        row = 0
        for ranks, stored in group.shards.items():
            header = stored[0].header
            sizes, begin = dict(self.sizes), {}
            for position, (_, axis) in enumerate(group.cut.dims):
                sizes[axis] = local[axis][ranks[position]]
                begin[axis] = starts[axis][ranks[position]]
            rows = None
            if group.cut.rows is not None:
                rows = (row, row + header.shape[0])
                row = rows[1]
            placed = regions(group.instance.axes, sizes, header.strides, rows=rows, starts=begin, fixed=group.fixed)
            for region in placed:
                found.setdefault(region.piece, []).append(Part(self._ids[id(stored[0])], region))
        return found


def _running(by_rank: Mapping[int, int]) -> dict[int, int]:
    result, total = {}, 0
    for rank in sorted(by_rank):
        result[rank] = total
        total += by_rank[rank]
    return result


def _unique(outputs: Sequence[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in outputs:
        if output.name in seen:
            raise EngineError("E206", f"two rules write `{output.name}`", place=Place(output.place),
                              got=f"{seen[output.name].rule} and {output.rule}", expected="one", fix="Change one target's name.")  # fmt: skip
        seen[output.name] = output


def _main_dtype(outputs: Sequence[Output]) -> str:
    """The type of most written elements, as config.json spells it."""
    count: dict[str, int] = {}
    for output in outputs:
        count[output.dtype] = count.get(output.dtype, 0) + output.elements
    best = max(count, key=lambda d: (count[d], d))
    return {v: k for k, v in DTYPES.items()}.get(best, best.lower())


def _expectations(mapping: MappingFile, sizes: Mapping[str, int], strict: bool) -> tuple[str, ...]:
    differ = [(a, n, sizes[a]) for a, n in mapping.expect.items() if a in sizes and sizes[a] != n]
    unknown = [a for a in mapping.expect if a not in sizes]
    if unknown:
        near = get_close_matches(unknown[0], list(sizes), 1)
        raise EngineError("E108", f"`expect` names an axis that is not there: {unknown[0]}", place=mapping.place,
                          fix=f"Did you mean `{near[0]}`?" if near else None)  # fmt: skip
    if differ and strict:
        raise EngineError("E213", f"sizes differ from release `{mapping.name}`", place=mapping.place,
                          got=", ".join(f"{a} = {got}" for a, _, got in differ),
                          expected=", ".join(f"{a} = {want}" for a, want, _ in differ),
                          fix="Leave --strict out to convert it all the same.")  # fmt: skip
    return tuple(f"`{a}` is {got}, release `{mapping.name}` has {want}" for a, want, got in differ)


def _notices(checkpoint: Checkpoint) -> tuple[str, ...]:
    if not checkpoint.grid.unknown:
        return ()
    return ("not part of the checkpoint, left alone: " + ", ".join(checkpoint.grid.unknown),)
