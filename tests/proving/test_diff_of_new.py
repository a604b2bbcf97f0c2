"""`engine diff` of a new release shows its parent and its own keys, and tells loudly when what is written changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.commands.main import cli

FAMILY = "torchtitan-llama.yaml"  # one whose meaning is soon made
TEXT = (Path(__file__).resolve().parents[2] / "mappings" / "families" / FAMILY).read_text()
RELEASE = """mapping: 1
name: small
version: 0.1.0
description: A small one
extends: families/torchtitan-llama.yaml
generation: {eos_token_id: [2, 92542]}
expect: {layer: 2}
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the family in it, and nothing else."""
    families = tmp_path / "mappings" / "families"
    families.mkdir(parents=True)
    (families / FAMILY).write_text(TEXT)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"], ["tag", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(*more: str) -> str:
    done = CliRunner().invoke(cli, ["diff", "first", *more])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_a_new_release_shows_its_parent_and_its_own_keys_only(repository: Path) -> None:
    (repository / "mappings" / "small.yaml").write_text(RELEASE)
    told = changed()
    assert told.startswith("mappings/small.yaml: new, small 0.1.0, compared with its parent torchtitan-llama 1.0.0\n")
    assert "eos_token_id" in told and "layer" in told
    assert "q_proj" not in told and len(told.splitlines()) < 30, told


def test_a_new_release_of_a_revision_is_compared_with_the_parent_there(repository: Path) -> None:
    (repository / "mappings" / "small.yaml").write_text(RELEASE)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (["add", "."], [*who, "commit", "-qm", "second"], ["tag", "second"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    (repository / "mappings" / "families" / FAMILY).unlink()
    assert "compared with its parent torchtitan-llama 1.0.0" in changed("second")


def test_changes_of_what_is_written_come_first_and_loudly(repository: Path) -> None:
    family = repository / "mappings" / "families" / FAMILY
    family.write_text(TEXT.replace("{{ rms_norm_eps }}", "{{ rms_norm_eps / 10 }}"))
    told = changed()
    assert told.index("WHAT IS WRITTEN CHANGES") < told.index("rms_norm_eps") < told.index("in the file: config.json")
    assert "**What is written changes.**" in changed("--format", "markdown")
    family.write_text(TEXT.replace("whether the output layer has a weight of its own", "its last layer"))
    told = changed()
    assert "what is written stays the same" in told and "CHANGES" not in told
