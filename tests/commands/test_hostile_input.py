"""Whatever stands in a JSON file, a mapping or an argument: a plain error, no traceback, nothing half done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import engine
from engine import api
from engine.commands.main import cli
from engine.errors import EngineError
from engine.serve.server import Line
from engine.storage.local import LocalStore
from tests.attacks.values import ARGUMENTS, EVERY, mutated
from tests.support.depth import sampled
from tests.support.disk import contents
from tests.support.genuine import FIXTURES
from tests.support.old_output import old_output
from tests.support.shards import Model, save

V2 = Model("v2", layers=2, groups=2)
SETTINGS = {"mlp_letters": "w2_is_down"}
SET = ("--set", "mlp_letters=w2_is_down")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint, its Hugging Face form in two files, and a saved plan."""
    folder = tmp_path_factory.mktemp("made")
    save(V2, folder / "step", tp=2)
    engine.convert(V2.mapping, folder / "step", folder / "hf", settings=SETTINGS, max_shard_size=3000)
    api.save_plan(folder / "plan.json", V2.mapping, folder / "step", settings=SETTINGS)
    return folder


def invoke(*command: object) -> Result:
    done = CliRunner().invoke(cli, list(map(str, command)), color=True)
    error = done.exception
    assert error is None or isinstance(error, SystemExit), (command, repr(error)[:500])
    assert done.exit_code in (0, 1, 2), command
    for c in done.output:
        harmless = c in "\n\t\x1b" or c.isprintable() or unicodedata.category(c) == "Zs"
        assert harmless, (command, repr(c))
    assert "E901" not in done.output, command
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def small(data: dict[str, Any]) -> dict[str, Any]:
    """A manifest or plan with fewer tensors, so that every kind of entry is changed and none a hundred times."""
    for key in ("tensors",):
        if isinstance(data.get(key), dict):
            data = {**data, key: dict(list(data[key].items())[:2])}
    return data


def test_no_manifest_breaks_verify_or_overwriting(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    shutil.copytree(made / "hf", out)
    data = json.loads((out / "conversion.json").read_text("utf-8"))
    data["mapping"]["resolved"] = {"a": 1}
    for name, raw in mutated(small(data)):
        (out / "conversion.json").write_bytes(raw)
        assert invoke("verify", out, "-q").exit_code == 1, name
    from engine.run.written import Ours

    for _, raw in mutated({"manifest": 1, "files": {"a": "0"}, "tensors": {"t": {"file": "b"}}}):
        (out / "conversion.json").write_bytes(raw)
        assert Ours()(LocalStore(out)) is not None


def test_no_saved_plan_breaks_run(made: Path, tmp_path: Path) -> None:
    data = json.loads((made / "plan.json").read_text("utf-8"))
    data["rules"] = data["rules"][:1]
    for name, raw in mutated(data):
        (tmp_path / "plan.json").write_bytes(raw)
        assert invoke("run", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", "-q").exit_code != 0, name
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json",
                                  "generation_config.json"])  # fmt: skip
