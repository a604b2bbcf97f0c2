"""Genuine DCP checkpoints and their kin convert to models with the trainer's logits, and broken ones are refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

import engine
from engine.checkpoint import folder as folders
from engine.errors import EngineError
from engine.formats import dcp
from engine.formats.dcp import read_dcp_directory, read_dcp_value
from engine.language.layout_file import load_layout
from engine.language.model import ConfigFile
from engine.storage.local import LocalStore
from tests.support.depth import sampled
from tests.support.frameworks import FIXTURES, logits_off, source_of, weights

DCP = FIXTURES / "dcp"
NAMED = ["fsdp2tp2-f32-model", "fsdp4-bf16-threads2", "fsdp4-f32-hf", "fsdp4-f32-optim", "hf_verl_fsdp4"]


@pytest.mark.parametrize("name", ["fsdp2tp2-f32-model"])
def test_a_flipped_bit_is_found_in_every_entry_of_a_file(name: str, tmp_path: Path) -> None:
    """Each entry is a zip of its own, with checksums."""
    folder = Path(shutil.copytree(DCP / name / "step-10", tmp_path / "copy"))
    convert(name, tmp_path / "out", folder, check_source=True)
    plan = engine.plan("transformers", folder, config=DCP / name / "hf_config.json")
    file = next(one for one in plan.files if one.name == "__1_0.distcp")
    raw = (folder / file.name).read_bytes()
    for header in (file.tensors[0], file.tensors[len(file.tensors) // 2], file.tensors[-1]):
        at = header.offset + 1
        (folder / file.name).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(EngineError, match="CRC-32") as caught:
            convert(name, tmp_path / "again", folder, check_source=True)
        assert caught.value.code == "E301" and not (tmp_path / "again").exists()


def convert(name: str, out: Path, source: Path | None = None, **options: Any) -> engine.Report:
    folder = source or source_of(DCP / name)
    return engine.convert("transformers", folder, out, config=DCP / name / "hf_config.json", **options)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(source_of(DCP / name), tmp_path / "copy"))


@sampled(2)
@pytest.mark.parametrize("name", NAMED)
def test_a_checkpoint_of_transformers_names_gives_the_trainers_logits(name: str, tmp_path: Path) -> None:
    convert(name, tmp_path / "out")
    assert logits_off(tmp_path / "out", DCP / name / "oracle.pt") < 1e-4


def test_what_is_not_of_the_model_is_left_behind_and_told(tmp_path: Path) -> None:
    report = convert("fsdp4-f32-optim", tmp_path / "out")
    assert report.tensors == 21
    assert any("app.optim.state" in notice for notice in report.notices)


def test_odd_boxes_strides_and_replicas_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    truth = torch.load(DCP / "odd4" / "truth.pt", weights_only=False)
    wanted = {k: v for k, v in truth.items() if v.dtype == torch.float32 and v.numel() and v.dim()}
    stored = metadata(DCP / "odd4" / "step-10").state_dict_metadata
    assert {"transposed", "five_rows_shard0", "grid_shard1_shard1", "view_cols"} <= set(wanted)
    rules = "\n".join(
        f"  - {{source: {name}, target: {name}, axes: {' '.join(f'n{i}x{size}' for i, size in enumerate(one.shape))},"
        " stage: first}"
        for name, one in wanted.items()
    )
    dims = {f"n{i}x{size}": size for one in wanted.values() for i, size in enumerate(one.shape)}
    (tmp_path / "odd.yaml").write_text(
        f"mapping: 1\nname: odd\nversion: 1.0.0\nsource: {{layout: torch-dcp}}\n"
        f"target: {{model_type: none, architecture: None}}\nconfig: {{}}\ndims: {dims}\nrules:\n{rules}\nignore:\n"
        + "".join(f"  - {{source: {name}, why: no weight}}\n" for name in stored if name not in wanted)
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    plan = engine.plan(tmp_path / "odd.yaml", DCP / "odd4" / "step-10", config=tmp_path / "config.json")
    made = dict(engine.iter_tensors(plan))
    for name, one in wanted.items():
        assert torch.equal(made[name], one.detach()), name


def test_the_same_model_is_the_same_content_whatever_it_was_saved_in(tmp_path: Path) -> None:
    one = convert("fsdp4-f32-hf", tmp_path / "one")
    sharded = {}
    for file in sorted((DCP / "fsdp4-f32-hf" / "step-10").iterdir()):
        for key, value in load_file(file).items():
            sharded.setdefault(key, []).append(value)
    made = weights(tmp_path / "one")
    assert set(made) == set(sharded)
    for key, parts in sharded.items():  # rank after rank, as FSDP cuts rows
        assert torch.equal(made[key], torch.cat(parts)), key
    assert one.content_id == convert("fsdp4-f32-hf", tmp_path / "two", max_shard_size=100_000).content_id


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def changed(folder: Path, change: Callable[[Any], object]) -> None:
    value = metadata(folder)
    change(value)
    (folder / ".metadata").write_bytes(pickle.dumps(value))


def refused(name: str, folder: Path, tmp_path: Path) -> EngineError:
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    with pytest.raises(EngineError) as caught:
        convert(name, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    assert caught.value.place is not None and caught.value.fix
    return caught.value


def test_a_directory_is_read_once_whatever_is_looked_for_in_it(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand boxes take seconds to read. One that was written anew meanwhile is read anew."""
    folder, read = copy("fsdp4-f32-optim"), []
    load = dcp.load_pickle
    monkeypatch.setattr(dcp, "load_pickle", lambda data, name: (read.append(name), load(data, name))[1])
    engine.inspect(folder)
    assert read == [".metadata"]
    with pytest.raises(KeyError):
        read_dcp_value(LocalStore(folder), "args")
    changed(folder, lambda value: value.state_dict_metadata.clear())
    assert read_dcp_directory(LocalStore(folder)).entries == ()


