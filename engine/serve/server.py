"""The server: passes requests from sockets to the hub, and its responses and files, as computed, to sockets.

A slow client takes a socket and one piece of a file, not a thread. A bounded number of threads makes responses
and pieces. Connections that send no request, or accept no data, are closed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import EngineError, Place
from engine.language.documents import grouped
from engine.serve.hub import Hub, Request, Response, refusal

_PIECE = 2 << 20  # bytes of a file that are read at a time
_THREADS = 16
_CONNECTIONS = 256
_HEADERS = 32 << 10  # bytes of a request's headers
_TARGET = 8 << 10  # bytes of a request's path and query

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits in seconds: `idle` for completing a request, `stalled` for accepting a piece of a file.

    `grace` is what downloads have to finish when the server is stopped.
    """

    idle: float = 15
    stalled: float = 60
    grace: float = 3


@dataclass(frozen=True, slots=True)
class Line:
    """One request, for the log."""

    client: str
    method: str
    path: str
    status: int
    bytes: int
    seconds: float
    problem: str | None = None


class App:
    """The hub as an ASGI application."""

    def __init__(self, hub: Hub, log: Callable[[Line], None], patience: Patience) -> None:
        self._hub, self._log, self._patience = hub, log, patience
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="answer")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        started, sent, problem, status = time.monotonic(), 0, None, 500
        request = _request(scope)
        refused = _refused(scope)
        loop = asyncio.get_running_loop()
        try:
            answer = partial(self._answer, request, refused)
            response, piece, problem = await loop.run_in_executor(self._threads, answer)
            status = response.status
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in response.headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            if request.method == "HEAD" or not response.length:
                await send({"type": "http.response.body", "body": b""})
                return
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                while not gone.done():
                    after = sent + len(piece)
                    more = after < response.length
                    coming = loop.run_in_executor(self._threads, _piece, response, after) if more else None
                    sending = send({"type": "http.response.body", "body": piece, "more_body": more})
                    await asyncio.wait_for(sending, self._patience.stalled)
                    sent = after
                    if coming is None:
                        return
                    piece = await coming
                problem = "the client disconnected"
            finally:
                gone.cancel()
        except TimeoutError:
            problem = "the client accepts no data"
            scope["state"]["abort"]()
        except EngineError as error:
            problem = str(error)
            scope["state"]["abort"]()  # less was sent than announced, so the client sees an incomplete file
        except asyncio.CancelledError:
            problem = "the server was stopped"
            scope["state"]["abort"]()
        finally:
            client = (scope.get("client") or ("?",))[0]
            seconds = time.monotonic() - started
            self._log(Line(str(client), request.method, request.path, status, sent, seconds, problem))

    def _answer(self, request: Request, refused: Response | None) -> tuple[Response, bytes | memoryview, str | None]:
        """The response with the first piece of its body; an error of a source is raised before anything is sent."""
        try:
            response = refused or self._hub.answer(request)
            return response, _piece(response, 0) if request.method != "HEAD" else b"", None
        except (EngineError, OSError) as error:
            told = f"{error.code} {error.message}" if isinstance(error, EngineError) else str(error.strerror)
            response, problem = refusal(409, told), str(error)
        except Exception as error:  # unforeseen: this request fails, the server goes on
            response, problem = refusal(500, "E901 internal error"), f"{type(error).__name__}: {error}"
        return response, _piece(response, 0), problem


def _request(scope: Mapping[str, Any]) -> Request:
    headers = grouped((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
    return Request(scope["method"], scope["path"], {name: ", ".join(values) for name, values in headers.items()})


def _refused(scope: Mapping[str, Any]) -> Response | None:
    """A refusal of a request for what is around its path."""
    if len(scope["raw_path"]) + len(scope["query_string"]) > _TARGET:
        return refusal(414, "the path is too long")
    if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > _HEADERS:
        return refusal(431, "the headers are too long")
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
        return refusal(400, "two lengths: a proxy may take the other one", Connection="close")  # as RFC 9112 says
    return None


def _piece(response: Response, at: int) -> bytes | memoryview:
    """Bytes of a body from `at` on."""
    stop = min(at + _PIECE, response.length)
    if isinstance(response.body, bytes):
        return response.body[at:stop]
    buffer = memoryview(bytearray(stop - at))
    response.body.read_into(response.start + at, buffer)
    return buffer  # a socket that does not take all of it at once makes no copy


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Wire(h11.Connection):
    """HTTP with bodies sent without a copy: h11 itself would copy each piece."""

    def send(self, event: Any) -> Any:
        parts = self.send_with_data_passthrough(event)
        if parts is None:
            return None
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Connection(H11Protocol):  # type: ignore[misc]
    """A connection that is closed if no request arrives, or the last one is not complete, in time."""

    patience = Patience()
    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.conn = Wire(h11.SERVER, _HEADERS)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._since = self.loop.time()
        self._watch()

    def _watch(self) -> None:
        now, busy = self.loop.time(), self.cycle is not None and not self.cycle.response_complete
        if busy or self.transport.get_write_buffer_size():
            self._since = now if busy else self._since
        if now - self._since > self.patience.idle:
            self.transport.abort()
        if not self.transport.is_closing():
            self.loop.call_later(self.patience.idle / 4, self._watch)


class Server:
    """A server with its socket bound; `run` serves until it is stopped."""

    def __init__(
        self,
        hub: Hub,
        host: str,
        port: int,
        log: Callable[[Line], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        """Args: port: 0 for any free one.

        Raises:
            EngineError: E001 when the address cannot be bound.
        """
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        patience = patience or Patience()
        self._app = App(hub, log, patience)
        config = uvicorn.Config(
            self._app,
            http=type("Connection", (Connection,), {"patience": patience}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=patience.grace,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or `stop`; downloads then have a few seconds to finish."""
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # what matters is in the log of requests
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self._app.close()

    def stop(self) -> None:
        """Make `run` end; may be called from any thread."""
        self._server.should_exit = True


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen()  # so that anyone who learns the address can connect
    except OSError as error:
        raise EngineError(
            "E001", "the server cannot listen there", place=Place(f"{host}:{port}"), got=error.strerror,
            fix="Choose another --port or --host; port 0 takes a free one.",
        ) from error  # fmt: skip
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    except (OSError, ValueError):
        return False
