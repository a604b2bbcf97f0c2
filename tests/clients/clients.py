"""The clients: what each is given, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from tests.clients.models import Folder, texts

Results = Mapping[str, Mapping[str, Any]]
Judge = Callable[[Sequence[Folder], Results], list[tuple[str, str]]]
TOLERANCE = 5e-5
OLDEST, NEWEST = "4.40.2", "5.24.0"
VERSIONS = (NEWEST, "5.12.0", "5.0.0", "4.57.6", "4.51.3", "4.46.3", OLDEST)
# Folders that a version says it cannot load, or drops tensors of; their cards ask for a later one.
REFUSED = {OLDEST: {"scaled_yarn": "error", "mlp_biases": "complaints"}}
# What their registries import, of all that they would install.
VLLM = ("cbor2", "pyzmq", "aiohttp", "multidict", "yarl", "propcache", "aiohappyeyeballs", "aiosignal", "frozenlist",
        "requests", "certifi", "openai-harmony", "openai", "sniffio")  # fmt: skip
LMDEPLOY = ("mmengine", "yapf", "platformdirs", "addict", "termcolor", "pillow", "pybase64", "pyzmq", "aiohttp",
            "multidict", "yarl", "propcache", "aiohappyeyeballs", "aiosignal", "frozenlist", "requests", "certifi",
            "openai", "sniffio", "openai-harmony", "cbor2")  # fmt: skip
SAMPLE = ("v1_tp2_pp2", "e052_v2_tp2_pp1_mult64", "llama_tp2_pp1_default", "v2_tp2_pp1_normhead")


@dataclass(frozen=True)
class Client:
    """A program, and how it is run.

    Attributes:
        version: of `package`; installed are also `others`, and nothing else if `bare`.
        folders: whether a folder is for it.
        judge: the figures of what it told, by what was run; AssertionError when one is wrong.
    """

    name: str
    package: str
    version: str
    program: str
    folders: Callable[[Folder], bool]
    judge: Judge
    others: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False

    @property
    def environment(self) -> str:
        return f"{self.package.partition('[')[0]}-{self.version}"

    @property
    def requirements(self) -> tuple[str, ...]:
        return (f"{self.package}=={self.version}", *self.others)


def sample(folder: Folder) -> bool:
    return folder.name in SAMPLE


def _worst(results: Results, key: str, limit: float = TOLERANCE) -> str:
    """The largest of a figure over all results that have it, each below the limit."""
    found = {name: told[key] for name, told in results.items() if key in told}
    assert found, f"no {key}"
    wrong = {name: value for name, value in found.items() if not value < limit}
    assert not wrong, f"{key}: {wrong}"
    return f"{max(found.values()):.1e}"


def _sound(results: Results) -> None:
    wrong = {name: told for name, told in results.items() if told.get("error") or told.get("complaints")}
    assert not wrong, wrong


def _ids(folders: Sequence[Folder], results: Results, stops: object) -> list[tuple[str, str]]:
    """Tokenizers: ids of SentencePiece's for every text, the prompt's ids, and that each end of the answer ends it."""
    found, given = [], texts()
    for folder in folders:
        told = results[folder.name]
        if folder.ends and "stops" in told:
            assert told["stops"] == [stops] * len(folder.ends), (folder.name, told["stops"])
        if folder.tokenizer is not None:
            wanted = SentencePieceProcessor(model_file=str(folder.tokenizer))
            wrong = [text for text, ids in zip(given, told["ids"], strict=True) if ids != wanted.encode(text)]
            assert not wrong, (folder.name, len(wrong), wrong[:3])
            assert told["chat"] == list(folder.chat), (folder.name, told["chat"], folder.chat)
            assert not told.get("plain"), (folder.name, told["plain"])
            found.append(f"`{folder.name}`")
    told = f"ids of {len(given)} texts and of a chat, which stops: {', '.join(found)}"
    return [(told, "as SentencePiece's")] if found else []


def judge_transformers(version: str) -> Judge:
    def judge(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
        refused = REFUSED.get(version, {})
        for name, what in refused.items():
            assert results[name].get(what), f"{name} was to be refused: {results[name]}"
        sound = {name: told for name, told in results.items() if name not in refused}
        _sound(sound)
        plain = {name: told for name, told in sound.items() if not name.startswith(("scaled", "mlp"))}
        count = sum("difference" in told for told in plain.values())
        rows = [(f"{count} folders: nothing missing, logits against the trainer's",
                 _worst(plain, "difference"))]  # fmt: skip
        if version != NEWEST:
            scaled = {name: told for name, told in sound.items() if name not in plain}
            told = f"; {', '.join(sorted(refused))} not" if refused else ""
            rows.append((f"{len(scaled)} folders with scaled angles or MLP biases{told}: logits against {NEWEST}'s",
                         _worst(scaled, "difference")))  # fmt: skip
        return rows + _ids(folders, results, 1)

    return judge


def judge_llama_cpp(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    count = sum("difference" in told for told in results.values())
    rows = [(f"{count} folders: logarithms of probabilities against the trainer's", _worst(results, "difference"))]
    return rows + _ids(folders, results, ["eos", 1, ""])


def judge_logits(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    return [(f"{len(results)} folders: logits against the trainer's", _worst(results, "difference"))]


def judge_peft(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    for name, told in results.items():
        assert told["linears"] == 7 * told["layers"], (name, told)
        assert told["moved"] > 0.1, (name, told)
    return [
        (f"LoRA on all linears of {len(results)} folders: logits against the trainer's", _worst(results, "difference")),
        ("trained, merged, saved and loaded again: logits against those before merging", _worst(results, "merged")),
    ]  # fmt: skip


def judge_mergekit(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    told = results["pair"]
    assert told["tensors"] and not told["missing"], told
    assert told["linear"] == 0 and told["apart"] > 0.01, told
    return [
        (f"linear merge of two folders, {told['tensors']} tensors", "exact"),
        ("slerp of the two, against the formula", _worst(results, "slerp", 1e-5)),
    ]


def judge_lm_eval(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    count = sum(told["requests"] for told in results.values())
    return [(f"{count} log-likelihoods, by token, against the logits' own", _worst(results, "difference"))]  # fmt: skip


def judge_registry(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
    _sound(results)
    for name, told in results.items():
        assert told["architectures"] == ["LlamaForCausalLM"] and all(told["taken"]), (name, told)
    return [(f"configuration and registries, without a model run: {len(results)} folders", "`LlamaForCausalLM`, taken")]


def judge_official(version: str) -> Judge:
    def judge(folders: Sequence[Folder], results: Results) -> list[tuple[str, str]]:
        _sound(results)
        rows = [(f"{len(results)} official folders with `--code`: logits against the trainer's or {NEWEST}'s",
                 _worst(results, "difference"))]  # fmt: skip
        return rows + _ids(folders, results, 1)

    return judge


def clients(official: bool) -> list[Client]:
    """All of them, transformers first, whose newest writes the logits of folders that no trainer has run."""
    found = [
        Client("transformers", "transformers", version, "transformers_folders", lambda folder: not folder.remote,
               judge_transformers(version))
        for version in VERSIONS
    ]  # fmt: skip
    if official:
        found += [
            Client("transformers, official code", "transformers", version, "transformers_folders",
                   lambda folder: folder.remote, judge_official(version), ("einops",))
            for version in ("4.51.3", "4.46.3", "4.41.2")
        ]  # fmt: skip
    return [
        *found,
        Client("llama.cpp (xllamacpp)", "xllamacpp", "2026.10.11549", "llama_cpp",
               lambda folder: sample(folder) or folder.tokenizer is not None, judge_llama_cpp, ("gguf",)),
        Client("CTranslate2", "ctranslate2", "4.8.5", "ctranslate2_folders", sample, judge_logits),
        Client("mlx-lm", "mlx-lm", "0.32.2", "mlx_folders", sample, judge_logits, ("mlx[cpu]==0.32.4",)),
        Client("optimum, ONNX Runtime", "optimum[onnxruntime]", "2.1.0", "onnx_folders", sample, judge_logits),
        Client("peft", "peft", "0.21.2", "peft_folders", sample, judge_peft),
        Client("mergekit", "mergekit", "0.1.5", "mergekit_folders",
               lambda folder: folder.name in ("v2_tp2_pp2", "v2_tp4_pp1_nohf"), judge_mergekit),
        Client("lm-evaluation-harness", "lm-eval[hf]", "0.4.13", "lm_eval_folders",
               lambda folder: folder.name in ("chat1", "chat2"), judge_lm_eval),
        Client("vLLM", "vllm", "0.33.0", "registries", sample, judge_registry, VLLM, {"registry": "vllm"}, bare=True),
        Client("LMDeploy", "lmdeploy", "0.18.0", "registries", sample, judge_registry, LMDEPLOY,
               {"registry": "lmdeploy"}, bare=True),
    ]  # fmt: skip


def asked(client: Client, folders: Sequence[Folder], words: Path, scratch: Path) -> dict[str, Any]:
    """What a program is given."""
    models = {}
    for folder in folders:
        first = client.version == NEWEST and folder.unproved
        models[folder.name] = {
            "folder": str(folder.path),
            "remote": folder.remote,
            "oracle": None if first or folder.oracle is None else str(folder.oracle),
            "save": str(folder.oracle) if first else None,
            "ends": folder.ends,
            "texts": str(words) if folder.tokenizer is not None else None,
        }
    return {"models": models, "scratch": str(scratch), **client.more}
