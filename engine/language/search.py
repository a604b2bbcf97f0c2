"""Finding mapping, layout and schema files: paths, `ENGINE_MAPPINGS`, then the bundled ones."""

from __future__ import annotations

import os
from difflib import get_close_matches
from itertools import product
from pathlib import Path

from engine.errors import EngineError


def bundled(folder: str) -> Path:
    """A data folder of the package; in a checkout it lies beside `engine/`."""
    inside = Path(__file__).resolve().parent.parent / folder
    return inside if inside.is_dir() else inside.parent.parent / folder


def search_folders() -> list[Path]:
    extra = [Path(p) for p in os.environ.get("ENGINE_MAPPINGS", "").split(os.pathsep) if p]
    return [*extra, bundled("mappings")]


def find_file(name: str, kind: str = "mapping") -> Path:
    """A path as given, or a name in the search folders with or without `.yaml`.

    Raises:
        EngineError: E002 with names that are near.
    """
    given = Path(name)
    if os.path.isfile(given):
        return given
    stems = (name, f"families/{name}") if kind == "mapping" else (f"layouts/{name}",)
    for folder, stem in product(search_folders(), stems):
        for candidate in (folder / stem, folder / f"{stem}.yaml", folder / f"{stem}.yml"):
            if os.path.isfile(candidate) and candidate.resolve().is_relative_to(folder.resolve()):
                return candidate
    known = (
        list_names()
        if kind == "mapping"
        else [p.stem for f in search_folders() for p in (f / "layouts").glob("*.yaml")]
    )
    near = get_close_matches(name, known, 3, 0.5) or get_close_matches(
        name.removesuffix(".yaml") + ".yaml", known, 3, 0.5
    )
    raise EngineError(
        "E002",
        f"there is no {kind} `{name}`",
        got=f"searched {', '.join(str(f) for f in search_folders())}",
        expected=", ".join(near) if near else "a path, or one of: " + ", ".join(known),
        fix=f"Did you mean `{near[0]}`?" if near else "Give the path of a mapping file, or set ENGINE_MAPPINGS.",
    )


def list_names() -> list[str]:
    """Names of all mappings in the search folders: releases first, then families."""
    names: list[str] = []
    for folder in search_folders():
        names += sorted(p.name for p in folder.glob("*.yaml"))
        names += sorted(f"families/{p.name}" for p in (folder / "families").glob("*.yaml"))
    return list(dict.fromkeys(names))


def shown(path: Path) -> str:
    """A path as errors show it: bundled files by their place in the project, others as given."""
    root = bundled("mappings").parent
    resolved = path.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root / "mappings") else str(path)


def layout_names() -> list[str]:
    """Names of all layouts in the search folders."""
    return list(dict.fromkeys(p.stem for f in search_folders() for p in sorted((f / "layouts").glob("*.yaml"))))
