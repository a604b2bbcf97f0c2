"""Whatever can be refused without reading tensors is refused before anything is written, or even made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import api
from engine.assets import bundle
from engine.errors import EngineError
from engine.language.model import MappingFile
from engine.planning.model import Output, Work
from engine.run import execute
from engine.run import source as source_checks
from engine.run.runner import check_runnable
from engine.run.running import Running
from engine.storage.sinks import SinkFiles
from tests.support.depth import sampled
from tests.support.disk import Disk, tree
from tests.support.sentencepiece_models import train
from tests.support.shards import Model, save

MODEL = Model("v2", layers=1, hidden=16, heads=4, groups=2, ffn=32, vocab=512, bias=False)
LETTERS = {"mlp_letters": "w2_is_down"}
NOTHING = Work(folder="", files=(), sources=(), outputs=(), copies=lambda _: [], shards=())
SPEC = {"file": "tokenizer.model", "bos": "<s>", "eos": "</s>", "pad": "</s>"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's own tokenizer, and others."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {
        "own": train(),
        "larger": train(user_defined_symbols=[f"[X{i}]" for i in range(300)], vocab_size=700),
        "unigram": train(model_type="unigram", vocab_size=380),
        "other ids": train(bos_id=5, eos_id=6, unk_id=0),
        "other names": train(bos_piece="<begin>", eos_piece="<end>"),
        "text": b"not a model",
        "empty": b"",
        "cut": train()[:3000],
    }
    for name, data in made.items():
        (folder / f"{name}.model").write_bytes(data)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(MODEL, tmp_path / "step", tp=2)
    return tmp_path / "step"


@pytest.fixture
def nothing_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were begun")

    for name in ("create", "write", "copy"):
        monkeypatch.setattr(SinkFiles, name, written)


def mapping(**changes: Any) -> MappingFile:
    return replace(engine.load_mapping(MODEL.mapping), **{"tokenizer": SPEC, **changes})


def refused(code: str, source: Path, out: Path, by: MappingFile, **how: Any) -> EngineError:
    """Refused with nothing made: no output, no parent folder, no lock."""
    before = tree(source.parent)
    with pytest.raises(EngineError) as caught:
        engine.convert(by, source, out, settings=LETTERS, **how)
    assert caught.value.code == code, str(caught.value)
    assert tree(source.parent) == before
    return caught.value


WRONG = {
    "larger": "more pieces",
    "unigram": "unigram",
    "other ids": "another id",
    "other names": "<s>",
    "text": "not a SentencePiece model",
    "empty": "not a SentencePiece model",
    "cut": "not a SentencePiece model",
    "gone": "no such tokenizer",
}


@sampled(2)
@pytest.mark.parametrize(
    ("large", "beside"), [(False, False), (True, False), (False, True)], ids=["small", "large", "beside"]
)
@pytest.mark.parametrize("name", WRONG)
def test_a_foreign_tokenizer_is_refused_first(
    name: str,
    large: bool,
    beside: bool,
    source: Path,
    tokenizers: Path,
    nothing_written: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one so large that it would be converted while tensors are copied."""
    if large:
        monkeypatch.setattr(bundle, "APART", 0)
    file: Path | None = tokenizers / f"{name}.model"
    if beside:
        if not (tokenizers / f"{name}.model").exists():
            pytest.skip("nothing beside is a notice")
        (source / "tokenizer.model").write_bytes((tokenizers / f"{name}.model").read_bytes())
        file = None
    error = refused("E501", source, source.parent / "a" / "b" / "hf", mapping(), tokenizer=file)
    assert WRONG[name] in str(error)


@pytest.mark.parametrize(
    ("rename", "told"),
    [({500: "<|im_end|>"}, "ends before"), ({300: "<|im_end|>"}, "ordinary text"), ({3: "</s>"}, "two ids")],
    ids=["beyond", "no reserved piece", "a name twice"],
)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_tokens_that_cannot_be_renamed_are_refused_first(
    rename: dict[int, str],
    told: str,
    large: bool,
    source: Path,
    tokenizers: Path,
    nothing_written: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if large:
        monkeypatch.setattr(bundle, "APART", 0)
    by = mapping(tokenizer={**SPEC, "rename": rename})
    assert told in str(refused("E501", source, source.parent / "hf", by, tokenizer=tokenizers / "own.model"))


def test_a_folder_or_a_pipe_as_tokenizer_is_refused_first(source: Path, tmp_path: Path, nothing_written: None) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        refused("E501", source, tmp_path / "hf", mapping(), tokenizer=path)


@pytest.mark.parametrize("put", [os.mkdir, lambda path: path.symlink_to("nothing"), os.mkfifo])
def test_what_is_no_file_at_the_place_of_the_tokenizer_is_refused_first(
    put: Callable[[Path], None], source: Path, tmp_path: Path, nothing_written: None
) -> None:
    put(source / "tokenizer.model")
    with pytest.raises(EngineError, match="E305"):
        engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)