def test_a_directory_larger_than_any_is_refused(
    copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("fsdp4-bf16-threads2")
    size = (folder / ".metadata").stat().st_size
    monkeypatch.setattr(dcp, "_MOST_BYTES", size)
    convert("fsdp4-bf16-threads2", tmp_path / "whole", folder)
    monkeypatch.setattr(dcp, "_MOST_BYTES", size - 1)
    error = refused("fsdp4-bf16-threads2", folder, tmp_path)
    assert error.code == "E301" and f"more than {size - 1} bytes" in str(error)


def test_an_unfinished_save_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp4-bf16-threads2")
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    assert refused("fsdp4-bf16-threads2", folder, tmp_path).code == "E201"


def test_a_missing_file_is_refused_by_its_name(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp4-bf16-threads2")
    (folder / "__2_1.distcp").unlink()
    error = refused("fsdp4-bf16-threads2", folder, tmp_path)
    assert error.code == "E201" and "__2_1.distcp" in error.message


def _drop_box(value: Any) -> None:
    value.state_dict_metadata["model.model.embed_tokens.weight"].chunks.pop(1)


def _double_box(value: Any) -> None:
    chunks = value.state_dict_metadata["model.model.embed_tokens.weight"].chunks
    info = next(v for k, v in value.storage_data.items() if k.fqn == "model.model.embed_tokens.weight")
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    chunks.append(ChunkStorageMetadata(torch.Size([32, 0]), torch.Size([65, 64])))
    value.storage_data[MetadataIndex("model.model.embed_tokens.weight", torch.Size([32, 0]))] = info


def _lying_box(value: Any) -> None:
    chunk = value.state_dict_metadata["model.model.embed_tokens.weight"].chunks[0]
    chunk.sizes = torch.Size([64, 65])


def _outside(value: Any) -> None:
    next(iter(value.storage_data.values())).offset = 1 << 40


def _above(value: Any) -> None:
    next(iter(value.storage_data.values())).relative_path = "../fsdp4-bf16-threads2/__0_0.distcp"


def _transformed(value: Any) -> None:
    for info in value.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]


def _one_on_another(value: Any) -> None:
    infos = [info for info in value.storage_data.values() if info.relative_path == "__0_0.distcp"]
    infos[1].offset = infos[0].offset


def _no_bytes(value: Any) -> None:
    value.storage_data.pop(next(iter(value.storage_data)))


def _other_type(value: Any) -> None:
    value.state_dict_metadata["model.model.norm.weight"].properties.dtype = torch.float16


@sampled(2, "code")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_drop_box, "E208"), (_double_box, "E301"), (_lying_box, "E301"), (_outside, "E301"), (_above, "E301"),
        (_transformed, "E303"), (_one_on_another, "E301"), (_no_bytes, "E301"), (_other_type, "E301"),
    ],
)  # fmt: skip
def test_a_directory_that_does_not_fit_its_files_is_refused(
    change: Callable[[Any], None], code: str, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("fsdp4-bf16-threads2")
    changed(folder, change)
    assert refused("fsdp4-bf16-threads2", folder, tmp_path).code == code


def test_a_box_where_a_file_has_a_number_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    def change(value: Any) -> None:
        places = value.storage_data
        wrong = next(info for key, info in places.items() if key.fqn == "step")
        places[next(key for key in places if key.fqn == "app.model.model.norm.weight")] = wrong

    folder = copy("fsdp4-f32-optim")
    changed(folder, change)
    error = refused("fsdp4-f32-optim", folder, tmp_path)
    assert error.code == "E301" and "where its directory has a tensor" in str(error)


def _exchange(one: tuple[str, str], other: tuple[str, str]) -> Callable[[Any], None]:
    """Exchange where two boxes lie, each given by the end of its tensor's name and its file."""

    def change(value: Any) -> None:
        first, second = (
            next(k for k, v in value.storage_data.items() if k.fqn.endswith(name) and v.relative_path == file)
            for name, file in (one, other)
        )
        places = value.storage_data
        places[first], places[second] = places[second], places[first]

    return change


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("layers.1.mlp.gate_proj.weight", "__1_0.distcp"), ("layers.1.mlp.up_proj.weight", "__1_0.distcp")),
        (("layers.0.mlp.up_proj.weight", "__0_0.distcp"), ("layers.0.mlp.up_proj.weight", "__2_0.distcp")),
    ],
    ids=["two tensors of a rank", "two ranks of a tensor"],
)
def test_boxes_that_exchanged_places_in_the_directory_are_refused(
    one: tuple[str, str], other: tuple[str, str], copy: Callable[[str], Path], tmp_path: Path
) -> None:
    """torch lists the entries of a file as it wrote them; it would read the exchanged ones without a word."""
    folder = copy("fsdp2tp2-f32-model")
    changed(folder, _exchange(one, other))
    error = refused("fsdp2tp2-f32-model", folder, tmp_path)
    assert error.code == "E306" and one[1] in str(error.got) and other[1] in str(error.got)


