"""Chat templates take content as text or as parts, mark what the assistant says, and render everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

import engine
from engine.assets.chat import chat_template, unmarked
from tests.support.chats import TURNS, load
from tests.support.depth import sampled
from tests.support.shards import Model, save

MODEL = Model("v2", layers=3, hidden=64, heads=4, groups=2, ffn=96, vocab=512, bias=False)
LETTERS = {"mlp_letters": MODEL.letters}
TEMPLATES = {path.stem: path for path in (Path(__file__).parents[2] / "mappings/chat_templates").glob("*.jinja")}


def turns_of(name: str) -> list[dict[str, Any]]:
    return TURNS[1:] if name.endswith("eoh") else TURNS


def parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, each text cut into two parts."""
    cut = [(turn, turn["content"][:3], turn["content"][3:]) for turn in turns]
    return [{**turn, "content": [{"type": "text", "text": part} for part in both]} for turn, *both in cut]


def plainly(text: str, turns: list[dict[str, Any]], **how: bool) -> str:
    """Rendered as programs do that know nothing of transformers' own tags."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(**how)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text).render(messages=turns, bos_token="<s>", add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_of_text_are_the_text(name: str, tmp_path: Path, chat_model: Path) -> None:
    tokenizer, _ = load(tmp_path, chat_model, name)
    turns = turns_of(name)
    written = [
        tokenizer.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in (turns, parts(turns))
    ]
    assert written[0] == written[1]
    assert "banana" in written[0] and "[" not in written[0]


@sampled(2)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("trimming", [False, True])
def test_without_marks_it_renders_the_same_in_plain_jinja(
    name: str, trimming: bool, tmp_path: Path, chat_model: Path
) -> None:
    tokenizer, _ = load(tmp_path, chat_model, name)
    turns = turns_of(name)
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    text = unmarked(chat_template(name))
    assert "generation %}" not in text
    for given in (turns, parts(turns)):
        assert plainly(text, given, trim_blocks=trimming, lstrip_blocks=trimming) == theirs


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("listed", [False, True])
def test_the_mask_is_what_the_assistant_says_and_its_end_of_turn(
    name: str, listed: bool, tmp_path: Path, chat_model: Path
) -> None:
    tokenizer, _ = load(tmp_path, chat_model, name)
    turns = [*turns_of(name), {"role": "assistant", "content": "the mat"}]
    given = parts(turns) if listed else turns
    made = tokenizer.apply_chat_template(given, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    end = "<|im_end|>" if name == "internlm2-chat" else "<eoa>"
    assert tokenizer.decode(marked) == f"banana{end}the mat{end}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "content",
    [None, {"type": "text", "text": "x"}, [{"type": "image"}], [{"type": "text", "text": "a"}, {"type": "x"}]],
)
def test_content_that_is_no_text_is_refused_and_not_left_out(
    name: str, content: Any, tmp_path: Path, chat_model: Path
) -> None:
    tokenizer, _ = load(tmp_path, chat_model, name)
    for turn in ({"role": "user", "content": content}, {"role": "assistant", "content": content}, {"role": "user"}):
        with pytest.raises(TemplateError):
            tokenizer.apply_chat_template([turn], tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_stand_as_programs_that_cut_them_out_look_for_them(name: str) -> None:
    text = TEMPLATES[name].read_text()
    assert text.count("generation %}") == 2
    assert text.count("{% generation %}") == text.count("{% endgeneration %}") == 1


def test_programs_that_look_in_the_tokenizers_settings_find_it_without_marks(tmp_path: Path, chat_model: Path) -> None:
    """transformers before chat_template.jinja, and llama.cpp's converter, read `tokenizer_config.json`."""
    from transformers import AutoTokenizer

    (tmp_path / "chat.yaml").write_text(
        "mapping: 1\nname: chat\nversion: 1.0.0\ndescription: A chat\n"
        "extends: families/internlm2.yaml\nchat_template: internlm2-chat\n"
    )
    save(MODEL, tmp_path / "step", tp=2)
    engine.convert(tmp_path / "chat.yaml", tmp_path / "step", tmp_path / "hf", tokenizer=chat_model, settings=LETTERS)
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    marked = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert settings["chat_template"] == unmarked(marked) != marked
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template.strip() == marked.strip()
