"""What the clients are given: folders converted from genuine checkpoints, and small chat models with tokenizers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor

import engine
from tests.support.sentencepiece_models import RESERVED, corpus, train
from tests.support.shards import Model, save

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
FAMILIES = {"v1": "internlm", "v2": "internlm2", "llama": "llama"}
ASKED = {"v1_tp4_pp1": {"mlp_letters": "w2_is_down"}, "v2_tp4_pp1_nohf": {"mlp_letters": "w2_is_down"}}
LONG = "e052_v2_tp2_pp1_mult64"  # theta 1e6, as the releases have
OFFICIAL = "families/internlm2-official.yaml"
SCALINGS = ("linear", "dynamic", "yarn")
TURNS = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "你好"},
    {"role": "user", "content": " two  spaces"},
]


@dataclass(frozen=True)
class Folder:
    """A converted folder.

    Attributes:
        oracle: a file of `input_ids` and the `logits` that are right, in float32.
        ends: ids that end a generation.
        tokenizer: the SentencePiece model whose ids are right.
        chat: the prompt's ids of `TURNS`.
        unproved: that no trainer ran it: the newest transformers writes its `oracle`.
        remote: that its classes are Python files in it.
    """

    name: str
    path: Path
    oracle: Path | None = None
    ends: tuple[int, ...] = ()
    tokenizer: Path | None = None
    chat: tuple[int, ...] = ()
    unproved: bool = False
    remote: bool = False


NARROW = ("llama_tp2_pp1_whole",)  # has fewer rows than the tokenizer has pieces


def genuine(out: Path) -> list[Folder]:
    """Every fixture that has a stock model, with the trainer's own logits, and a tokenizer of as many pieces."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "small.model"
    tokenizer.write_bytes(train(byte_fallback=False, vocab_size=256, character_coverage=1.0))
    folders = []
    for source in sorted(FIXTURES.iterdir()):
        family = next((family for key, family in FAMILIES.items() if key in source.name), None)
        if family is not None and source.name not in NARROW:
            path = out / source.name
            _convert(f"families/{family}.yaml", source, path, ASKED.get(source.name, {}), tokenizer)
            folders.append(Folder(source.name, path, source / "oracle.pt", (2,)))
    return folders


def scaled(out: Path) -> list[Folder]:
    """One fixture served longer than it was trained, in every way; the newest transformers' logits are `oracle`."""
    folders = []
    for scaling in SCALINGS:
        settings = {"rope_scaling": scaling, "rope_factor": 4, "max_position_embeddings": 8}
        path = out / f"scaled_{scaling}"
        _convert("families/internlm2.yaml", FIXTURES / LONG, path, settings, None)
        folders.append(Folder(path.name, path, out / f"{path.name}.pt", unproved=True))
    return folders


def with_mlp_biases(out: Path) -> Folder:
    """What no fixture has."""
    source = _saved(out, Model("v2", layers=2, hidden=64, heads=8, groups=4, ffn=128, vocab=256), "mlp_biases")
    (file,) = source.glob("model_tp*.pt")
    tensors = torch.load(file, weights_only=True)
    for name in [name for name in tensors if ".feed_forward." in name]:
        tensors[name.removesuffix("weight") + "bias"] = torch.randn(tensors[name].shape[0]).to(torch.bfloat16)
    torch.save(tensors, file)
    path = out / "mlp_biases"
    _convert("families/internlm2.yaml", source, path, {}, None)
    return Folder(path.name, path, out / "mlp_biases.pt", unproved=True)


def official(out: Path, code: Path) -> list[Folder]:
    """InternLM2 under its official names with the official classes, which `code` holds."""
    folders = []
    for source in sorted(FIXTURES.glob("*v2*")):
        path = out / f"official_{source.name}"
        _convert(OFFICIAL, source, path, ASKED.get(source.name, {}), out / "small.model", code)
        folders.append(Folder(path.name, path, source / "oracle.pt", (2,), remote=True))
    for scaling in ("linear", "dynamic"):
        settings = {"rope_scaling": scaling, "rope_factor": 4, "max_position_embeddings": 8}
        path = out / f"official_{scaling}"
        _convert(OFFICIAL, FIXTURES / LONG, path, settings, None, code)
        folders.append(Folder(path.name, path, out / f"scaled_{scaling}.pt", remote=True))
    return folders


def chats(out: Path, tokenizers: Path | None) -> list[Folder]:
    """Small chat models of both generations; with the releases' own tokenizers where `tokenizers` holds them."""
    small = out / "chat.model"
    small.write_bytes(train(user_defined_symbols=[*RESERVED, "<eoh>", "<eoa>"]))
    pieces = SentencePieceProcessor(model_file=str(small))
    start, end, eoa = (pieces.piece_to_id(name) for name in (*RESERVED[:2], "<eoa>"))
    renamed = f'rename: {{{start}: "<|im_start|>", {end}: "<|im_end|>"}}'
    found = [
        _chat(out, "chat2", "v2", small, f"tokenizer: {{{renamed}}}\ngeneration: {{eos_token_id: [2, {end}]}}\n"
              "chat_template: internlm2-chat\n", {start: "<|im_start|>", end: "<|im_end|>"}),
        _chat(out, "chat1", "v1", small, f"tokenizer: {{eos: <eoa>}}\ngeneration: {{eos_token_id: [2, {eoa}]}}\n"
              "chat_template: internlm-chat\n", {eoa: "<eoa>"}),
    ]  # fmt: skip
    if tokenizers is not None:
        real = {"internlm2-chat-7b": ("v2", "tokenizer_internlm2.model", {92543: "<|im_start|>", 92542: "<|im_end|>"}),
                "internlm-chat-7b": ("v1", "tokenizer_internlm.model", {103028: "<eoa>"})}  # fmt: skip
        for name, (family, file, names) in real.items():
            found.append(_chat(out, name, family, tokenizers / file, None, names))
    return found


