"""Compares a mapping or layout without a committed meaning with the bundled one that is most like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.language.documents import changed, flat, grouped, plain, same
from engine.language.keys import names_apart
from engine.language.loader import load_yaml
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.search import bundled, find_file
from engine.proving.holdings import parts_of
from engine.proving.meaning import Meaning
from engine.proving.proof import Failure

FOLDER = "meanings"
_ASPECTS = ("order", "changed")  # facts of an entry that are compared, besides its source
_SHARE = 0.5  # the share of a mapping's sources, or of a layout's facts, that its neighbour must have too
_REASONS = ("help", "why", "fix", "ignored", "noted")
_TITLE = ("layout", "mapping", "name", "version", "description")
GONE = "(not there)"
_MODES = ("order of modes",)
_ENTRIES = {"keys": 3, "options": 2, "modes": 2}  # length of the path of an entry that a layout may add

KeyPath = tuple[str, ...]


def path_of(file: Path) -> Path:
    """The path of a mapping file's committed meaning."""
    return file.parent / FOLDER / f"{file.stem}.txt"


def file_facts(data: Mapping[str, Any]) -> dict[KeyPath, Any]:
    """The content of a layout's or class's file, without text for people."""
    found = {p: v for p, v in flat(data) if p[0] not in _TITLE and p[-1] not in _REASONS}
    found |= {p: True for p, _ in flat(data) if p[-1] in ("ignored", "noted")}
    return found | ({_MODES: list(data["modes"])} if "modes" in data else {})


def near_layout(name: str) -> tuple[str, dict[KeyPath, Any], dict[KeyPath, Any]] | None:
    """The bundled layout that says most of what a layout says, if at least half: its name, its facts and the layout's.

    None for a bundled layout.
    """
    now = _facts(find_file(name, "layout"))
    files = sorted((bundled("mappings") / "layouts").glob("*.yaml"))
    known = {file.stem: _facts(file) for file in files}
    shares = {stem: sum(same(now.get(path), value) for path, value in then.items()) for stem, then in known.items()}
    best = max(shares, key=lambda stem: shares[stem])
    return (best, known[best], now) if shares[best] >= _SHARE * len(now) and known[best] != now else None


def _facts(file: Path) -> dict[KeyPath, Any]:
    return file_facts(plain(names_apart(load_yaml(file)).data))


def laid_out_otherwise(name: str) -> list[Failure]:
    """What a layout says otherwise than the bundled one that is most like it; what it adds to it is its own."""
    found = near_layout(name)
    if found is None:
        return []
    other, then, now = found
    known = {path[:end] for path in then for end in _ENTRIES.values()}
    told = [
        f"layout {name}: {', '.join(path)} is {short(new)}; the bundled {other} has {short(old)}"
        for path, old, new in changed(then, now)
        if (path[0] not in _ENTRIES or path[: _ENTRIES[path[0]]] in known) and not (path == _MODES and {*old} < {*new})
    ]
    told += ["if that is right, commit it with --write-meaning"] if told else []
    return [Failure(one, str(find_file(name, "layout"))) for one in told]


def short(value: Any) -> str:
    """A fact of a meaning, cut to a length that fits a message."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else GONE if value is None else str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def neighbour_of(mapping: MappingFile) -> MappingFile | None:
    """The bundled family of the layout, or of the nearest, that reads most of a mapping's sources, if at least half."""
    near = near_layout(mapping.layout)
    layouts = (mapping.layout, *near[:1]) if near is not None else (mapping.layout,)
    alike = [one for one in _families() if one.layout in layouts and one.model_type == mapping.model_type]
    own = _sources(mapping)
    best = max(alike, key=lambda one: len(own & _sources(one)), default=None)
    return best if best is not None and len(own & _sources(best)) >= max(1, _SHARE * len(own)) else None


def nearer(mapping: MappingFile, parent: MappingFile) -> MappingFile | None:
    """The bundled family that says most of what a mapping says, if it says more of it than its parent does.

    So a copy of a family is held against that family, and not against the one that both extend.
    """
    now = file_facts(plain(mapping.resolved))

    def shared(other: MappingFile) -> int:
        return sum(same(now.get(path), value) for path, value in file_facts(plain(other.resolved)).items())

    best = max(_families(), key=shared)
    return best if shared(best) > shared(parent) else None


def _families() -> Iterator[MappingFile]:
    """The bundled families, but for a new one whose meaning is not committed yet."""
    files = sorted((bundled("mappings") / "families").glob("*.yaml"))
    return (load_mapping(file) for file in files if path_of(file).is_file())


def _sources(mapping: MappingFile) -> set[str]:
    return {source for rule in mapping.rules for source in rule.sources}


def read_otherwise(mapping: MappingFile, now: Meaning, other: MappingFile, then: Meaning) -> list[Failure]:
    """Tensors that the bundled mapping reads from another source or in another way, though it knows both names."""
    known = {key: (*parts_of(key), entry) for key, entry in then.get("tensors", {}).items()}
    routes = grouped((target, (source, entry)) for target, source, _, entry in known.values())
    sources = {name for _, source, _, entry in known.values() for name in (source, *entry.get("also read as", ()))}
    places = {target.name: str(rule.place) for rule in mapping.rules for target in rule.targets}
    alike = now.get("sizes") == then.get("sizes")  # else orders cannot be compared
    cuts = mapping.layout != other.layout and bool(laid_out_otherwise(mapping.layout))  # told as the layout's
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
        elif alike and not (any(_alike(entry, one) for one in same) and (cuts or _cut(key, now, then))):
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
