"""A release that was chosen and is not it: named where it is known, else said everywhere, and never claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import engine
from engine.commands.main import cli
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.planning.release import check_release
from tests.support.depth import sampled
from tests.support.families import model_of, save_family
from tests.support.shards import Model, save

V2 = Model("v2", groups=2)
SIZES = {"layer": 4, "hidden": 16, "heads": 4, "groups": 2, "ffn": 24, "vocab": 32}
SETTINGS = {"mlp_letters": "w2_is_down"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(V2, tmp_path / "step", tp=2, pp=2)
    return tmp_path / "step"


def release(folder: Path, name: str, **sizes: int) -> Path:
    """A release of the InternLM2 family with these sizes."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.yaml"
    stated = json.dumps({**SIZES, **sizes}).replace('"', "")
    file.write_text(
        f"mapping: 1\nname: {name}\nversion: 1.0.0\ndescription: The famous {name}\n"
        f"extends: families/internlm2.yaml\nexpect: {stated}\n"
    )
    return file


def manifest(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "conversion.json").read_text("utf-8"))
    return data


@sampled(3)
@pytest.mark.parametrize("key", SIZES)
def test_a_model_of_other_sizes_is_not_titled_after_the_release(source: Path, tmp_path: Path, key: str) -> None:
    chosen = release(tmp_path / "own", "famous-7b", **{key: SIZES[key] * 2})
    report = engine.convert(chosen, source, tmp_path / "out", settings=SETTINGS)
    (told,) = [one for one in report.notices if "not release" in one]
    assert told == f"this is not release `famous-7b`: {key}: got {SIZES[key]}, expected {2 * SIZES[key]}"
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# internlm2 of " in card and "# famous-7b" not in card and "The famous" not in card
    assert f"This is not `famous-7b`, whose mapping it was converted with: `{key}` is {SIZES[key]} here" in card
    found = manifest(tmp_path / "out")["mapping"]["not_the_release"]
    assert found == {key: {"got": SIZES[key], "expected": 2 * SIZES[key]}}


@pytest.mark.parametrize(
    ("release", "family"),
    [
        ("llama2-7b", "llama"),
        ("internlm2_5-7b-chat-1m", "internlm2"),
        ("internlm2_5-7b-chat-official", "internlm2-official"),
        ("internlm3-8b-instruct", "internlm3"),
        ("meta-llama-3-8b", "meta-llama"),
    ],
)
def test_the_family_in_such_a_title_is_the_releases_own_and_not_the_one_that_it_is_made_of(
    release: str, family: str
) -> None:
    assert load_mapping(release).family == family


def test_the_release_itself_is_titled_after_it(source: Path, tmp_path: Path) -> None:
    report = engine.convert(release(tmp_path / "own", "famous-7b"), source, tmp_path / "out", settings=SETTINGS)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# famous-7b, converted" in card and "The famous famous-7b." in card and "This is not" not in card
    assert not any("not release" in one for one in report.notices)
    assert "not_the_release" not in manifest(tmp_path / "out")["mapping"]


def test_another_release_of_exactly_these_sizes_is_named_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = release(tmp_path / "own", "famous-7b", layer=8, ffn=48)
    release(tmp_path / "more", "famous-1b")
    (tmp_path / "more" / "broken.yaml").write_text("[")
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "more"))
    with pytest.raises(EngineError, match="it has the sizes of famous-1b") as caught:
        engine.convert(chosen, source, tmp_path / "out", settings=SETTINGS)
    assert caught.value.code == "E213"
    assert caught.value.got == "layer = 4, ffn = 24" and caught.value.expected == "layer = 8, ffn = 48"
    assert "--mapping famous-1b" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
    with pytest.raises(EngineError, match="famous-1b"):
        engine.reshard(chosen, source, tmp_path / "out", tp=1, settings=SETTINGS)
    engine.convert("families/internlm2.yaml", source, tmp_path / "hf", settings=SETTINGS)
    with pytest.raises(EngineError, match="famous-1b"):
        engine.reverse(chosen, tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_of_another_family_with_these_sizes_is_not_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = release(tmp_path / "own", "famous-7b", layer=8)
    other = release(tmp_path / "more", "other-family")
    other.write_text(other.read_text().replace("families/internlm2", "families/internlm2-official"))
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "more"))
    assert any("not release" in one for one in engine.plan(chosen, source, settings=SETTINGS).notices)


