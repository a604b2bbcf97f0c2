"""A server of objects that the tests of this folder share, and a proxy for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import api
from engine.errors import EngineError
from engine.storage.places import store_options
from tests.support.object_server import BUCKET, Proxy, options, proxy, server


@dataclass
class Bucket:
    """A prefix of a bucket that one test has for itself."""

    url: str
    proxy: Proxy

    def client(self, name: str = "") -> Any:
        from obstore.store import from_url

        return from_url(f"{self.url}/{name}".rstrip("/"), client_options={"allow_http": True}, **options(self.port))

    port: int = 0

    def upload(self, folder: Path, name: str) -> str:
        client = self.client(name)
        for path in sorted(folder.iterdir()):
            if path.is_file():
                client.put(path.name, path.read_bytes())
        return f"{self.url}/{name}"

    def contents(self, name: str) -> dict[str, bytes]:
        client = self.client(name)
        return {one["path"]: client.get(one["path"]).bytes().to_bytes() for one in client.list().collect()}


MAPPING = "families/internlm2.yaml"
STEP = Path(__file__).parents[1] / "fixtures" / "internevo" / "v2_tp2_pp2"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(code: str, call: Callable[[], object]) -> EngineError:
    with pytest.raises(EngineError) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    return caught.value


def pending(bucket: Bucket, *names: str) -> list[str]:
    """Uploads at some prefixes that were begun and not ended; ends them."""
    return [str(one) for name in names or ("hf",) for one in api.clean(f"{bucket.url}/{name}")]


@pytest.fixture(scope="package")  # it takes processor time as long as it runs
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    pytest.importorskip("obstore", reason="the extra `store` is not installed")
    with server(tmp_path_factory.mktemp("weed")) as port:
        yield port


@pytest.fixture
def bucket(s3_port: int, tmp_path: Path) -> Iterator[Bucket]:
    with proxy(s3_port) as seen, store_options(options(seen.port)):
        yield Bucket(f"s3://{BUCKET}/{tmp_path.parent.name}-{tmp_path.name}", seen, s3_port)
