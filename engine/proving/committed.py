"""The meaning that is committed beside a mapping, and how the mapping's current meaning differs, in words.

`families/internlm2.yaml` has `families/meanings/internlm2.txt`. A mapping that differs little from the one it
extends commits only the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.language.documents import changed, flat, plain, same, tree_of
from engine.language.loader import content_of, load_bytes, load_yaml
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.names import PARAMS
from engine.language.search import find_file, list_names, search_folders
from engine.proving.changes import KINDS, VALUED, tensor_changes, value_changes
from engine.proving.forth import LEAST
from engine.proving.meaning import VERSION, meaning_of, text_of
from engine.proving.meaning import Path as KeyPath
from engine.proving.neighbour import (
    FOLDER,
    GONE,
    file_facts,
    laid_out_otherwise,
    nearer,
    neighbour_of,
    path_of,
    read_otherwise,
    short,
)
from engine.proving.proof import Check, Failure, check_of
from engine.storage.replacing import write_file

MEANING = "meaning"
_MODEL = ("tensors", "ranks", "layers", "reading", "writing", "variants", "divided evenly", "refused")
_START = b"# What this mapping means"
_HEAD = """\
# What this mapping means, written by `engine prove --write-meaning`. Read its diff: it is what an edit comes to.
# `order` gives elements from a source to a target: `@first → @first: count (step there → step here) × …`.
"""


def write_meanings(names: Sequence[str | Path] = ()) -> list[Path]:
    """Write the meanings of mapping files into `meanings/` beside them, for `prove` to compare with later.

    Args:
        names: paths or names of bundled mappings; default: all bundled ones.
    """
    every = [*names] or sorted(list_names(), key=lambda name: len(load_mapping(name).files))  # parents first
    return [write_meaning(name) for name in every]


def write_meaning(name: str | Path) -> Path:
    """Commit the current meaning of a mapping file."""
    file = find_file(str(name))
    path = path_of(file)
    path.parent.mkdir(exist_ok=True)
    mapping = load_mapping(file)
    write_file(path, committed_text(mapping).encode(), overwrite=True, ours=is_meaning)
    for kind, beside in _beside(mapping).items():
        if beside.parent.parent in file.parents:  # only beside this mapping
            path_of(beside).parent.mkdir(exist_ok=True)
            facts = tree_of(file_facts(plain(load_yaml(beside).data)))
            text = _HEAD + text_of({"meaning": VERSION, kind.split()[0]: beside.stem, **facts})
            write_file(path_of(beside), text.encode(), overwrite=True, ours=is_meaning)
    return path


def committed_text(mapping: MappingFile) -> str:
    """The text to commit for a mapping: its whole meaning, or its difference from its parent if that is shorter."""
    head = {"meaning": VERSION, "mapping": mapping.name}
    now = meaning_of(mapping)
    whole = _HEAD + text_of({**head, **now})
    if len(mapping.files) < 2:
        return whole
    before, after = dict(flat(meaning_of(load_mapping(_file(mapping.files[-2]))))), dict(flat(now))
    changed = {p: v for p, v in after.items() if p not in before or not same(before[p], v)}
    inside = {p[:end] for p in after for end in range(1, len(p))}  # paths that hold several values now
    lost = (p for p in before if p not in inside and not any(p[:end] in after for end in range(1, len(p) + 1)))
    changed |= dict.fromkeys(lost, GONE)
    beside = _HEAD + text_of({**head, "extends": mapping.files[-2], "differs": tree_of(changed)})
    return min(whole, beside, key=len)


def _beside(mapping: MappingFile) -> dict[str, Path]:
    """The files that a mapping reads besides its parents, by kind: its layout, and model classes."""
    classes = {f"class {name}": find_file(file) for name, file in mapping.classes.items()}
    return {f"layout {mapping.layout}": find_file(mapping.layout, "layout"), **classes}


def failures_beside(mapping: MappingFile) -> list[Failure]:
    """How files that a mapping reads differ from their committed facts, such as names of files or tensors."""
    found: list[Failure] = []
    for kind, file in _beside(mapping).items():
        if not path_of(file).is_file():
            told = f"no meaning of the {kind} is committed; --write-meaning writes it"
            if path_of(file).parent.is_dir():
                found.append(Failure(told, file.name))
            elif kind == f"layout {mapping.layout}":
                found += laid_out_otherwise(mapping.layout)
            continue
        said = flat(load_yaml(path_of(file)).data)
        then = {p: v for p, v in said if p[0] not in ("meaning", kind.split()[0])}
        now = file_facts(plain(load_yaml(file).data))
        found += [Failure(f"{kind}: {_generic(*one)}", file.name) for one in changed(then, now, GONE)]
    return found


def is_meaning(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a meaning."""
    return start.startswith(_START)


