"""What people rely on at the command line: start-up, exit codes, where things are printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

import engine
from engine import api
from engine.api import plans
from engine.commands import main, progress
from engine.commands.main import cli
from engine.commands.values import parse_size, parse_value
from engine.errors import EngineError, EngineErrors, Place
from engine.run.meter import Progress
from engine.show import text
from engine.storage.places import options_now
from tests.support.depth import deep, sampled
from tests.support.forked import run_engine
from tests.support.invoking import invoke
from tests.support.shards import Model, save

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "internevo" / "v1_tp2_pp2"
MAPPING = "families/internlm.yaml"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "step"))


# -- start-up


def test_commands_without_a_checkpoint_import_neither_torch_nor_transformers() -> None:
    """Each in a fork of one interpreter that has only loaded the commands."""
    code = (
        "import os, sys\nfrom engine.commands.main import cli\n"
        "for words in ('--help', '--version', 'run --help', 'show internlm', 'lint internlm --json'):\n"
        "    words = words.split()\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0\n"
        "        continue\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as end: assert not end.code, (words, end.code)\n"
        "    quick = {'yaml', 'jsonschema', 'jinja2', 'rich'} if words == ['--help'] else set()\n"
        "    loaded = ({'torch', 'transformers', 'numpy'} | quick) & set(sys.modules)\n"
        "    assert not loaded, (words, loaded)\n"
        "    break"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout[done.stdout.rindex("\n{\n") :])["findings"]
    assert not [one for one in findings if one["severity"] == "error"]


@deep
def test_planning_imports_neither_torch_nor_transformers() -> None:
    """Nor does the package named `plan` hide the function, once it is loaded."""
    code = (
        "import sys, engine\n"
        f"engine.plan({MAPPING!r}, {str(CHECKPOINT)!r})\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "import engine.planning.planner\n"
        f"print(len(engine.plan({MAPPING!r}, {str(CHECKPOINT)!r}).outputs))"
    )
    done = python(code)
    assert done.stdout == "[]\n55\n", done.stderr


@deep
def test_merging_rows_of_usual_length_imports_no_numpy(tmp_path: Path) -> None:
    """It would take a sixth of the time until the first byte."""
    save(
        Model("v2", layers=1, hidden=2048, heads=16, groups=4, ffn=2048, rotary="pairs", bias=False),
        tmp_path / "step",
        tp=2,
    )
    code = (
        "import sys, engine\n"
        f"engine.convert('families/internlm2.yaml', {str(tmp_path / 'step')!r}, {str(tmp_path / 'hf')!r}, "
        "settings={'mlp_letters': 'w2_is_down'})\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = python(code)
    assert done.stdout.rstrip() == "[]", done.stdout + done.stderr


def test_importing_the_package_is_instant_and_gives_every_public_name() -> None:
    code = (
        "import sys, engine\n"
        "assert not {'torch', 'numpy', 'yaml', 'click'} & set(sys.modules)\n"
        "for name in engine.__all__: getattr(engine, name)\n"
        "print('ok')"
    )
    done = python(code)
    assert done.stdout == "ok\n", done.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = engine.convrt


def test_commands_are_listed_in_the_order_of_use() -> None:
    listed = [line.split()[0] for line in invoke("--help").output.splitlines() if line.startswith("  ")]
    order = ["run", "reverse", "reshard", "inspect", "verify", "compare", "new", "lint", "show", "format"]
    assert [name for name in listed if name in order] == order


def test_every_command_is_in_a_section_with_a_line_that_is_not_cut_off() -> None:
    told = invoke("--help").output
    for name, command in cli.commands.items():
        (line,) = re.findall(rf"^  {name} .*$", told, re.MULTILINE)
        assert len(line) <= 80 and line.endswith(".") and not line.endswith("..."), line
        assert command.help is not None


def test_help_without_docstrings_says_why_it_is_short() -> None:
    for command in ((), ("run",)):
        shown = subprocess.run([sys.executable, "-OO", "-m", "engine", *command, "-h"], capture_output=True, text=True)
        assert "started with -OO" in shown.stdout and not shown.stderr
        assert "-OO" not in invoke(*command, "-h").output


def test_convert_is_another_name_of_run() -> None:
    assert invoke("convert", "--help").output.split("\n", 1)[1] == invoke("run", "--help").output.split("\n", 1)[1]


# -- arguments


@pytest.mark.parametrize(
    ("text", "size"),
    (("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("500MB", 500 * 10**6), ("1.5kB", 1500), ("7", 7), ("3 tib", 3 << 40)),
)
def test_sizes_are_decimal_unless_they_say_i(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ("", "GB", "5 G B", "-1", "0", "0.1", "5PB", "1e9", "5iB"))
def test_a_size_that_is_none_is_wrong_usage(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)
    assert invoke("run", "--mapping", MAPPING, "--max-shard-size", text).exit_code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("4096", 4096),
        ("-1", -1),
        ("1e-5", 1e-5),
        ("2.0", 2.0),
        ("true", True),
        ("false", False),
        ("yes", "yes"),
        ("nan", "nan"),
        ("w2_is_up", "w2_is_up"),
        ("a=b", "a=b"),
        ("", ""),
    ),
)
def test_set_takes_numbers_booleans_and_text(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    "arguments",
    (
        ["rum"],
        ["run", "--mapping", ""],
        ["run", "--mapping", "x", "--dtype", "float8"],
        ["run", "--mapping", "x", "--set", "rotary"],
        ["run", "--mapping", "x", "--set", "=halves"],
        ["run", "--mapping", "x", "--set", "rope_base=-1e31"],
        ["run", "--mapping", "x", "--set", "rotary=halves", "--set", "rotary=pairs"],
        ["run", "--mapping", "x", "--workers", "0"],
        ["reverse", "--mapping", "x", "--out", "y", "--tp", "0"],
        ["reverse", "--mapping", "x", "--out", "y", "--tp", "two"],
        ["run", "--mapping", "x", "--workers", "many"],
        ["show"],
        ["format"],
        ["inspect", "a", "b"],
        ["plan", "--for", "reverse"],
        ["serve", "--mapping", "x", "--src", "a", "--as", "b", "--as", "c"],
        ["serve", "--mapping", "x", "--mapping", "y", "--src", "a"],
    ),
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert ("Error:" in done.stderr and "--tp" not in arguments) or "from 1 to 1,048,576" in done.stderr
    assert done.stdout == ""


def test_a_near_command_is_suggested() -> None:
    assert "run" in invoke("rum").stderr.split("Error:")[1]


def test_options_reach_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def convert(mapping: str, src: str, out: str | None, **options: Any) -> api.Report:
        seen.update(mapping=mapping, src=src, out=out, **options)
        return api.Report(out=Path("o"), tensors=1, bytes=2, seconds=0.5, variants={}, files=(), notices=())

    monkeypatch.setattr(api, "convert", convert)
    given = "-m m.yaml --set a=1 --set b=x --dtype float32 --workers 3 --max-shard-size 1MiB --strict --overwrite"
    given += " --no-digests --check-source --max-memory 256MiB"
    done = invoke("run", *given.split(), "--tokenizer", "t.model", "--code", "official", "--json")
    assert done.exit_code == 0, done.stderr
    assert seen == {
        "mapping": "m.yaml",
        "src": ".",
        "config": None,
        "out": None,
        "settings": {"a": 1, "b": "x"},
        "dtype": "float32",
        "max_shard_size": 1 << 20,
        "strict": True,
        "overwrite": True,
        "tokenizer": "t.model",
        "code": "official",
        "workers": 3,
        "resume": False,
        "digests": False,
        "check_source": True,
        "max_memory": 1 << 28,
        "executor": None,
        "parts": 8,
        "progress": None,
    }
    assert json.loads(done.stdout)["tensors"] == 1


@pytest.mark.parametrize(("held", "token"), [("secret", "secret"), ("", None)])
def test_the_token_of_a_server_may_be_in_the_environment(
    held: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Mock(side_effect=EngineError("E001", "stopped here"))
    monkeypatch.setattr(api, "serve", served)
    monkeypatch.setenv("ENGINE_TOKEN", held)
    assert invoke("serve", "-m", "x", "-s", "a", "--port", "81", "--host", "::1").exit_code == 2
    assert [served.call_args.kwargs[name] for name in ("token", "port", "host")] == [token, 81, "::1"]


# -- run


def test_run_converts_and_says_where_to(checkpoint: Path) -> None:
    done = invoke("run", "--mapping", MAPPING, "--src", checkpoint, "--set", "mlp_letters=w2_is_down")
    assert done.exit_code == 0, done.stderr
    out = checkpoint.with_name("step-hf")
    again = f"--mapping {MAPPING} --src {checkpoint} --set mlp_letters=w2_is_down"
    assert f"engine verify {out} {again}   (every tensor against the checkpoint)" in done.stdout
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert str(out) in done.stdout
    assert "55 tensors" in done.stdout


def test_the_current_folder_is_converted_beside_itself(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert invoke("run", "--mapping", MAPPING, "--quiet").exit_code == 0
    assert (checkpoint.with_name("step-hf") / "config.json").is_file()


def test_quiet_prints_nothing(checkpoint: Path) -> None:
    done = invoke("run", "--mapping", MAPPING, "--src", checkpoint, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_an_output_that_exists_is_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    done = invoke("run", "--mapping", MAPPING, "--src", checkpoint, "--out", out)
    assert done.exit_code == 1
    assert "E401" in done.stderr
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_output_that_overwriting_would_not_replace_is_told_as_such_at_once(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    done = invoke("run", "-m", MAPPING, "-s", str(checkpoint), "-o", str(tmp_path / "out"))
    assert done.exit_code == 1 and "a link, not a folder" in done.stderr and "--overwrite" not in done.stderr


def test_an_error_goes_to_stderr_with_its_code_and_fix(tmp_path: Path) -> None:
    done = invoke("plan", "--mapping", "families/internlm9.yaml", "--src", tmp_path)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("E002 ")
    assert "families/internlm" in done.stderr


def test_with_json_errors_are_data_on_stdout(tmp_path: Path) -> None:
    done = invoke("plan", "--mapping", "families/internlm9.yaml", "--src", tmp_path, "--json")
    assert done.exit_code == 1
    (error,) = json.loads(done.stdout)["errors"]
    assert error["code"] == "E002"
    assert error["fix"]


def test_several_errors_are_all_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise EngineErrors([EngineError("E205", "one"), EngineError("E206", "two", place=Place("f", 3))])

    monkeypatch.setattr(api, "plan", plan)
    shown = invoke("plan", "--mapping", "x")
    assert (shown.exit_code, shown.stderr) == (1, "E205 one\n\nE206 two\n  f:3\n")
    assert len(json.loads(invoke("plan", "--mapping", "x", "--json").stdout)["errors"]) == 2


@pytest.mark.parametrize(("codes", "ends"), [(["E001", "E001"], 2), (["E001", "E205"], 1)])
def test_of_several_errors_all_must_be_of_usage_for_the_exit_code_of_usage(
    codes: list[str], ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise EngineErrors([EngineError(code, "wrong") for code in codes])

    monkeypatch.setattr(api, "plan", plan)
    assert invoke("plan", "--mapping", "x").exit_code == ends


@pytest.mark.parametrize("terminated", [False, True])
def test_an_interruption_is_told_and_ends_with_130_and_a_termination_with_143(
    terminated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any, **__: Any) -> None:
        if terminated:
            main.terminate(15, None)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan", plan)
    monkeypatch.setattr(main, "_terminated", [])
    done = invoke("plan", "--mapping", "x")
    assert done.exit_code == (143 if terminated else 130)
    assert "interrupted" in done.stderr


def test_an_interruption_while_it_is_loaded_is_quiet() -> None:
    done = python(
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from engine.__main__ import main\n"
        "main()"
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_internal_error_is_one_line_that_asks_to_be_reported_or_a_traceback_for_who_asks(
    debug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plan(*_: Any, **__: Any) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(api, "plan", plan)
    monkeypatch.setenv("ENGINE_DEBUG", debug)
    done = run_engine("plan", "--mapping", "x", cwd=tmp_path)
    assert done.returncode == 1
    told = done.stderr.decode()
    if debug:
        assert "Traceback" in told and "E901" not in told
        return
    assert told.count("\n") == 1
    assert told.startswith("E901 internal error: ValueError: two lines (")
    assert "report" in told


def test_a_reader_that_goes_away_is_no_error() -> None:
    shown = subprocess.run(
        f"{sys.executable} -m engine show --resolved internlm | head -n 1", shell=True, capture_output=True, text=True
    )
    assert shown.stderr == ""
    assert shown.stdout.startswith("# internlm")


# -- inspect and plan


@sampled(2, "code")
@pytest.mark.parametrize(
    ("rest", "code", "told"),
    (
        ("explain E301 >&-", 0, ""),
        ("explain E301 <&- >&- 2>&-", 0, ""),
        ("explain E301 >/dev/full", 1, "E403 standard output cannot be written"),
        ("--help >/dev/full", 1, "E403 standard output cannot be written"),
        (f"plan -m {MAPPING} -s {CHECKPOINT} | cat", 0, "tp 2 \\u00d7 pp 2"),
    ),
    ids=("closed", "all closed", "full", "full for help", "an encoding without that sign"),
)
def test_a_stream_that_is_closed_or_takes_not_all_is_no_internal_error(rest: str, code: int, told: str) -> None:
    command = f"exec {sys.executable} -m engine {rest}"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1251"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, errors="replace")
    assert done.returncode == code and told in done.stdout + done.stderr
    assert "E901" not in done.stderr


@pytest.mark.parametrize(
    ("error", "limit"),
    (
        (MemoryError(), "-v"),
        (RuntimeError("can't start new thread"), "-u"),
        (ImportError("PLEASE READ\nx.so: failed to map segment"), "-v"),
        (OSError("x.so: cannot open"), "-v"),
    ),
)
def test_too_little_memory_too_few_threads_and_a_library_that_does_not_load_are_told_as_such(
    error: Exception, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.api, "inspect", lambda *_, **__: (_ for _ in ()).throw(error))
    done = CliRunner().invoke(cli, ["inspect", "x"])
    assert done.exit_code == 1 and "E305" in done.stderr and f"ulimit {limit}" in done.stderr


def test_a_library_that_fails_with_any_error_while_it_is_loaded_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        exec("raise RuntimeError('operator torchvision::nms does not exist')", {"__name__": "torch.ops"})

    monkeypatch.setattr(engine.api, "inspect", load)
    done = CliRunner().invoke(cli, ["inspect", "x"])
    assert done.exit_code == 1 and "E305 torch cannot be loaded" in done.stderr and "torchvision::nms" in done.stderr
    monkeypatch.setattr(engine.api, "inspect", lambda *_, **__: 1 // 0)
    assert isinstance(CliRunner().invoke(cli, ["inspect", "x"]).exception, ZeroDivisionError)


def test_inspect_names_the_grid_the_layers_and_the_mapping_that_fits() -> None:
    done = invoke("inspect", CHECKPOINT)
    assert done.exit_code == 0, done.stderr
    assert "tp 2 × pp 2" in done.stdout
    assert "pp0: layers 0…1; pp1: layers 2…3" in done.stdout
    assert "296,512" in done.stdout and "4 layers, hidden 64, 8 heads" in done.stdout
    assert "\n  internlm  " in done.stdout
    assert json.loads(invoke("inspect", CHECKPOINT, "--json").stdout)["ranks"] == {"tp": 2, "pp": 2}


def test_inspect_of_a_folder_that_is_no_checkpoint_fails_clearly(tmp_path: Path) -> None:
    done = invoke("inspect", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith("E")


def test_plan_folds_layers_and_shows_why_each_variant_was_chosen() -> None:
    done = invoke("plan", "--mapping", MAPPING, "--src", CHECKPOINT)
    assert done.exit_code == 0, done.stderr
    assert "model.layers.{0…3}.self_attn.q_proj.weight" in done.stdout
    assert "the only choice for which all sizes agree" in done.stdout
    assert "model.safetensors" in done.stdout
    assert "peak memory" in done.stdout


def test_plan_as_json_counts_what_run_will_write(checkpoint: Path) -> None:
    planned = json.loads(invoke("plan", "--mapping", MAPPING, "--src", checkpoint, "--json").stdout)
    done = json.loads(invoke("run", "--mapping", MAPPING, "--src", checkpoint, "--json").stdout)
    assert planned["tensors"] == done["tensors"] == 55
    assert planned["bytes"] == done["bytes"]
    assert {o["file"] for o in planned["outputs"]} <= set(done["files"])
    assert all(rule["place"].startswith("mappings/families/internlm.yaml:") for rule in planned["rules"])


@pytest.mark.parametrize("command", ["run", "plan", "explain x", "view"])
def test_the_mapping_is_found_with_the_configuration_that_was_given(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def found(src: str, config: str | None = None) -> None:
        seen.append((src, config))
        raise EngineError("E003", "several fit")

    monkeypatch.setattr(api, "find_mapping", found)
    assert invoke(*command.split(), "-s", "step", "--config", "c.json").exit_code == 1
    assert seen == [("step", "c.json")]


def test_the_mapping_of_a_plan_is_found_as_that_of_a_run(tmp_path: Path) -> None:
    source = CHECKPOINT.parent / "llama_tp2_pp1_default"
    done = invoke("plan", "-s", str(source), "-o", str(tmp_path / "plan.json"), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["mapping"]["name"] == "llama"


def test_plan_writes_nothing(checkpoint: Path) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    assert invoke("plan", "--mapping", MAPPING, "--src", checkpoint).exit_code == 0
    assert sorted(checkpoint.parent.rglob("*")) == before


# -- lint, show, format


def test_lint_names_the_place_and_ends_with_1(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    text = (Path(api.__file__).parents[2] / "mappings" / MAPPING).read_text()
    broken.write_text(text.replace("axes: (q heads head_dim) | hidden", "axes: (q heads) | hidden"))
    done = invoke("lint", broken)
    assert done.exit_code == 1
    assert "broken.yaml:" in done.stdout + done.stderr


def test_show_prints_a_mapping_as_written_and_resolved() -> None:
    written = invoke("show", MAPPING)
    assert "# each is a claim" in written.stdout
    resolved = invoke("show", "--resolved", MAPPING)
    assert resolved.stdout.startswith("# internlm 1.0.0, from mappings/families/internlm.yaml\n")
    assert json.loads(invoke("show", "--json", MAPPING).stdout)["name"] == "internlm"


def test_a_resolved_mapping_is_itself_a_mapping(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(invoke("show", "--resolved", MAPPING).stdout)
    assert api.load_mapping(copy).digest == api.load_mapping(MAPPING).digest


def test_format_rewrites_only_what_differs_and_check_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "format_mapping", lambda text, name: text.replace("  ", " "))
    tidy, untidy = tmp_path / "tidy.yaml", tmp_path / "untidy.yaml"
    tidy.write_text("mapping: b\n")
    untidy.write_text("mapping:  b\n")
    untidy.chmod(0o640)
    checked = invoke("format", "--check", tidy, untidy)
    assert (checked.exit_code, checked.stdout) == (1, f"would format {untidy}\n")
    assert untidy.read_text() == "mapping:  b\n"
    assert invoke("format", tidy, untidy).exit_code == 0
    assert untidy.read_text() == "mapping: b\n" and untidy.stat().st_mode & 0o777 == 0o640
    assert invoke("format", "--check", tidy, untidy).exit_code == 0


def test_format_leaves_files_of_others_and_those_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mine = tmp_path / "compose.yaml", tmp_path / "mine.yaml"
    other.write_text("version: '3'\nservices: {}\n")
    refused = invoke("format", other)
    assert refused.exit_code == 1 and "neither" in refused.stderr and "compose.yaml" in refused.stderr
    assert other.read_text() == "version: '3'\nservices: {}\n"
    mine.write_text(text := "mapping: 1\n\n\n\nname: x\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
        assert invoke("format", mine).exit_code == 1
    assert mine.read_text() == text and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    for name in ("none.yaml", "x.yaml"):
        done = invoke("format", tmp_path / name)
        assert done.exit_code == 1
        assert name in done.stderr


# -- rendering


def test_colours_are_only_for_terminals_and_can_be_turned_off() -> None:
    def shown(*arguments: str, **environment: str) -> str:
        return CliRunner(env=environment).invoke(cli, ["plan", "-m", "none.yaml", *arguments], color=True).stderr

    assert shown().startswith("\x1b[31m")
    assert shown("--no-color").startswith("E002")
    assert shown(NO_COLOR="1").startswith("E002")


def test_tables_are_aligned_and_never_cut() -> None:
    lines = text.table(("name", "n"), [("x" * 200, "1"), ("y", "1,000")])
    assert lines[1] == "  " + "x" * 200 + "      1"
    assert lines[2] == "  y" + " " * 199 + "  1,000"


def test_plain_progress_tells_tenths_and_every_five_seconds() -> None:
    lines: list[str] = []
    now = [0.0]
    listen = progress.plain_progress(lines.append, lambda: now[0])
    for done, second in ((0, 0), (1, 1), (9, 2), (10, 3), (11, 4), (12, 8), (100, 9)):
        now[0] = second
        listen(Progress(done, 100))
    assert [line.split("%")[0].strip() for line in lines] == [
        "writing: 1",
        "writing: 10",
        "writing: 12",
        "writing: 100",
    ]
    assert "left" in lines[0]
    assert "left" not in lines[-1]


# -- the log


def test_a_log_has_one_json_line_per_event(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = ["run", "-m", MAPPING, "-s", str(CHECKPOINT), "-o", str(tmp_path / "hf"), "--log-file", str(log), "-q"]
    assert invoke(*command).exit_code == 0
    assert invoke(*command).exit_code == 1  # the output exists
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "finished", "started", "failed"]
    assert events[0]["command"] == "run" and events[0]["mapping"] == MAPPING
    assert events[2]["content_id"] and events[2]["tensors"] == 55
    assert events[4]["errors"][0]["code"] == "E401"


def test_a_log_measures_time_where_the_clock_is_set_back(tmp_path: Path) -> None:
    hours = iter(range(2 * 10**9, 0, -3600))
    log = progress.Log(str(tmp_path / "log.jsonl"), clock=lambda: float(next(hours)))
    log.event("started")
    log.event("finished")
    log.close()
    assert all(0 <= json.loads(line)["elapsed"] < 60 for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_a_log_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    done = invoke("run", "-m", MAPPING, "-s", str(CHECKPOINT), "-o", str(tmp_path / "hf"), "--log-file", str(tmp_path))
    assert done.exit_code == 1 and "E403" in done.stderr
    assert not (tmp_path / "hf").exists()


def test_a_run_that_failed_on_its_disk_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    done = invoke("run", "-m", MAPPING, "-s", str(CHECKPOINT), "-o", str(tmp_path / "hf"), "-q")
    assert done.exit_code == 1
    assert "continue  the same command with --resume" in done.stderr
    assert f"remove    engine clean {tmp_path / 'hf'}" in done.stderr


def test_the_command_line_and_the_api_write_files_of_the_same_size() -> None:
    from engine.planning import DEFAULT_SHARD_SIZE

    option = next(param for param in cli.commands["run"].params if param.name == "max_shard_size")
    assert parse_size(option.default) == DEFAULT_SHARD_SIZE


# Options that would have no effect: once nothing told so.
ALONE = [
    *[f"{command} -s x -o y -m internlm2 --parts 3" for command in ("run", "reverse", "reshard")],
    "plan -m internlm2 --overwrite",
    "new --overwrite",
    "verify x --config y",
    "verify x --dtype bf16",
    "verify x --set rotary=halves",
    "compare x y --dtype bf16",
    "compare x y --set rotary=halves",
    *[f"{command} -m internlm2 -s x -o y --window 1MB" for command in ("run", "reverse", "reshard")],
    "inspect x --store-option region=here",
    "serve -m internlm2 -s x --store-option region=here",
    "verify x --window 1MB",
    *[f"explain E203 {given}" for given in ("-m internlm2", "-s x", "--config x", "--dtype bf16", "--set a=b")],
]


@pytest.mark.parametrize("arguments", ALONE)
def test_an_option_without_effect_is_wrong_usage(arguments: str) -> None:
    done = invoke(*arguments.split())
    assert done.exit_code == 2 and "has no effect" in done.output, done.output


@pytest.mark.parametrize("name", ["src", "like", "config"])
def test_an_option_of_a_store_has_an_effect_where_a_saved_plan_names_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(src="a", like=None, config=None)
    monkeypatch.setattr(plans, "read_saved", lambda path: Mock(request=asked))
    command = ["run", "--plan", str(tmp_path / "plan.json"), "-o", "y", "--store-option", "region=here"]
    assert "has no effect" in invoke(*command).output
    setattr(asked, name, "s3://bucket/step")
    done = invoke(*command)
    assert done.exit_code and "has no effect" not in done.output  # there is no such plan


def test_an_option_of_a_store_has_an_effect_where_any_of_several_sources_is_one() -> None:
    done = invoke("serve", "-m", "internlm2", "-s", "a", "-s", "s3://b", "--as", "c", "--store-option", "region=here")
    assert done.exit_code == 2 and "has no effect" not in done.output  # two sources need two names


@pytest.mark.parametrize("value", ["007", "1e5", "+1", "true", "9" * 40, "x" * 2000])
def test_an_option_of_a_store_is_the_text_that_was_given(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and passwords may look like numbers."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(engine.api, "inspect", lambda *_, **__: (seen.append(options_now()[0]), sys.exit()))
    command = ["inspect", "s3://bucket/step", "--store-option", f"access_key_id={value}"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert seen == [{"access_key_id": value}]
    twice = CliRunner().invoke(cli, [*command, "--store-option=access_key_id=2"])
    assert twice.exit_code == 2 and "set twice" in twice.output


def test_ranks_that_are_given_one_by_one_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(engine.api, "reverse", lambda *_, **asked: (seen.append(asked["ranks"]), sys.exit()))
    CliRunner().invoke(cli, ["reverse", "-m", "x", "-s", "hf", "-o", "y", "--ranks", "tp=2", "--ranks", "pp=4"])
    assert seen == ["tp=2,pp=4"]


def test_a_setting_without_effect_on_what_is_read_is_wrong_usage(checkpoint: Path, tmp_path: Path) -> None:
    engine.convert(MAPPING, checkpoint, tmp_path / "hf")
    config, hf, ranks = tmp_path / "hf" / "config.json", ("-s", tmp_path / "hf"), ("-s", checkpoint)
    for command, flag in (
        (("reverse", *hf, "--config", config), "--config has no effect"),
        (("reverse", *hf, "--lossy", "norm.weight"), "has no effect"),
        (("reverse", *hf, "--set", "max_position_embeddings=99"), "max_position_embeddings contradicts"),
        (("run", *ranks, "--set", "rope_factor=4"), "rope_factor has no effect"),
        (("reshard", *ranks, "--set", "rope_scaling=linear"), "rope_scaling has no effect"),
        (("reshard", *ranks, "--set", "rotary=pairs"), "rotary has no effect"),
        (("reverse", *hf, "--set", "expert_weight=2"), "expert_weight has no effect"),
        (("reverse", *hf, "--pp=2", "--chunks=2", "--set", "wrapped=true"), "wrapped has no effect"),
    ):
        done = invoke(*command, "-m", MAPPING, "-o", tmp_path / "out")
        assert done.exit_code == 2 and flag in done.output, done.output
    done = invoke("inspect", tmp_path / "hf", "--config", config)
    assert done.exit_code == 2 and "--config has no effect" in done.output
    assert invoke("run", *ranks, "-m", MAPPING, "--set", "rope_factor=4", "--set", "rope_scaling=linear").exit_code == 0


def test_a_configuration_given_to_reshard_is_held_against_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    engine.convert(MAPPING, checkpoint, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    options = ("-m", MAPPING, "-s", checkpoint, "--tp", 1, "--config", config)
    assert invoke("reshard", *options, "-o", tmp_path / "one").exit_code == 0
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"rms_norm_eps": 0.5e-3}), "utf-8")
    done = invoke("reshard", *options, "-o", tmp_path / "two")
    assert done.exit_code == 1 and "E218" in done.output and "rms_norm_eps" in done.output
    like = ("--like", checkpoint, "--config", config)
    back = invoke("reverse", "-m", MAPPING, "-s", engine.convert(MAPPING, checkpoint, tmp_path / "hf2").out, *like,
                  "-o", tmp_path / "two")  # fmt: skip
    assert back.exit_code == 1 and "E218" in back.output
