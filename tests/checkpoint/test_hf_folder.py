"""Reading Hugging Face weights from disk: every usual form, and refusals that name what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint.folder import read_configuration
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.storage.local import LocalStore
from tests.support.readers import read_hf_config, read_hf_folder

INDEX = "model.safetensors.index.json"


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.zeros(2, 2).half()}


def names(path: Path) -> dict[str, list[str]]:
    return {file.name: sorted(t.name for t in file.tensors) for file in read_hf_folder(path)}


def write_index(folder: Path, weight_map: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = weights()
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def refused(path: Path, code: str, *told: str) -> None:
    with pytest.raises(EngineError) as error:
        read_hf_folder(path)
    assert error.value.code == code, error.value
    for text in told:
        assert text in str(error.value)


def test_a_single_safetensors_file_is_found_in_its_folder_and_by_itself(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    assert names(tmp_path) == names(tmp_path / "model.safetensors") == {"model.safetensors": ["a", "b", "c"]}


def test_a_torch_file_is_found_in_its_folder_and_by_itself(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    assert names(tmp_path) == names(tmp_path / "pytorch_model.bin") == {"pytorch_model.bin": ["a", "b", "c"]}


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_of_any_name_is_told_by_its_content(kind: str, tmp_path: Path) -> None:
    (save_file if kind == "safetensors" else torch.save)(weights(), tmp_path / "weights.backup")
    assert names(tmp_path / "weights.backup") == {"weights.backup": ["a", "b", "c"]}


@pytest.mark.parametrize(("name", "text"), [("config.json", b'{"model_type": "llama"}'), ("README.md", b"# a card")])
def test_a_file_that_holds_no_weights_is_not_called_damaged_ones(name: str, text: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    refused(tmp_path / name, "E304", f"`{name}` is no weights file", "the folder that it is in")


def test_shards_are_found_through_their_index(sharded: Path) -> None:
    expected = {"one.safetensors": ["a"], "two.safetensors": ["b", "c"]}
    assert names(sharded) == names(sharded / INDEX) == expected


def test_torch_shards_are_found_through_their_index(tmp_path: Path) -> None:
    tensors = weights()
    torch.save({"a": tensors["a"]}, tmp_path / "one.bin")
    torch.save({"b": tensors["b"]}, tmp_path / "two.bin")
    write_index(tmp_path, {"a": "one.bin", "b": "two.bin"}, "pytorch_model.bin.index.json")
    assert names(tmp_path) == {"one.bin": ["a"], "two.bin": ["b"]}


def test_safetensors_are_preferred_to_torch_files(sharded: Path) -> None:
    torch.save(weights(), sharded / "pytorch_model.bin")
    assert set(names(sharded)) == {"one.safetensors", "two.safetensors"}


def test_files_linked_from_elsewhere_are_followed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    away = tmp_path_factory.mktemp("blobs") / "blob"
    os.replace(sharded / "one.safetensors", away)
    (sharded / "one.safetensors").symlink_to(away)
    assert set(names(sharded)) == {"one.safetensors", "two.safetensors"}


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    refused(sharded, "E201", "`two.safetensors` is missing", "1 of 2")


def test_a_listed_tensor_that_no_file_has_is_named(sharded: Path) -> None:
    write_index(
        sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "d": "two.safetensors"}
    )
    refused(sharded, "E207", "`d`", "in no file")


def test_a_tensor_in_another_file_than_listed_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    refused(sharded, "E207", "`c`", "two.safetensors", "one.safetensors")


def test_a_tensor_in_two_files_is_named(sharded: Path) -> None:
    save_file({"a": weights()["a"], "b": weights()["b"]}, sharded / "one.safetensors")
    refused(sharded, "E208", "`b` is in two files", "one.safetensors, two.safetensors")


def test_a_tensor_that_the_index_leaves_out_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(sharded, "E301", "leaves out `c`")


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "..", "", "a\\b", "sub/one.safetensors", "\0", 3]
)
def test_an_index_cannot_lead_out_of_its_folder(name: Any, sharded: Path) -> None:
    write_index(sharded, {"a": name})
    refused(sharded, "E301", "is not the name of a file beside it")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff",
     '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
     '{"weight_map": {"\\ud800": "one.safetensors"}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    refused(sharded, "E301", INDEX)


def test_an_index_without_end_is_refused_without_reading_it_all(sharded: Path) -> None:
    with (sharded / INDEX).open("wb") as file:
        file.truncate(1 << 40)
    refused(sharded, "E301", "larger than")


def test_a_fifo_is_refused_without_waiting(sharded: Path) -> None:
    (sharded / "one.safetensors").unlink()
    os.mkfifo(sharded / "one.safetensors")
    refused(sharded, "E305", "not a regular file")


def test_a_file_left_over_beside_the_shards_is_not_guessed_about(sharded: Path) -> None:
    save_file(weights(), sharded / "model.safetensors")
    refused(sharded, "E304", "two sets of weights")


def test_an_index_of_the_one_file_is_no_second_set(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    write_index(tmp_path, dict.fromkeys("abc", "model.safetensors"))
    assert names(tmp_path) == {"model.safetensors": ["a", "b", "c"]}


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "E303", "`a` repeats its elements")


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Else a plan, and the manifest of what it writes, would be another in every process."""
    listed = {f"t{at}": f"model-{at:05}-of-00007.safetensors" for at in (3, 7, 1, 5, 2, 6, 4)}
    for name, file in listed.items():
        save_file({name: torch.zeros(1)}, tmp_path / file)
    write_index(tmp_path, listed)
    assert [file.name for file in read_hf_folder(tmp_path)] == sorted(listed.values())


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "model_tp0_pp0.pt").write_bytes(b"")
    refused(tmp_path, "E304", "model_tp0_pp0.pt", "model.safetensors.index.json")
    refused(tmp_path / "nowhere", "E304", "no such checkpoint")


def test_the_configuration_is_read_beside_the_weights(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    assert read_hf_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"head_dim": 8}')
    assert read_hf_config(tmp_path) == read_hf_config(tmp_path / "model.safetensors") == {"head_dim": 8}
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(EngineError, match="not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")  # as some editors of Windows save it
    with pytest.raises(EngineError, match="without a byte order mark"):
        read_hf_config(tmp_path)


def test_configurations_in_two_places_must_be_the_same_but_for_what_only_says_who_saved_them(tmp_path: Path) -> None:
    (tmp_path / "huggingface").mkdir()
    one, other = tmp_path / "config.json", tmp_path / "huggingface" / "config.json"
    one.write_text(json.dumps({"rope_theta": 10000, "dtype": "float32"}))
    other.write_text(json.dumps({"rope_theta": 10000, "dtype": "bfloat16", "transformers_version": "5.0.0"}))
    store, layout = LocalStore(tmp_path), load_layout("torch-dcp")
    assert read_configuration(store, layout) == ("config.json", {"rope_theta": 10000, "dtype": "float32"})
    other.write_text(json.dumps({"rope_theta": 500000}))
    with pytest.raises(EngineError, match=r"E218 `rope_theta` is not the same in config[.]json and huggingface/config"):
        read_configuration(store, layout)
