"""Clients that are slow, broken or hostile get what they deserve, and others are served meanwhile."""

from __future__ import annotations

import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from engine.serve.hub import Hub, Served
from engine.serve.server import Line, Patience, Server
from engine.storage.virtual import Stretch, VirtualFile
from tests.support.depth import sampled
from tests.support.serving import Running, drained

SIZE = 1 << 30
GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
BIG = b"/a/b/resolve/main/big.bin"


class Made:
    """Revisions of a model with one large file of zeros, that counts what is read of it."""

    def __init__(self, fail_at: int = SIZE) -> None:
        self.read = 0

        def fill(at: int, target: memoryview) -> None:
            if at + len(target) > fail_at:
                from engine.errors import EngineError

                raise EngineError("E405", "a source file changed since it was planned")
            self.read += len(target)

        file = VirtualFile("big.bin", SIZE, "tag", (Stretch(0, SIZE, fill),))
        self.folder = {"big.bin": file}

    def find(self, name: str) -> Any:
        return SimpleNamespace(commit="c" * 40, name="1"), self.folder

    def names(self) -> list[str]:
        return ["1"]


@contextmanager
def serving(made: Made, **patience: float) -> Iterator[Running]:
    lines: list[Line] = []
    served: Any = made
    server = Server(Hub([Served("a/b", served)]), "127.0.0.1", 0, lines.append, Patience(**patience))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Running(server, lines)
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def big() -> Iterator[Running]:
    with serving(Made(), idle=0.5, stalled=0.5) as running:
        yield running


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answer)]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/x.y\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        GET % (b"/", b"A : b\r\n"),
        GET % (b"/", b"Host: other\r\n"),
        GET % (b"/", b"Content-Length: -1\r\n"),
        GET % (b"/", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
        GET % (b"/ x", b""),
        GET % (b"/\x00", b""),
        GET % (b"/\xff", b""),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_closed(big: Running, sent: bytes) -> None:
    answer = big.raw(sent)
    assert statuses(answer) == [400] and b"Traceback" not in answer


@sampled(2, "status")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (GET % (b"/", b"A: " + b"a" * 40_000 + b"\r\n"), 431),
        (GET % (b"/", b"A: b\r\n" * 6_000), 431),
        (GET % (b"/" + b"a" * 10_000, b""), 414),
        (GET % (b"/?" + b"a=b&" * 3_000, b""), 414),
        (GET % (b"/", b"A: " + b"a" * 200_000 + b"\r\n"), 400),
        (b"GET /" + b"a" * 200_000, 400),
    ],
)
def test_requests_that_are_too_long_are_refused(big: Running, sent: bytes, status: int) -> None:
    assert statuses(big.raw(sent)) == [status]


def test_requests_in_one_go_are_answered_in_order(big: Running) -> None:
    ranges = [(0, 9), (5, 5), (100, 199)]
    sent = b"".join(GET % (BIG, b"Range: bytes=%d-%d\r\n" % one) for one in ranges)
    sent += GET % (b"/nothing", b"") + GET % (b"/api/models/nobody", b"Connection: close\r\n")
    answer = big.raw(sent)
    assert statuses(answer) == [206, 206, 206, 404, 404]
    told = [line for line in answer.split(b"\r\n") if line.startswith(b"content-range")]
    assert told == [b"content-range: bytes %d-%d/%d" % (*one, SIZE) for one in ranges]


