"""`engine verify OUT --src --mapping`: an output read again beside the checkpoint it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import engine
from engine.commands.main import cli
from engine.comparing import source
from engine.comparing.source import parse_sample
from engine.errors import EngineError
from engine.language.search import find_file
from tests.support.depth import sampled
from tests.support.shards import Model, save

MODEL = Model("v2", layers=3, groups=2, bias=False)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save(MODEL, folder / "step", tp=2, pp=2)
    engine.convert(MODEL.mapping, folder / "step", folder / "hf")
    return folder


@pytest.fixture
def both(made: Path, tmp_path: Path) -> Path:
    """A copy of source and output, to be damaged."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def verify(both: Path, *more: str, mapping: str = MODEL.mapping) -> Result:
    source = ["--src", str(both / "step"), "--mapping", mapping]
    return CliRunner().invoke(cli, ["verify", str(both / "hf"), *source, *more])


def source_of(both: Path, *more: str) -> dict[str, Any]:
    result = verify(both, "--json", *more)
    assert result.exit_code == 1, result.output
    found: dict[str, Any] = json.loads(result.output)["source"]
    return found


def change(both: Path, how: Any) -> None:
    """Write the output's tensors anew, as a tool would that keeps no manifest."""
    path = both / "hf" / "model.safetensors"
    state = load_file(path)
    how(state)
    save_file(state, path)
    (both / "hf" / "conversion.json").unlink()


def test_an_output_is_what_its_source_gives(made: Path) -> None:
    result = verify(made)
    assert result.exit_code == 0, result.output
    assert "every element" in result.output
    found = engine.api.verify(made / "hf", src=made / "step", mapping=MODEL.mapping)
    assert found.source is not None
    assert found.source.bytes == sum(t.nbytes for t in load_file(made / "hf" / "model.safetensors").values())


def test_it_may_be_split_into_other_files_and_cast_to_another_type(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    engine.convert(MODEL.mapping, made / "step", out, dtype="float32", max_shard_size=2000)
    assert len(list(out.glob("*.safetensors"))) > 3
    found = engine.api.verify(out, src=made / "step", mapping=MODEL.mapping)  # the manifest tells the type
    assert not found.problems
    (out / "conversion.json").unlink()
    assert engine.api.verify(out, src=made / "step", mapping=MODEL.mapping).problems
    assert not engine.api.verify(out, src=made / "step", mapping=MODEL.mapping, dtype="float32").problems


def test_one_changed_element_is_named_with_its_rule_and_the_shard_it_came_from(both: Path) -> None:
    def one(state: dict[str, torch.Tensor]) -> None:
        state[Q][11, 5] += 1  # the second rank's rows start at 8

    change(both, one)
    (differing,) = source_of(both)["differing"]
    assert differing["name"] == Q
    assert differing["index"] == [11, 5]
    assert differing["rule"] == "qkv"
    assert "internlm2.yaml" in differing["place"]
    assert differing["source"][0] == "model_tp1_pp1.pt:layers.0.attention.wqkv.weight"  # stages of 1 and 2
    assert "in 1 of 256 elements" in differing["what"]
    text = verify(both).output
    assert f"{Q} differs from the source in 1 of 256 elements, first at [11, 5]" in text
    assert "no manifest" not in text  # problems come first, and nothing that reassures


def test_of_elements_in_several_blocks_the_first_is_told(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(state: dict[str, torch.Tensor]) -> None:
        for at in ((11, 5), (14, 3), (3, 9)):
            state[Q][at] += 1

    monkeypatch.setattr(source, "_BLOCK", 16)  # one row
    change(both, some)
    (differing,) = source_of(both)["differing"]
    assert differing["index"] == [3, 9] and "in 3 of 256 elements" in differing["what"]


def test_a_source_that_changed_since_is_found_though_the_manifest_still_holds(both: Path) -> None:
    other = Model("v2", layers=3, groups=2, bias=False, seed=1)
    shutil.rmtree(both / "step")
    save(other, both / "step", tp=2, pp=2)
    assert not engine.api.verify(both / "hf").problems
    found = source_of(both)
    assert len(found["differing"]) == found["tensors"]


@pytest.mark.parametrize("damage", ["missing", "extra", "type", "shape"])
def test_tensors_that_are_missing_left_over_or_of_another_kind_are_told(damage: str, both: Path) -> None:
    def how(state: dict[str, torch.Tensor]) -> None:
        if damage == "missing":
            del state[Q]
        elif damage == "extra":
            state["more"] = torch.zeros(1)
        elif damage == "type":
            state[Q] = state[Q].float()
        else:
            state[Q] = state[Q][:8].contiguous()

    change(both, how)
    found = source_of(both)
    if damage == "extra":
        assert found["extra"] == ["more"]
        assert not found["differing"]
    else:
        (differing,) = found["differing"]
        assert differing["name"] == Q
        word = {"missing": "is missing", "type": "is F32 [16, 16], the source gives BF16", "shape": "is BF16 [8, 16]"}
        assert word[damage] in differing["what"]


@sampled(2)
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("variants", "rotary", "choice"), "pairs"),
        (("options", "rope_factor"), 3.0),
        (("sizes", "layer"), 4),
        (("mapping", "name"), "internlm2-7b"),
        (("unread", "a_key"), 1),
        (("mapping", "digest"), "0" * 64),
        (("mapping", "resolved", "description"), "another"),
    ],
)
def test_a_manifest_that_says_otherwise_how_it_was_made_is_told(at: tuple[str, ...], value: Any, both: Path) -> None:
    path = both / "hf" / "conversion.json"
    said = data = json.loads(path.read_text())
    for key in at[:-1]:
        said = said[key]
    said[at[-1]] = value
    path.write_text(json.dumps(data))
    done = verify(both)
    assert done.exit_code == 1 and f"conversion.json: {'.'.join(at[:2])} is " in done.output


