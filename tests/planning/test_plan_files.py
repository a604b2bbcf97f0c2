"""Plans are files: what is reviewed is what runs, or nothing runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from click.testing import CliRunner, Result

import engine
from engine import api
from engine.commands.main import cli
from engine.errors import EngineError
from tests.support.depth import crossed, sampled
from tests.support.sentencepiece_models import train

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "internevo"
SCHEMA = json.loads((ROOT / "schemas" / "saved-plan.schema.json").read_text("utf-8"))
MAPPING = "families/internlm.yaml"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "v1_tp2_pp2", tmp_path / "step"))


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path) -> Path:
    done = invoke("plan", "-m", MAPPING, "-s", checkpoint, "-o", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    return tmp_path / "plan.json"


def refused(path: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        api.load_plan(path)
    return caught.value


def change(path: Path, *keys: str | int, to: Any) -> None:
    data = json.loads(path.read_text("utf-8"))
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    path.write_text(json.dumps(data), encoding="utf-8")


@sampled(2)
@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("v1_tp2_pp2_chunks2", "internlm-7b"),
        ("v1_isp_tp1_wp2", "families/internlm.yaml"),
        ("v2_tp2_pp1_normhead", "families/internlm2-official.yaml"),
        ("v1_tp2_pp1_reward", "internlm-20b"),
        ("moe_tp2_pp2_dp1", "families/moe-stacked.yaml"),
    ],
)
def test_a_saved_plan_fits_its_schema_and_is_small(name: str, mapping: str, tmp_path: Path) -> None:
    api.save_plan(tmp_path / "plan.json", mapping, FIXTURES / name)
    text = (tmp_path / "plan.json").read_text("utf-8")
    jsonschema_rs.validator_for(SCHEMA).validate(json.loads(text))
    assert len(text) < 30_000


def test_running_a_saved_plan_writes_what_running_its_request_writes(
    checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    engine.convert(MAPPING, checkpoint, tmp_path / "direct")
    done = invoke("run", "--plan", saved, "-o", tmp_path / "planned")
    assert done.exit_code == 0 and "next: engine verify" in done.output, done.output
    direct = {p.name: p.read_bytes() for p in (tmp_path / "direct").iterdir() if p.suffix == ".safetensors"}
    planned = {p.name: p.read_bytes() for p in (tmp_path / "planned").iterdir() if p.suffix == ".safetensors"}
    assert direct == planned and direct
    assert (tmp_path / "direct" / "config.json").read_bytes() == (tmp_path / "planned" / "config.json").read_bytes()


def test_a_saved_plan_keeps_settings_dtype_and_shard_size(checkpoint: Path, tmp_path: Path) -> None:
    asked = ("--set", "max_position_embeddings=64", "--dtype", "float16", "--max-shard-size", "200kB")
    assert invoke("plan", "-m", MAPPING, "-s", checkpoint, "-o", tmp_path / "p", *asked).exit_code == 0
    done = invoke("run", "--plan", tmp_path / "p", "-o", tmp_path / "hf", "-q")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    assert (config["max_position_embeddings"], config["dtype"]) == (64, "float16")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


def test_planning_twice_saves_the_same_bytes(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    api.save_plan(tmp_path / "again.json", MAPPING, checkpoint)
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_a_checkpoint_file_that_changed_is_named_and_nothing_is_written(
    checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    path = checkpoint / "model_tp1_pp0.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, path)
    error = refused(saved)
    assert (error.code, error.message.split("`")[1]) == ("E405", "model_tp1_pp0.pt")
    done = invoke("run", "--plan", saved, "-o", tmp_path / "hf")
    assert done.exit_code == 1 and "E405" in done.output
    assert not (tmp_path / "hf").exists()


def test_a_mapping_that_changed_is_refused_also_through_its_parent(tmp_path: Path, checkpoint: Path) -> None:
    mine = tmp_path / "mappings"
    mine.mkdir()
    family = (ROOT / "mappings" / MAPPING).read_text("utf-8")
    (mine / "family.yaml").write_text(family, encoding="utf-8")
    (mine / "mine.yaml").write_text("mapping: 1\nname: mine\nversion: 1.0.0\nextends: family.yaml\n", encoding="utf-8")
    api.save_plan(tmp_path / "plan.json", mine / "mine.yaml", checkpoint)
    (mine / "family.yaml").write_text(family + "# a remark\n", encoding="utf-8")
    api.load_plan(tmp_path / "plan.json")
    (mine / "family.yaml").write_text(family.replace("default: 2048", "default: 4096"), encoding="utf-8")
    error = refused(tmp_path / "plan.json")
    assert error.code == "E217" and "the mapping changed" in error.message


def test_a_chat_template_that_changed_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path))
    template = tmp_path / "chat_templates" / "ours.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    text = "mapping: 1\nname: ours\nversion: 1.0.0\nextends: families/internlm.yaml\nchat_template: ours\n"
    (tmp_path / "ours.yaml").write_text(text)
    api.save_plan(tmp_path / "plan.json", tmp_path / "ours.yaml", checkpoint)
    jsonschema_rs.validate(SCHEMA, json.loads((tmp_path / "plan.json").read_text("utf-8")))
    api.load_plan(tmp_path / "plan.json")
    template.write_text("{{ messages[0] }}")
    assert refused(tmp_path / "plan.json").code == "E217"


def test_a_layout_that_changed_is_refused(saved: Path) -> None:
    change(saved, "layout", "digest", to="0" * 64)
    error = refused(saved)
    assert error.code == "E217" and "the layout changed" in error.message


def test_a_training_configuration_that_changed_is_refused_by_what_it_changes(checkpoint: Path, saved: Path) -> None:
    path = checkpoint / "model_config.pt"
    config = dict(engine.api.read_checkpoint(checkpoint, api.load_layout("internevo")).config)
    torch.save(config | {"layer_norm_epsilon": 0.05}, path)
    (checkpoint / "config_file.pt").unlink()  # which repeats it
    error = refused(saved)
    assert error.code == "E217" and "rms_norm_eps" in error.message
    assert error.got == "0.05"


@sampled(2)
@pytest.mark.parametrize(
    ("keys", "to", "told"),
    [
        (("variants", "rotary"), "pairs", "`rotary` of variants"),
        (("ranks", "tp"), 4, "`ranks`"),
        (("rules", 1, "copies"), 1, "self_attn.q_proj.weight"),
        (("outputs", 0, "tensors"), 1, "what goes into which file"),
        (("digest",), "ab", "what is copied"),
    ],
)
def test_a_plan_that_comes_out_differently_is_refused_and_the_difference_named(
    saved: Path, keys: tuple[str | int, ...], to: Any, told: str
) -> None:
    change(saved, *keys, to=to)
    error = refused(saved)
    assert error.code == "E217" and told in error.message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"plan": 3}', "[" * 100_000])
def test_a_file_that_is_no_saved_plan_is_refused_plainly(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    error = refused(tmp_path / "plan.json")
    assert (error.code, error.message) == ("E102", "the file is not a saved plan")


def test_a_saved_plan_of_two_mappings_has_both_plans_of_one_request(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole = api.save_plan(path, MAPPING, checkpoint, job="reshard", to="transformers") and path.read_text("utf-8")
    change(path, "through", "request", "src", to=str(FIXTURES / "v1_tp2_pp2"))
    assert refused(path).got == "`through` is another request's"
    data = json.loads(whole)
    for one in ({**data, "through": None}, {**data["through"], "through": data["through"]}):
        path.write_text(json.dumps({key: value for key, value in one.items() if value is not None}), encoding="utf-8")
        assert refused(path).got == "two mappings with the plan of one, or two plans of one mapping"


def test_a_saved_plan_whose_request_cannot_be_asked_is_refused(saved: Path) -> None:
    change(saved, "request", "max_shard_size", to=0)
    assert (refused(saved).code, refused(saved).message) == ("E102", "the file is not a saved plan")


def test_a_saved_plan_of_a_later_format_is_refused_as_such(saved: Path) -> None:
    change(saved, "plan", to=4)
    assert "version 4" in refused(saved).message


@sampled(2)
@pytest.mark.parametrize(
    "more", [("-m", MAPPING), ("-s", "."), ("--set", "rotary=pairs"), ("--dtype", "float32"), ("--strict",)]
)
def test_a_saved_plan_excludes_what_it_already_says(saved: Path, more: tuple[str, ...]) -> None:
    done = invoke("run", "--plan", saved, *more)
    assert done.exit_code == 2
    assert "--plan" in done.output


def test_saving_a_plan_tells_of_a_tokenizer_that_running_it_refuses(checkpoint: Path, tmp_path: Path) -> None:
    """Parts are written before `commit` reads the tokenizer, which may be given another one."""
    (checkpoint / "tokenizer.model").write_bytes(b"of no model")
    done = invoke("plan", "-m", MAPPING, "-s", checkpoint, "-o", tmp_path / "plan")
    told = " ".join(done.output.split())
    assert done.exit_code == 0 and "running this plan is refused:" in told and "--tokenizer" in told, told


@pytest.fixture(scope="module")
def tokenizers() -> tuple[bytes, bytes]:
    small = {"vocab_size": 200, "byte_fallback": False}
    return train(**small), train(**small, split_digits=False)


@pytest.mark.parametrize(("what", "by"), crossed(["replaced", "removed"], ["run", "commit"]))
def test_a_saved_plan_is_not_run_with_another_tokenizer_than_was_there(
    what: str, by: str, tokenizers: tuple[bytes, bytes], checkpoint: Path, tmp_path: Path
) -> None:
    beside = checkpoint / "tokenizer.model"
    beside.write_bytes(tokenizers[0])
    api.save_plan(tmp_path / "plan", MAPPING, checkpoint)
    beside.unlink() if what == "removed" else beside.write_bytes(tokenizers[1])
    if by == "commit":
        api.part(tmp_path / "plan", "1/1", tmp_path / "hf")
    finish = api.commit if by == "commit" else api.run_plan
    with pytest.raises(EngineError, match=r"the tokenizer's `tokenizer.model` differs") as caught:
        finish(tmp_path / "plan", tmp_path / "hf")
    assert caught.value.code == "E217" and not (tmp_path / "hf").exists()
    assert what == "replaced" or "or not of a tokenizer that fits" in str(caught.value.got)  # as one that is left out
    (tmp_path / "other.model").write_bytes(tokenizers[1])
    finish(tmp_path / "plan", tmp_path / "hf", tokenizer=tmp_path / "other.model")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizers[1]


def test_a_tokenizer_that_came_after_a_plan_without_one_is_used(
    tokenizers: tuple[bytes, bytes], saved: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "tokenizer.model").write_bytes(tokenizers[0])
    api.run_plan(saved, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizers[0]


@pytest.mark.parametrize("option", ["--tokenizer", "--code"])
def test_what_goes_beside_a_model_has_no_use_where_rank_files_are_written(
    option: str, checkpoint: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    api.save_plan(plan, MAPPING, checkpoint, job="reshard")
    done = invoke("run", "--plan", plan, "-o", tmp_path / "out", option, tmp_path)
    assert done.exit_code == 2 and f"{option} has no effect" in done.output, done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--tp", "2"), "--tp is no option of run; it needs --for reverse or --for reshard"),
        (("--for", "reverse", "--strict"), "--strict is no option of reverse"),
        (("--for", "reverse"), "--mapping"),
    ],
)
def test_a_plan_takes_the_options_of_the_command_that_it_is_for(asked: tuple[str, ...], told: str) -> None:
    mapping = () if told == "--mapping" else ("-m", MAPPING)
    done = invoke("plan", *mapping, *asked)
    assert done.exit_code == 2
    assert told in done.output