def _chat(out: Path, name: str, family: str, tokenizer: Path, added: str | None, names: Mapping[int, str]) -> Folder:
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    vocab = pieces.vocab_size()
    model = Model(family, layers=2, hidden=32, heads=4, groups=2 if family == "v2" else 4, ffn=64, vocab=vocab)
    source, mapping = _saved(out, model, name), name
    if added is not None:
        file = out / f"{name}.yaml"
        about = f"mapping: 1\nname: {name}\nversion: 1.0.0\ndescription: A small chat\n"
        file.write_text(f"{about}extends: families/{FAMILIES[family]}.yaml\n{added}")
        mapping = str(file)
    path = out / name
    _convert(mapping, source, path, {}, tokenizer)
    ends = (2, next(index for index, text in names.items() if text in ("<|im_end|>", "<eoa>")))
    return Folder(name, path, None, ends, tokenizer, tuple(_prompt(family, pieces, names)))


def _prompt(family: str, pieces: Any, names: Mapping[int, str]) -> list[int]:
    """The ids of `TURNS` and of the answer's begin, put together by hand."""
    ids = [pieces.bos_id()]
    of = {text: index for index, text in names.items()}
    for turn in [*TURNS, None]:
        if family == "v2":
            role, content = (turn["role"], turn["content"]) if turn else ("assistant", None)
            ids += [of["<|im_start|>"], *pieces.encode(f"{role}\n")]
            ids += [] if content is None else [*pieces.encode(content), of["<|im_end|>"], *pieces.encode("\n")]
        elif turn is None:
            ids += pieces.encode("<|Bot|>:")
        elif turn["role"] == "user":
            ids += pieces.encode(f"<|User|>:{turn['content']}\n")
        else:
            ids += [*pieces.encode(f"<|Bot|>:{turn['content']}"), of["<eoa>"], *pieces.encode("\n")]
    return ids if family == "v2" else _joined(pieces, ids, of)


def _joined(pieces: Any, ids: list[int], of: Mapping[str, int]) -> list[int]:
    """The same with text encoded from one special token to the next, as a tokenizer does."""
    text = "".join(
        f"<|User|>:{turn['content']}\n" if turn["role"] == "user" else f"<|Bot|>:{turn['content']}<eoa>\n"
        for turn in TURNS
    )
    parts = f"{text}<|Bot|>:".split("<eoa>")
    joined = ids[:1]
    for index, part in enumerate(parts):
        joined += ([of["<eoa>"]] if index else []) + pieces.encode(part)
    return joined


def _saved(out: Path, model: Model, name: str) -> Path:
    source = out / "sources" / name
    shutil.rmtree(source, ignore_errors=True)
    source.parent.mkdir(parents=True, exist_ok=True)
    save(model, source)
    return source


def _convert(
    mapping: str,
    source: Path,
    path: Path,
    settings: Mapping[str, Any],
    tokenizer: Path | None,
    code: Path | None = None,
) -> None:
    more = {"settings": settings, "tokenizer": tokenizer, "code": code}
    engine.convert(mapping, source, path, dtype="float32", overwrite=True, **more)


def texts() -> list[str]:
    """About five hundred texts: lines of the small tokenizers' own corpus, scripts, code, runs of spaces, anything."""
    fixed = [
        "Hello", " Hello", "Hello  world ", "   ", "\n\n\t x\r\n", "1234567890", "3.14159", "a\x00b\x1f\x7f", "▁a ▁▁b",
        "你好，世界！ 書生·浦语", "naïve café e\u0301", "👩\u200d👩\u200d👧 🏳️\u200d🌈", "Ａ①ﬁ\u3000\xa0\u200b—",
        "def f(x):\n    return x\n",
        "Привет, мир", "שלום עולם", "مرحبا بالعالم", "สวัสดีชาวโลก", "한국어 텍스트", "日本語のテキスト",
        "<|unknown|>", "< s >",
    ]  # fmt: skip
    chance = random.Random(13)
    alphabet = "abc xyz\n\t.,-_01289éßЖ你好世界🙂\u3000▁"
    mixed = ["".join(chance.choice(alphabet) for _ in range(chance.randint(1, 60))) for _ in range(300)]
    spaces = [f"{' ' * n}x{' ' * (n % 5)}" for n in range(1, 73)]
    return [*fixed, *mixed, *spaces, *corpus()[:100]]


def write_texts(path: Path) -> None:
    path.write_text(json.dumps({"texts": texts(), "chat": TURNS}))
