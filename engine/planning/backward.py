"""Reading a Hugging Face checkpoint by a mapping's targets: names, variants and sizes backwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.expressions import OMIT, compile_expression, evaluate, names_in
from engine.language.model import Exclusion, Expression, Variant
from engine.language.model import Mapping as MappingFile
from engine.language.names import pattern
from engine.planning.groups import Cut, Group
from engine.planning.pieces import Pieces
from engine.planning.stored import Instance, Stored
from engine.planning.variants import Decision, choice_of


@dataclass(frozen=True, slots=True)
class WholeCheckpoint:
    """A Hugging Face checkpoint before planning: headers and config.json, and weight files that are no part of it."""

    folder: str
    files: tuple[FileHeader, ...]
    config: Mapping[str, Any]
    unknown: tuple[str, ...] = ()

    def tensors(self) -> dict[str, tuple[int, TensorHeader]]:
        return {h.name: (i, h) for i, file in enumerate(self.files) for h in file.tensors}


def names_back(names: Sequence[str], instances: Sequence[Instance]) -> set[str]:
    """Training names that some rule, active or not, would write from these tensors.

    A placeholder that the target stacks stands as 0.
    """
    found: set[str] = set()
    targets = [(instance, name) for instance in instances for name, _ in instance.targets]
    for name in names:
        for instance, target in targets:
            values = target.match(name)
            if values is not None:
                blank = dict.fromkeys(instance.axis_names(), 0)
                found.update(source.format({**blank, **values}) for source in instance.sources)
    return found


def render_known(tree: Any, names: Mapping[str, Any]) -> Any:
    """A tree of expressions as far as `names` allow; what they do not is left out."""
    if isinstance(tree, Expression):
        try:
            return evaluate(tree, names)
        except EngineError:
            return OMIT
    if isinstance(tree, Mapping):
        return {key: v for key, child in tree.items() if (v := render_known(child, names)) is not OMIT}
    if isinstance(tree, list | tuple):
        return [v for child in tree if (v := render_known(child, names)) is not OMIT]
    return tree


def decide_back(
    variants: Mapping[str, Variant], settings: Mapping[str, Any], like: Mapping[str, str], names: Mapping[str, Any]
) -> dict[str, Decision]:
    """What generation of training code is written: `--set`, what the checkpoint shows, `--like`, the default.

    A checkpoint shows a choice when exactly one of its expressions holds on names that are known;
    `otherwise` and values filled in by `default(...)` show nothing.
    """
    decided: dict[str, Decision] = {}
    for variant in variants.values():
        shown, of_files = _shown(variant, names)
        if variant.name in settings:
            choice = choice_of(variant, settings[variant.name])
            if of_files and shown is not None and shown != choice:
                raise EngineError(
                    "E202",
                    f"`--set {variant.name}={choice}` contradicts the files",
                    place=variant.place,
                    got=choice,
                    expected=shown,
                    fix="Leave it out: it is read off the tensors' names.",
                )
            decided[variant.name] = Decision(variant.name, choice, "set", f"--set {variant.name}={choice}")
        elif shown is not None:
            text = variant.choices[shown]
            decided[variant.name] = Decision(variant.name, shown, "expression", text.text if text else "")
        elif variant.name in like:
            decided[variant.name] = Decision(variant.name, like[variant.name], "like", "as in the checkpoint of --like")
        elif variant.default is not None:
            decided[variant.name] = Decision(variant.name, variant.default, "default", "what is written by default")
        else:
            decided[variant.name] = _first_holding(variant, names)
    return decided


def _shown(variant: Variant, names: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The one choice that the checkpoint shows, if any, and whether its tensors' names show it."""
    holding: list[str] = []
    of_files = variant.decide == "expression"
    for choice, expression in variant.choices.items():
        if expression is None:
            continue
        read = names_in(expression)
        of_files = of_files and not read
        if read and not any(name in names for name in read):
            continue
        try:
            if evaluate(expression, names):
                holding.append(choice)
        except EngineError:
            continue
    return (holding[0] if len(holding) == 1 else None), of_files


def _first_holding(variant: Variant, names: Mapping[str, Any]) -> Decision:
    """As when reading: the first choice that holds, values filled in by `default(...)` and all."""
    for choice, expression in variant.choices.items() if variant.decide == "expression" else ():
        if expression is None:
            return Decision(variant.name, choice, "expression", "otherwise")
        try:
            if evaluate(expression, names):
                return Decision(variant.name, choice, "expression", expression.text)
        except EngineError:
            continue
    raise EngineError(
        "E202",
        f"variant `{variant.name}` cannot be decided: nothing says which to write",
        place=variant.place,
        expected="one of " + ", ".join(variant.choices),
        fix=f"{variant.help[:1].upper()}{variant.help[1:]}. Say which: "
        + " or ".join(f"--set {variant.name}={choice}" for choice in variant.choices)
        + ".",
    )


