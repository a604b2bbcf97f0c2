"""The manifest: what an output was made from, and proof that it is still what was written."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
import xxhash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import engine
from engine.checkpoint import manifests
from engine.commands.main import cli
from engine.errors import EngineError
from engine.formats.checksums import check_files
from engine.run.digests import content_id
from engine.run.written import Ours, _written_later
from engine.storage import output
from engine.storage.local import LocalStore, local_file
from tests.support.depth import sampled
from tests.support.shards import Model, save

MODEL = Model("v1", layers=3)
LETTERS = {"mlp_letters": "w2_is_down"}
SCHEMA = json.loads((Path(__file__).parents[2] / "schemas" / "conversion.schema.json").read_text())


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "conversion.json").read_text())
    jsonschema_rs.validator_for(SCHEMA).validate(data)
    return data


def test_what_has_no_digests_is_as_it_was_written_if_it_is_no_younger_than_the_manifest() -> None:
    times = {"old": {"modified": 5}, "young": {"modified": 6}, "untimed": {}, "conversion.json": {"modified": 5}}
    assert [told.split()[0] for told in _written_later(times, times.keys() - {"conversion.json"})] == [
        "untimed",
        "young",
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(MODEL, tmp_path / "step", tp=2)
    return tmp_path / "step"


def test_every_tensor_has_the_digest_of_its_bytes(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    data = read(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    assert sorted(data["tensors"]) == sorted(state)
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert data["tensors"][name]["digest"] == xxhash.xxh3_128(raw).hexdigest()
    assert data["variants"]["mlp_letters"] == {
        "choice": "w2_is_down", "how": "set", "evidence": "--set mlp_letters=w2_is_down"
    }  # fmt: skip
    assert sorted(data["sources"]) == ["model_tp0_pp0.pt", "model_tp1_pp0.pt"]


def test_the_manifest_is_written_after_all_that_it_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names = LocalStore.put, []
    monkeypatch.setattr(LocalStore, "put", lambda store, name, data: (names.append(name), put(store, name, data))[1])
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    assert {"config.json", "README.md"} < {*names} and names[-1] == "conversion.json"


def test_small_files_count_in_the_room_that_an_output_needs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = engine.plan(MODEL.mapping, source, settings=LETTERS).nbytes + 100
    monkeypatch.setattr(output, "free_bytes", lambda path: free)
    with pytest.raises(EngineError, match="E403 there is not enough room"):
        engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)


def test_what_was_changed_is_so_however_often_it_is_asked(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    ours, store = Ours(), LocalStore(tmp_path / "hf")
    assert ours(store) is None and ours(store) is None
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert ours(store) == ours(store) == "not what the engine wrote there: config.json was changed"


def test_the_content_id_is_that_of_the_model_whatever_ranks_and_files_it_came_in(tmp_path: Path) -> None:
    ids = set()
    for i, (layout, size) in enumerate([({"tp": 1}, 10**9), ({"tp": 2, "pp": 3}, 10**9), ({"tp": 4}, 1500)]):
        save(MODEL, tmp_path / f"step{i}", **layout)
        out = tmp_path / f"hf{i}"
        report = engine.convert(MODEL.mapping, tmp_path / f"step{i}", out, settings=LETTERS, max_shard_size=size)
        assert report.content_id == read(out)["content_id"]
        ids.add(report.content_id)
    assert len(ids) == 1
    other = Model("v1", layers=3, seed=1)
    save(other, tmp_path / "other")
    ids.add(engine.convert(MODEL.mapping, tmp_path / "other", tmp_path / "hf", settings=LETTERS).content_id)
    assert len(ids) == 2


def test_the_content_id_is_another_for_another_name_type_shape_or_digest_of_any_tensor() -> None:
    last = ("w", ("F32", (2, 3), "12"))
    others = [("v", last[1]), ("w", ("F16", (2, 3), "12")), ("w", ("F32", (3, 2), "12")), ("w", ("F32", (2, 3), "13"))]
    assert len({content_id(dict([("a", ("F32", (1,), "1")), one])) for one in [last, *others]}) == 5


def test_rank_files_have_a_manifest_too_and_it_is_no_stranger_to_them(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", tp=2)
    assert "model_tp1_pp0.pt:norm.weight" in read(tmp_path / "back")["tensors"]
    assert not engine.api.verify(tmp_path / "back").problems
    report = engine.convert(MODEL.mapping, tmp_path / "back", tmp_path / "again", settings=LETTERS)
    assert not any("conversion.json" in notice for notice in report.notices)
    assert report.content_id == read(tmp_path / "hf")["content_id"]


def test_an_untouched_output_verifies(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS, max_shard_size=2000)
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "hf")])
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "hf")["content_id"] in result.output


@sampled(2)
@pytest.mark.parametrize("damage", ["payload", "config", "missing", "renamed", "extra", "shape"])
def test_whatever_changed_in_an_output_is_found(damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    engine.convert(MODEL.mapping, source, out, settings=LETTERS)
    path = out / "model.safetensors"
    state = load_file(path)
    if damage == "payload":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "config":
        (out / "config.json").write_text((out / "config.json").read_text().replace("10000", "20000"))
    elif damage == "missing":
        path.unlink()
    elif damage == "renamed":
        state["other"] = state.pop("model.norm.weight")
        save_file(state, path)
    elif damage == "extra":
        save_file(state | {"more": torch.zeros(1)}, path)
    else:
        state["lm_head.weight"] = state["lm_head.weight"].t().contiguous()
        save_file(state, path)
    result = CliRunner().invoke(cli, ["verify", str(out), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output)["problems"]


def test_without_digests_there_is_no_content_id_and_verify_says_what_it_did_not_check(
    source: Path, tmp_path: Path
) -> None:
    report = engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS, digests=False)
    assert report.content_id is None
    assert "content_id" not in read(tmp_path / "hf")
    (problem,) = engine.api.verify(tmp_path / "hf").problems
    assert problem.startswith("no tensor's content was checked")
    found = engine.api.verify(tmp_path / "hf", src=source, mapping=MODEL.mapping, settings=LETTERS)
    assert not found.problems
    assert found.unchecked[0].startswith("contents of the tensors: the manifest has no digests")
    back = engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", tp=2, settings=LETTERS, check_source=True)
    assert "no checksum was saved in model.safetensors; not checked" in back.notices


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest": 1}', '{"manifest": 2, "tensors": {}, "files": {}}'])
def test_a_manifest_that_cannot_be_read_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(text)
    with pytest.raises(EngineError) as caught:
        engine.api.verify(tmp_path)
    assert caught.value.code == "E301"


def test_a_manifest_cannot_point_outside_its_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    engine.convert(MODEL.mapping, source, out, settings=LETTERS)
    data = read(out)
    data["files"]["../step/model_config.pt"] = "0" * 64
    data["tensors"]["x"] = {"dtype": "BF16", "shape": [1], "file": "../step/model_tp0_pp0.pt", "digest": "00"}
    (out / "conversion.json").write_text(json.dumps(data))
    problems = engine.api.verify(out).problems
    assert sum("not the name of an output file" in problem for problem in problems) == 2


def flip(path: Path) -> None:
    """One bit of payload, which no header shows."""
    from tests.support.readers import read_rank_file

    at = read_rank_file(path).tensors[0].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_the_source_is_found_when_asked_for(source: Path, tmp_path: Path) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "good", settings=LETTERS, check_source=True)
    flip(source / "model_tp1_pp0.pt")
    with pytest.raises(EngineError) as caught:
        engine.convert(MODEL.mapping, source, tmp_path / "bad", settings=LETTERS, check_source=True)
    assert caught.value.code == "E301"
    assert "model_tp1_pp0.pt" in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_a_changed_tensor_or_configuration_of_what_the_engine_wrote_is_found_when_it_is_read_again(
    source: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    engine.convert(MODEL.mapping, source, hf, settings=LETTERS)
    back = engine.reverse(MODEL.mapping, hf, tmp_path / "good", tp=2, settings=LETTERS, check_source=True)
    assert not any("check" in one or "conversion.json" in one for one in back.notices)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(
        json.dumps({**config, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8})
    )
    back = engine.reverse(MODEL.mapping, hf, tmp_path / "heads", tp=2, settings=LETTERS)
    told = "config.json was changed since the engine wrote it with the weights, by conversion.json beside it"
    assert told in back.notices
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"model\.norm\.weight has other bytes than were written") as caught:
        engine.reverse(MODEL.mapping, hf, tmp_path / "bad", tp=2, settings=LETTERS, check_source=True)
    assert caught.value.code == "E301" and not (tmp_path / "bad").exists()
    (hf / "conversion.json").write_text("{")
    back = engine.reverse(MODEL.mapping, hf, tmp_path / "ours", tp=2, settings=LETTERS, check_source=True)
    assert any("conversion.json cannot be read" in one for one in back.notices)
    (hf / "conversion.json").unlink()
    back = engine.reverse(MODEL.mapping, hf, tmp_path / "own", tp=2, settings=LETTERS, check_source=True)
    assert any("not checked" in one for one in back.notices)


def test_a_tensor_that_was_changed_in_a_rank_file_of_the_engine_is_found_although_its_checksum_is_new(
    source: Path, tmp_path: Path
) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    back = tmp_path / "back"
    engine.reverse(MODEL.mapping, tmp_path / "hf", back, tp=2, settings=LETTERS)
    engine.convert(MODEL.mapping, back, tmp_path / "good", settings=LETTERS, check_source=True)
    state = torch.load(back / "model_tp1_pp0.pt", weights_only=True)
    next(iter(state.values()))[0] += 1
    torch.save(state, back / "model_tp1_pp0.pt")
    with pytest.raises(EngineError, match=r"model_tp1_pp0\.pt:.* has other bytes than were written"):
        engine.convert(MODEL.mapping, back, tmp_path / "bad", settings=LETTERS, check_source=True)


def test_of_rank_files_that_the_engine_wrote_the_text_of_training_may_be_changed_and_the_manifest_of_others(
    source: Path, tmp_path: Path
) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "step2", tp=2, settings=LETTERS)
    text = tmp_path / "step2" / "config_file.pt"
    torch.save(torch.load(text, weights_only=True) + "# later\n", text)
    again = engine.convert(MODEL.mapping, tmp_path / "step2", tmp_path / "again", settings=LETTERS)
    assert any(one.startswith("config_file.pt was changed since") for one in again.notices)
    (tmp_path / "step2" / "conversion.json").write_text("{}")  # of another program
    other = engine.convert(MODEL.mapping, tmp_path / "step2", tmp_path / "other", settings=LETTERS, check_source=True)
    assert not any("was changed" in one for one in other.notices)


RANKS = ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt")
BOXES = ("__0_0.distcp", "__1_0.distcp")


@pytest.mark.parametrize(
    ("mapping", "ranks", "mode", "pair"),
    [
        ("megatron-llama", "tp=2", "torch", RANKS),
        ("megatron-llama", "dp=2", "torch_dist", BOXES),
        ("torchtitan-llama", "dp=2", None, BOXES),
    ],
)
def test_exchanged_rank_files_of_the_engine_are_refused_though_they_do_not_say_their_ranks(
    mapping: str, ranks: str, mode: str | None, pair: tuple[str, str], tmp_path: Path
) -> None:
    hf, made, model = tmp_path / "hf", tmp_path / "made", Model("v2", layers=2, groups=2, bias=False)
    save(model, tmp_path / "step")
    engine.convert(model.mapping, tmp_path / "step", hf, settings=LETTERS)
    engine.reverse(mapping, hf, made, ranks=ranks, mode=mode)
    contents = [(made / name).read_bytes() for name in pair]
    for name, content in zip(pair, reversed(contents), strict=True):
        (made / name).write_bytes(content)
    with pytest.raises(EngineError, match=f"`{pair[0]}` was written as `{pair[1]}`") as refused:
        engine.plan(mapping, made, config=hf / "config.json")
    assert refused.value.code == "E306"
    if mode is None:  # files of a later save, which put the boxes elsewhere
        text = (made / ".metadata").read_bytes()
        (made / ".metadata").write_bytes(re.sub(rb"__[01](?=_0\.distcp)", lambda m: b"__%d" % (m[0] == b"__0"), text))
        engine.convert(mapping, made, tmp_path / "again", config=hf / "config.json")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_of_rank_files_that_say_their_ranks_no_tensor_is_compared_with_the_manifest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS)
    engine.reverse(MODEL.mapping, tmp_path / "hf", tmp_path / "back", tp=2, settings=LETTERS)
    compared: list[str] = []
    monkeypatch.setattr(manifests, "blocks", lambda file, *_: compared.append(file.name) or iter(()))
    engine.plan(MODEL.mapping, tmp_path / "back", settings=LETTERS)
    assert compared == []


@pytest.mark.parametrize(
    ("mapping", "ranks", "changed"),
    [
        ("torchtitan-llama", "dp=2", BOXES[1:]),
        ("megatron-llama", "tp=2", RANKS[:1]),
        ("torchtitan-llama", "dp=2", BOXES),
    ],
)
def test_a_file_of_another_conversion_among_those_of_the_engine_is_refused_and_a_whole_other_save_is_read(
    mapping: str, ranks: str, changed: tuple[str, ...], tmp_path: Path
) -> None:
    hf, model = tmp_path / "hf", Model("v2", layers=2, groups=2, bias=False)
    save(model, tmp_path / "step")
    engine.convert(model.mapping, tmp_path / "step", hf, settings=LETTERS)
    engine.reverse(mapping, hf, tmp_path / "made", ranks=ranks)
    weights = hf / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    engine.reverse(mapping, hf, tmp_path / "other", ranks=ranks)
    for name in changed:
        (tmp_path / "made" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    if len(changed) == 2:
        engine.plan(mapping, tmp_path / "made", config=hf / "config.json")
        return
    with pytest.raises(EngineError, match=f"`{changed[0]}` is not as the engine wrote it") as refused:
        engine.plan(mapping, tmp_path / "made", config=hf / "config.json")
    assert refused.value.code == "E306"


@pytest.mark.parametrize("name", ["../other", "huge"])
def test_a_manifest_makes_nobody_read_another_folder_or_a_huge_file(name: str, source: Path) -> None:
    engine.convert(MODEL.mapping, source, source.parent / "hf", settings=LETTERS)
    data = read(source.parent / "hf") | {"files": {name: "0" * 64}}
    (source / "conversion.json").write_text(json.dumps(data))
    with (source / name).open("wb") as file:
        file.truncate(1 << 36)
    engine.plan(MODEL.mapping, source, settings=LETTERS)  # reading it takes a minute


def test_a_flipped_bit_is_found_in_every_member_of_a_file(source: Path) -> None:
    path = source / "model_tp1_pp0.pt"
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = [(one.filename, one.header_offset, archive.read(one)) for one in archive.infolist() if one.file_size]
    for name, header, content in members:
        at = raw.index(content, header + 30 + len(name))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(EngineError, match=re.escape(name)) as caught:
            check_files([local_file(path)], lambda count: None)
        assert caught.value.code == "E301"


def test_files_without_checksums_are_said_to_be_unchecked(source: Path, tmp_path: Path) -> None:
    (source / "model_tp0_pp0.pt.md5").unlink()
    path = source / "model_tp1_pp0.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    report = engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS, check_source=True)
    assert any("model_tp1_pp0.pt" in notice and "not checked" in notice for notice in report.notices)


def test_zips_in_a_row_are_checked_and_what_is_before_them_is_said_to_be_unchecked(source: Path) -> None:
    path = source / "model_tp1_pp0.pt"
    (source / "model_tp1_pp0.pt.md5").unlink(missing_ok=True)
    raw = path.read_bytes()
    for content, unchecked in ((raw + raw, []), (b"PK\x03\x04, and no zip" + raw, [path.name])):
        path.write_bytes(content)
        assert check_files([local_file(path)], lambda count: None) == unchecked


def test_a_sidecar_of_another_file_is_found(source: Path, tmp_path: Path) -> None:
    (source / "model_tp1_pp0.pt.md5").write_text("d41d8cd98f00b204e9800998ecf8427e")
    with pytest.raises(EngineError) as caught:
        engine.convert(MODEL.mapping, source, tmp_path / "hf", settings=LETTERS, check_source=True)
    assert "MD5" in str(caught.value)