@pytest.mark.parametrize(
    ("chosen", "right"),
    [
        ("internlm2-7b", "internlm2-1_8b"),
        ("internlm2-chat-7b", "internlm2-chat-1_8b"),
        ("internlm2_5-20b", "internlm2_5-7b"),
        ("internlm2_5-20b-chat", "internlm2_5-7b-chat"),
        ("internlm2_5-7b-chat-official", "internlm2_5-1_8b-chat-official"),
        ("internlm-chat-20b", "internlm-chat-7b"),
        ("meta-llama-3-70b", "meta-llama-3-8b"),
    ],
)
def test_of_several_releases_of_these_sizes_the_one_of_the_same_kind_is_proposed(chosen: str, right: str) -> None:
    with pytest.raises(EngineError, match="it has the sizes of") as caught:
        check_release(load_mapping(chosen), load_mapping(right).expect)
    assert str(caught.value.fix).endswith(f"such as --mapping {right}.")


def test_strict_refuses_any_other_size(source: Path, tmp_path: Path) -> None:
    chosen = release(tmp_path / "own", "famous-7b", vocab=64)
    with pytest.raises(EngineError, match="this is not release `famous-7b`") as caught:
        engine.plan(chosen, source, settings=SETTINGS, strict=True)
    assert caught.value.code == "E213" and caught.value.got == "vocab = 32"


def test_what_only_the_release_answers_is_asked_about_another_model(tmp_path: Path) -> None:
    """Meta's files do not say the base of the angles; the release's is not that of every model."""
    save_family(model_of("meta", heads=4, groups=4), tmp_path / "step", tp=1)
    weights, params = tmp_path / "step" / "consolidated.00.pth", tmp_path / "step" / "params.json"
    state = torch.load(weights, weights_only=True)
    torch.save({name: one for name, one in state.items() if name != "rope.freqs"}, weights)  # Llama 3 has none
    params.write_text(json.dumps({**json.loads(params.read_text()), "vocab_size": SIZES["vocab"]}))
    with pytest.raises(EngineError, match=r"E202.*this is not release `meta-llama-3-8b`") as caught:
        engine.plan("meta-llama-3-8b", tmp_path / "step")
    assert "--set rope_theta=VALUE" in str(caught.value.expected)
    plan = engine.plan("meta-llama-3-8b", tmp_path / "step", settings={"rope_theta": 500000})
    assert plan.config["rope_parameters"]["rope_theta"] == 500000


def test_reverse_and_reshard_say_it_too(source: Path, tmp_path: Path) -> None:
    chosen = release(tmp_path / "own", "famous-7b", layer=8)
    engine.convert("families/internlm2.yaml", source, tmp_path / "hf", settings=SETTINGS)
    for out, report in (
        ("ranks", engine.reverse(chosen, tmp_path / "hf", tmp_path / "ranks", tp=2, settings=SETTINGS)),
        ("again", engine.reshard(chosen, source, tmp_path / "again", tp=1, settings=SETTINGS)),
    ):
        assert "this is not release `famous-7b`: layer: got 4, expected 8" in report.notices
        assert manifest(tmp_path / out)["mapping"]["not_the_release"] == {"layer": {"got": 4, "expected": 8}}


def test_the_end_of_the_run_says_it(source: Path, tmp_path: Path) -> None:
    chosen = release(tmp_path / "own", "famous-7b", layer=8)
    command = [
        "run",
        "-m",
        str(chosen),
        "-s",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--set",
        "mlp_letters=w2_is_down",
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0
    assert "note this is not release `famous-7b`: layer: got 4, expected 8" in done.stdout
