"""What `lint` says of values that contradict themselves, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from engine.language.keys import Key, Limits
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile, Option
from engine.proving.values import check_declared, check_options, check_tokens

MAPPING = load_mapping("families/internlm2.yaml")
TOKENS = {"bos": "<s>", "eos": "</s>", "pad": "</s>"}


def config(**tokens: int) -> dict[str, Any]:
    return {**MAPPING.config, **{f"{name}_token_id": number for name, number in tokens.items()}}


def told(found: Iterable[Any]) -> str:
    return "\n".join(one.message for one in found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": {**TOKENS, "bos": "</s>"}}, "`bos` of the tokenizer is `</s>`, which ends a text"),
        ({"tokenizer": {**TOKENS, "eos": "<s>"}}, "`eos` of the tokenizer is `<s>`, which begins a text"),
        ({"tokenizer": {"bos": "</s>", "eos": "<s>"}}, "`bos` and `eos` of the tokenizer are exchanged"),
        ({"config": config(bos=2)}, "`bos_token_id` of `config` is 2; `<s>` is 1"),
        ({"tokenizer": None, "config": config(bos=2, eos=1)}, "`eos_token_id` of `config` are exchanged"),
        ({"generation": {"eos_token_id": 7}}, "`eos_token_id` of `generation` is 7; `config` says 2"),
        ({"generation": {"eos_token_id": [2, 99]}, "expect": {"vocab": 99}}, "is 99; the vocabulary has 99 rows"),
        (
            {"tokenizer": {**TOKENS, "rename": {"99": "x"}}, "expect": {"vocab": 99}},
            "`rename` of the tokenizer names 99",
        ),
        (
            {"tokenizer": {**TOKENS, "rename": {"9": "<|im_start|>"}}, "generation": {"eos_token_id": [2, 9]}},
            "generation stops at 9, `<|im_start|>`, which begins",
        ),
    ],
)
def test_tokens_that_contradict_each_other_are_told(changed: dict[str, Any], message: str) -> None:
    assert told(check_tokens(MAPPING)) == ""
    assert message in told(check_tokens(replace(MAPPING, **changed)))


def option(default: Any, choices: tuple[Any, ...] | None = None, **limits: Any) -> MappingFile:
    made = Option("o", "integer", default, "", choices, MAPPING.place, Limits(("integer",), **limits))
    return replace(MAPPING, options={"o": made})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (option(None, (1, "x")), "choice `x` of option `o` is not"),
        (option("x"), "the default of option `o` is `x`"),
        (option(9, max=3), "the default of option `o` is `9`"),
        (option(None, min=4, max=3), "`min` is above its `max`"),
    ],
)
def test_options_that_can_have_no_value_are_told(mapping: MappingFile, message: str) -> None:
    assert message in told(check_options(mapping))


def test_a_default_that_its_own_key_does_not_allow_is_told() -> None:
    layout = load_layout(MAPPING.layout)
    key = Key("k", Limits(("integer",)), MAPPING.place, default="x")
    assert "the default of `k` is x" in told(check_declared(replace(MAPPING, keys={"source": {"k": key}}), layout))