def test_no_json_of_a_hugging_face_folder_breaks_reverse_or_compare(name: str, made: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(made / "hf", hf)
    data = json.loads((hf / name).read_text("utf-8")) if (hf / name).exists() else {"bos_token": {"content": "<s>"}}
    if "weight_map" in data:
        data["weight_map"] = dict(list(data["weight_map"].items())[:1])
    for _, raw in mutated(data):
        (hf / name).write_bytes(raw)
        invoke("reverse", "-m", V2.mapping, "-s", hf, "-o", tmp_path / "out", *SET, "-q")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    invoke("compare", hf, made / "hf")


def test_no_mapping_breaks_lint_or_plan(made: Path, tmp_path: Path) -> None:
    """JSON is YAML too."""
    data: dict[str, Any] = {
        "mapping": 1, "name": "x", "version": "1.0.0", "description": "x", "extends": "families/internlm2.yaml",
        "options": {"rope_factor": {"type": "number", "default": 2.0}},
        "variants": {"rotary": {"choices": {"halves": "otherwise"}, "default": "halves"}},
        "dims": {"multiple": "256"},
        "rules": [{"name": "wo", "source": "a.{layer}.b", "axes": "hidden | ffn", "when": {"rotary": "halves"}}],
        "config": {"rms_norm_eps": "{{ 1e-5 }}"},
        "tokenizer": {"file": "tokenizer.model", "rename": {"3": "x"}},
        "generation": {"eos_token_id": [2, 3]},
        "expect": {"layer": 2},
    }  # fmt: skip
    for _, raw in mutated(data):
        (tmp_path / "m.yaml").write_bytes(raw)
        invoke("lint", tmp_path / "m.yaml")
        invoke("plan", "-m", tmp_path / "m.yaml", "-s", made / "step", *SET)


def test_no_committed_meaning_breaks_prove(tmp_path: Path) -> None:
    from engine.language.loader import load_yaml
    from engine.language.mapping_file import load_mapping
    from engine.proving.committed import check_meaning, write_meaning

    mapping = tmp_path / "m.yaml"
    mapping.write_text("mapping: 1\nname: m\nversion: 1.0.0\ndescription: x\nextends: families/meta-llama.yaml\n")
    loaded = load_mapping(str(mapping))
    file = write_meaning(mapping)
    start = file.read_bytes().split(b"meaning:")[0]
    assert write_meaning(mapping) == file  # its own are replaced
    data = {**load_yaml(file).data, "differs": {"tensors": {"a ← b": {"order": "@0"}}, "chat": "x"}}
    for _, raw in mutated(data):
        file.write_bytes(start + raw)
        try:
            check_meaning(loaded)
        except EngineError as error:
            str(error).encode()
    file.write_text("years")
    with pytest.raises(EngineError, match="E401"):
        write_meaning(mapping)
    assert file.read_text() == "years"


def commands(made: Path, tmp_path: Path) -> Iterator[tuple[tuple[object, ...], str]]:
    """Commands with one argument left open, and what stands before it."""
    planned = ("-m", V2.mapping, "-s", made / "step", *SET)
    out = ("-o", tmp_path / "out" / "x")
    for option in ("--workers", "--max-memory", "--max-shard-size", "--set", "--dtype", "--tokenizer", "-m", "-s"):
        yield ("run", *planned, *out, "-q"), option
    for option in ("--tp", "--pp", "--wp", "--chunks", "--mode", "--like", "--set", "--workers", "--max-memory"):
        yield ("reshard", *planned, *out, "-q"), option
    for option in ("--tp", "--pp", "--lossy", "-s"):
        yield ("reverse", "-m", V2.mapping, "-s", made / "hf", *SET, *out, "-q"), option
    for option in ("--sample", "--src", "--dtype"):
        yield ("verify", made / "hf", "-s", made / "step", "-m", V2.mapping, *SET), option
    for option in ("--from", "--"):
        yield ("explain", *planned), option
    yield ("new", "-s", made / "step"), "--name"
    yield ("run", *out), "--plan"
    for command in ("inspect", "compare", "diff", "show", "lint", "prove", "format", "clean"):
        yield (command,), ""


def test_no_argument_breaks_a_command(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = files(made)
    for number, (command, option) in enumerate(commands(made, tmp_path)):
        for value in ARGUMENTS[number % (EVERY // 2) :: EVERY // 2]:
            invoke(*command, *((option,) if option else ()), value)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert files(made) == before
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "wrong",
    [("--workers", "0"), ("--workers", "-1"), ("--workers", "99999999"), ("--workers", "9" * 5000), ("--workers", "x"),
     ("--max-memory", "9" * 400 + "GB"), ("--max-shard-size", "0"), ("--set", "x"), ("--set", "=1"),
     ("--set", "a=" + "9" * 5000), ("--set", "a=1e999"), ("--dtype", "int8"), ("--unknown", "1"), ("-s", ""),
     ("-o", ""), ("-o", "/"), ("-m", "a\0b"), ("--set", "nothing=1"), ("--max-memory", "1000")],
    ids=lambda pair: " ".join(pair)[:30].replace("\0", "?"),
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(wrong: tuple[str, str], made: Path, tmp_path: Path) -> None:
    done = invoke("run", "-m", V2.mapping, "-s", made / "step", "-o", tmp_path / "out", *SET, *wrong)
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, -1, 257, 99999999, True, "3", 1.5])
def test_a_number_of_workers_is_bounded(workers: Any, made: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        engine.convert(V2.mapping, made / "step", tmp_path / "out", settings=SETTINGS, workers=workers)
    assert caught.value.code == "E001"


# -- what is replaced


@pytest.mark.parametrize("file", ["/dev/zero", "/proc/self/mem", "/nothing/there", "."])
def test_a_file_that_holds_no_token_is_refused(file: str, made: Path) -> None:
    done = invoke("serve", "-m", V2.mapping, "-s", made / "step", *SET, "--port", 0, "--token-file", file)
    assert done.exit_code != 0 and re.search("E001|E305", done.output)


def test_a_file_that_somebody_put_under_a_name_of_ours_is_not_replaced(made: Path, tmp_path: Path) -> None:
    def convert(out: Path) -> None:
        engine.convert(V2.mapping, made / "step", out, settings=SETTINGS, overwrite=True, max_shard_size=3000)

    for name in ("model-00001-of-00004.safetensors", "config.json", "README.md", "model.safetensors.index.json"):
        out = tmp_path / name
        shutil.copytree(made / "hf", out)
        raw = (out / name).read_bytes()
        for others in (raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], raw[: len(raw) // 2]):
            (out / name).write_bytes(others)
            before = files(out)
            with pytest.raises(EngineError) as caught:
                convert(out)
            assert caught.value.code == "E401" and "wrote" in str(caught.value.got), name
            assert files(out) == before
        (out / name).unlink()  # what is missing is nobody's
        convert(out)
        assert files(out) == files(made / "hf")


def test_weights_without_digests_are_replaced_only_if_nobody_wrote_to_them(made: Path, tmp_path: Path) -> None:
    def convert() -> None:
        engine.convert(V2.mapping, made / "step", tmp_path / "hf", settings=SETTINGS, overwrite=True, digests=False)

    convert()
    convert()
    weights = tmp_path / "hf" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    before = files(tmp_path)
    with pytest.raises(EngineError) as caught:
        convert()
    assert caught.value.code == "E401" and "model.safetensors" in str(caught.value.got)
    assert files(tmp_path) == before


@pytest.mark.parametrize("mode", [0o700, 0o2775])
def test_a_folder_that_is_replaced_keeps_who_may_read_it(mode: int, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    out.mkdir()
    out.chmod(mode)
    seen: set[int] = set()

    def look(_: object) -> None:
        seen.update(path.stat().st_mode & 0o7777 for path in tmp_path.iterdir() if path.is_dir())

    for _ in range(2):
        engine.convert(V2.mapping, made / "step", out, settings=SETTINGS, overwrite=True, progress=look)
        assert out.stat().st_mode & 0o7777 == mode
    assert seen == {mode}


def test_rank_files_in_folders_are_replaced_too(tmp_path: Path) -> None:
    save(Model("v2", layers=2, groups=2, bias=False), tmp_path / "step", tp=2)
    engine.convert(V2.mapping, tmp_path / "step", tmp_path / "hf", settings=SETTINGS)
    out = tmp_path / "back"
    for _ in range(2):
        engine.reverse("megatron-llama", tmp_path / "hf", out, ranks="tp=1,pp=2", overwrite=True)
    (out / "mp_rank_00_001" / "notes.txt").write_text("mine")
    with pytest.raises(EngineError, match=r"mp_rank_00_001/notes\.txt"):
        engine.reverse("megatron-llama", tmp_path / "hf", out, ranks="tp=1,pp=2", overwrite=True)


def test_only_an_output_of_the_engine_or_an_empty_folder_is_replaced(made: Path, tmp_path: Path) -> None:
    def convert(out: Path) -> None:
        engine.convert(V2.mapping, made / "step", out, settings=SETTINGS, overwrite=True)

    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("years")
    (tmp_path / "link").symlink_to(thesis)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    old_output(tmp_path / "notes")
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    old_output(tmp_path / "sub")
    (tmp_path / "sub" / "folder").mkdir()
    old_output(tmp_path / "broken")
    (tmp_path / "broken" / "conversion.json").write_text('{"manifest": 1, "files": {}, "tensors": {}}')
    before = files(tmp_path)
    for name in ("thesis", "file", "link", "dangling", "notes", "sub", "broken"):
        with pytest.raises(EngineError) as caught:
            convert(tmp_path / name)
        assert caught.value.code == "E401", name
    assert files(tmp_path) == before and (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    (tmp_path / "empty").mkdir()
    old_output(tmp_path / "old")
    for name in ("empty", "old"):
        convert(tmp_path / name)
        convert(tmp_path / name)
        assert not api.verify(tmp_path / name).problems
        assert not (tmp_path / name / "mine.txt").exists()


def test_what_comes_to_the_output_while_a_run_goes_on_is_kept(made: Path, tmp_path: Path) -> None:
    def arrive(_: object) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years")

    for overwrite in (False, True):
        with pytest.raises(EngineError) as caught:
            engine.convert(V2.mapping, made / "step", tmp_path / "out", settings=SETTINGS, overwrite=overwrite,
                           progress=arrive)  # fmt: skip
        assert caught.value.code == "E401"
        assert files(tmp_path / "out") == {"thesis.txt": b"years"}
        shutil.rmtree(tmp_path / "out")


@sampled(2)
@pytest.mark.parametrize("out", ["/", ".", "..", "", "in", "same", ".hf.partial-0a1b2c3d", ".hf.old-0a1b2c3d"])
def test_an_output_that_is_no_place_of_its_own_is_refused(
    out: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "step", tmp_path / "a" / "step")
    monkeypatch.chdir(tmp_path / "a")
    before = files(tmp_path)
    place = {"in": "step/out", "same": "step"}.get(out, out)
    for command in ("run", "reshard"):
        done = invoke(command, "-m", V2.mapping, "-s", "step", "-o", place, *SET, "--overwrite")
        assert done.exit_code == (2 if out in ("/", "") or out.startswith(".hf.") else 1), done.output
    assert files(tmp_path) == before


def test_files_are_replaced_only_when_told_and_when_the_engine_wrote_them(made: Path, tmp_path: Path) -> None:
    planned = ("-m", V2.mapping, "-s", made / "step", *SET)
    for command in (("plan", *planned), ("view", *planned), ("new", "-s", made / "step")):
        out = tmp_path / command[0]
        assert invoke(*command, "-o", out).exit_code == 0
        wrote = out.read_bytes()
        assert "E401" in invoke(*command, "-o", out).output
        assert invoke(*command, "-o", out, "--overwrite").exit_code == 0
        assert out.read_bytes() == wrote
        thesis = tmp_path / f"{command[0]}-thesis"
        for content in (b"years", b"{}", b'{"plan": 1}', b"mapping: 1\nname: mine\n", b"<html></html>"):
            thesis.write_bytes(content)
            for more in ((), ("--overwrite",)):
                assert "E401" in invoke(*command, "-o", thesis, *more).output
                assert thesis.read_bytes() == content
        link = tmp_path / f"{command[0]}-link"
        link.symlink_to(out)
        assert "E401" in invoke(*command, "-o", link, "--overwrite").output
        assert "E401" in invoke(*command, "-o", tmp_path, "--overwrite").output
        assert invoke(*command, "-o", "").exit_code == 2


def test_a_log_is_appended_to_logs_only_and_an_error_when_it_cannot_be_written(made: Path, tmp_path: Path) -> None:
    command = ("run", "-m", V2.mapping, "-s", made / "step", *SET, "-q", "-o", tmp_path / "out")
    (tmp_path / "thesis").write_text("years")
    rank = made / "step" / "model_tp0_pp0.pt"
    kept = rank.read_bytes()
    missing = tmp_path / "no" / "x"
    for log, code in (
        (tmp_path / "thesis", "E401"), (rank, "E401"), (tmp_path, "E403"), (missing, "E403"), ("/dev/full", "E403"),
    ):  # fmt: skip
        done = invoke(*command, "--log-file", log)
        assert done.exit_code == 1 and code in done.output, log
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "thesis").read_text() == "years" and rank.read_bytes() == kept


def test_a_log_in_the_output_is_refused_before_it_is_a_foreign_file_there(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    before = contents(tmp_path / "out")
    command = ("run", "-m", V2.mapping, "-s", made / "step", *SET, "-q", "-o", tmp_path / "out", "--overwrite")
    for log in (tmp_path / "out" / "log", tmp_path / "link" / "log"):
        done = invoke(*command, "--log-file", log)
        assert done.exit_code == 1 and "E403" in done.output and "foreign file in the output" in done.output
    assert contents(tmp_path / "out") == before


# -- what is shown

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b1A\x7f\u202e\u2066\u200b\r\nE000 forged"


def test_names_steer_no_terminal_card_page_or_log(tmp_path: Path) -> None:
    save(V2, tmp_path / "step", tp=1)
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, NASTY: torch.zeros(2)}, path)
    (tmp_path / "step" / f"x{NASTY.replace('/', '')}").write_text("x")
    mapping = tmp_path / "m.yaml"
    data = {"mapping": 1, "name": "x", "version": "1.0.0", "description": NASTY, "extends": "families/internlm2.yaml",
            "ignore": [{"source": NASTY, "why": NASTY}]}  # fmt: skip
    mapping.write_text(json.dumps(data))
    planned = ("-m", mapping, "-s", tmp_path / "step", *SET)
    log = tmp_path / "log"
    for command in (
        ("inspect", tmp_path / "step"),
        ("plan", *planned),
        ("plan", *planned, "-o", tmp_path / "plan.json"),
        ("new", "-s", tmp_path / "step"),
        ("show", mapping),
        ("show", mapping, "--resolved"),
        ("lint", mapping),
        ("diff", mapping, "families/internlm2.yaml"),
        ("view", *planned, "-o", tmp_path / "view.html"),
        ("explain", *planned, "--from", NASTY),
        ("explain", *planned, NASTY),
        ("run", *planned, "-o", tmp_path / "hf", "--log-file", log),
        ("verify", tmp_path / "hf"),
        ("run", "-m", NASTY),
        ("--" + NASTY,),
    ):
        for more in ((), ("--json",)):
            done = invoke(*command, *more)
            assert "\nE000 forged" not in done.output, command
    for file in (tmp_path / "view.html", tmp_path / "hf" / "README.md", log):
        text = file.read_text("utf-8")
        assert all(c == "\n" or c.isprintable() for c in text), file


def test_a_key_of_a_configuration_adds_no_line_to_a_message(tmp_path: Path) -> None:
    assert not invoke("run", "-m", "internlm", "-s", FIXTURES / "v1_tp2_pp2", "-o", tmp_path / "hf").exit_code
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), NASTY: 1}))
    done = invoke("reverse", "-m", "internlm", "-s", tmp_path / "hf", "-o", tmp_path / "ranks")
    assert done.exit_code == 1 and "E219" in done.output and "E000 forged" in done.output
    assert not any(line.strip().startswith("E000") for line in done.output.splitlines())


