"""Remote code: a model's classes as Python files beside the weights. Parsed and copied as bytes, never executed."""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Lines, Place, first_of
from engine.formats.python_source import parsed
from engine.language.expressions import render_tree
from engine.planning.model import Plan
from engine.storage.local import open_regular

PATTERNS = ("configuration_*.py", "modeling_*.py")
_MOST = 4 << 20  # bytes of one file
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py", re.ASCII)


@dataclass(frozen=True, slots=True)
class Code:
    """Files by name, unchanged, and the `auto_map` through which transformers finds their classes."""

    files: Mapping[str, bytes]
    auto_map: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Module:
    raw: bytes
    classes: Mapping[str, ast.ClassDef]
    imports: frozenset[str]  # files beside it


def read_code(plan: Plan, folder: Path | None) -> Code | None:
    """The user's copies of the remote code of a plan's target; None when none is given.

    Raises:
        EngineError: E001 when the target needs no code, E305 for a file that cannot be read, E503 when the files
            do not match the mapping: a file is missing or not needed, or a class is in none of them.
    """
    remote = plan.mapping.remote_code
    if folder is None:
        return None
    if remote is None:
        raise EngineError(
            "E001",
            f"mapping `{plan.mapping.name}` writes a model that transformers has built in, so --code has no effect",
            place=plan.mapping.place,
            got=str(folder),
            expected="a mapping whose `target` has `remote_code`",
            fix="Leave --code out, or use the mapping of the form that needs it.",
        )
    modules = {name: _parse(folder / name) for name in _list(folder)}
    auto_map: dict[str, str] = {}
    needed: set[str] = set()
    for auto, wanted in render_tree(remote, plan.names).items():
        file = _file_of(str(wanted), modules, folder)
        needed.add(file)
        auto_map[auto] = f"{file.removesuffix('.py')}.{wanted}"
        if auto == "AutoConfig":
            _check_type(modules[file].classes[str(wanted)], plan.mapping.model_type, folder / file)
    needed = _imported(needed, modules, folder)
    if extra := sorted(modules.keys() - needed):
        raise _wrong(
            folder,
            f"the code has files that the model does not need: {', '.join(extra)}",
            got=", ".join(sorted(modules)),
            expected=", ".join(sorted(needed)),
            fix="Remove them from the folder: everything in it would become part of the model.",
        )
    return Code({name: modules[name].raw for name in sorted(needed)}, auto_map)


def remote_facts(plan: Plan, code: Code | None) -> dict[str, Any] | None:
    """What the model card says about remote code; None when transformers has the model built in."""
    remote = plan.mapping.remote_code
    if remote is None:
        return None
    auto_map = render_tree(remote, plan.names)
    special = [auto for auto in auto_map if auto.startswith("AutoModelFor")]
    return {
        "patterns": PATTERNS,
        "auto_class": (special or [auto for auto in auto_map if auto != "AutoConfig"] or ["AutoModel"])[0],
        "classes": sorted(set(map(str, auto_map.values()))),
        "files": sorted(code.files) if code is not None else [],
    }


def _list(folder: Path) -> list[str]:
    """The files of a folder that are code; E503 for anything else in it."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:  # ValueError: a NUL or lone surrogate in the path
        told = error.strerror if isinstance(error, OSError) else str(error)
        raise _wrong(folder, "the --code folder cannot be read", got=str(told)) from error
    for pattern in PATTERNS:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _wrong(
                folder,
                f"the code lacks a file: there is no `{pattern}`",
                got=first_of(names, 8) or "an empty folder",
                expected=" and ".join(PATTERNS),
                fix="Copy both from the official release of the model.",
            )
    if other := [name for name in names if _NAME.fullmatch(name) is None]:
        raise _wrong(
            folder,
            f"the code has files that are not Python modules: {first_of(other, 8)}",
            got=f"{len(other)} of {len(names)} names",
            expected=" and ".join(PATTERNS),
            fix="Put the model's two files into a separate folder.",
        )
    return names


def _parse(path: Path) -> _Module:
    with open_regular(path) as file:
        raw = file.read(_MOST + 1)
    if len(raw) > _MOST:
        raise _wrong(path, "a file of the code is too large", got=f"more than {_MOST >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's file, such as unusual escapes
            body = parsed(raw.decode())  # as transformers reads it, whatever encoding it declares
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        raise EngineError(
            "E503",
            "a file of the code is not Python",
            place=Place(str(path), line),
            got=(error.msg if isinstance(error, SyntaxError) else str(error)) or type(error).__name__,
            fix="Copy it again: a download may have saved a web page in its place.",
        ) from None
    statements = list(_statements(body))
    classes = {one.name: one for one in statements if isinstance(one, ast.ClassDef)}
    return _Module(raw, classes, frozenset(_beside(path, statements)))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's top-level statements, including those inside `if` and `try`."""
    for one in body:
        yield one
        for name in ("body", "orelse", "finalbody"):
            if isinstance(one, ast.If | ast.Try):
                yield from _statements(getattr(one, name, []))


