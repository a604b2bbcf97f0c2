"""Compares a mapping without a committed meaning with a bundled family that reads the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.language.documents import grouped
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.search import list_names
from engine.proving.holdings import parts_of
from engine.proving.meaning import Meaning
from engine.proving.proof import Failure

_ASPECTS = ("order", "changed")  # facts of an entry that are compared, besides its source
_SHARE = 0.5  # the share of a mapping's sources that its neighbour must read too


def neighbour_of(mapping: MappingFile) -> MappingFile | None:
    """The bundled family of the same layout and model type that reads most of a mapping's sources, if at least half."""
    families = (load_mapping(name) for name in list_names() if name.startswith("families/"))
    alike = [one for one in families if (one.layout, one.model_type) == (mapping.layout, mapping.model_type)]
    own = _sources(mapping)
    best = max(alike, key=lambda one: len(own & _sources(one)), default=None)
    return best if best is not None and len(own & _sources(best)) >= max(1, _SHARE * len(own)) else None


def _sources(mapping: MappingFile) -> set[str]:
    return {source for rule in mapping.rules for source in rule.sources}


def read_otherwise(mapping: MappingFile, now: Meaning, other: MappingFile, then: Meaning) -> list[Failure]:
    """Tensors that the bundled mapping reads from another source or in another way, though it knows both names."""
    known = {key: (*parts_of(key), entry) for key, entry in then.get("tensors", {}).items()}
    routes = grouped((target, (source, entry)) for target, source, _, entry in known.values())
    sources = {name for _, source, _, entry in known.values() for name in (source, *entry.get("also read as", ()))}
    places = {target.name: str(rule.place) for rule in mapping.rules for target in rule.targets}
    alike = now.get("sizes") == then.get("sizes")  # else orders cannot be compared
    found: dict[str, Failure] = {}
    for key, entry in now.get("tensors", {}).items():
        target, source, _ = parts_of(key)
        held = routes.get(target)
        if held is None or source not in sources:
            continue
        same = [one for name, one in held if source in (name, *one.get("also read as", ()))]
        same = [known[key][3]] if key in known else same
        if not same:
            told = f"{target} is read from {source}; the bundled {other.name} reads {held[0][0]}"
        elif alike and not (any(_alike(entry, one) for one in same) and _cut(key, now, then)):
            told = f"{target} is read differently: {_said(entry)}; the bundled {other.name} has {_said(same[0])}"
        else:
            continue
        stem = next((name for name in places if name.replace("{param}", target.rpartition(".")[2]) == target), target)
        found.setdefault(target, Failure(told, places.get(stem)))
    return list(found.values())


def _alike(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return all(one.get(name) == two.get(name) for name in _ASPECTS)


def _cut(key: str, *meanings: Meaning) -> bool:
    """Whether ranks hold the same elements of an entry, if both meanings list its ranks."""
    one, two = (ranks.get(key) if isinstance(ranks := each.get("ranks"), Mapping) else None for each in meanings)
    return one == two or not (isinstance(one, Mapping) and isinstance(two, Mapping))


def _said(entry: Mapping[str, Any]) -> str:
    told = [f"`{entry['axes']}`", *(f"{name} {entry[name]}" for name in ("split", "stage") if entry.get(name))]
    return ", ".join([*told, *(str(entry[name]) for name in _ASPECTS if entry.get(name))])