def test_what_libraries_log_does_not_reach_the_terminal() -> None:
    logs = "main.cli.main = lambda: logging.getLogger('transformers').error('\\x1b[31mforged')"
    told = f"import logging; from engine.commands import main; {logs}; main.main()"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, check=True).stderr == b""


def test_names_of_folders_steer_no_terminal_and_can_be_copied_from_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "-\x1b[8m\nE000 'forged' \\ \udcff\u202e"
    shutil.copytree(FIXTURES / "v1_tp2_pp2", tmp_path / hidden)
    (tmp_path / f".{hidden}2.partial-0123abcd").mkdir()
    monkeypatch.chdir(tmp_path)
    planned = ("-m", "internlm", "-s", hidden)
    printed = ""
    for command in (
        ("inspect", f"./{hidden}"),
        ("run", *planned, "-o", f"{hidden}1"),
        ("run", *planned),
        ("inspect", f"./{hidden}1"),
        ("reverse", "-m", "internlm", "-s", f"{hidden}1", "-o", f"{hidden}3"),
        ("view", *planned, "-o", f"{hidden}.html"),
        ("new", "-s", hidden, "-o", f"{hidden}.yaml"),
        ("format", "--check", f"./{hidden}.yaml"),
        ("clean", f"./{hidden}2"),
        ("inspect", f"./{hidden}", f"./{hidden}"),
    ):
        done = invoke(*command)
        assert "\x1b[8m" not in done.output and "\nE000" not in done.output, command
        printed += done.output
    for wrong in (("run", *planned, "--set", hidden), ("env", hidden[1:])):  # where no colours are wanted, too
        assert "\nE000" not in CliRunner().invoke(cli, wrong).output
    copied = re.findall(r"[$]'(?:[^'\\]|\\.)+'", printed)
    assert len(copied) > 8
    bash = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(copied)}"], capture_output=True, check=True)
    assert {os.fsdecode(name).rstrip("\0") for name in bash.stdout.split(b"\0") if name} <= {
        f"./{hidden}{end}" for end in ("", "1", "3", ".yaml")
    } | {str(tmp_path / f"{hidden}-hf")}


