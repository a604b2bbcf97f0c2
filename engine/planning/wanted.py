"""The tensors that a model class loads, from the class or from a mapping that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError
from engine.language.documents import leaves
from engine.language.layout_file import load_layout
from engine.language.model import MappingFile
from engine.planning.attempts import claims
from engine.planning.config_keys import read_config, source_side
from engine.planning.pieces import match_pieces
from engine.planning.stored import instances
from engine.planning.variants import decide
from engine.planning.whole_outputs import whole_groups

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tensors that a model class loads.

    Attributes:
        shapes: name → shape, in the order of the model.
        tied: tensors that may be left out, as they equal another one: name → that name.
        types: element types of tensors that are not weights, such as counters: name → type.
        ties: whether every transformers release ties the tied tensors, by the configuration or by default.
        versions: the transformers versions that load these names; None for all.
        others: the same under older names of the tensors that transformers loads too.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    ties: bool = False
    versions: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Wanted, ...] = ()

    def fits(self, held: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint holds all of it, in these shapes."""
        return all(held.get(name) == shape for name, shape in self.shapes.items())


def wanted_by_mapping(told: MappingFile, config: Mapping[str, Any]) -> Wanted | None:
    """The tensors of a model class from the mapping that lists them; None if it does not know the configuration.

    It knows a configuration if it declares every key and every value fits; a null only if its type is null, since the
    class itself may refuse it.
    """
    side = source_side(told, replace(load_layout(told.layout, told.layout_place), keys={}))
    nulls = {path for path, value in leaves(config) if value is None} & side.keys.keys()
    if not all(side.keys[path].limits.fits(None) for path in nulls):
        return None
    try:
        read = read_config(config, side)
        decide(told.variants, {}, read.config)
        facts, unread = claims(told, dict(read.config), "config.json")
        pieces = match_pieces(instances(told))
        sizes = {name: fact.value for name, fact in facts.items()}
        listed = whole_groups(pieces, sizes, unread)
    except EngineError:
        return None
    shapes = {group.name: group.first.header.shape for group in listed}
    ties = bool(read.config["tie_word_embeddings"])
    listed_ties = {group.name: group.instance.rule.tied_to for group in listed if ties}
    tied = {name: to for name, to in listed_ties.items() if to is not None}
    return Wanted({name: shape for name, shape in shapes.items() if name not in tied}, tied, ties)
