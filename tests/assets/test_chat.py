"""Chat templates give the ids that upstream's prompts give; generation stops at the end of a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.assets.chat import chat_template, unmarked
from engine.assets.generation import generation_config, within
from engine.assets.model_card import model_card
from engine.errors import EngineError
from tests.support.chats import TURNS, load


def ids(tokenizer: Any, turns: list[dict[str, str]], prompt: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)


def test_internlm2_chat_gives_special_ids_around_sentencepiece_ids(tmp_path: Path, chat_model: Path) -> None:
    tokenizer, theirs = load(tmp_path, chat_model, "internlm2-chat")
    start, end = theirs.piece_to_id("[U0]"), theirs.piece_to_id("[U1]")
    expected = [1]
    for turn in TURNS:
        text = f"{turn['role']}\n{turn['content']}"
        expected += [start, *theirs.encode(text), end, *theirs.encode("\n")]
    assert ids(tokenizer, TURNS, prompt=False) == expected
    assert ids(tokenizer, TURNS) == [*expected, start, *theirs.encode("assistant\n")]


def test_internlm2_chat_names_tools_by_their_tokens(tmp_path: Path, chat_model: Path) -> None:
    tokenizer, _ = load(tmp_path, chat_model, "internlm2-chat")
    turns = [{"role": "environment", "name": "plugin", "content": "1"}, {"role": "user", "name": "ann", "content": "2"}]
    text = tokenizer.decode(ids(tokenizer, turns, prompt=False))
    assert text == ("<s><|im_start|>environment name=<|plugin|>\n1<|im_end|>\n<|im_start|>user name=ann\n2<|im_end|>\n")


def test_internlm_chat_gives_sentencepiece_ids_of_upstreams_prompt(tmp_path: Path, chat_model: Path) -> None:
    tokenizer, theirs = load(tmp_path, chat_model, "internlm-chat")
    prompt = "<|System|>:the cat\n<|User|>: 你好  x\n\n<|Bot|>:banana<eoa>\n<|User|>:on a mat\n<|Bot|>:"
    assert ids(tokenizer, TURNS) == [1, *theirs.encode(prompt)]


def test_the_first_internlm_chat_begins_every_round_with_bos(tmp_path: Path, chat_model: Path) -> None:
    tokenizer, theirs = load(tmp_path, chat_model, "internlm-chat-eoh")
    rounds = ["<|User|>: 你好  x\n<eoh>\n<|Bot|>:banana<eoa>\n", "<|User|>:on a mat<eoh>\n<|Bot|>:"]
    assert ids(tokenizer, TURNS[1:]) == [1, *theirs.encode(rounds[0]), 1, *theirs.encode(rounds[1])]


@pytest.mark.parametrize("name", ["internlm2-chatt", "../chat_templates/internlm2-chat", "../layouts/internevo", ""])
def test_an_unknown_template_is_named_beside_the_known(name: str) -> None:
    with pytest.raises(EngineError) as caught:
        chat_template(name)
    assert caught.value.code == "E002"
    assert "internlm2-chat" in str(caught.value.expected)


def test_a_template_that_is_no_jinja_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "mine.jinja").write_text("a\n{% for x %}")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    with pytest.raises(EngineError, match="not valid Jinja") as caught:
        chat_template("mine")
    assert str(caught.value.place) == "mine.jinja:2"


@pytest.mark.parametrize(
    "text", [b"\xff{{ x }}", b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}", b"{{ " + b"9" * 5000 + b" }}"]
)
def test_a_template_that_cannot_be_read_or_parsed_is_refused(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "mine.jinja").write_bytes(text)
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    with pytest.raises(EngineError, match="not valid Jinja") as caught:
        chat_template("mine")
    assert caught.value.code == "E502"


@pytest.mark.parametrize(
    "marks",
    ["{%- generation %} X {%- endgeneration %}", "{% generation -%}\nX{% endgeneration -%}\n", "a {%generation%}\nX\n "
     "{% endgeneration %}", "a {% generation -%} X {% endgeneration -%} b",
     "\n  {% generation %}\nX\n  {% endgeneration %}\n"],
)  # fmt: skip
def test_a_template_without_marks_says_what_it_says_with_them(marks: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import render_jinja_template

    text = "{% for m in messages %}" + marks.replace("X", "{{ m.content }}") + "{% endfor %}"
    messages = [{"role": "assistant", "content": "yes\n"}]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(unmarked(text))
    assert plain.render(messages=messages) == render_jinja_template([messages], chat_template=text)[0][0]


def test_generation_settings_load_in_transformers(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 92544}
    (tmp_path / "generation_config.json").write_bytes(generation_config({"eos_token_id": [2, 92542]}, config))
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, [2, 92542], 2)


def test_ids_from_the_end_of_the_vocabulary_on_are_left_out_and_told() -> None:
    kept, told = within({"eos_token_id": [2, 91, 92], "pad_token_id": 92, "top_k": 92}, 92)
    assert kept == {"eos_token_id": [2, 91], "top_k": 92} and "token ids 92, 92 of" in told[0]
    assert within({"eos_token_id": 92}, 93) == within({"eos_token_id": 92}, None) == ({"eos_token_id": 92}, [])


@pytest.mark.parametrize("wrong", [92542, -1, "</s>", True, [2, 256]])
def test_an_eos_that_the_model_does_not_have_is_refused(wrong: object) -> None:
    with pytest.raises(EngineError) as caught:
        generation_config({"eos_token_id": wrong}, {"vocab_size": 256})
    assert caught.value.code == "E502"


FACTS: dict[str, Any] = {
    "mapping": "internlm2-7b",
    "mapping_version": "1.0.0",
    "architecture": "LlamaForCausalLM",
    "layout": "internevo",
    "mode": "tensor",
    "ranks": {"tp": 2, "pp": 4},
    "decisions": [{"variant": "mlp_letters", "choice": "w2_is_up", "how": "shapes", "evidence": "ffn | 11008\n<b>"}],
    "dtype": "bfloat16",
    "sizes": {"ffn": 11008},
    "bytes": 15_500_000_000,
    "files": ["model.safetensors"],
    "notices": ["left alone: `x`"],
}


def test_the_card_tells_source_and_decisions() -> None:
    card = model_card(FACTS).decode()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in (
        "| mapping | `internlm2-7b` version 1.0.0 |",
        "| tp | 2 |",
        "| ffn | 11,008 |",
        "| size | 15.5 GB |",
        "| `mlp_letters` | `w2_is_up` | shapes | ffn \\| 11008 &lt;b&gt; |",
        "- `model.safetensors`",
    ):
        assert line in card.splitlines()


def test_the_card_of_another_model_does_not_name_internlm() -> None:
    facts = {**FACTS, "mapping": "megatron-mixtral", "architecture": "MixtralForCausalLM", "layout": "megatron"}
    assert "internlm" not in model_card(facts).decode()


def test_the_card_is_the_same_for_the_same_facts_in_another_order() -> None:
    other = {**dict(reversed(FACTS.items())), "ranks": {"pp": 4, "tp": 2}}
    assert model_card(FACTS) == model_card(other)


def test_the_card_shows_how_to_load_a_reward_model() -> None:
    card = model_card({**FACTS, "architecture": "LlamaForSequenceClassification"}).decode()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert json.dumps("auto") in card