def test_a_body_is_not_taken_for_the_next_request(big: Running) -> None:
    smuggled = GET % (b"/api/models/nobody", b"")
    for headers in (b"Content-Length: %d\r\n" % len(smuggled), b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n"):
        answer = big.raw(GET % (b"/nothing", headers) + smuggled)
        assert statuses(answer) in ([404], [400]), headers
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"  # a proxy may take the other one
    answer = big.raw(GET % (b"/api/models", both) + b"0\r\n\r\n" + smuggled)
    assert statuses(answer) == [400]


def test_who_asks_nothing_or_too_slowly_is_closed(big: Running) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", big.server.port), timeout=20) as silent:
        assert drained(silent) == b""
    with socket.create_connection(("127.0.0.1", big.server.port), timeout=0.2) as slow:
        for byte in GET % (b"/", b"A: " + b"a" * 1000 + b"\r\n"):
            try:
                slow.send(bytes([byte]))
                if not slow.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("a request came for minutes")
    assert time.monotonic() - started < 15


def stalled(running: Running, path: bytes = BIG) -> socket.socket:
    """A client that asks for much and takes nothing."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", running.server.port))
    made.sendall(GET % (path, b""))
    return made


def test_clients_that_take_nothing_hold_no_thread() -> None:
    with serving(Made(), stalled=600, grace=0.2) as running, ExitStack() as clients:
        for _ in range(40):  # more than there are threads
            clients.enter_context(stalled(running))
        time.sleep(0.2)
        for _ in range(20):
            assert running.ask("/a/b/resolve/main/big.bin", Range="bytes=0-9")[0] == 206


def test_clients_that_take_nothing_are_closed() -> None:
    made = Made()
    with serving(made, stalled=0.5, grace=0.2) as running, ExitStack() as clients:
        sleeping = [clients.enter_context(stalled(running)) for _ in range(40)]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len([one for one in running.lines if one.problem]) < 40:
            time.sleep(0.02)
        assert [one.problem for one in running.lines if one.problem] == ["the client accepts no data"] * 40
        assert made.read < 40 * (20 << 20)
        for one in sleeping[:3]:
            one.settimeout(10)
            assert len(drained(one)) < SIZE


def test_nothing_is_read_for_a_client_that_went_away() -> None:
    made = Made()
    with serving(made) as running:
        with stalled(running) as client:
            client.recv(1000)
        assert running.logged(BIG.decode()).problem == "the client disconnected"
        before = made.read
        time.sleep(0.2)
        assert made.read == before < SIZE // 4


def test_too_many_connections_are_told_so_and_forgotten() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft >= 900

    def crowded(running: Running, clients: ExitStack) -> bool:
        """Whether a request is refused; on a slow machine the first connections are closed before the last are made."""
        clients.close()
        for _ in range(300):
            clients.enter_context(socket.create_connection(("127.0.0.1", running.server.port)))
        return running.ask("/api/models/nobody")[0] == 503

    with serving(Made(), idle=0.6) as running, ExitStack() as clients:
        assert any(crowded(running, clients) for _ in range(9))
        deadline = time.monotonic() + 20
        while running.ask("/api/models/nobody")[0] != 404:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_source_that_changes_midway_ends_the_response_before_its_length() -> None:
    with serving(Made(fail_at=10 << 20)) as running:
        answer = running.raw(GET % (BIG, b""))
        head, body = answer.split(b"\r\n\r\n", 1)
        assert b"content-length: %d" % SIZE in head and len(body) <= 10 << 20
        assert "E405" in str(running.logged(BIG.decode()).problem)
        status, headers, body = running.ask(BIG.decode(), Range=f"bytes={11 << 20}-")
        assert status == 409 and "E405" in json.loads(body)["error"] and "E405" in headers["x-error-message"]


def test_a_mistake_of_the_server_is_one_line_and_the_next_request_is_answered() -> None:
    made = Made()
    with serving(made) as running:
        find, made.find = made.find, lambda name: 1 // 0  # type: ignore[method-assign]
        status, _, body = running.ask("/api/models/a/b")
        assert status == 500 and b"E901" in body and b"ZeroDivision" not in body
        assert "ZeroDivisionError" in str(running.logged("/api/models/a/b").problem)
        made.find = find  # type: ignore[method-assign]
        assert running.ask(BIG.decode(), "HEAD")[0] == 200


def test_stopping_ends_downloads_that_hang() -> None:
    with serving(Made(), stalled=60, grace=0.3) as running:
        client = stalled(running)
        client.recv(1, socket.MSG_PEEK)  # the download has begun
        started = time.monotonic()
    with client:
        assert time.monotonic() - started < 8
        assert [one.problem for one in running.lines] == ["the server was stopped"]
