"""The public functions for those who write mappings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.search import find_file, kind_of, list_names, rule_files
from engine.planning.given import check_type
from engine.run.meter import Progress

if TYPE_CHECKING:
    from engine.discover.scaffold import Scaffold
    from engine.proving.proof import Finding, Proof

T = TypeVar("T")


def lint(paths: str | Path | Sequence[str | Path] = ()) -> list[Finding]:
    """Findings of mapping and layout files, or of those below folders; without paths, of every bundled mapping.

    >>> engine.lint("internlm2-7b")
    []
    """
    from engine.proving.lint import lint_file

    names = [str(p) for p in mapping_files(_listed(paths)) if kind_of(p) != "meaning"] if paths else list_names()
    return list(dict.fromkeys(finding for name in names for finding in lint_file(name)))


def prove(
    names: str | Path | MappingFile | Sequence[str | Path | MappingFile] = (),
    *,
    mutants: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> list[Proof]:
    """Prove mappings: complete, one-to-one, invertible, and equal in every layout; without names, all bundled ones.

    Runs the real planner and runner on tiny tensors of numbered elements in a temporary folder, checks a
    release's own sizes by arithmetic, and compares names and shapes with transformers' model. Rules that
    several mappings share are run once.

    >>> [proof.holds for proof in engine.prove("internlm")]  # doctest: +SKIP
    [True]

    Args:
        names: paths, names of bundled mappings, or loaded ones.
        mutants: also change the mapping in one place at a time, and say which check notices.
        progress: called before each mapping.
    """
    from engine.proving.prove import prove as prove_each

    bundled = sorted(list_names(), key=lambda name: not name.startswith("families/"))
    for name in _listed(names):
        check_type("names", name, str | Path | MappingFile, "names, paths or loaded mappings")
    return prove_each(_listed(names) or bundled, mutants=mutants, progress=progress)


def write_meanings(names: Sequence[str | Path] = ()) -> list[Path]:
    """Write what mapping files mean into `meanings/` beside them, for `prove` to compare with later.

    Args:
        names: paths or names of bundled mappings; default: all bundled ones.
    """
    from engine.proving.committed import write_meaning as write

    every = [*names] or sorted(list_names(), key=lambda name: len(load_mapping(name).files))  # parents first
    return [write(name) for name in every]


def new_mapping(
    src: str | Path = ".",
    *,
    name: str | None = None,
    like: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Scaffold:
    """A first draft of a mapping for a checkpoint: what fits, what is guessed, what a person must decide.

    >>> print(engine.new_mapping("ckpt/1000", name="mine-7b").text)
    # yaml-language-server: ...
    mapping: 1
    name: mine-7b
    ...

    Args:
        name: the mapping's; default: that of the file or of the folder.
        like: the family to extend, by name or path; default: the nearest bundled one.
        out: the file to write; without it the text is only returned.
        overwrite: replace a file that exists.

    Raises:
        EngineError: E401 when the file exists; E2xx and E3xx for what cannot be read.
    """
    from engine.discover.files import new_mapping as make

    check_type("name", name, str | None)
    check_type("like", like, str | Path | None)
    return make(src, name=name, like=like, out=out, overwrite=overwrite)


def mapping_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that paths stand for; of a folder, every mapping and layout below it.

    Raises:
        EngineError: E002 for a folder without any, or a path where nothing is.
    """

    for path in paths:
        check_type("paths", path, str | Path)
    return [
        file for path in paths for file in (rule_files(Path(path)) if Path(path).is_dir() else [find_file(str(path))])
    ]


def _listed(names: T | Sequence[T]) -> list[T]:
    """Several names, or one by itself."""
    return list(names) if isinstance(names, list | tuple | set | frozenset) else [cast(T, names)]
