"""The names that a checkpoint's configuration and tensor names provide to a mapping's expressions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from engine.errors import EngineError
from engine.language.documents import grouped
from engine.language.expressions import OMIT, evaluate, names_in, render_tree, valued_in
from engine.language.model import Expression, Layout, MappingFile
from engine.language.names import form, pattern
from engine.planning.agreement import check_repeated, told_by_places
from engine.planning.attempts import Checkpoint
from engine.planning.config_keys import Read, read_config, read_training, source_side, target_side, whole_side
from engine.planning.stored import Instance, Stored
from engine.planning.variants import Decision, decide

UNASKED = "only config.json depends on it, which is not written"


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts from a configuration and the names of tensors.

    Attributes:
        seen: the names for expressions that write the other side's configuration.
        names: the names for sizes and variants, which are expressions over the training configuration.
    """

    read: Read
    seen: Mapping[str, Any]
    names: Mapping[str, Any]
    decisions: Mapping[str, Decision]


def facts_of(
    mapping: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    rules: Sequence[Instance],
    stored: Sequence[Stored],
    settings: Mapping[str, Any],
    like: Mapping[str, str] | None,
    cut: Mapping[str, Any],
    expressed: bool,
) -> Facts:
    """Read the configuration; if it is the target's, the mapping computes the training configuration from it."""
    names = list(dict.fromkeys(one.name for one in stored))
    if checkpoint.end == "training":
        side = replace(source_side(mapping, layout), file=checkpoint.config_name)
        read = read_config(_saved_or_computed(mapping, layout, checkpoint, options), side, expressed=expressed)
        training = read_training(mapping, layout, checkpoint.training, expressed=expressed)
        check_repeated(checkpoint.config, checkpoint.training, read.side, layout)
        saved = [*names, *(name for file in checkpoint.files for name in file.left)]
        given = {"given": dict(checkpoint.target_config), "training": training, "present": present_in(saved)}
        placed = told_by_places(read, checkpoint.joined)
        given |= {"placed": placed, "options": options, "mode": checkpoint.grid.mode.name}
        seen = {**read.config, **placed, **given}
        free = {} if expressed else _unasked(mapping, settings)
        asked = {name: variant for name, variant in mapping.variants.items() if name not in free}
        other = checkpoint.config_name != layout.config_file and not checkpoint.config
        instead = f" in place of {layout.config_file}" if other else ""
        with valued_in(checkpoint.config_name):
            decided = decide(asked, settings, seen, f"{checkpoint.config_name}{instead}")
            return Facts(read, seen, seen, {**decided, **free})
    same = layout.config_of_target  # then it is written as it was read
    read = read_config(checkpoint.config, whole_side(mapping, layout))
    given = {"given": read.config, "training": {}, "present": present_in(_training_names(names, rules))}
    seen = {**read.config, **cut, "options": options, "present": given["present"]}
    first = {**(read.config if same else render_known(mapping.training_config, seen)), "options": options}
    first |= {**cut, **given}
    decisions = decide(mapping.variants, settings, first, like=like or {})
    choices = {n: d.choice for n, d in decisions.items()}
    made = read.config if same else render_known(mapping.training_config, {**seen, **choices})
    return Facts(read, seen, {**made, "options": options, **cut, **given}, decisions)


def _saved_or_computed(
    mapping: MappingFile, layout: Layout, checkpoint: Checkpoint, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The training configuration as saved, or computed from the target's if the framework saves none.

    Raises:
        EngineError: E202 when neither is there.
    """
    if checkpoint.config or not (layout.config_from_target or layout.config_of_target):
        return checkpoint.config
    if not checkpoint.target_config:
        raise EngineError(
            "E202",
            "the training configuration is missing, so sizes and facts that no tensor shows are not known",
            expected=f"{layout.config_file} beside the weights, or --config",
            fix="Give the config.json of the model with --config FILE.",
            answers={"config": ()},
        )
    target = read_config(checkpoint.target_config, target_side(mapping)).config
    computed: Mapping[str, Any] = render_known(mapping.training_config, {**target, "options": options})
    return computed


def _unasked(mapping: MappingFile, settings: Mapping[str, Any]) -> dict[str, Decision]:
    """Decisions of variants with a single choice that no rule and no size depends on: only config.json does."""
    read = {name for rule in mapping.rules for name in rule.when}
    read |= {name for size in mapping.dims.values() for name in names_in(size)} | {*settings}
    only = {v.name: next(iter(v.choices)) for v in mapping.variants.values() if len(v.choices) == 1}
    return {name: Decision(name, one, "default", UNASKED) for name, one in only.items() if name not in read}


def _training_names(names: Sequence[str], rules: Sequence[Instance]) -> set[str]:
    """Training names that any rule, active or not, would write from target tensors.

    A placeholder whose values the target stacks is 0.
    """
    found: set[str] = set()
    targets = grouped((form(name.sample()), (one, name)) for one in rules for name, _ in one.targets)
    for name in names:
        for one, target in targets.get(form(name), ()):
            values = target.match(name)
            if values is not None:
                blank = dict.fromkeys(one.axis_names, 0)
                found.update(source.format({**blank, **values}) for source in one.sources)
    return found


def present_in(names: Collection[str]) -> Callable[[str], bool]:
    """`present(pattern)`: whether training saved something whose name matches the pattern."""

    @cache
    def present(text: str) -> bool:
        compiled = pattern(text)
        return any(compiled.match(name) is not None for name in names)

    return present


def render_known(tree: Any, names: Mapping[str, Any]) -> Any:
    """Evaluate a tree of expressions as far as `names` allow; the others are left out."""
    return render_tree(tree, names, _known)


def _known(expression: Expression, names: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expression, names)
    except EngineError:
        return OMIT
