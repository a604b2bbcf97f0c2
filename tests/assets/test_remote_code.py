"""Remote code: the user's files are copied and named, never run; what does not fit is refused before writing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import engine
from engine.assets.remote_code import read_code, remote_facts
from engine.commands.main import cli
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from tests.support.genuine import FIXTURES

MAPPING = "families/internlm2-official.yaml"
SOURCE = FIXTURES / "v2_tp2_pp2"
CONFIGURATION = b"""raise RuntimeError('this ran')
from transformers.configuration_utils import PretrainedConfig
class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
"""
MODELING = b"""raise RuntimeError('this ran')
import torch
from .configuration_internlm2 import InternLM2Config
try:
    import flash_attn
except ImportError:
    pass
class InternLM2Model: '\\d'
class InternLM2ForCausalLM: pass
"""
FILES = {"configuration_internlm2.py": CONFIGURATION, "modeling_internlm2.py": MODELING}


def folder(path: Path, **changed: bytes | None) -> Path:
    """The two files, some changed, left out (None) or added: `x_y` is x_y.py."""
    path.mkdir()
    for name, data in {**FILES, **{f"{name}.py": data for name, data in changed.items()}}.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


def converted(out: Path, code: Path | None, **more: Any) -> dict[str, Any]:
    engine.convert(MAPPING, SOURCE, out, code=code, **more)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def refused(tmp_path: Path, code: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        engine.convert(MAPPING, SOURCE, tmp_path / "hf", code=code)
    assert not (tmp_path / "hf").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"code"}
    return caught.value


def test_the_files_are_copied_byte_by_byte_and_named(tmp_path: Path) -> None:
    config = converted(tmp_path / "hf", folder(tmp_path / "code"))
    for name, data in FILES.items():
        assert (tmp_path / "hf" / name).read_bytes() == data
    assert config["auto_map"] == {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
    manifest = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert FILES.keys() <= manifest["files"].keys()
    assert not engine.api.verify(tmp_path / "hf").problems


def test_the_card_says_how_to_load_and_in_which_versions(tmp_path: Path) -> None:
    converted(tmp_path / "hf", folder(tmp_path / "code"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    assert ">=4.41,<4.49" in card
    assert "`configuration_internlm2.py` and `modeling_internlm2.py`" in card


def test_without_code_the_card_shows_no_loading_that_cannot_work(tmp_path: Path) -> None:
    report = engine.convert(MAPPING, SOURCE, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "from_pretrained" not in card
    assert "--code DIR" in card and "trust_remote_code" in card and ">=4.41,<4.49" in card
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert any("--code DIR" in notice for notice in report.notices)


def test_a_reward_model_names_the_reward_class(tmp_path: Path) -> None:
    code = folder(tmp_path / "code", modeling_internlm2=MODELING + b"class InternLM2ForRewardModel: pass\n")
    plan = engine.plan(MAPPING, SOURCE)
    reward = replace(plan, names={**plan.names, "head": "reward"})
    made = read_code(reward, code)
    assert made is not None
    assert made.auto_map == {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
    }
    facts = remote_facts(reward, made)
    assert facts is not None and facts["auto_class"] == "AutoModel"


def test_the_command_line_and_a_saved_plan_take_it_too(tmp_path: Path) -> None:
    code = folder(tmp_path / "code")
    ran = CliRunner().invoke(
        cli, ["run", "-m", MAPPING, "-s", str(SOURCE), "-o", str(tmp_path / "one"), "--code", str(code), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    engine.api.save_plan(tmp_path / "plan.json", MAPPING, SOURCE)
    engine.api.run_plan(tmp_path / "plan.json", tmp_path / "two", code=code)
    one, two = ((tmp_path / name / "config.json").read_bytes() for name in ("one", "two"))
    assert one == two and b"auto_map" in one


def test_the_way_back_ignores_the_code(tmp_path: Path) -> None:
    converted(tmp_path / "hf", folder(tmp_path / "code"))
    engine.reverse(MAPPING, tmp_path / "hf", tmp_path / "back")


def test_what_a_module_imports_from_beside_itself_is_copied(tmp_path: Path) -> None:
    modeling = MODELING + b"if True:\n    from .helpers import f\n"
    code = folder(tmp_path / "code", modeling_internlm2=modeling, helpers=b"def f(): pass\n")
    converted(tmp_path / "hf", code)
    assert (tmp_path / "hf" / "helpers.py").read_bytes() == b"def f(): pass\n"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"modeling_internlm2": None}, "there is no `modeling_*.py`"),
        ({"configuration_internlm2": None}, "there is no `configuration_*.py`"),
        ({"modeling_internlm2": b"x = 1\n"}, "`InternLM2ForCausalLM` is in none of the files"),
        ({"modeling_copy": MODELING}, "`InternLM2ForCausalLM` is in several files"),
        ({"configuration_internlm2": CONFIGURATION.replace(b"M2C", b"MC")}, "`InternLM2Config` is in none"),
        ({"configuration_internlm2": CONFIGURATION.replace(b'm2"', b'"')}, "another model type"),
        ({"configuration_internlm2": CONFIGURATION.replace(b"model_type", b"kind")}, "another model type"),
        ({"configuration_internlm2": CONFIGURATION.replace(b'"internlm2"', b"str()")}, "something computed"),
        ({"tokenization_internlm2": b"class T: pass\n"}, "does not need: tokenization_internlm2.py"),
        ({"modeling_internlm2": b"<!DOCTYPE html>"}, "is not Python"),
        ({"modeling_internlm2": b"x = '\0'"}, "is not Python"),
        ({"modeling_internlm2": b"(" * 100_000}, "is not Python"),
        ({"modeling_internlm2": b"\xff\xfe"}, "is not Python"),
        ({"modeling_internlm2": MODELING + b"# caf\xe9\n"}, "is not Python"),  # transformers reads it as UTF-8
        ({"modeling_internlm2": MODELING + b"from .other import y\n"}, "imports `other.py`"),
        ({"modeling_internlm2": MODELING + b"from . import other\n"}, "imports `other.py`"),
        ({"modeling_internlm2": MODELING + b"from ..llama import y\n"}, "imports from another folder"),
        ({"modeling_internlm2": MODELING + b"#" * (5 << 20)}, "too large"),
        ({"modeling_internlm2": CONFIGURATION, "configuration_internlm2": MODELING}, "imports from itself"),
    ],
)  # fmt: skip
def test_files_that_are_not_the_models_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    error = refused(tmp_path, folder(tmp_path / "code", **changed))
    assert error.code == "E503"
    assert said in str(error)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", ".hidden", "a-b.py", "__pycache__"])
def test_anything_else_in_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    code = folder(tmp_path / "code")
    (code / name).mkdir() if name.startswith("__") else (code / name).write_text("")
    error = refused(tmp_path, code)
    assert error.code == "E503" and name in error.message


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "nul"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    code = tmp_path / "code"
    if kind == "file":
        code.write_text("")
    elif kind == "empty":
        code.mkdir()
    assert refused(tmp_path, tmp_path / "co\0de" if kind == "nul" else code).code == "E503"


def test_a_mapping_whose_target_transformers_has_takes_no_code(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="built in") as caught:
        engine.convert("families/internlm2.yaml", SOURCE, tmp_path / "hf", code=folder(tmp_path / "code"))
    assert caught.value.code == "E001"
    assert not (tmp_path / "hf").exists()


OFFICIAL = ["chat-1_8b", "chat-7b", "chat-20b", "_5-1_8b-chat", "_5-7b-chat", "_5-7b-chat-1m", "_5-20b-chat"]


@pytest.mark.parametrize("release", OFFICIAL)
def test_a_chat_release_has_an_official_form_that_is_the_same_chat(release: str) -> None:
    stock = f"internlm2{release}" if release.startswith("_") else f"internlm2-{release}"
    mine, other = load_mapping(f"{stock}-official"), load_mapping(stock)
    assert (mine.model_type, mine.remote_code is not None) == ("internlm2", True)
    for part in ("tokenizer", "generation", "chat_template", "expect", "layout", "model_types"):
        assert getattr(mine, part) == getattr(other, part), part
    options = {name: option.default for name, option in other.options.items()}
    assert {name: option.default for name, option in mine.options.items()} == options | {"reward_token_id": None}


def child(path: Path, target: str) -> Path:
    path.write_text(
        "mapping: 1\nname: mine\nversion: 1.0.0\ndescription: Mine\n"
        f"extends: families/internlm2-official.yaml\ntarget: {target}\n"
    )
    return path


def test_any_mapping_can_say_that_its_target_is_remote_code(tmp_path: Path) -> None:
    """The classes, the type and the versions are the mapping's; the engine knows no model."""
    mapping = child(
        tmp_path / "mine.yaml",
        "{model_type: nova, architecture: NovaLM, transformers: '==4.99', remote_code: {auto_map: "
        '{AutoConfig: NovaConfig, AutoModel: NovaLM, AutoModelForCausalLM: "{{ omit }}"}}}',
    )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "configuration_nova.py").write_text("class NovaConfig:\n    model_type: str = 'nova'\n")
    (tmp_path / "code" / "modeling_nova.py").write_text("class NovaLM: pass\n")
    engine.convert(mapping, SOURCE, tmp_path / "hf", code=tmp_path / "code")
    auto_map = json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_nova.NovaConfig", "AutoModel": "modeling_nova.NovaLM"}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "==4.99" in card and "AutoModel.from_pretrained" in card


def test_a_child_can_say_that_its_target_is_not_remote(tmp_path: Path) -> None:
    mapping = load_mapping(child(tmp_path / "mine.yaml", "{model_type: internlm2, remote_code: null}"))
    assert mapping.remote_code is None


@pytest.mark.parametrize(
    "remote",
    ["{}", "{transformers: x}", "{auto_map: {AutoModel: X}}", "{transformers: x, auto_map: {AutoConfig: X}}", "yes"],
)
def test_half_a_statement_of_remote_code_does_not_fit_the_schema(tmp_path: Path, remote: str) -> None:
    own = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "mappings/families/internlm2.yaml").read_text()
    own.write_text(text.replace("architecture: LlamaForCausalLM\n", f"architecture: L\n  remote_code: {remote}\n"))
    with pytest.raises(EngineError) as caught:
        load_mapping(own)
    assert caught.value.code == "E102"
    assert "remote_code" in str(caught.value)