def test_how_to_give_a_tokenizer_is_said_where_it_was_given_in_another_way(
    source: Path, tokenizers: Path, nothing_written: None
) -> None:
    (source.parent / "folder").mkdir()
    (source.parent / "folder" / "tokenizer_7b.model").write_bytes((tokenizers / "own.model").read_bytes())
    error = refused("E501", source, source.parent / "hf", mapping(), tokenizer=source.parent / "folder")
    assert f"--tokenizer {source.parent / 'folder' / 'tokenizer_7b.model'}." in str(error.fix)


@pytest.mark.parametrize("key", ["bos", "eos", "pad", "unk"])
def test_a_token_that_a_tokenizer_lacks_tells_first_of_a_foreign_tokenizer(
    key: str, source: Path, tokenizers: Path, nothing_written: None
) -> None:
    """Whoever gave the wrong file must not be sent to the mapping."""
    by = mapping(tokenizer={**SPEC, key: "<eoa>"})
    error = refused("E501", source, source.parent / "hf", by, tokenizer=tokenizers / "own.model")
    assert str(error.fix).startswith("Give the model's own tokenizer with --tokenizer. If it is, correct")


def test_templates_settings_and_configurations_are_refused_first(
    source: Path, tmp_path: Path, nothing_written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "chat_templates").mkdir(parents=True)
    (tmp_path / "mine" / "chat_templates" / "broken.jinja").write_text("{% if %}")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "mine"))
    by = mapping()
    out = tmp_path / "hf"
    assert "no chat template" in str(refused("E002", source, out, replace(by, chat_template="nowhere")))
    assert "Jinja" in str(refused("E502", source, out, replace(by, chat_template="broken")))
    refused("E502", source, out, replace(by, generation={"eos_token_id": -1}))
    refused("E502", source, out, replace(by, config={**by.config, "x": float("nan")}))


