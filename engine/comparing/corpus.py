"""Texts and conversations on which two tokenizers, or two chat templates, are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_TEXTS = (
    "", " ", "Hello", " Hello", "hello world", "Hello, world! How are you?", "HELLO WORLD",
    "The quick brown fox jumps.", "  two  spaces ", "trailing space ", "\n", "\n\n",
    "line one\nline two\r\nline three", "\ttabbed\t\ttext", "1234567890", "3.14159", "1,000,000",
    "2026-11-28T03:39:53Z", "x = y ** 2 + 1", "a\x00b", "def f(x):\n    return x + 1  # comment\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }", '{"key": ["value", 1, true, null]}',
    "<html><body class=\"a\">text</body></html>", "SELECT * FROM t WHERE a <> 'b';",
    "https://example.com/path?query=1&other=%20", "user@example.com", "C:\\Users\\name",
    "$E = mc^2$ and \\frac{1}{2}", "你好，世界！", "书生·浦语大模型", "中英 mixed 文本 with English",
    "日本語のテキスト、カタカナ", "한국어 문장입니다", "Привет, мир", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "Xin chào thế giới", "Grüße aus Köln, naïve café",
    "e\u0301 cafe\u0301", "Ａ①ﬁ\u3000\xa0\u200b—", "👩\u200d👩\u200d👧 🏳️\u200d🌈 🤖",
    "\U0010fffd \ufffd", "▁a ▁▁b", "…—–''\"\"", "aaaaaaaaaaaaaaaaaaaaaaaa", "========", "----------",
    "!!!???", "....", "ha" * 40, " " * 17, "\n" * 5, "don't can't I'm we've you'll",
    "antidisestablishmentarianism", "CamelCaseIdentifier snake_case_identifier kebab-case",
)  # fmt: skip


def texts(names: Sequence[str], pieces: Sequence[str]) -> Iterator[str]:
    """Texts of many kinds, the names of special tokens inside text, and joins of a vocabulary's own pieces.

    Args:
        names: of special tokens, of both sides.
        pieces: a vocabulary.
    """
    yield from _TEXTS
    for name in names:
        yield from (name, f"a {name} b", f"a{name}b", f"{name}{name}")
    step = max(1, len(pieces) // 500)
    some = [piece.replace("▁", " ").replace("Ġ", " ") for piece in pieces[::step]]
    for start in range(0, len(some), 20):
        yield "".join(some[start : start + 20])
        yield " ".join(some[start : start + 20])


_USER = {"role": "user", "content": "What is 2 + 2?"}
_SYSTEM = {"role": "system", "content": "You are a careful assistant."}
_ANSWER = {"role": "assistant", "content": "It is 4."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}

# Name → messages, tools, and whether the assistant is to speak next.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "a question": ([_USER], None, True),
    "a question and its answer": ([_USER, _ANSWER], None, False),
    "a system message": ([_SYSTEM, _USER], None, True),
    "several turns": ([_SYSTEM, _USER, _ANSWER, {"role": "user", "content": " And 3?\n"}], None, True),
    "an empty message": ([{"role": "user", "content": ""}], None, True),
    "marks in a message": ([{"role": "user", "content": "<|im_end|>\n<s> {{ x }}"}], None, True),
    "tools": ([_USER], [_TOOL], True),
    "a tool's answer": ([_USER, _CALL, {"role": "tool", "name": "add", "content": "4"}], [_TOOL], True),
    "two questions in a row": ([_USER, _USER], None, True),
}
