"""Keys of configurations that a mapping reads and nothing declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine.language.declared import expressions_of
from engine.language.expressions import compile_expression
from engine.language.keys import Key
from engine.language.model import Expression, Layout
from engine.language.model import Mapping as MappingFile
from engine.language.names import pattern
from engine.planning.config_keys import declared, prefixes


def undeclared(mapping: MappingFile, layout: Layout) -> Iterator[tuple[Expression, str, str, Mapping[str, Key]]]:
    """Keys that expressions read and nothing declares: expression, side, path, what is declared there."""
    axes = {name for rule in mapping.rules for name in rule.axes.names()}
    axes |= {name for rule in mapping.rules for target in rule.targets for name in target.axes.names()}
    axes |= {name for rule in mapping.rules for s in rule.sources for name in pattern(s).placeholders}
    dims = {d for mode in layout.modes for file in mode.files for d in pattern(file.name).placeholders}
    own = {*axes, *mapping.dims, *mapping.variants, "options", "training", "given"}
    grid = {"dtype", "chunks", "mode", "layers", "model_type", *layout.layers.variants, *(f"{dim}s" for dim in dims)}
    remote = mapping.remote_code.auto_map if mapping.remote_code is not None else {}
    variants = [dict(v.choices) for v in mapping.variants.values()]
    forth = [dict(mapping.dims), mapping.config, dict(remote), mapping.transformers]
    trees = (("source", forth, own), ("source", variants, own | grid), ("target", mapping.training_config, own | grid))
    for side, tree, known in trees:
        keys = declared(mapping, layout, side) if side == "source" else mapping.keys.get("target", {})
        for expression in expressions_of(tree):
            for path in sorted(compile_expression(expression).paths):
                root, _, rest = path.partition(".")
                if root == "training" and rest:
                    training = declared(mapping, layout, "training")
                    if not any(p in training for p in prefixes(rest)):
                        yield expression, "training", rest, training
                elif root not in known and not _is_declared(path, keys):
                    yield expression, side, path, keys


def _is_declared(path: str, keys: Mapping[str, Key]) -> bool:
    return path in keys or any(name.startswith(f"{path}.") for name in keys)