def test_what_a_client_asks_for_is_one_visible_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "/\x1b[8m\n127.0.0.1 GET /forged 200"

    def serve(*_: Any, log: Any, told: Any, **__: Any) -> Any:
        log(Line("127.0.0.1", "GET", asked, 404, 1, 0.1, None))
        told(f"step {asked} is not complete")
        return SimpleNamespace(url="http://127.0.0.1:1", run=lambda: None)

    monkeypatch.setattr(api, "serve", serve)
    done = invoke("serve", "-m", V2.mapping, "-s", f"{asked}.step")
    assert done.exit_code == 0 and done.output.count("forged") == 3
    assert "\x1b" not in done.output and "\n127.0.0.1 GET /forged" not in done.output


def test_compare_shows_names_as_escapes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for side, value in (("a", 0.0), ("b", float("nan"))):
        (tmp_path / side).mkdir()
        save_file(
            {NASTY: torch.full((3,), value), "big": torch.full((3,), 3e38)}, tmp_path / side / "model.safetensors"
        )
    done = invoke("compare", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 1 and "\\x1b]0;owned" in done.output and "\nE000" not in done.output
    assert json.loads(invoke("compare", tmp_path / "a", tmp_path / "b", "--json").output)


# -- numbers that do not fit


@sampled(2)
@pytest.mark.parametrize(
    ("stored", "asked", "value"),
    [(torch.float32, "float16", 1e5), (torch.bfloat16, "float16", 1e5), (torch.float32, "bfloat16", 3.4e38),
     (torch.float64, "float32", 1e39), (torch.float64, "bfloat16", 1e39), (torch.float64, "float16", 1e300)],
)  # fmt: skip
def test_a_number_that_would_become_infinite_is_refused_and_no_warning_shown(
    stored: torch.dtype, asked: str, value: float, tmp_path: Path
) -> None:
    save(Model("v2", layers=2, groups=2, dtype=stored), tmp_path / "step", tp=1)
    path = tmp_path / "step" / "model_tp0_pp0.pt"
    state = torch.load(path, weights_only=True)
    name = next(one for one in state if one.endswith("norm.weight"))
    how: dict[str, Any] = {"settings": SETTINGS, "dtype": asked}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for put, refused in ((float("nan"), False), (float("inf"), False), (-float("inf"), False), (-value, True)):
            state[name][0] = put
            torch.save(state, path)
            if refused:
                with pytest.raises(EngineError, match=f"does not fit {asked}") as caught:
                    engine.convert(V2.mapping, tmp_path / "step", tmp_path / "out", **how, overwrite=True)
                assert caught.value.code == "E406"
            else:
                engine.convert(V2.mapping, tmp_path / "step", tmp_path / "out", **how, overwrite=True)
                assert not api.verify(tmp_path / "out", src=tmp_path / "step", mapping=V2.mapping, **how).problems


def test_a_disk_that_fails_to_read_is_told_whatever_is_read_from_it(made: Path, tmp_path: Path) -> None:
    failing = "/proc/self/mem"  # a regular file that gives EIO
    for command in (
        ("reverse", "-m", V2.mapping, "-s", failing, "-o", tmp_path / "out"), ("compare", failing, made / "hf"),
        ("run", "--plan", failing, "-o", tmp_path / "out"),
        ("run", "-m", V2.mapping, "-s", made / "step", "-o", tmp_path / "out", "--config", failing),
    ):  # fmt: skip
        done = invoke(*command)
        assert done.exit_code == 1 and "E305" in done.output and "Input/output" in done.output, command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["\ud800", "a\x00b", ""])
