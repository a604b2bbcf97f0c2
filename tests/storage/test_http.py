"""Checkpoints behind a web server: read by ranges, listed by the page that links to them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import EngineError
from engine.storage.objects import linked_names
from tests.storage.conftest import MAPPING, STEP, files, refused
from tests.support.depth import sampled
from tests.support.invoking import invoke
from tests.support.serving import serving

pytest.importorskip("obstore", reason="the extra `store` is not installed")


class Ranges(SimpleHTTPRequestHandler):
    """Files by ranges, and pages of folders."""

    etags = True
    listed = True
    more = b""  # sent after a range

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET() if self.listed else self.send_error(403)
        data = path.read_bytes()
        start, end = 0, len(data)
        if found := self.headers.get("Range", "").removeprefix("bytes="):
            low, _, high = found.partition("-")
            start, end = int(low), min(int(high) + 1, len(data))
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start + (len(self.more) if found else 0)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if self.etags:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:end] + (self.more if found else b""))

    do_HEAD = do_GET


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of more connections at once each would wait a second


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    with Server(("127.0.0.1", 0), partial(Ranges, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def web() -> Iterator[str]:
    with serving_files(STEP.parent) as url:
        yield url


@pytest.mark.parametrize("etags", [True, False])
def test_a_checkpoint_behind_a_web_server_converts(
    etags: bool, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranges, "etags", etags)
    engine.convert(MAPPING, STEP, tmp_path / "hf")
    engine.convert(MAPPING, f"{web}/{STEP.name}", tmp_path / "web")
    assert files(tmp_path / "web") == files(tmp_path / "hf")


def test_a_pointer_to_a_large_file_is_told_as_one(tmp_path: Path) -> None:
    """As in a clone that was uploaded before its large files were fetched."""
    shutil.copytree(STEP, tmp_path / "step")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 9\n"
    (tmp_path / "step" / "model_tp1_pp0.pt").write_text(pointer)
    with serving_files(tmp_path) as web:
        assert "Git LFS pointer" in str(refused("E305", lambda: engine.plan(MAPPING, f"{web}/step")))


def test_a_password_in_a_url_is_neither_shown_nor_kept(web: str, tmp_path: Path) -> None:
    url = f"{web}/{STEP.name}".replace("://", "://me:sekret@")
    log, out, plan = tmp_path / "log", tmp_path / "out", tmp_path / "plan.json"
    done = invoke("run", "-m", MAPPING, "-s", url, "-o", out, "--log-file", log)
    assert done.exit_code == 0 and "http://***@127" in done.output
    shown = [
        done,
        invoke("inspect", url),
        invoke("inspect", url, "--json"),
        invoke("run", "-m", MAPPING, "-s", url + "x"),
    ]
    refused = invoke("plan", "-m", MAPPING, "-s", url, "-o", plan)
    assert refused.exit_code == 2 and "E001" in refused.output and not plan.exists()
    kept = b"".join([log.read_bytes(), *files(out).values()])
    assert b"sekret" not in kept and not any("sekret" in one.output for one in (*shown, refused))


def test_a_copy_of_a_step_is_served_when_the_step_is_gone(tmp_path: Path) -> None:
    """Entity tags of equal content are equal."""
    for name in ("100", "200"):
        shutil.copytree(STEP, tmp_path / "run" / name)
    with serving_files(tmp_path) as web, serving([engine.api.Model("m", MAPPING, f"{web}/run")]) as hub:
        whole = hub.ask("/m/resolve/main/model.safetensors")[2]
        shutil.rmtree(tmp_path / "run" / "200")
        status, _, body = hub.ask("/m/resolve/main/model.safetensors")
        assert (status, body) == (200, whole)


@pytest.mark.parametrize(
    "links",
    [
        ("a", "b"),
        ("/c d/a", "http://host/c%20d/b"),  # as some servers write them
        ("//host/c%20d/a", "./b#x"),
        ("a", "b", "http://[::", "//[/b", "http://x:port/"),
        ("a", "b", "/a/x", "/c d", "/c d/", "/c d/a/x", "/c dx", "http://other/c%20d/x", "ftp://host/c%20d/x", "b?x=y"),
        ("a", "b", "..%2fx", "%2e%2e/", "../x", "..", ".", "%2e", "?C=N;O=D", "#x", "mailto:a@b"),
        ("a", "a/", "b/", "b"),  # one name: two kinds of it would be two files
    ],
)
def test_links_of_a_page_are_names_if_they_lead_into_its_folder(links: tuple[str, ...]) -> None:
    page = "".join(f'<a href="{link}">' for link in links).encode()
    assert linked_names(page, "http://host/c d") == ["a", "b"]


def test_more_bytes_than_asked_for_are_not_a_file_that_ends_early(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranges, "more", b"more")
    told = refused("E305", lambda: engine.plan(MAPPING, f"{web}/{STEP.name}"))
    assert "more bytes than asked for" in str(told)


@sampled(2)
@pytest.mark.parametrize("url", ["http://[", "s3://[/a", "az://][", "s3://a/\udcff", "https://a/\ud800"])
def test_an_address_that_is_none_is_wrong_usage(url: str, tmp_path: Path) -> None:
    for command in (("inspect", url), ("run", "-m", MAPPING, "-s", url), ("run", "-m", MAPPING, "-s", STEP, "-o", url)):
        done = invoke(*command)
        assert done.exit_code == 2 and "E001" in done.output


def test_a_web_server_is_not_written_to_and_must_list_folders(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="can only be read"):
        engine.convert(MAPPING, STEP, f"{web}/out")
    monkeypatch.setattr(Ranges, "listed", False)
    with pytest.raises(EngineError) as caught:
        engine.plan(MAPPING, f"{web}/{STEP.name}")
    assert caught.value.code in ("E304", "E305")
