"""Finding mapping, layout and schema files: paths, `ENGINE_MAPPINGS`, then the bundled ones."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path

from engine.errors import EngineError, first_of, meant

_MOST_ENTRIES = 20_000  # files and folders that are looked at for mappings


@cache
def bundled(folder: str) -> Path:
    """A data folder of the package; in a checkout it lies beside `engine/`."""
    inside = Path(__file__).resolve().parent.parent / folder
    return inside if inside.is_dir() else inside.parent.parent / folder


def search_folders() -> list[Path]:
    """The folders of `ENGINE_MAPPINGS`, then the bundled one.

    Raises:
        EngineError: E002 for one that does not exist: a bundled mapping would be used in place of one of the same name
            in it.
    """
    extra = [Path(p) for p in os.environ.get("ENGINE_MAPPINGS", "").split(os.pathsep) if p]
    for folder in extra:
        if not folder.is_dir():
            raise EngineError(
                "E002",
                f"ENGINE_MAPPINGS names the folder `{folder}`, which is not there",
                expected="folders with mappings, separated by `:`".replace(":", os.pathsep),
                fix="Correct the variable, or unset it.",
            )
    return [*extra, bundled("mappings")]


def find_file(name: str, kind: str = "mapping", *, first: Path | None = None) -> Path:
    """A path as given, or a name in the search folders with or without `.yaml`.

    Args:
        first: a folder that is searched before them.

    Raises:
        EngineError: E002 with names that are near.
    """
    given = Path(name)
    if os.path.isfile(given):
        return given
    stems = (name, f"families/{name}") if kind == "mapping" else (f"layouts/{name}",)
    placed = {".", ".."} & set(name.split(os.sep))  # it says where the file is, so no other place is searched
    searched = [] if placed else [*([first] if first is not None else []), *search_folders()]
    for folder, stem, end in product(searched, stems, ("", ".yaml", ".yml")):
        candidate = os.path.join(folder, f"{stem}{end}")
        if os.path.isfile(candidate) and os.path.realpath(candidate).startswith(f"{os.path.realpath(folder)}{os.sep}"):
            return Path(candidate)
    above = name.rpartition("/")[0]  # older versions spelled bundled names `families/NAME` and `NAME.yaml`
    older = above in ("", "families") and (above != "" or not os.path.lexists(name))
    if kind == "mapping" and (os.sep in name or name.endswith((".yaml", ".yml"))) and not older:
        raise _no_file(given)
    if kind != "mapping":
        known = layout_names()
        raise EngineError(
            "E002",
            f"there is no layout `{name}`",
            got=name,
            expected=f"one of {', '.join(known)}",
            fix=meant(name, known, "Correct `layout` in `source` of the mapping."),
        )
    same, others = near_names(name, list(map(spelled, list_names())))
    raise EngineError(
        "E002",
        f"there is no mapping `{name}`",
        expected=", ".join(same) or None,
        fix=f"Did you mean `{same[0]}`?"
        if same
        else (f"Similar names are of other models: {', '.join(others)}. " if others else "")
        + "`engine mappings` lists them all; a file is given by its path.",
    )


def _no_file(path: Path) -> EngineError:
    """E002 for a path where nothing is, with what lies near it."""
    if os.path.isdir(path):  # which is false, not an error, for names that no file can have
        inside = first_of(sorted(p.name for p in path.glob("*.yaml")), 4)
        return EngineError("E002", f"`{path}` is a folder", got=inside or "no YAML files in it",
                           expected="a mapping file", fix="Give one of its files.")  # fmt: skip
    if os.path.lexists(path):
        return EngineError("E002", f"`{path}` is no file", got="a link to nothing, a pipe or a device",
                           expected="a mapping file", fix="Check the path.")  # fmt: skip
    beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if os.path.isdir(path.parent) else []
    near = get_close_matches(path.name, beside, 1)
    where = path.parent if os.path.isdir(path.parent) else f"{path.parent}, which is not there"
    return EngineError(
        "E002",
        f"there is no mapping file `{path}`",
        got=f"in {where}: {first_of(beside, 4) or 'no YAML files'}",
        fix=f"Did you mean `{path.with_name(near[0])}`?"
        if near
        else "Check the path. A bundled mapping goes by its name alone, like internlm2-7b.",
    )


def spelled(name: str) -> str:
    """A bundled mapping's name as it is written everywhere.

    >>> spelled("families/internlm2.yaml"), spelled("internlm2_5-7b.yaml")
    ('internlm2', 'internlm2_5-7b')
    """
    return name.removeprefix("families/").removesuffix(".yaml")


def near_names(name: str, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that may be meant: the same model in another spelling, and near names of other models.

    A model's generation and size are the numbers in its name; where these differ, it is another model.

    >>> near_names("internlm2.5-7b-chat", ["internlm2-chat-7b", "internlm2_5-7b-chat", "internlm2-7b"])
    (['internlm2_5-7b-chat'], ['internlm2-chat-7b', 'internlm2-7b'])
    """
    wanted = _words(spelled(name))
    same = [one for one in known if _words(one) == wanted]
    if not same:
        numbers = [one for one in known if _numbers(_words(one)) == _numbers(wanted)]
        same = get_close_matches(spelled(name), numbers, 3, 0.75)
    others = [one for one in get_close_matches(spelled(name), known, 3, 0.6) if one not in same]
    return same, others


