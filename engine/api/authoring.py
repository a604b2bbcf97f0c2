"""The public functions for those who write mappings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError, distinct
from engine.language.search import find_file, kind_of, list_names, rule_files
from engine.planning.given import check_type, listed
from engine.proving.lint import lint_file


def lint(paths: str | Path | Sequence[str | Path] = ()) -> list[EngineError]:
    """Check mapping and layout files, all files below a folder, or without paths every bundled mapping.

    >>> engine.lint("internlm2-7b")
    []
    """
    names = [str(p) for p in mapping_files(listed(paths)) if kind_of(p) != "meaning"] if paths else list_names()
    return distinct(finding for name in names for finding in lint_file(name))


def mapping_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths name; for a folder, every mapping and layout below it.

    Raises:
        EngineError: E002 for a folder that holds none, or a path that does not exist.
    """
    for path in paths:
        check_type("paths", path, str | Path)
    return [
        file for path in paths for file in (rule_files(Path(path)) if os.path.isdir(path) else [find_file(str(path))])
    ]
