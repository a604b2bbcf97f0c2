"""The wheel is complete: what the engine reads at run time ships inside it and is found there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.depth import deep

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_every_mapping_schema_and_code_page_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [
        path.relative_to(ROOT).as_posix()
        for folder in ("docs/codes", "mappings", "schemas")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
    assert data
    assert {f"engine/{name}" for name in data} <= names
    assert "engine/py.typed" in names


def test_every_module_and_nothing_foreign_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine").rglob("*.py")}
    assert modules <= set(names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"engine"}


def test_every_template_is_in_the_wheel(wheel: Path) -> None:
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "engine").glob("*/templates/*")}
    assert {"engine/show/templates/view.html.j2", "engine/assets/templates/model_card.md.j2"} <= templates
    assert templates <= set(zipfile.ZipFile(wheel).namelist())


@deep  # what is in it is looked at above
def test_an_unpacked_wheel_finds_its_own_mappings_schemas_and_code_pages(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import engine\n"
        "from engine.commands.main import cli\n"
        f"assert engine.__file__.startswith({str(site)!r}), engine.__file__\n"
        "from engine.explaining.codes import explain_code, list_codes\n"
        "assert all(explain_code(code).startswith(f'# {code}: ') for code in list_codes())\n"
        "cli.main(['lint'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stderr


def test_the_lock_pins_everything_by_hash_and_leaves_torch_and_its_gpu_parts_out() -> None:
    text = (ROOT / "requirements-dev.lock").read_text()
    entries = [entry for entry in text.replace("\\\n", "").splitlines() if entry.strip()]
    for entry in entries:
        assert "==" in entry and "--hash=sha256:" in entry, entry
        name = entry.split("==")[0]
        assert not name.startswith(("torch", "nvidia", "triton", "cuda")), name
    assert "://" not in text


def test_the_lock_covers_every_dependency_that_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {line.split("==")[0] for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if "==" in line}
    for requirement in wanted:
        name = requirement.split(">=")[0].lower().replace("_", "-")
        assert name in names or name == "torch", name