def _beside(path: Path, statements: list[ast.stmt]) -> Iterator[str]:
    """The files beside it that a module imports; E503 for an import from a parent folder."""
    for one in statements:
        if not isinstance(one, ast.ImportFrom) or not one.level:
            continue
        if one.level > 1 or (one.module is not None and "." in one.module):
            raise EngineError(
                "E503",
                "a file of the code imports from another folder",
                place=Place(str(path), one.lineno),
                got=f"from {'.' * one.level}{one.module or ''} import …",
                expected="only files beside it",
                fix="Take the files of the model's repository, not those of a library.",
            )
        yield from (f"{name}.py" for name in ([one.module] if one.module else [alias.name for alias in one.names]))


def _file_of(wanted: str, modules: Mapping[str, _Module], folder: Path) -> str:
    found = [name for name, module in modules.items() if wanted in module.classes]
    if len(found) == 1:
        return found[0]
    told = Lines.of(f"{name}: {', '.join(module.classes) or 'no class'}" for name, module in modules.items())
    raise _wrong(
        folder,
        f"class `{wanted}` is in {'several files' if found else 'none of the files'} of the code",
        got=told,
        expected=f"`class {wanted}` in one of them",
        fix="Take the files of the official release of this very model.",
    )


def _check_type(config: ast.ClassDef, wanted: str, path: Path) -> None:
    """E503 unless the configuration class has the model type that config.json names."""
    said: object = None
    for one in config.body:
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if "model_type" in names and isinstance(one, ast.Assign | ast.AnnAssign):
            said = one.value.value if isinstance(one.value, ast.Constant) else "something computed"
    if said != wanted:
        raise EngineError(
            "E503",
            f"class `{config.name}` is the configuration of another model type",
            place=Place(str(path), config.lineno),
            got="none" if said is None else str(said),
            expected=wanted,
            fix="Take the files of the official release of this very model.",
        )


def _imported(needed: set[str], modules: Mapping[str, _Module], folder: Path) -> set[str]:
    """The needed files and all that they import; E503 for one that is missing, or that imports itself."""
    found: set[str] = set()
    left = sorted(needed)
    while left:
        name = left.pop()
        found.add(name)
        if name in modules[name].imports:
            raise _wrong(
                folder,
                f"`{name}` of the code imports from itself",
                got=", ".join(modules[name].classes) or "no class",
                expected="a file that is under the name that it was published with",
                fix="Copy it again: it seems to be another file's content.",
            )
        for other in sorted(modules[name].imports - found):
            if other not in modules:
                raise _wrong(
                    folder,
                    f"the code lacks a file: `{name}` imports `{other}`",
                    got=", ".join(sorted(modules)),
                    expected=other,
                    fix="Copy it from the same place as the others.",
                )
            left.append(other)
    return found


def _wrong(folder: Path, message: str, *, got: str, expected: str | None = None, fix: str | None = None) -> EngineError:
    return EngineError(
        "E503",
        message,
        place=Place(str(folder)),
        got=got,
        expected=expected or " and ".join(PATTERNS),
        fix=fix or "Give the folder that holds copies of the official files.",
    )
