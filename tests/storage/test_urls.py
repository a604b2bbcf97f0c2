"""Whatever takes a checkpoint takes the URL of one: every command, and what reads without converting."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

import engine
from engine import api
from engine.commands.main import cli
from tests.storage.conftest import MAPPING, STEP, Bucket, files, refused
from tests.support.depth import SOAK
from tests.support.object_server import options
from tests.support.serving import serving


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "hf"
    engine.convert(MAPPING, STEP, out)
    return out


def test_every_command_takes_urls(bucket: Bucket, written: Path, tmp_path: Path) -> None:
    step, hf = bucket.upload(STEP, "run/100"), bucket.upload(written, "hf")
    chosen, plan = ("-m", MAPPING, "-s", step), str(tmp_path / "plan.json")
    tensor = "model.norm.weight"
    for given in (
        ("inspect", step), ("inspect", hf), ("inspect", f"{bucket.url}/run"),
        ("plan", *chosen), ("plan", *chosen, "-o", plan), ("plan", "--for", "reverse", "-m", MAPPING, "-s", hf),
        ("explain", tensor, *chosen), ("explain", "--from", "model_tp0_pp0.pt:norm.weight", *chosen),
        ("view", *chosen, "-o", str(tmp_path / "view.html")), ("new", "-s", step),
        ("run", *chosen, "-o", f"{bucket.url}/out"), ("run", "--plan", plan, "-o", f"{bucket.url}/planned"),
        ("reverse", "-m", MAPPING, "-s", hf, "-o", f"{bucket.url}/ranks", "--like", step),
        ("reshard", *chosen, "-o", f"{bucket.url}/tp1", "--tp", "1"),
        ("part", "1/1", "--plan", plan, "-o", f"{bucket.url}/parts"),
        ("commit", "--plan", plan, "-o", f"{bucket.url}/parts"),
        ("verify", hf), ("verify", f"{bucket.url}/out", "-m", MAPPING, "-s", step),
        ("compare", hf, f"{bucket.url}/out"), ("compare", f"{bucket.url}/parts", step, "-m", MAPPING),
        ("clean", f"{bucket.url}/out"),
    ):  # fmt: skip
        reached = [f"--store-option={name}={value}" for name, value in options(bucket.proxy.port).items()]
        takes = any("s3://" in one for one in given)
        done = CliRunner().invoke(cli, [*given, *(reached if takes else ())])
        if given[0] == "explain" and "--from" in given and done.exit_code:
            continue
        assert done.exit_code == 0, (given, done.output)
    for name in ("out", "planned", "parts"):
        assert bucket.contents(name) == files(written), name
    assert "complete" in CliRunner().invoke(cli, ["inspect", f"{bucket.url}/run", "--json"]).output


def test_a_url_where_only_a_path_can_be_is_told_and_makes_no_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ("-m", MAPPING, "-s", str(STEP))
    for given in (
        ("new", "-s", str(STEP), "-o", "s3://b/x.yaml"), ("plan", *chosen, "-o", "gs://b/plan.json"),
        ("view", *chosen, "-o", "az://b/x.html"), ("mount", *chosen, "https://b/x"),
        ("run", "--plan", "s3://b/plan.json", "-o", "hf"), ("run", *chosen, "-o", "hf", "--config", "s3://b/config.json"),
        ("run", *chosen, "-o", "hf", "--tokenizer", "s3://b"),
    ):  # fmt: skip
        told = CliRunner().invoke(cli, given).stderr
        assert "is a URL, and must be a path" in told and "E001" in told, (given, told)
    assert not list(tmp_path.iterdir())


def test_a_step_in_a_store_is_opened_and_mounted(bucket: Bucket, written: Path, tmp_path: Path) -> None:
    step = bucket.upload(STEP, "step")
    with engine.open(step, MAPPING) as tensors, engine.open(STEP, MAPPING) as local:
        assert tensors.keys() == local.keys()
        assert all((tensors[name] == local[name]).all() for name in list(local)[::7])
    with engine.virtual(engine.plan(MAPPING, step)) as folder:
        assert {name: file.read() for name, file in folder.items()} == files(written)
        asked = len(bucket.proxy.asked)
        folder["model.safetensors"].read(100_000, 10_000)
        assert len(bucket.proxy.asked) <= asked + 4  # and no listing for every read
    from tests.support.fuse import missing

    if missing() is not None or not SOAK:  # what is mounted elsewhere is the same folder
        return
    reached = [f"--store-option={name}={value}" for name, value in options(bucket.proxy.port).items()]
    command = [sys.executable, "-m", "engine", "mount", str(tmp_path / "at"), "-m", MAPPING, "-s", step, *reached]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as mounted:
        try:
            assert mounted.stderr is not None and mounted.stderr.readline().startswith("mounted")
            assert files(tmp_path / "at") == files(written)
        finally:
            mounted.send_signal(signal.SIGINT)


def test_the_steps_of_a_run_in_a_store_are_served(bucket: Bucket, written: Path) -> None:
    bucket.upload(STEP, "run/100")
    with serving([api.Model("org/name", MAPPING, f"{bucket.url}/run")]) as hub:
        assert json.loads(hub.ask("/api/models/org/name")[2])["sha"]
        for name, data in files(written).items():
            whole = SOAK or len(data) < 100_000  # of others some bytes: each piece is a request
            asked = urllib.request.Request(
                f"{hub.url}/org/name/resolve/100/{name}", headers={} if whole else {"Range": "bytes=90000-99999"}
            )
            with urllib.request.urlopen(asked) as got:
                assert got.read() == (data if whole else data[90_000:100_000]), name
        bucket.upload(STEP, "run/200")
        refs = json.loads(hub.ask("/api/models/org/name/refs")[2])
        assert [one["name"] for one in refs["branches"]] == ["main", "200", "100"]
        bucket.client("run/200").delete("model_tp0_pp0.pt")
        assert hub.ask("/org/name/resolve/200/config.json")[0] == 404
        assert hub.ask("/org/name/resolve/main/config.json")[0] == 200  # of 100, which is complete
    refused("E304", lambda: api.serve([api.Model("org/name", MAPPING, f"{bucket.url}/nothing")], port=0))


def test_an_image_without_certificates_is_not_told_that_its_url_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "/nowhere")
    found = refused("E001", lambda: engine.plan(MAPPING, "s3://bucket-without-certificates/step"))
    assert "ca-certificates" in str(found.fix)
