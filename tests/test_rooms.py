"""Each room of the engine imports only rooms below it, as `docs/architecture.md` lists them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "commands", "api", "serve", "show", "comparing", "discover", "oracle", "proving", "explaining", "assets", "run",
    "move", "planning", "checkpoint", "formats", "storage", "language", "errors",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module but the two at the top."""
    found = {}
    for path in sorted((ROOT / "engine").glob("**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 or parts[-1] not in ("__init__", "__main__"):
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1]


@cache
def import_nodes(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    found: list[ast.Import | ast.ImportFrom] = []
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:  # through statements, and not through expressions, which are most of it
        if isinstance(node := left.pop(), ast.Import | ast.ImportFrom):
            found.append(node)
        below = (ast.stmt, ast.ExceptHandler, ast.match_case)
        left += [child for child in ast.iter_child_nodes(node) if isinstance(child, below)]
    return tuple(found)


def imports(path: Path) -> set[str]:
    """Every module of the engine that a file imports, at its top or inside a function."""
    found: set[str] = set()
    known = modules()
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {name for name in found if name.startswith("engine.")}


@pytest.mark.parametrize("above", ROOMS)
def test_a_module_imports_only_its_own_room_and_rooms_below(above: str) -> None:
    for module, path in modules().items():
        if room(module) == above:
            up = {n for n in imports(path) if ROOMS.index(room(n)) < ROOMS.index(above)}
            assert not up, f"{module} is in {above}, which is below {sorted(up)}"


def test_only_the_command_line_imports_the_package_itself() -> None:
    """`engine/__init__.py` offers the API, so an import of it from a room below runs up."""
    for module, path in modules().items():
        for node in import_nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module == "engine" and room(module) != "commands":
                names = {alias.name for alias in node.names} - set(ROOMS)
                assert not names, f"{module} imports {sorted(names)} from the package"


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in modules()} == set(ROOMS)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports(path) & modules().keys() for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    assert len(graph) > 100
    for module in graph:
        visit(module, ())


def test_the_architecture_page_lists_the_rooms_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^([a-z]+) {2,}\S", page.split("## Rooms")[1].split("```")[1], re.M)
    assert tuple(listed) == ROOMS


def test_no_test_module_imports_another() -> None:
    """What tests share lies in tests/support, and fixtures in a conftest."""
    found = []
    for path in sorted((ROOT / "tests").glob("**/*.py")):
        for node in import_nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                (str(path.relative_to(ROOT)), name) for name in names if name.rpartition(".")[2].startswith("test_")
            ]
    assert found == []


def test_no_test_patches_a_name_by_the_path_of_its_module() -> None:
    """A patch goes to an imported module or class, so moving one breaks the import, not a test's meaning."""
    by_path = re.compile(r"""\b(?:setattr|patch|multiple|dict)\(\s*f?["'](?:engine|benchmarks)\.""")
    found = [str(path) for path in sorted((ROOT / "tests").glob("**/*.py")) if by_path.search(path.read_text("utf-8"))]
    assert not found
