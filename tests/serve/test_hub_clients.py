"""Stock clients of the Hub read a training checkpoint through a server, and stop and start as users do it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_api, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from engine import api
from tests.support.depth import deep
from tests.support.serving import MAPPING, STEP, Running

ROOT = Path(__file__).parents[2]


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **more}


@pytest.fixture
def endpoint(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server as the one that clients in this process ask: `HF_ENDPOINT` is read when they are loaded."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)


@pytest.mark.usefixtures("endpoint")
def test_transformers_loads_it_by_name_and_revision_with_the_trainers_logits(hub: Running, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    oracle = torch.load(STEP / "oracle.pt", weights_only=True)
    for how in ({}, {"revision": "100"}):
        model, loading = AutoModelForCausalLM.from_pretrained(
            "org/name", dtype=torch.float32, output_loading_info=True, cache_dir=tmp_path, **how
        )
        assert not any(loading.values()), loading
        with torch.no_grad():
            assert float((model(oracle["input_ids"]).logits - oracle["logits"]).abs().max()) < 1e-4
    problems = [line for line in hub.lines if line.problem or line.status >= 500]
    assert not problems and sum(line.status == 200 for line in hub.lines) > 10, hub.lines


def same(folder: Path, written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == names
    for name in names:
        assert (folder / name).read_bytes() == (written / name).read_bytes(), name


def test_a_snapshot_is_what_a_run_writes(hub: Running, written: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    same(Path(snapshot_download("org/name", **how)), written)
    snapshot_download("org/name", local_dir=tmp_path / "local", **how)
    same(tmp_path / "local", written)
    snapshot_download("org/name", local_dir=tmp_path / "local", **how)
    one = hf_hub_download("org/name", "config.json", revision="200", **how)
    assert Path(one).read_bytes() == (written / "config.json").read_bytes()
    some = Path(snapshot_download("org/name", revision="100", allow_patterns=["*.json"], **how))
    assert {path.suffix for path in some.iterdir()} == {".json"}


def test_a_download_that_was_cut_goes_on_where_it_was(hub: Running, written: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    how: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    sha = HfApi(endpoint=hub.url).model_info("org/name").sha
    etag = hub.ask(f"/org/name/resolve/{sha}/{name}", "HEAD")[1]["etag"].strip('"')
    data = (written / name).read_bytes()
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag}.incomplete").write_bytes(data[:1000])
    assert Path(hf_hub_download("org/name", name, **how)).read_bytes() == data


def test_the_client_of_the_hub_says_what_is_wrong(hub: Running) -> None:
    client = HfApi(endpoint=hub.url)
    with pytest.raises(RepositoryNotFoundError):
        client.model_info("org/other")
    with pytest.raises(RevisionNotFoundError, match=r"model_tp1_pp1\.pt"):
        client.model_info("org/name", revision="300")
    assert [one.name for one in client.list_repo_refs("org/name").branches] == ["main", "300", "200", "100"]
    assert not client.file_exists("org/name", "other.json") and client.file_exists("org/name", "config.json")
    assert client.revision_exists("org/name", "200") and not client.revision_exists("org/name", "1")
    info = client.get_safetensors_metadata("org/name")
    assert info.sharded and len(info.files_metadata) == 3
    assert [one.id for one in client.list_models()] == ["org/name", "single"]
    with pytest.raises(HfHubHTTPError):
        client.create_repo("org/new", token="t")


def test_a_client_needs_the_token_that_the_server_was_given(
    run: Path, written: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    with serve([api.Model("org/name", MAPPING, run / "100")], token="hf_secret") as running:
        with pytest.raises(HfHubHTTPError, match="a token is needed: set HF_TOKEN"):
            snapshot_download("org/name", endpoint=running.url, cache_dir=tmp_path, token=False)
        found = snapshot_download("org/name", endpoint=running.url, cache_dir=tmp_path, token="hf_secret")
        assert (Path(found) / "config.json").read_bytes() == (written / "config.json").read_bytes()


@deep
def test_the_hubs_command_line_downloads_it(hub: Running, written: Path, tmp_path: Path) -> None:
    hf = Path(sys.executable).with_name("hf")
    command = [str(hf)] if hf.exists() else [sys.executable, "-m", "huggingface_hub.cli.hf"]
    done = subprocess.run(
        [*command, "download", "org/name", "--revision", "200", "--local-dir", str(tmp_path / "out")],
        env=environment(hub.url, tmp_path / "home"), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out", written)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_ranges_and_goes_on(hub: Running, written: Path, tmp_path: Path) -> None:
    data = (written / "model-00001-of-00003.safetensors").read_bytes()
    url, out = f"{hub.url}/org/name/resolve/main/model-00001-of-00003.safetensors", tmp_path / "file"

    def curl(*arguments: str) -> bytes:
        return subprocess.run(["curl", "-sS", "--fail", *arguments], capture_output=True, check=True, timeout=60).stdout

    assert curl(url) == data and curl("-r", "100-1999", url) == data[100:2000] and curl("-r", "-5", url) == data[-5:]
    out.write_bytes(data[:5000])
    curl("-C", "-", "-o", str(out), url)
    assert out.read_bytes() == data
    assert b"accept-ranges: bytes" in curl("-I", url)
    assert subprocess.run(["curl", "-sS", "--fail", "--path-as-is", f"{hub.url}/org/name/resolve/main/../../x"],
                          capture_output=True, timeout=60).returncode == 22  # fmt: skip


def test_urllib_reads_it(hub: Running, written: Path) -> None:
    with urllib.request.urlopen(f"{hub.url}/single/resolve/main/config.json", timeout=20) as response:
        assert json.load(response)["model_type"] == "llama"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{hub.url}/single/resolve/main/nothing", timeout=20)


@contextmanager
def command(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`engine serve` as a user starts it, and the address that it says."""
    started = subprocess.Popen(
        [sys.executable, "-m", "engine", "serve", *arguments, "--port", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stderr is not None
        for line in started.stderr:
            if "HF_ENDPOINT=" in line:
                yield started, line.split("=", 1)[1].strip()
                return
        pytest.fail("it did not start")
    finally:
        started.kill()
        started.wait()


def stopped(started: subprocess.Popen[str], how: signal.Signals) -> str:
    """What it says when it ends, as it should."""
    started.send_signal(how)
    said = started.communicate(timeout=20)[1]
    assert started.returncode == 0 and said.endswith("stopped\n") and "Traceback" not in said
    return said


@deep
def test_the_command_serves_until_it_is_interrupted_and_ends_well(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with command("-m", MAPPING, "-s", str(run), "--as", "org/name", "--log-file", str(log)) as (started, url):
        with urllib.request.urlopen(f"{url}/org/name/resolve/main/config.json", timeout=30) as response:
            assert json.load(response)["model_type"] == "llama"
        said = stopped(started, signal.SIGINT)
    assert "200 is served as" in said and "GET /org/name/resolve/main/config.json 200" in said
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["event"] for one in events] == ["started", "serving", "request", "finished"]
    assert events[2]["path"] == "/org/name/resolve/main/config.json" and events[2]["status"] == 200


def test_the_command_serves_several_models_with_a_token_until_it_is_terminated(run: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    arguments = ["-m", MAPPING, "-s", str(run / "100"), "-s", str(run), "--token-file", str(token)]
    with command(*arguments, "--as", "a/one", "--as", "two") as (started, url):
        asked = urllib.request.Request(f"{url}/api/models", headers={"Authorization": "Bearer s3cret"})
        with urllib.request.urlopen(asked, timeout=30) as response:
            assert [one["id"] for one in json.load(response)] == ["a/one", "two"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/api/models", timeout=30)
        stopped(started, signal.SIGTERM)
