"""Files of equal names, sizes and headers are not the same files: no output holds tensors of two models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import api
from engine.checkpoint.folder import _below
from engine.errors import EngineError
from engine.formats.headers import FileHeader, TensorHeader
from engine.run import journal, runner
from engine.storage.local import FileState, LocalStore
from engine.storage.sinks import SinkFiles
from tests.support.depth import crossed, sampled
from tests.support.disk import Disk, contents, partials
from tests.support.readers import read_rank_file, read_safetensors
from tests.support.shards import Model, save

MODEL = Model("v2", layers=4, groups=2, bias=False)
LETTERS = {"mlp_letters": MODEL.letters}
OTHER = Model("v2", layers=4, groups=2, bias=False, seed=1)
KINDS = ("zip", "zip without checksums", "legacy", "safetensors")
WEAK = KINDS[1:]


def write(folder: Path, kind: str, model: Model = MODEL) -> Path:
    """A source of one kind; all kinds have the same names, sizes and headers for both models."""
    if kind == "safetensors":
        save(model, folder.with_name("from"), tp=1)
        engine.convert(model.mapping, folder.with_name("from"), folder, settings=LETTERS)
        shutil.rmtree(folder.with_name("from"))
        return folder
    torch.serialization.set_crc32_options(kind != "zip without checksums")
    try:
        save(model, folder, tp=2, legacy=kind == "legacy")
    finally:
        torch.serialization.set_crc32_options(True)
    return folder


def weights(source: Path) -> Path:
    return next(p for p in (source / "model_tp1_pp0.pt", source / "model.safetensors") if p.exists())


def go(source: Path, out: Path, **how: Any) -> Any:
    if (source / "config.json").exists():
        return engine.reverse(MODEL.mapping, source, out, tp=2, workers=1, **how)
    return engine.convert(MODEL.mapping, source, out, settings=LETTERS, max_shard_size=4000, workers=1, **how)


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, good: int = 25) -> None:
    with monkeypatch.context() as patch:
        Disk(patch, good)
        with pytest.raises(EngineError) as caught:
            go(source, out)
    assert caught.value.code == "E403"


def refused(source: Path, out: Path, code: str, **how: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        go(source, out, **how)
    assert caught.value.code == code, str(caught.value)
    assert not out.exists()
    return caught.value


def put_back(path: Path, was: os.stat_result) -> None:
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def another_file(path: Path, data: bytes) -> None:
    """As `mv` or `cp -p` over it leave it: another inode, the same times."""
    was = path.stat()
    path.with_name("new").write_bytes(data)
    put_back(path.with_name("new"), was)
    os.replace(path.with_name("new"), path)


def in_place(path: Path, data: bytes) -> None:
    """The same inode, the same times."""
    was = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    put_back(path, was)


PUT: dict[str, Callable[[Path, bytes], object]] = {
    "another file": another_file,
    "in place": in_place,
    "written anew": lambda path, data: path.write_bytes(data),
}


def header_of(path: Path) -> FileHeader:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_rank_file(path)


def changed(path: Path, tensors: Sequence[TensorHeader]) -> bytes:
    """The file with other bytes in some tensors; checksums that it holds stay as they are."""
    data = bytearray(path.read_bytes())
    for tensor in tensors:
        for at in range(tensor.offset, tensor.offset + tensor.nbytes):
            data[at] ^= 1
    return bytes(data)


def other_model(source: Path, kind: str) -> bytes:
    if kind == "legacy":  # its headers hold numbers that are never the same twice
        cut = [tensor for tensor in header_of(weights(source)).tensors if "norm" not in tensor.name]
        return changed(weights(source), cut)  # another norm on one rank would be refused for itself
    other = write(source.with_name("other"), kind, OTHER)
    return weights(other).read_bytes()


@sampled(2)
@pytest.mark.parametrize(("kind", "put"), crossed(KINDS, list(PUT)))
def test_a_run_does_not_go_on_with_another_model_of_the_same_headers(
    kind: str, put: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "step", kind), tmp_path / "out"
    interrupted(source, out, monkeypatch)
    data, good = other_model(source, kind), weights(source).read_bytes()
    assert len(data) == len(good)
    PUT[put](weights(source), data)
    error = refused(source, out, "E407", resume=True)
    assert weights(source).name in str(error) and "source" in error.message
    assert len(partials(out)) == 1  # what was done is not lost by the refusal
    PUT[put](weights(source), good)
    go(source, out, resume=True)
    go(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@sampled(3)
@pytest.mark.parametrize("put", ["in place"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_tensor_that_changed_is_noticed_when_it_was_copied_and_else_copied_as_it_is_now(
    kind: str, put: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "step", kind)
    seen, path = set(), weights(source)
    good, cut = path.read_bytes(), [t for t in header_of(path).tensors if "norm" not in t.name]
    for word, tensor in enumerate(cut[::6]):  # replicas of a norm would give it away otherwise
        out = tmp_path / f"out {word}"
        interrupted(source, out, monkeypatch, 14 if kind == "safetensors" else 25)
        PUT[put](path, changed(path, [tensor]))
        try:
            go(source, out, resume=True)
        except EngineError as error:
            assert error.code == "E407" and path.name in str(error)
            assert not out.exists()
            seen.add("refused")
        else:
            go(source, tmp_path / f"whole {word}")
            assert contents(out) == contents(tmp_path / f"whole {word}")
            seen.add("as it is now")
        path.write_bytes(good)
    assert seen == {"refused", "as it is now"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_with_the_same_content_goes_on_and_writes_only_what_is_missing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "step", kind), tmp_path / "out"
    interrupted(source, out, monkeypatch)
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    writes: list[int] = []
    write_one = SinkFiles.write
    monkeypatch.setattr(SinkFiles, "write", lambda *a: (writes.append(a[2]), write_one(*a))[1])
    go(tmp_path / "copy", out, resume=True)
    resumed = len(writes)
    writes.clear()
    go(tmp_path / "copy", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert resumed < len(writes) - 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_that_is_killed_while_it_compares_does_not_vouch_for_what_it_did_not_compare(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "step", kind), tmp_path / "out"
    interrupted(source, out, monkeypatch)
    cut = [tensor for tensor in header_of(weights(source)).tensors if "norm" not in tensor.name]
    in_place(weights(source), changed(weights(source), cut))
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(runner, "compare_copied", killed)
        with pytest.raises(KeyboardInterrupt):
            go(source, out, resume=True)
    refused(source, out, "E407", resume=True)


def test_sources_with_checksums_that_nothing_touched_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "step", "zip"), tmp_path / "out"
    interrupted(source, out, monkeypatch)
    monkeypatch.setattr(journal, "Reader", None)
    go(source, out, resume=True)
    assert not api.verify(out).problems


def test_a_configuration_that_changed_is_named_when_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other heads cut the same shapes in another way."""
    source, out = tmp_path / "step", tmp_path / "out"
    save(MODEL, source, tp=1)
    interrupted(source, out, monkeypatch)
    config = dict(api.read_checkpoint(source, api.load_layout("internevo")).config)
    torch.save({**config, "layer_norm_epsilon": 0.05}, source / "model_config.pt")
    error = refused(source, out, "E407", resume=True)
    assert "the configuration" in error.message and "rms_norm_eps" in str(error)
    heads = {"num_attention_heads": MODEL.heads // 2, "num_kv_attention_heads": MODEL.groups // 2}
    torch.save({**config, **heads}, source / "model_config.pt")
    assert "sizes" in refused(source, out, "E407", resume=True).message
    torch.save(config, source / "model_config.pt")
    go(source, out, resume=True)


@pytest.mark.parametrize(("kind", "put"), crossed(KINDS, list(PUT)))
def test_a_source_that_changes_while_it_is_read_is_refused_at_the_end(
    kind: str, put: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "step", kind), tmp_path / "out"
    cut = [tensor for tensor in header_of(weights(source)).tensors if "norm" not in tensor.name]
    data, left = changed(weights(source), cut), [25]
    write_one = SinkFiles.write

    def writing(self: SinkFiles, file: int, offset: int, what: Any) -> None:
        write_one(self, file, offset, what)
        left[0] -= any(isinstance(part, memoryview) for part in what)
        if left[0] == 0:
            left[0] = -1
            PUT[put](weights(source), data)

    with monkeypatch.context() as patch:
        patch.setattr(SinkFiles, "write", writing)
        error = refused(source, out, "E405")
    assert weights(source).name in str(error)
    refused(source, out, "E407", resume=True)


def planned(source: Path, folder: Path) -> Path:
    api.save_plan(folder / "plan.json", MODEL.mapping, source, settings=LETTERS)
    return folder / "plan.json"


@pytest.mark.parametrize(("kind", "put"), crossed(KINDS[:3], list(PUT)))
def test_a_saved_plan_does_not_run_on_another_model_of_the_same_headers(kind: str, put: str, tmp_path: Path) -> None:
    source = write(tmp_path / "step", kind)
    saved, data = planned(source, tmp_path), other_model(source, kind)
    PUT[put](weights(source), data)
    with pytest.raises(EngineError) as caught:
        api.run_plan(saved, tmp_path / "out")
    assert caught.value.code == "E405"
    assert weights(source).name in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_saved_plan_runs_on_a_copy_where_checksums_tell_that_it_is_one(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "step", kind)
    saved = planned(source, tmp_path)
    api.run_plan(saved, tmp_path / "hf")
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    (tmp_path / "copy").rename(source)
    if kind == "zip":
        api.run_plan(saved, tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "hf")
        return
    with pytest.raises(EngineError) as caught:
        api.run_plan(saved, tmp_path / "again")
    assert caught.value.code == "E405"
    assert "checksum" in str(caught.value) and "changed" in str(caught.value)


def test_a_file_whose_inode_is_numbered_anew_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by sshfs, exfat and file systems over buckets, after a while or on another machine."""
    source = write(tmp_path / "step", "legacy")
    saved, numbers, of = planned(source, tmp_path), count(1), FileState.of
    monkeypatch.setattr(FileState, "of", lambda found: replace(of(found), inode=next(numbers), device=next(numbers)))
    api.run_plan(saved, tmp_path / "hf")
    assert not api.verify(tmp_path / "hf", src=source, mapping=MODEL.mapping, settings=LETTERS).problems


def test_names_of_equal_length_exchanged_in_a_zip_without_checksums_are_another_file(tmp_path: Path) -> None:
    source = write(tmp_path / "step", "zip without checksums")
    path = weights(source)
    before = read_rank_file(path)
    data = path.read_bytes()
    assert data.count(b"w1.weight") and data.count(b"w3.weight")
    swapped = data.replace(b"w1.weight", b"w#.weight").replace(b"w3.weight", b"w1.weight")
    path.write_bytes(swapped.replace(b"w#.weight", b"w3.weight"))
    after = read_rank_file(path)
    assert not before.summed and before.identity != after.identity


def test_what_tells_content_is_known_of_each_kind(tmp_path: Path) -> None:
    for kind in KINDS:
        path = weights(write(tmp_path / kind, kind))
        assert header_of(path).summed == (kind == "zip"), kind


@pytest.mark.parametrize("keys", [["1"], ["model"], ["0", "model"], ["0"]])
def test_a_configuration_that_is_not_where_the_layout_says_is_refused(keys: list[str]) -> None:
    with pytest.raises(EngineError, match="E303 the configuration holds no settings"):
        _below([[]], keys, "config.pt")


def test_a_configuration_in_a_list_is_found_by_its_number() -> None:
    assert _below([[], {"layers": 2}], ["1"], "config.pt") == {"layers": 2}


def test_a_file_that_goes_while_a_folder_is_listed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").touch()
    assert LocalStore(tmp_path).entries().keys() == {"here"}
