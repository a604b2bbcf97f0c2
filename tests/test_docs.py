"""The documentation is true: its mapping files lint and convert, its tables are complete, its links resolve."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import engine
from engine.commands.main import cli
from engine.explaining.codes import list_codes
from engine.proving.lint import lint_file
from tests.support.depth import sampled
from tests.support.shards import same

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "mapping-guide.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@cache
def mappings() -> dict[str, str]:
    """Every complete mapping file of the documentation, by name."""
    complete = [text for page in PAGES for text in blocks(page) if re.search(r"^mapping: 1$", text, re.MULTILINE)]
    return {yaml.load(text, yaml.CSafeLoader)["name"]: text for text in complete}


def same_files(got: Path, wanted: Path) -> None:
    for path in wanted.glob("model_tp*.pt"):
        same(dict(torch.load(got / path.name, weights_only=True)), dict(torch.load(path, weights_only=True)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in mappings().items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_there_are_mapping_files() -> None:
    assert {"my-release-7b", "internlm2-qk-norm", "small-internlm2"} <= set(mappings())


@pytest.mark.parametrize("name", sorted(mappings()))
def test_a_mapping_file_has_no_findings(name: str, folder: Path) -> None:
    assert lint_file(str(folder / f"{name}.yaml")) == []
    assert any(f"`{name}.yaml`" in page.read_text() for page in PAGES)


@sampled(2)
@pytest.mark.parametrize("fixture", ["v2_tp2_pp2", "e052_v2_tp2_pp1_mult64"])
def test_the_family_of_the_guide_converts_and_inverts_genuine_checkpoints(fixture: str, folder: Path) -> None:
    own, source = str(folder / "small-internlm2.yaml"), FIXTURES / fixture
    ours = dict(engine.iter_tensors(engine.plan(own, source)))
    same(ours, dict(engine.iter_tensors(engine.plan("families/internlm2.yaml", source))))
    engine.convert(own, source, folder / "hf")
    engine.reverse(own, folder / "hf", folder / "back", like=source)
    same_files(folder / "back", source)


@sampled(2)
@pytest.mark.parametrize("fixture", ["v2_tp2_pp2", "e052_v2_tp2_pp1_mult64"])
def test_the_extended_family_of_the_guide_converts_and_inverts(fixture: str, folder: Path) -> None:
    """A genuine checkpoint with norms of queries and keys put in; in one of the two they are stored in pairs."""
    source = folder / "step"
    shutil.copytree(FIXTURES / fixture, source)
    text = torch.load(source / "config_file.pt", weights_only=False)
    torch.save(text.replace("INTERNLM2_PUBLIC", "INTERNLM2_QK_NORM"), source / "config_file.pt")
    norm = torch.arange(8.0)
    for path in source.glob("model_tp*.pt"):
        state = {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True).items()}
        for name in [name for name in state if name.endswith("attention_norm.weight")]:
            for letter in "qk":
                state[name.replace("attention_norm", f"attention.{letter}_norm")] = norm.clone()
        torch.save(state, path)
    own = str(folder / "internlm2-qk-norm.yaml")
    engine.convert(own, source, folder / "hf")
    wanted = norm if fixture == "v2_tp2_pp2" else norm.view(4, 2).t().flatten()
    with safe_open(folder / "hf" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.3.self_attn.q_norm.weight"), wanted)
        assert torch.equal(file.get_tensor("model.layers.3.self_attn.k_norm.weight"), wanted)
    engine.reverse(own, folder / "hf", folder / "back", like=source)
    same_files(folder / "back", source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), link


def properties(schema: Any) -> set[str]:
    return set(schema["properties"])


def test_the_guide_has_every_word_of_the_schema() -> None:
    schema = json.loads((ROOT / "schemas" / "mapping.schema.json").read_text())
    head, rule = re.split(r"^## All words of a rule$", GUIDE.read_text(), flags=re.MULTILINE)

    def words(table: str) -> set[str]:
        rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
        return {word for row in rows for word in re.findall(r"\w+", row)}

    assert words(head.split("## All words of a mapping")[1]) == properties(schema)
    assert words(rule.split("## All words of a layout")[0]) == properties(schema["properties"]["rules"]["items"])


def test_codes_named_in_the_documentation_exist() -> None:
    known = list_codes()
    for page in PAGES:
        for code in re.findall(r"\b[EL]\d{3}\b", page.read_text()):
            assert code in known, (page, code)


def command_lines() -> list[str]:
    """Every `engine …` line of a console block, in all pages."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            found += [
                line[2:].split("  #")[0].removesuffix(" &").strip()
                for line in block.splitlines()
                if line.startswith("$ engine ")
            ]
    return sorted(set(found))


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_of_the_documentation_is_one(line: str) -> None:
    """The command exists and its options parse; it is not run."""
    name, *arguments = shlex.split(line)[1:]
    command = cli.commands.get(name)
    if name.startswith("-"):
        return
    assert command is not None, line
    command.make_context(name, arguments, resilient_parsing=False)


def test_every_command_is_in_the_readme_and_in_the_page_of_commands() -> None:
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "commands.md").read_text()
    for name in cli.commands:
        assert f"`engine {name}" in readme, name
        assert re.search(rf"(engine |`){name}\b", page), name
