"""What a model class wants to load, and what a mapping that tells its tensors says of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError
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
    """What a model class wants to load.

    Attributes:
        shapes: name → shape, in the order of the model.
        tied: names that are stored or not, and equal another: name → that one.
        types: element types of those that are no weights, such as counters: name → type.
        ties: whether every release ties what is tied, by what the configuration says or by default.
        versions: of transformers, those that load these names; None for all.
        others: the same under names that older releases gave the tensors, and that transformers loads too.
    """

    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]
    ties: bool = False
    versions: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Wanted, ...] = ()

    def fits(self, held: Mapping[str, Shape]) -> bool:
        """Whether a checkpoint holds it, in its shapes."""
        return all(held.get(name) == shape for name, shape in self.shapes.items())


def wanted_by_mapping(told: MappingFile, config: Mapping[str, Any]) -> Wanted | None:
    """What a model class wants by the mapping that tells its tensors; None where that does not know the configuration.

    It knows one of which it declares every key, and every value fits.
    """
    layout = replace(load_layout(told.layout, told.layout_place), keys={})
    try:
        read = read_config(config, source_side(told, layout))
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