def _words(name: str) -> list[str]:
    return sorted(re.findall(r"[a-z]+|[0-9]+", name.lower()))


def _numbers(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.isdecimal()]


def list_names() -> list[str]:
    """Names of all mappings in the search folders: releases first, then families."""
    names: list[str] = []
    for folder in search_folders():
        names += sorted(p.name for p in folder.glob("*.yaml"))
        names += sorted(f"families/{p.name}" for p in (folder / "families").glob("*.yaml"))
    return list(dict.fromkeys(names))


def rule_files(folder: Path) -> list[Path]:
    """Every mapping and layout below a folder, except hidden ones.

    Raises:
        EngineError: E002 when there is none, E001 for a folder with far more files than a folder of mappings has.
    """
    found: list[Path] = []
    seen = 0
    for above, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen += len(folders) + len(names)
        if seen > _MOST_ENTRIES:
            raise EngineError("E001", f"`{folder}` holds more than {_MOST_ENTRIES:,} files and folders",
                              expected="a folder of mappings", fix="Give the folder of the mappings.")  # fmt: skip
        paths = [Path(above, name) for name in sorted(names) if name.endswith((".yaml", ".yml")) and name[0] != "."]
        found += [path for path in paths if kind_of(path) in ("mapping", "layout")]
    if not found:
        raise EngineError("E002", f"there are no mappings below `{folder}`", fix="Give a folder with YAML files.")
    return found


def kind_of(path: Path) -> str:
    """What a YAML file is, by its keys: `mapping` (however broken), `layout`, `meaning`; else empty."""
    if not os.path.isfile(path):  # opening a pipe would wait
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 16)
    except OSError:
        return ""
    found = re.search(r"^(mapping|layout|meaning):", text, re.MULTILINE)
    if found is None:
        return "mapping" if re.search(r"^(rules|extends):", text, re.MULTILINE) else ""
    return found[1]


def shown(path: Path) -> str:
    """A path as errors show it: bundled files by their place in the project, others as given."""
    folder, own = str(bundled("mappings")), str(path)
    resolved = own if own.startswith(f"{folder}{os.sep}") and ".." not in path.parts else str(path.resolve())
    return resolved[len(folder) - len("mappings") :] if resolved.startswith(f"{folder}{os.sep}") else own


def layout_names() -> list[str]:
    """Names of all layouts in the search folders."""
    return list(dict.fromkeys(p.stem for f in search_folders() for p in sorted((f / "layouts").glob("*.yaml"))))