def test_an_output_of_other_files_with_the_same_tensors_is_told_as_such(both: Path) -> None:
    shutil.rmtree(both / "step")
    save(MODEL, both / "step", tp=1, pp=2)
    done = verify(both)
    assert done.exit_code == 0 and "it was made from other files: model_tp0_pp0.pt" in done.output


def test_a_manifest_without_what_it_need_not_say_is_none_that_says_otherwise(both: Path) -> None:
    path = both / "hf" / "conversion.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "unread"}))
    assert verify(both).exit_code == 0


def test_an_output_that_an_older_mapping_made_with_other_words_is_no_problem(both: Path) -> None:
    text = find_file("families/internlm2").read_text()
    mapping = both / "internlm2.yaml"
    mapping.write_text(text.replace("halves", "half"))
    shutil.rmtree(both / "hf")
    engine.convert(mapping, both / "step", both / "hf")
    mapping.write_text(text)
    done = verify(both, mapping=str(mapping))
    assert done.exit_code == 0 and 'rotary is "half", the source gives "halves"' in done.output


def test_a_long_list_of_differences_is_cut_but_counted(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LISTED", 3)
    change(both, lambda state: [tensor.add_(1) for tensor in state.values()])
    found = source_of(both)
    assert len(found["differing"]) == 3
    assert found["more"] == found["tensors"] - 3
    assert "more tensors differ from the source" in verify(both).output


def test_a_sample_has_other_blocks_in_each_layer() -> None:
    layers: list[Any] = [SimpleNamespace(name=f"layers.{n}.w", shape=(1 << 14, 1 << 8)) for n in range(4)]
    assert len({str(source._chosen(one, 0.25)) for one in layers}) > 1


@sampled(2)
@pytest.mark.parametrize(("sample", "read"), [("10%", 4), ("9%", 3), ("100%", 32), ("0.1%", 1), ("99%", 32)])
def test_a_sample_reads_some_blocks_of_each_tensor_the_same_each_time(
    sample: str, read: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_BLOCK", 16)  # one row
    asked: list[list[int]] = []
    real = source._chosen

    def chosen(output: Any, sample: Any) -> Any:
        for box in real(output, sample):
            if output.name == "lm_head.weight":
                asked[-1].append(box[0][0])
            yield box

    monkeypatch.setattr(source, "_chosen", chosen)
    for _ in range(2):
        asked.append([])
        assert not engine.api.verify(made / "hf", src=made / "step", mapping=MODEL.mapping, sample=sample).problems
    assert asked[0] == asked[1]
    assert len(asked[0]) == len(set(asked[0])) == read
    thirds = [{row * 3 // 32 for row in asked[0]}] if read >= 3 else []
    assert all(len(seen) == 3 for seen in thirds)  # spread over the tensor


@pytest.mark.parametrize("text", ["0", "0%", "101%", "8", "-1", "many", "", "5 %%"])
def test_a_sample_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse_sample(text)
    assert caught.value.code == "E001"


@pytest.mark.parametrize(
    "arguments",
    [["--mapping", "internlm2.yaml"], ["--logits"], ["--src", "step"], ["--src", "step", "--logits", "--sample", "5%"]],
)
def test_arguments_that_say_nothing_together_are_refused(arguments: list[str], made: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(made / "hf"), *arguments, "--json"])
    assert result.exit_code == 2
    assert json.loads(result.output)["errors"][0]["code"] == "E001"


def test_replicas_that_drifted_apart_are_found_when_everything_is_read(both: Path) -> None:
    path = both / "step" / "model_tp1_pp1.pt"
    state = torch.load(path, weights_only=True)
    state["norm.weight"][0] += 1
    torch.save(state, path)
    result = verify(both, "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["errors"][0]["code"] == "E402"