def test_a_path_that_no_file_system_takes_is_refused_from_python_too(path: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"
    for src, out in ((source, path), (path, tmp_path / "hf")):
        with pytest.raises(engine.EngineError) as caught:
            engine.convert("families/internlm2.yaml", src, out)
        assert caught.value.code == "E001"
        str(caught.value).encode()


def test_the_current_folder_is_not_replaced_and_may_be_gone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run once left the shell in a folder that was removed, where the next one ended in E901."""
    run = ("run", "-m", V2.mapping, "-s", made / "step", *SET, "-o")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke(*run, ".")
    assert done.exit_code == 2 and "current folder" in done.output, done.output
    (tmp_path / "here").rmdir()
    for arguments in ((*run, "x"), ("clean", "x"), ("new", "-s", "x")):
        done = invoke(*arguments)
        assert done.exit_code == 2 and "the current folder is not there" in done.output, done.output


def test_no_module_of_the_current_folder_is_run(tmp_path: Path) -> None:
    """It may be a checkpoint; `python -m` puts it before all that is installed."""
    (tmp_path / "click.py").write_text("print('run')")
    places = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parent.parent)}
    command = [sys.executable, "-m", "engine", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=places, capture_output=True, text=True)
    assert done.returncode == 0 and "run" not in done.stdout, done.stdout + done.stderr


def test_a_folder_of_mappings_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundled mapping was taken silently for the edited one of its name."""
    monkeypatch.setenv("ENGINE_MAPPINGS", str(tmp_path / "mapings"))
    done = invoke("mappings")
    assert done.exit_code == 1 and "E002" in done.output and "ENGINE_MAPPINGS" in done.output, done.output