def _file(shown: str) -> Path:
    """The path of a mapping's file, given its name in `Mapping.files`."""
    for base in (Path(), *(folder.parent for folder in search_folders())):
        if (base / shown).is_file():
            return base / shown
    return Path(shown)


@lru_cache(maxsize=64)  # a family's meaning is read for each of its releases
def _values(name: str, content: bytes) -> dict[KeyPath, Any]:
    return dict(flat(load_bytes(content, name).data))


def read_meaning(path: Path) -> dict[KeyPath, Any]:
    """The values of a committed meaning, merged over those of its parent.

    Raises:
        EngineError: E101 for a file that is not a meaning.
    """
    try:
        data = _values(str(path), content_of(path, str(path)))
        if data["meaning",] != VERSION:
            raise ValueError(f"version {data['meaning',]} is not known")
        found = {p: v for p, v in data.items() if p[0] not in ("meaning", "mapping", "extends", "differs")}
        if ("extends",) not in data:
            return found
        parent = _file(str(data["extends",]))
        over = path_of(parent)
        base = read_meaning(over) if over.is_file() else dict(flat(meaning_of(load_mapping(parent))))
        differs = {p[1:]: v for p, v in data.items() if p[0] == "differs" and p[1:]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            "E101",
            f"the committed meaning cannot be read: {' '.join(str(error).split())[:200]}",
            got=str(path),
            fix="Write it again with `engine prove --write-meaning`, and read what changes.",
        ) from None
    above = {q[:end] for q in differs for end in range(len(q) + 1)}
    base = {p: v for p, v in base.items() if p not in above and not any(p[:n] in differs for n in range(len(p)))}
    return {**base, **{p: v for p, v in differs.items() if v != GONE}}


def committed(mapping: MappingFile) -> tuple[str, Path, bool] | None:
    """The mapping and file of the nearest committed meaning, and whether it is another mapping's.

    The mapping's own, one with its name, its parent's or that of a nearer family.
    """
    own = path_of(_file(mapping.files[-1]))
    if own.is_file():
        return mapping.files[-1], own, False
    for folder in search_folders():
        for place in (folder, folder / "families"):
            named = path_of(place / f"{mapping.name}.yaml")
            if named.is_file():
                return f"the bundled {mapping.name}", named, False
    for file in reversed(mapping.files[:-1]):
        if path_of(_file(file)).is_file():
            near = nearer(mapping, load_mapping(_file(file)))
            name = file if near is None else near.files[-1]
            return name, path_of(_file(name)), True
    return None


def check_meaning(mapping: MappingFile) -> Check:
    """Check that a mapping, and the layout and classes it reads, still mean what is committed."""
    check = _check_mapping(mapping)
    try:
        failures = failures_beside(mapping)
    except EngineError as error:
        failures = [Failure.of(error)]
    return check_of(MEANING, check.told, [*check.failures, *failures]) if failures else check


def _check_mapping(mapping: MappingFile) -> Check:
    found = committed(mapping)
    own = _file(mapping.files[-1])
    if found is None:
        if (own.parent / FOLDER).is_dir():
            told = "none is committed, and its neighbours have theirs; --write-meaning writes it"
            return check_of(MEANING, told, [Failure(told, str(mapping.place))])
        return _beside_none(mapping)
    file, path, inherits = found
    try:
        then = read_meaning(path)
        now = dict(flat(meaning_of(mapping)))
    except EngineError as error:
        return check_of(MEANING, "", [Failure.of(error)])
    failures = differences(mapping, then, now)
    if inherits and (own.parent / FOLDER).is_dir():
        beside = f", with these differences from that of {file}:" if failures else ""
        told = f"no meaning of its own is committed; --write-meaning writes it{beside}"
        return check_of(
            MEANING, "committed, as those of its neighbours are", [Failure(told, str(mapping.place)), *failures]
        )
    if inherits and failures:
        told = f"no meaning of its own is committed, and its meaning differs from that of {file}"
        other = [{path: value for path, value in one.items() if _is_model(path)} for one in (then, now)]
        # A release exists to change defaults, tokenizer or sizes, but not the places of tensors.
        if wrong := differences(mapping, other[0], other[1]):
            wrong.append(Failure("if that is right, commit its own meaning with --write-meaning", str(mapping.place)))
            return check_of(MEANING, told, wrong)
        return Check(MEANING, None, told, tuple(failures))
    return check_of(MEANING, f"{len(now)} facts are as committed for {file}", failures)


