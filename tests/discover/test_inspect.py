"""`engine inspect` says what a folder is, what fits and how to choose, and what is wrong with what nearly fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import engine
from engine.commands.main import cli
from engine.discover import steps
from engine.discover.fits import find_fits
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.storage.local import LocalStore
from tests.support.terminal import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "internevo"


def inspected(*words: object) -> str:
    done = CliRunner().invoke(cli, ["inspect", *map(str, words)])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_mappings_that_fit_are_told_apart_by_what_no_file_says() -> None:
    told = inspected(FIXTURES / "v2_tp2_pp2")
    assert "2 mappings fit" in told and "internlm2, remote code" in told and "choose by target" in told
    assert "next: engine run --mapping NAME" in told


def test_all_says_of_each_other_mapping_why_it_does_not_fit() -> None:
    told = inspected("--all", FIXTURES / "v1_tp2_pp2")
    assert "(this checkpoint)" in told and "internlm-7b, internlm-chat-7b" in told
    assert "it is for model_type INTERNLM3 or INTERNLM3_M8, this is INTERNLM" in told
    assert "INTERNLM3" not in inspected(FIXTURES / "v1_tp2_pp2")


def test_releases_are_told_before_families_and_a_family_before_what_extends_it() -> None:
    names = ["families/internevo-gemma", "families/internlm2-official", "families/internlm2", "internlm2-7b"]
    checkpoint: Any = SimpleNamespace(training={"model_type": "ANOTHER"})
    found, _ = find_fits(checkpoint, load_layout("internevo"), map(load_mapping, names))
    assert [fit.name for fit in found] == ["internlm2-7b", "internlm2", "internlm2-official", "internevo-gemma"]


def test_a_hugging_face_folder_is_told_what_can_be_done_with_it(tmp_path: Path) -> None:
    engine.convert("internlm", FIXTURES / "v1_tp2_pp2", tmp_path / "hf")
    told = inspected(tmp_path / "hf")
    assert "Hugging Face checkpoint, LlamaForCausalLM, written by the engine with internlm" in told
    assert all(f"engine {command}" in told for command in ("verify", "compare", "reverse -m internlm"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for wrong in (5, True, {"a": 1}, [[1]], "x"):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "architectures": wrong}))
        assert "Hugging Face checkpoint, llama, written" in inspected(tmp_path / "hf")


@pytest.mark.parametrize("depth", ["100", "100/actor", "100/dcp_checkpoint/_actor"])
def test_a_step_below_the_folder_is_named_by_inspect_and_where_a_mapping_is_given(depth: str, tmp_path: Path) -> None:
    (tmp_path / "run" / depth).parent.mkdir(parents=True)
    (tmp_path / "run" / depth).symlink_to(FIXTURES / "v1_tp2_pp2")
    (tmp_path / "run" / "logs" / "host").mkdir(parents=True)
    assert engine.inspect(tmp_path / "run").facts["newest"] == depth
    with pytest.raises(engine.EngineError, match="no weights files of layout `internevo`") as caught:
        engine.plan("internlm", tmp_path / "run")
    assert caught.value.fix == f"Give the folder of one step, like {tmp_path}/run/{depth}."
    with pytest.raises(engine.EngineError, match="no weights files of layout `megatron`") as caught:
        engine.plan("families/megatron-llama", tmp_path / "run")
    assert str(caught.value.fix).startswith("Give the folder of one step, which holds")


@pytest.mark.parametrize("name", ["common.pt", "model_config.pt"])
def test_a_save_that_stopped_before_its_weights_is_told_as_unfinished(name: str, tmp_path: Path) -> None:
    (tmp_path / "100").mkdir()
    torch.save({}, tmp_path / "100" / name)
    mapping = "internlm" if name == "model_config.pt" else "families/megatron-llama"
    for call in (engine.inspect, lambda step: engine.plan(mapping, step)):
        with pytest.raises(engine.EngineError, match=f"`{name}` is here and no weights file is") as caught:
            call(tmp_path / "100")
        assert caught.value.code == "E304" and str(caught.value.fix).startswith("Take the step before")
    assert engine.inspect(tmp_path).facts["steps"][0]["why"].startswith(f"`{name}` is here")


def test_a_folder_of_steps_says_which_are_complete(tmp_path: Path) -> None:
    for step in ("100", "90", "iter_7"):
        shutil.copytree(FIXTURES / "v1_tp2_pp2", tmp_path / step)
    (tmp_path / "100" / "model_tp0_pp1.pt").unlink()
    (tmp_path / "logs").mkdir()
    found = engine.inspect(tmp_path)
    assert found.kind == "steps" and found.facts["newest"] == "90"
    assert [(s["name"], s["complete"]) for s in found.facts["steps"]] == [
        ("iter_7", True),
        ("90", True),
        ("100", False),
    ]
    assert "rank file `model_tp0_pp1.pt` is missing" in inspected(tmp_path)


def test_a_step_that_cannot_be_read_is_named_too_if_there_is_no_other(tmp_path: Path) -> None:
    """DeepSpeed's advice names a program that lies in the folder above its files, which is the one that is given."""
    for number in (400, 500):
        step = tmp_path / f"checkpoint-{number}" / f"global_step{number}"
        step.mkdir(parents=True)
        torch.save({}, step / "mp_rank_00_model_states.pt")
    assert inspected(step.parent).splitlines()[-1] == f"next: engine inspect {step}"
    with pytest.raises(engine.EngineError) as caught:
        engine.plan("transformers", tmp_path)
    assert caught.value.fix == f"Give the folder of one step, like {step}."