def test_boxes_that_exchanged_starts_in_the_directory_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    def change(value: Any) -> None:
        one, other = [k for k in value.storage_data if k.fqn.endswith("layers.1.mlp.gate_proj.weight")][:2]
        starts = {one: replace(one, offset=other.offset), other: replace(other, offset=one.offset)}
        value.storage_data = {starts.get(k, k): v for k, v in value.storage_data.items()}

    folder = copy("fsdp2tp2-f32-model")
    changed(folder, change)
    error = refused("fsdp2tp2-f32-model", folder, tmp_path)
    assert error.code == "E306" and "layers.1.mlp.gate_proj.weight" in error.message


def test_a_file_of_boxes_is_known_by_its_checksums_and_by_the_directory(copy: Callable[[str], Path]) -> None:
    folder, names = copy("fsdp2tp2-f32-model"), [f"__{rank}_0.distcp" for rank in range(4)]
    path = folder / names[0]

    def known() -> tuple[str, bool]:
        header = dcp.read_dcp(LocalStore(folder), names)[0]
        return header.identity, header.summed

    def told(data: bytes) -> tuple[str, bool]:
        path.write_bytes(data)
        return known()

    saved = path.read_bytes()
    entry = saved.rindex(b"PK\x01\x02", 0, saved.rindex(b"/data/0"))  # of a tensor's bytes, in a zip's directory
    first, other = known(), told(saved[: entry + 16] + b"abcd" + saved[entry + 20 :])
    none = told(saved[: entry + 16] + bytes(4) + saved[entry + 20 :])
    assert first[1] and other[1] and not none[1]
    path.write_bytes(saved)
    changed(folder, lambda value: setattr(value, "planner_data", None))
    assert len({first[0], other[0], none[0], known()[0]}) == 4


