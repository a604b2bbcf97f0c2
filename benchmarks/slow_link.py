"""A TCP proxy on a loopback port that makes a server seem far away: answers come late, and connections are slow."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

_BLOCK = 64 << 10  # bytes passed on at once


@contextlib.contextmanager
def link(port: int, milliseconds: float, rate: float) -> Iterator[int]:
    """The port of a proxy before a server on `port`; that port itself where nothing is slowed down.

    Args:
        milliseconds: from a request to its answer, beside the server's own time.
        rate: MB/s of each connection and direction; 0 for no limit.
    """
    if not milliseconds and not rate:
        yield port
        return
    command = [sys.executable, "-m", "benchmarks.slow_link", str(port), str(milliseconds), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


class _Connection:
    def __init__(self, milliseconds: float, rate: float) -> None:
        self._turn, self._bytes = milliseconds / 2000, rate * 1e6
        self._speaks: object = None

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free = 0.0  # when the bytes before have passed
        with contextlib.suppress(OSError):
            while data := await reader.read(_BLOCK):
                if self._speaks is not reader:  # the other side spoke last
                    self._speaks = reader
                    await asyncio.sleep(self._turn)
                now = time.monotonic()
                free = max(free, now) + (len(data) / self._bytes if self._bytes else 0)
                await asyncio.sleep(max(free - now, 0))
                writer.write(data)
                await writer.drain()
        writer.close()


async def _serve(port: int, milliseconds: float, rate: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one = _Connection(milliseconds, rate)
        answers, asks = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(one.carry(reader, asks), one.carry(answers, writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as listening:
        print(listening.sockets[0].getsockname()[1], flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), *map(float, sys.argv[2:])))