def test_a_folder_that_is_none_of_these_names_what_there_could_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path)])
    assert done.exit_code == 1 and done.stderr.startswith("E304 this folder is not a checkpoint")
    assert (
        "notes.txt" in done.stderr
        and "model_tp{tp}_pp{pp}.pt (internevo)" in done.stderr
        and "--src" not in done.stderr
        and "docs/frameworks.md" in done.stderr
    )


def test_a_checkpoint_that_its_own_family_refuses_is_not_sent_to_write_a_mapping(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "v2_tp2_pp2", tmp_path / "step")
    for path in (tmp_path / "step").glob("model_tp*.pt"):
        state = {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True).items()}
        state |= {n.replace(".weight", ".bias"): t.clone() for n, t in state.items() if n.endswith("norm.weight")}
        torch.save(state, path)
    told = inspected(tmp_path / "step")
    assert "it has layer norms" in told and "(E209)" in told and "engine new" not in told


def test_experts_that_were_lost_are_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "moe_tp2_pp2_dp1", tmp_path / "step")
    sorted((tmp_path / "step").glob("model_moe*"))[-1].unlink()
    told = inspected(tmp_path / "step")
    assert "wrapped_experts.3" in told and "(E207)" in told and "engine new" not in told


@pytest.mark.parametrize(
    ("name", "meant", "not_meant"),
    [
        ("internlm2-7b-chat", "Did you mean `internlm2-chat-7b`?", None),
        ("internlm2.5-7b", "Did you mean `internlm2_5-7b`?", None),
        ("internlm2-70b", "of other models: internlm2-7b", "Did you mean"),
        ("families/internlm9.yaml", "of other models", "Did you mean"),
    ],
)
def test_a_suggestion_never_crosses_to_another_model_silently(name: str, meant: str, not_meant: str | None) -> None:
    with pytest.raises(engine.EngineError) as caught:
        engine.load_mapping(name)
    assert meant in str(caught.value) and (not_meant is None or not_meant not in str(caught.value))


def test_a_path_where_nothing_is_lists_no_bundled_mappings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(engine.EngineError) as caught:
        engine.load_mapping(tmp_path / "mien.yaml")
    told = str(caught.value)
    assert f"Did you mean `{tmp_path / 'mine.yaml'}`?" in told and "internlm" not in told


def test_an_empty_folder_is_an_output(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    done = CliRunner().invoke(
        cli, ["convert", "-s", str(FIXTURES / "v1_tp2_pp2"), "-o", str(tmp_path / "hf"), "--dtype", "bf16"]
    )
    assert done.exit_code == 0, done.stderr
    assert "using mapping internlm, the only one that fits" in done.stderr
    assert (tmp_path / "hf" / "config.json").is_file() and "hf upload" in done.stdout


def test_without_a_configuration_what_fits_is_unsure_and_one_that_is_given_goes_into_the_next_command() -> None:
    fixture = FIXTURES.parent / "dcp" / "tt03_tied_fsdp4"
    told = inspected(fixture / "step-10")
    assert "may fit" in told and "next: engine inspect --config config.json" in told
    assert "torchtitan-llama: the training configuration is missing" in told
    config = fixture / "hf_config.json"
    told = inspected(fixture / "step-10", "--config", config)
    assert "next: engine run --mapping torchtitan-llama --src" in told and told.rstrip().endswith(f"--config {config}")


def test_a_form_that_only_an_extending_family_writes_back_is_told_that_family(tmp_path: Path) -> None:
    engine.convert("internlm2-official", FIXTURES / "v2_tp2_pp2", tmp_path / "hf")
    (tmp_path / "hf" / "conversion.json").unlink()
    assert [fit.name for fit in engine.inspect(tmp_path / "hf").fits] == ["internlm2-official"]


def test_the_next_command_has_what_must_be_filled_in() -> None:
    told = inspected(FIXTURES.parent / "megatron" / "leg_t4_g2" / "iter_0000010")
    assert told.splitlines()[-1].endswith(" --config FILE   (fill in as described above)")
    told = inspected(FIXTURES / "v1_tp4_pp1")  # of no release's size
    assert "--mapping internlm --src" in told and told.splitlines()[-1].endswith(
        " --set mlp_letters=CHOICE   (fill in as described above)"
    )


def test_steps_are_in_the_order_of_the_last_numbers_in_their_names_and_a_hidden_folder_is_none(tmp_path: Path) -> None:
    for name in ("iter_0000200", "run900-step30", ".40"):
        (tmp_path / name).mkdir()
    assert steps.folders_of(LocalStore(tmp_path)) == ["run900-step30", "iter_0000200"]


def test_a_folder_of_files_without_a_tensor_of_the_model_is_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optimizer_0").mkdir()
    found = SimpleNamespace(name="any"), SimpleNamespace(files=[SimpleNamespace(tensors=(), size=8)])
    monkeypatch.setattr(steps, "read_any", lambda *_, **__: found)
    assert steps.find_steps(LocalStore(tmp_path), None) is None