def _beside_none(mapping: MappingFile) -> Check:
    """The check of a mapping without a committed meaning: it is compared with a bundled family of the same tensors."""
    told = "none is committed beside it, so a wrong rule may go unnoticed; --write-meaning writes it"
    other = neighbour_of(mapping)
    if other is None:
        return Check(MEANING, None, told)
    try:
        then = tree_of(read_meaning(path_of(_file(other.files[-1]))))
        failures = read_otherwise(mapping, meaning_of(mapping), other, then)
    except EngineError as error:
        return check_of(MEANING, told, [Failure.of(error)])
    if not failures:
        return Check(MEANING, None, told)
    failures.append(Failure("if that is right, commit its own meaning with --write-meaning", str(mapping.place)))
    return check_of(MEANING, f"none is committed beside it, but {other.name} reads the same tensors", failures)


def _is_model(path: KeyPath) -> bool:
    """Whether a fact describes the model itself, regardless of release, options and neighbours."""
    row = path[2] if len(path) > 2 else ""
    of_options = row.startswith((LEAST, "options.")) or path[1:] == ("no difference",)
    return path[0] in _MODEL and not of_options


def differences(mapping: MappingFile, then: Mapping[KeyPath, Any], now: Mapping[KeyPath, Any]) -> list[Failure]:
    """How a meaning differs from a committed one, in words, with places; tensors first."""
    if same(then, now):
        return []
    before, after = tree_of(then), tree_of(now)
    names = [(target.name, rule) for rule in mapping.rules for target in rule.targets]
    places = {name.replace("{param}", param): str(rule.place) for name, rule in names for param in ("{param}", *PARAMS)}
    found: list[Failure] = []
    for one in tensor_changes(before, after, [mapping]):
        under = f" ({', '.join(one.when)})" if one.when else ""
        told = f"{one.target}{under} is {KINDS[one.kind]}: {_said(one.new, one.old)}"
        found.append(Failure(told, places.get(one.target)))
    for value in value_changes(before, after):
        told = f"{value.file} {value.name}{f' with {value.given}' if value.given else ''}"
        found.append(Failure(f"{told}: {_said(value.new, value.old)}", _place(mapping, value.name)))
    apart = [one for one in changed(then, now, GONE) if not found or one[0][0] not in ("tensors", "ranks", *VALUED)]
    return found + [Failure(_generic(*one), _place(mapping, one[0][-1].partition(" ")[2])) for one in apart]


def _said(new: Any, old: Any) -> str:
    return f"{short(new)}; the committed meaning says {short(old)}"


def _place(mapping: MappingFile, name: str) -> str:
    """The line of the expression that gives a key's value, if there is one."""
    for part in (mapping.config, mapping.training_config, mapping.dims):
        place = getattr(part.get(name.split(".")[0]), "place", None)
        if place is not None:
            return str(place)
    return str(mapping.place)


def _generic(path: KeyPath, old: Any, new: Any) -> str:
    """A difference anywhere else: `reading, rope_base: (absent), config.json rope_theta: …`."""
    where = ", ".join(path)
    if isinstance(old, list) and isinstance(new, list):
        lost, more = [o for o in old if o not in new], [n for n in new if n not in old]
        if lost or more:
            both = (("has no", lost), ("has also", more))
            told = " and ".join(f"{word} {', '.join(map(str, some))}" for word, some in both if some)
            return f"{where}: {told}, unlike the committed meaning"
    return f"{where}: {_said(new, old)}"