def test_boxes_that_exchanged_names_in_the_directory_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The order of a layer's names in a file is then another than in other layers and files."""

    def change(value: Any) -> None:
        held = {k.fqn: k for k, v in value.storage_data.items() if v.relative_path == "__1_0.distcp"}
        one, other = (held[f"model.model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        names = {one: replace(one, fqn=other.fqn), other: replace(other, fqn=one.fqn)}
        value.storage_data = {names.get(k, k): v for k, v in value.storage_data.items()}

    folder = copy("fsdp2tp2-f32-model")
    changed(folder, change)
    error = refused("fsdp2tp2-f32-model", folder, tmp_path)
    assert error.code == "E306" and "`__1_0.distcp` have exchanged names" in error.message


def _laughs() -> bytes:
    """A short pickle that lists the same boxes of a hundred thousand tensors, a hundred thousand each."""
    value = metadata(DCP / "odd4" / "step-10")
    one = value.state_dict_metadata["five_rows_shard0"]
    one.chunks = [one.chunks[-1]] * 100_000
    value.state_dict_metadata = {f"t{i}": one for i in range(100_000)}
    return pickle.dumps(value)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


@sampled(2, "code")
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda: b"", "E301"), (lambda: b"\x80\x04.", "E301"), (lambda: pickle.dumps({}), "E301"),
        (lambda: pickle.dumps(_Runs()), "E302"), (lambda: b"(" * 100_000 + b".", "E301"), (_laughs, "E301"),
        (lambda: b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}Vstorage_data\nIos\nsb.", "E301"),
    ],
    ids=["empty", "nothing", "a dict", "code", "brackets", "laughs", "no attributes"],
)  # fmt: skip
def test_a_hostile_directory_is_refused_soon_and_runs_nothing(
    data: Callable[[], bytes],
    code: str,
    copy: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy("fsdp4-bf16-threads2")
    (folder / ".metadata").write_bytes(data())
    assert refused("fsdp4-bf16-threads2", folder, tmp_path).code == code
    assert "it ran" not in capsys.readouterr().out


def test_a_file_of_another_rank_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp4-bf16-threads2")
    (folder / "__3_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    assert refused("fsdp4-bf16-threads2", folder, tmp_path).code in ("E301", "E306")


def test_every_cut_off_file_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp4-bf16-threads2")
    whole = (folder / "__1_0.distcp").read_bytes()
    for end in (0, 1, 700, len(whole) // 2, len(whole) - 1):
        (folder / "__1_0.distcp").write_bytes(whole[:end])
        assert refused("fsdp4-bf16-threads2", folder, tmp_path).code == "E301"


def test_sharding_info_that_lies_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("fsdp4-f32-hf")
    path = folder / "shard-00002-model-00001-of-00002.safetensors"
    tensors = load_file(path)
    for said in (
        None,
        "{}",
        "[]",
        "{",
        "{" + ",".join(f'"{name}":{{"saved_offsets":[0,0]}}' for name in tensors) + "}",
        "{" + ",".join(f'"{n}":{{"saved_offsets":{[-1] * t.dim()}}}' for n, t in tensors.items()) + "}",
        "{" + ",".join(f'"{n}":{{"saved_offsets":{[9999] * t.dim()}}}' for n, t in tensors.items()) + "}",
    ):
        save_file(tensors, path, {"format": "pt"} | ({} if said is None else {"DCP_SHARDING_INFO": said}))
        assert refused("fsdp4-f32-hf", folder, tmp_path).code in ("E301", "E303", "E208", "E203")
    for start in (True, 1 << 62, 1.0, "0", None):
        said = json.dumps({name: {"saved_offsets": [start] * one.dim()} for name, one in tensors.items()})
        save_file(tensors, path, {"format": "pt", "DCP_SHARDING_INFO": said})
        assert "saved_offsets [" in str(refused("fsdp4-f32-hf", folder, tmp_path))
    flat = {name: one.flatten() for name, one in tensors.items()}
    said = json.dumps({name: {"saved_offsets": [0]} for name in flat})
    save_file(flat, path, {"format": "pt", "DCP_SHARDING_INFO": said})
    assert "1 dimensions, elsewhere 2" in str(refused("fsdp4-f32-hf", folder, tmp_path))


def test_what_torch_made_of_shards_is_read_too_and_a_missing_file_named(tmp_path: Path) -> None:
    source, folder = source_of(DCP / "fsdp4-f32-hf"), tmp_path / "step-10"
    shards = Path(shutil.copytree(source, folder / "sharded"))
    files = {name: int(file.name[18:23]) for file in shards.iterdir() for name in load_file(file)}
    consolidate_safetensors_files(str(shards), str(folder), files)
    convert("fsdp4-f32-hf", tmp_path / "one", folder)
    convert("fsdp4-f32-hf", tmp_path / "other", source)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    shutil.rmtree(shards)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refused("fsdp4-f32-hf", folder, tmp_path).code == "E207"
    shutil.copy(DCP / "fsdp4-f32-hf" / "hf_config.json", folder / "config.json")  # it is what is to be written
    assert refused("fsdp4-f32-hf", folder, tmp_path).code == "E304"


def test_the_configuration_must_be_there_and_be_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="--config"):
        engine.convert("transformers", source_of(DCP / "hf_verl_fsdp4"), tmp_path / "out")
    (tmp_path / "model").mkdir()
    with pytest.raises(EngineError, match=r"config\.json"):  # a folder stands for the file in it
        engine.convert("transformers", source_of(DCP / "hf_verl_fsdp4"), tmp_path / "out", config=tmp_path / "model")
    shutil.copy(DCP / "hf_verl_fsdp4" / "hf_config.json", tmp_path / "model" / "config.json")
    engine.convert("transformers", source_of(DCP / "hf_verl_fsdp4"), tmp_path / "whole", config=tmp_path / "model")
    other = DCP / "fsdp4-f32-hf" / "hf_config.json"
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", source_of(DCP / "hf_verl_fsdp4"), tmp_path / "out", config=other)
    assert caught.value.code in ("E203", "E207")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_written_with_the_model_is_told(tmp_path: Path) -> None:
    step = shutil.copytree(source_of(DCP / "hf_verl_fsdp4"), tmp_path / "step")
    (step / "huggingface").mkdir()
    shutil.copy(DCP / "hf_verl_fsdp4" / "hf_config.json", step / "huggingface" / "config.json")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (step / "huggingface" / name).write_text("{}")
    told = [one for one in engine.convert("transformers", step, tmp_path / "out").notices if "not written" in one]
    assert len(told) == 1 and "huggingface/generation_config.json, huggingface/tokenizer_config.json" in told[0]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "E502"),
        ({"model_type": "mistral"}, "E502"),
        ({"model_type": ["llama"]}, "E209"),
        ({"architectures": {"a": 1}}, "E218"),
        ({"num_hidden_layers": 10**9}, "E218"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "E218"),
        ({"num_local_experts": 10**4, "num_hidden_layers": 10**3}, "E218"),
        ({"num_labels": 10**9}, "E218"),
        ({"quantization_config": {"quant_method": "fp8"}}, "E209"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_itself_or_the_tensors_is_refused(
    change: dict[str, Any], code: str, tmp_path: Path
) -> None:
    fixture = DCP / "fsdp4-f32-hf"
    config = json.loads((fixture / "hf_config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError) as caught:
        engine.convert("transformers", source_of(fixture), tmp_path / "out", config=tmp_path / "config.json")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_two_configurations_beside_the_weights_that_disagree_are_refused(tmp_path: Path) -> None:
    fixture, folder = DCP / "hf_verl_fsdp4", tmp_path / "step"
    shutil.copytree(source_of(fixture), folder)
    (folder / "huggingface").mkdir()
    text = (fixture / "hf_config.json").read_text()
    (folder / "huggingface" / "config.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    with pytest.raises(EngineError, match="rms_norm_eps") as caught:
        engine.convert("transformers", folder, tmp_path / "out")
    assert caught.value.code == "E218"
    told = {"transformers_version": "4.40.0", "_name_or_path": "base", "torch_dtype": "float16", "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(json.loads(text) | told))
    report = engine.convert("transformers", folder, tmp_path / "out")
    assert not any("huggingface" in notice for notice in report.notices)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"rms_norm_eps": 1e-3, "torch_dtype": "float16"}, ["rms_norm_eps in config.json"]),
        ({}, []),
        (None, []),
        (
            {"rms_norm_eps": 1e-3, "chunk_size_feed_forward": 0, "is_decoder": False},
            ["rms_norm_eps in config.json, chunk_size_feed_forward in config.json, is_decoder in config.json"],
        ),
    ],
    ids=["another value", "the same", "damaged", "what both say is first"],
)
def test_a_given_configuration_that_the_one_beside_the_weights_contradicts_is_told(
    beside: dict[str, Any] | None, told: list[str], tmp_path: Path
) -> None:
    fixture, folder = DCP / "hf_verl_fsdp4", tmp_path / "step"
    shutil.copytree(source_of(fixture), folder)
    config = json.loads((fixture / "hf_config.json").read_text())
    (folder / "config.json").write_text("{" if beside is None else json.dumps(config | beside))
    report = engine.convert("transformers", folder, tmp_path / "out", config=fixture / "hf_config.json")
    assert [one.rpartition(": ")[2] for one in report.notices if "given configuration is taken" in one] == told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == config["rms_norm_eps"]


def test_a_subfolder_that_has_files_of_a_checkpoint_is_listed_as_these_alone(tmp_path: Path) -> None:
    for name in ("huggingface", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert folders.list_folder(LocalStore(tmp_path), ["huggingface"]) == ["huggingface/config.json", "other"]


@pytest.mark.parametrize("held", [None, {"a": 1}, {"a": 2}])
def test_a_second_configuration_may_be_in_a_distributed_checkpoint(
    held: dict[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = load_layout("torch-dcp")
    layout = replace(layout, configs=(*layout.configs, ConfigFile(".metadata", "dcp", "args:model")))
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / ".metadata").touch()
    monkeypatch.setattr(folders, "read_dcp_value", lambda *_: {"model": held} if held else {}[""])
    if held == {"a": 2}:
        with pytest.raises(EngineError, match="is not the same"):
            folders.read_configuration(LocalStore(tmp_path), layout)
    else:
        assert folders.read_configuration(LocalStore(tmp_path), layout) == ("config.json", {"a": 1})


def test_a_configuration_without_a_class_is_that_of_its_model_type(tmp_path: Path) -> None:
    fixture = DCP / "fsdp4-f32-hf"
    config = json.loads((fixture / "hf_config.json").read_text()) | {"architectures": None, "auto_map": {"A": "b.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = engine.convert("transformers", source_of(fixture), tmp_path / "out", config=tmp_path / "config.json")
    assert logits_off(tmp_path / "out", fixture / "oracle.pt") < 1e-4
    assert any("auto_map" in notice for notice in report.notices)


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}], ids=str
)
def test_angles_that_transformers_4_and_5_read_otherwise_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Version 4 reads these keys, and 5 rope_parameters, which says something else."""
    fixture = DCP / "fsdp4-f32-hf"
    config = json.loads((fixture / "hf_config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=next(iter(change))) as caught:
        engine.plan("transformers", source_of(fixture), config=tmp_path / "config.json")
    assert caught.value.code == "E218"


@sampled(2, "family")
@pytest.mark.parametrize(
    ("name", "family"),
    [("tt02_fsdp4", "llama"), ("tt03_fsdp4", "llama"), ("tt03_tied_fsdp4", "llama"), ("tt03_qwen3_fsdp2", "qwen3")],
)  # of torchtitan 0.2.2 and 0.3
def test_torchtitans_names_and_rotary_order_give_its_logits(name: str, family: str, tmp_path: Path) -> None:
    fixture = DCP / name
    engine.convert(f"torchtitan-{family}", fixture / "step-10", tmp_path / "out", config=fixture / "hf_config.json")
    assert logits_off(tmp_path / "out", fixture / "oracle.pt") < 1e-4


@pytest.mark.parametrize(
    ("name", "mapping"), [("xtuner_tied_fsdp4", "transformers"), ("xtuner_moe_fsdp4", "xtuner-moe")]
)
def test_what_xtuner_saved_gives_its_logits(name: str, mapping: str, tmp_path: Path) -> None:
    """The tied head is there a second time, behind the prefix that stands in the place of the model's own."""
    fixture = DCP / name
    engine.convert(mapping, fixture / "step-10", tmp_path / "out", config=fixture / "hf_config.json")
    assert logits_off(tmp_path / "out", fixture / "oracle.pt") < 1e-4


EPSILON_AND_BASE = ("rms_norm_eps", "rope_theta")


@pytest.mark.parametrize(
    ("name", "mapping", "keys"),
    [
        ("tt03_fsdp4", "torchtitan-llama", EPSILON_AND_BASE),
        ("xtuner_moe_fsdp4", "xtuner-moe", (*EPSILON_AND_BASE, "num_experts_per_tok", "norm_topk_prob")),
    ],
)
def test_what_trainer_and_transformers_take_an_absent_key_for_must_be_written_out(
    name: str, mapping: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    """torchtitan has 1e-5 and 500000 where transformers has 1e-6 and 10000; XTuner makes experts' weights sum to 1."""
    given = json.loads((DCP / name / "hf_config.json").read_text())
    for key in keys:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in given.items() if k != key}))
        with pytest.raises(EngineError, match=f"{key}` has no value in config.json") as caught:
            engine.plan(mapping, DCP / name / "step-10", config=tmp_path / "config.json")
        assert caught.value.code == "E105" and str(caught.value.place) == "config.json"