def test_too_little_memory_is_refused_before_the_source_is_read(
    source: Path, tmp_path: Path, nothing_written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the source was read")

    monkeypatch.setattr(source_checks, "check_source", read)
    refused("E001", source, tmp_path / "a" / "hf", mapping(), max_memory=1000, check_source=True)


def test_an_output_that_is_in_the_way_is_told_before_the_tokenizer_is_read(
    source: Path, tmp_path: Path, tokenizers: Path, nothing_written: None
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("mine")
    refused("E401", source, tmp_path / "hf", mapping(), tokenizer=tokenizers / "larger.model")
    refused("E404", source, source / "hf", mapping(), tokenizer=tokenizers / "larger.model")


@sampled(2)
@pytest.mark.parametrize("what", ["tokenizer", "memory"])
def test_a_refusal_leaves_what_an_interrupted_run_wrote(
    what: str, source: Path, tmp_path: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own = tmp_path / "hf", tokenizers / "own.model"
    with monkeypatch.context() as patch:
        Disk(patch, 5)
        with pytest.raises(EngineError):
            engine.convert(mapping(), source, out, settings=LETTERS, tokenizer=own)
    how: dict[str, Any] = {"tokenizer": tokenizers / "larger.model"} if what == "tokenizer" else {"max_memory": 1000}
    refused("E501" if what == "tokenizer" else "E001", source, out, mapping(), resume=True, **how)
    engine.convert(mapping(), source, out, settings=LETTERS, tokenizer=own, resume=True)
    engine.convert(mapping(), source, tmp_path / "whole", settings=LETTERS, tokenizer=own)
    assert [p.read_bytes() for p in sorted(out.iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "whole").iterdir())
    ]


def test_a_tokenizer_replaced_after_it_was_checked_is_refused(
    source: Path, tmp_path: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "APART", 0)
    file = tmp_path / "tokenizer.model"
    file.write_bytes((tokenizers / "own.model").read_bytes())
    checked = bundle.check_tokenizer

    def replaced(*arguments: Any) -> Any:
        found = checked(*arguments)
        file.write_bytes((tokenizers / "larger.model").read_bytes())
        return found

    monkeypatch.setattr(bundle, "check_tokenizer", replaced)
    with pytest.raises(EngineError) as caught:
        engine.convert(mapping(), source, tmp_path / "hf", settings=LETTERS, tokenizer=file)
    assert caught.value.code == "E405" and "tokenizer" in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_two_files_of_one_name_are_refused_before_a_rank_file_is_written(
    source: Path, tmp_path: Path, nothing_written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan_reshard(MODEL.mapping, source, tp=1, settings=LETTERS)
    how = execute.Running()
    for name in ("model_tp0_pp0.pt", "conversion.json"):
        small = execute.Small({name: b""})
        with pytest.raises(EngineError) as caught:
            execute.execute(plan, source, tmp_path / "out", lambda small=small: small, how, 0.0)
        assert caught.value.code == "E502" and caught.value.got == name
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_fewer_pieces_than_rows_is_told(source: Path, tmp_path: Path, tokenizers: Path) -> None:
    own = tokenizers / "own.model"
    report = engine.convert(mapping(), source, tmp_path / "hf", settings=LETTERS, tokenizer=own)
    assert any("pieces" in notice and "512 rows" in notice for notice in report.notices)


@pytest.mark.parametrize("named", [True, False])
def test_an_answer_that_ends_with_a_token_that_the_template_never_writes_is_told(
    source: Path, tmp_path: Path, tokenizers: Path, named: bool
) -> None:
    """As where a mapping has a chat template and forgets to give the reserved tokens their names."""
    spec = {**SPEC, "rename": {3: "<|im_end|>", 4: "<|im_start|>"}} if named else SPEC
    mine = mapping(tokenizer=spec, chat_template="internlm2-chat", generation={"eos_token_id": [2, 3]})
    report = engine.convert(mine, source, tmp_path / "hf", settings=LETTERS, tokenizer=tokenizers / "own.model")
    told = [notice for notice in report.notices if "chat template" in notice]
    assert not told if named else "`[UNUSED_TOKEN_0]`, id 3" in told[0]


def test_other_files_of_a_tokenizer_beside_the_weights_are_told(source: Path, tmp_path: Path, tokenizers: Path) -> None:
    (source / "tokenizer.model").write_bytes((tokenizers / "own.model").read_bytes())
    others = ["added_tokens.json", "generation_config.json", "tokenizer.json"]
    for names in ([], others):
        for name in names:
            (source / name).write_text("{}")
        report = engine.convert(mapping(), source, tmp_path / f"hf{len(names)}", settings=LETTERS)
        told = [notice for notice in report.notices if "tokenizer.model alone" in notice]
        assert len(told) == bool(names) and all(name in told[0] for name in names)


def test_a_refusal_once_the_folder_is_made_removes_it_again_with_its_parents(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_written: None
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        refused("E403", source, tmp_path / "a" / "b" / "hf", mapping(tokenizer=None))
    path = source / "model_tp1_pp0.pt"
    torch.save({k: v + 1 if "norm" in k else v for k, v in torch.load(path, weights_only=True).items()}, path)
    refused("E402", source, tmp_path / "a" / "b" / "hf", mapping(tokenizer=None))


@pytest.mark.parametrize("out", ["x/" * 1800 + "hf", "link/../hf"])
def test_an_output_lies_where_the_system_finds_its_path(
    out: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep; and what is beside a link is not what is beside the folder that it leads to."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "linked").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "linked")
    monkeypatch.chdir(tmp_path / "here")
    try:
        engine.convert(mapping(tokenizer=None), source, out, settings=LETTERS)
        assert os.path.exists(f"{out}/config.json") and not os.path.exists("hf")
    finally:  # Python's own calls itself for each folder
        subprocess.run(["rm", "-rf", "--", out.split("/")[0]], check=True)


def test_text_that_cannot_be_written_is_refused_before_a_rank_file_is(
    source: Path, tmp_path: Path, nothing_written: None
) -> None:
    """Half a character, in what only the manifest tells."""
    plan = api.plan_reshard(MODEL.mapping, source, tp=1, settings=LETTERS)
    plan = replace(plan, options={**plan.options, "note": "\ud800"})
    with pytest.raises((EngineError, UnicodeEncodeError)):
        execute.execute(plan, source, tmp_path / "out", lambda: execute.Small({}), execute.Running(), 0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_values_that_change_along_an_axis_that_is_not_stored_last_are_refused_first() -> None:
    output = Output("w", "F32", "F32", (2, 3), "rule", "rule 1", "w", ("normalize", "row"), 0)
    with pytest.raises(EngineError, match="E209"):
        check_runnable(replace(NOTHING, outputs=(output,)), Running(), 0, lambda _: 0)
