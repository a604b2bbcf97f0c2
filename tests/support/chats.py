"""Chats: messages, and a tokenizer that knows the names that a template uses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

from engine.assets.chat import chat_template
from engine.assets.tokenizer import convert_tokenizer

SPEC = {"bos": "<s>", "eos": "</s>", "pad": "</s>"}
TURNS = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": " 你好  x\n"},
    {"role": "assistant", "content": "banana"},
    {"role": "user", "content": "on a mat"},
]
NAMES = ["<|im_start|>", "<|im_end|>", "<|plugin|>", "<|interpreter|>"]


def load(folder: Path, model_file: Path, template: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    files, theirs = converted(model_file)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "chat_template.jinja").write_text(chat_template(template))
    return AutoTokenizer.from_pretrained(folder), theirs


@cache  # a model is trained once for a module
def converted(model_file: Path) -> tuple[dict[str, bytes], Any]:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    rename = {theirs.piece_to_id(f"[U{i}]"): name for i, name in enumerate(NAMES)}
    return convert_tokenizer(model_file, {**SPEC, "rename": rename}), theirs
