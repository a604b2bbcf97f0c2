"""A server of small genuine checkpoints in a thread, and requests to it byte by byte."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import api
from engine.serve.server import Line, Server

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
MAPPING, STEP = "families/internlm2.yaml", FIXTURES / "v2_tp2_pp2"
SPLIT = 200_000  # bytes of tensors in a file of the model


@dataclass
class Running:
    """A server that runs in a thread, with what it said."""

    server: Server
    lines: list[Line] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def logged(self, path: str) -> Line:
        """The last line about a path, which comes when its response is over."""
        deadline = time.monotonic() + 10
        while not (found := [one for one in self.lines if one.path == path]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found[-1]

    def raw(self, data: bytes, *, wait: float = 20) -> bytes:
        """Everything that comes back for some bytes, until the server closes or nothing comes for a while."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=wait) as opened:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has answered before it had read all
                opened.sendall(data)
            return drained(opened)


def drained(opened: socket.socket) -> bytes:
    found = b""
    try:
        while piece := opened.recv(1 << 16):
            found += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return found


@contextmanager
def serving(models: list[api.Model], **options: Any) -> Iterator[Running]:
    lines: list[Line] = []
    told: list[str] = []
    patience = options.pop("patience", None)
    server = api.serve(models, port=0, log=lines.append, told=told.append, patience=patience, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Running(server, lines, told)
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