def used_back(active: Sequence[Instance], names: Sequence[str], folder: str) -> tuple[Instance, ...]:
    """Active rules whose targets are in the checkpoint; E207 for a rule that has some of them or none."""
    used: list[Instance] = []
    for instance in active:
        there = [any(target.match(name) is not None for name in names) for target, _ in instance.targets]
        if all(there):
            used.append(instance)
            continue
        if not any(there) and (instance.param == "bias" or instance.rule.optional):
            continue
        lacking = next(t.text for (t, _), has in zip(instance.targets, there, strict=True) if not has)
        raise EngineError(
            "E207",
            f"rule `{instance.rule.name}` has no tensor to read",
            place=instance.rule.place,
            got=f"no tensor named {lacking} in {folder}",
            expected="one for every layer",
            fix="Is it the mapping for this checkpoint, and are the variants right? A rule that may be absent is "
            "`optional: true`.",
        )
    return tuple(used)


def check_names_back(
    checkpoint: WholeCheckpoint, pieces: Pieces, mapping: MappingFile, choices: Mapping[str, str]
) -> dict[str, str]:
    """Refuse tensors that no active rule writes; returns those that are ignored, with the reason."""
    ignored: dict[str, str] = {}
    skip = [(pattern(e.pattern), e) for e in mapping.ignore if e.side == "target"]
    refuse = [(pattern(e.pattern), e) for e in mapping.refuse if e.side == "target"]
    patterns = [spec.name for spec in pieces.targets.values()]
    for name, (file, header) in checkpoint.tensors().items():
        place = Place(checkpoint.files[file].name, tensor=name)
        shape = f"{' × '.join(map(str, header.shape))} {header.dtype}"
        entry = _hit(name, refuse)
        if entry is not None:
            raise EngineError(
                "E209",
                f"training files cannot express this model: {entry.why}",
                place=place,
                got=shape,
                expected=f"no such tensor ({entry.place})",
                fix="Use a mapping that has it.",
            )
        entry = _hit(name, skip)
        if entry is not None:
            ignored[name] = entry.why
            continue
        if not any(one.match(name) is not None for one in patterns):
            told = ", ".join(f"{n}={c}" for n, c in choices.items())
            raise EngineError(
                "E205",
                f"tensor `{name}` is written by no active rule",
                place=place,
                got=shape,
                expected=f"one rule of mapping `{mapping.name}`" + (f" with {told}" if told else ""),
                fix="Is it the mapping for this checkpoint? An `ignore` entry with `target:` says why one is left out.",
            )
    return ignored


def _hit(name: str, entries: Sequence[tuple[Any, Exclusion]]) -> Exclusion | None:
    return next((entry for compiled, entry in entries if compiled.match(name) is not None), None)


def groups_back(
    checkpoint: WholeCheckpoint, pieces: Pieces, whole: Mapping[str, Instance], sizes: Mapping[str, int] | None
) -> list[Group]:
    """The checkpoint's tensors as groups of one shard.

    Args:
        sizes: None takes what is there; else every target must be there for each placeholder
            value, and E207 names the first that is not. A tied target may stand for another.
    """
    tensors = checkpoint.tensors()
    ties = bool(checkpoint.config.get("tie_word_embeddings"))
    groups: list[Group] = []
    for text, spec in pieces.targets.items():
        instance = whole[text]
        if sizes is None:
            values = [v for name in tensors if (v := spec.name.match(name)) is not None]
        else:
            names = spec.name.placeholders
            values = [dict(zip(names, v, strict=True)) for v in product(*(range(sizes[p]) for p in names))]
        tied_to = spec.instances[0].rule.tied_to if ties else None
        for fixed in values:
            name = spec.name.format(fixed)
            held = tensors.get(name) or (tensors.get(tied_to) if tied_to is not None else None)
            if held is None:
                raise EngineError(
                    "E207",
                    f"a tensor that a rule needs is missing: {name}",
                    place=spec.instances[0].rule.place,
                    got=f"not in {checkpoint.folder}",
                    expected="one for every layer and expert",
                    fix="The checkpoint is incomplete, or the mapping is not the one for it.",
                )
            groups.append(Group(instance, fixed, Cut(), {(): (Stored(held[0], held[1], name, 0),)}))
    return groups


def grid_only(tree: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that depend on how the model is cut, and on nothing else."""
    return {
        key: evaluate(child, grid)
        for key, child in tree.items()
        if isinstance(child, Expression) and (read := compile_expression(child).names) and read <= set(grid)
    }
