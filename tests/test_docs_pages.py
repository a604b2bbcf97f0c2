"""The pages are true: commands exist, their output is what the engine says, complete files lint."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

from engine import api
from engine.commands.main import cli
from engine.discover import files
from engine.explaining.codes import list_codes
from engine.language.search import list_names
from tests.support.families import model_of, save_family
from tests.support.shards import Model, save, write_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every `engine …` in console blocks; code spans with an option end in `…`."""
    found = []
    for page in PAGES:
        lines = [line.removeprefix("$ ") for block in fenced(page, "console") for line in block.split("\n")]
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines += [f"{span} …" for span in re.findall(r"`(engine [a-z][^`]*)`", prose) if " --" in span]
        for line in lines:
            line = re.sub(r"\s+#.*", "", line)
            if line.startswith("engine "):
                found.append((page.relative_to(ROOT).as_posix(), line.split(" > ")[0].removesuffix(" &")))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_line_of_the_pages_parses(page: str, line: str) -> None:
    """Its command and options exist, and what it must have is there."""
    words = shlex.split(line)[1:]
    command = cli.commands.get(words[0]) if words else None
    assert command is not None or words[:1] in (["--version"], ["--help"]), f"{page}: {line}"
    if command is None:
        return
    whole = re.search(r"[\[…]", line) is None
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    used = [word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    assert set(used) <= known | {"--help", "-h"}, f"{page}: {line}"
    if whole and not {"--help", "-h"} & set(used):
        command.make_context(words[0], words[1:], parent=click.Context(cli))


def layouts() -> list[str]:
    return [b for p in PAGES for b in fenced(p, "yaml") if re.search(r"^layout: 1$", b, re.MULTILINE)]


@pytest.mark.parametrize("text", layouts())
def test_a_complete_layout_of_the_pages_is_the_bundled_one(text: str) -> None:
    name = yaml.safe_load(text)["name"]
    assert (ROOT / "mappings" / "layouts" / f"{name}.yaml").read_text() == text


def test_complete_mappings_of_the_pages_lint_and_are_in_their_usual_form(tmp_path: Path) -> None:
    complete = [b for p in PAGES for b in fenced(p, "yaml") if re.search(r"^mapping: 1$", b, re.MULTILINE)]
    assert complete
    paths = [tmp_path / f"{yaml.safe_load(text)['name']}.yaml" for text in complete]
    for path, text in zip(paths, complete, strict=True):
        path.write_text(text)
    for path in paths:
        assert api.lint([path]) == []


def test_parts_of_files_are_yaml() -> None:
    for page in PAGES:
        for text in fenced(page, "yaml"):
            yaml.safe_load(text)
        for text in fenced(page, "json"):
            json.loads(text)


def test_the_drafts_of_the_release_page_are_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "adding-a-release.md").read_text()
    source = str(ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2")
    drafted = CliRunner().invoke(cli, ["new", "--src", source, "--name", "tiny-internlm2"]).stdout
    assert drafted in page
    told = CliRunner().invoke(cli, ["inspect", source]).stdout.split("\n")[1:4]
    assert "\n".join(told) in page


def test_the_framework_page_shows_what_a_draft_without_a_family_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("meta", hidden=64, heads=8, groups=2, vocab=256, embedding="by_vocab", multiple_of=32)
    save_family(model, tmp_path / "llama-ckpt", tp=2)
    page = ROOT / "docs" / "adding-a-framework.md"
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "llama-ckpt")]).stdout.split("\n")[1:3]
    assert "\n".join(told) in page.read_text()
    others = [name for name in list_names() if "meta" not in name]
    monkeypatch.setattr(files, "list_names", lambda: others)
    text = api.new_mapping(tmp_path / "llama-ckpt").text
    (rules,) = (block for block in fenced(page, "yaml") if block.startswith("rules:"))
    assert all(line in text.split("\n") for line in rules.split("\n"))
    decided = re.findall(r"meta-llama.yaml:\d+  decide: (.*)", page.read_text())
    assert len(decided) == 2
    assert all(d in [text for _, text in api.new_mapping(tmp_path / "llama-ckpt").decisions] for d in decided)


def refused(*words: str) -> str:
    return CliRunner().invoke(cli, ["plan", "-m", *words]).stderr


def test_the_troubleshooting_page_shows_what_the_engine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures = ROOT / "tests" / "fixtures" / "internevo"
    monkeypatch.chdir(tmp_path)
    for name, kind in (("mixed", "v2_tp2_pp2"), ("missing", "v2_tp2_pp2"), ("letters", "v2_tp4_pp1_nohf")):
        shutil.copytree(fixtures / kind, name)
    shutil.copytree(fixtures / "v1_tp2_pp2", "step")
    Path("dist").mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        Path("dist", name).touch()
    Path("missing/model_tp1_pp1.pt").unlink()
    state = {n: t.clone() for n, t in torch.load("mixed/model_tp1_pp1.pt", weights_only=True).items()}
    state["layers.0.feed_forward.w2.weight"] = state["layers.0.feed_forward.w2.weight"][:, :-4].clone()
    torch.save(state, "mixed/model_tp1_pp1.pt")
    save(Model(family="v1"), Path("padded"), tp=2)
    write_config(Model(family="v1", vocab=30), Path("padded"), 1, "tensor", 2, 1, 1, False)
    page = fenced(ROOT / "docs" / "troubleshooting.md", "text")
    told = [
        refused("internlm2", "-s", "mixed"),
        refused("internlm2", "-s", "letters"),
        refused("internlm2", "-s", "missing"),
        refused("internlm2", "-s", "step"),
        refused("internlm2", "-s", "dist"),
    ]
    for text in told:
        assert re.sub(r":\d+:\d+\n", "\n", text) in [re.sub(r":\d+:\d+\n", "\n", shown) for shown in page]
    padded = refused("internlm", "-s", "padded").split("\n")
    assert any("\n".join(padded[2:4]) in shown for shown in page)


def test_messages_of_the_troubleshooting_page_have_known_codes_and_pages() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    codes = [text[:4] for text in fenced(page, "text") if re.match(r"E\d{3} ", text)]
    assert len(codes) >= 10
    for code in codes:
        assert code in list_codes()
        assert (ROOT / "docs" / "codes" / f"{code}.md").is_file()
    assert len(re.findall(r"^## \d+\. ", page.read_text(), re.MULTILINE)) == 10


def test_snippets_are_data_whose_prefixes_the_page_lists() -> None:
    snippets = json.loads((ROOT / "docs" / "snippets" / "mappings.code-snippets").read_text())
    page = (ROOT / "docs" / "editor.md").read_text()
    for snippet in snippets.values():
        assert f"`{snippet['prefix']}`" in page
        text = "\n".join(snippet["body"])
        text = re.sub(r"\$\{\d\|([^,|]*)[^}]*\|\}", r"\1", text)
        text = re.sub(r"\$\{\d:\$\{TM_FILENAME_BASE\}\}", "name", text)
        text = re.sub(r"\$\{\d:((?:[^}\\]|\\.)*)\}", r"\1", text).replace("\\}", "}").replace("\\$", "$")
        yaml.safe_load(text.replace("$0", ""))
