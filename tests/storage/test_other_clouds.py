"""Google's and Microsoft's stores: the same functions, other addresses, options and protocols."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import api
from engine.storage.client import client_of
from engine.storage.places import store_options
from tests.storage.conftest import MAPPING, STEP, files, refused
from tests.support.object_server import BUCKET, proxy

# Of the emulator that Microsoft publishes; everybody knows it.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.mark.parametrize(
    ("url", "options", "shown"),
    [
        ("gs://bucket/a/b", {"skip_signature": "true"}, 'bucket="bucket", prefix="a/b"'),
        ("az://box/a/b", {"account_name": "me", "account_key": ACCOUNT_KEY}, 'container_name="box", account_name="me"'),
        ("s3://bucket/a/b", {"region": "eu-west-1", "skip_signature": "true"}, 'bucket="bucket", prefix="a/b"'),
    ],
)
def test_a_url_and_options_make_the_client_of_each_provider(url: str, options: dict[str, str], shown: str) -> None:
    pytest.importorskip("obstore", reason="the extra `store` is not installed")
    made = client_of(url, tuple(sorted(options.items())))
    assert shown in repr(made) and ACCOUNT_KEY not in repr(made)
    refused("E001", lambda: client_of(url, (("no_such_option", "x"),)))


def there_and_back(base: str, client: Any, folder: Path) -> None:
    """A step is uploaded, converted in the store and looked at; a replaced output and a resumed run come out alike."""
    for path in sorted(STEP.iterdir()):
        if path.is_file():
            client.put(f"step/{path.name}", path.read_bytes())
    engine.convert(MAPPING, STEP, folder / "hf", max_shard_size=200_000)
    for how in ({}, {"overwrite": True}):
        engine.convert(MAPPING, f"{base}/step", f"{base}/hf", max_shard_size=200_000, **how)
        got = {one["path"]: client.get(f"hf/{one['path'].rpartition('/')[2]}").bytes().to_bytes() for one in
               client.list("hf").collect()}  # fmt: skip
        assert {name.rpartition("/")[2]: data for name, data in got.items()} == files(folder / "hf")
    refused("E401", lambda: engine.convert(MAPPING, f"{base}/step", f"{base}/hf"))
    assert api.verify(f"{base}/hf").problems == () and api.inspect(f"{base}/step").fitting
    engine.reverse(MAPPING, f"{base}/hf", f"{base}/ranks", tp=2, pp=2)
    assert api.verify(f"{base}/ranks").problems == ()
    client.delete("hf/conversion.json")
    engine.convert(MAPPING, f"{base}/step", f"{base}/hf", max_shard_size=200_000, resume=True)
    assert api.verify(f"{base}/hf").problems == ()
    client.delete("hf/conversion.json")
    assert f"{base}/hf/config.json" in api.clean(f"{base}/hf")
    assert not client.list("hf").collect()


def test_googles_store_is_read_and_written(s3_port: int, tmp_path: Path) -> None:
    with proxy(s3_port, google=True) as seen:
        how = {"base_url": f"http://127.0.0.1:{seen.port}", "bearer_token": "nobody looks at it"}
        base = f"gs://{BUCKET}/{tmp_path.name}-google"
        with store_options(how):
            there_and_back(base, client_of(base, tuple(sorted(how.items()))), tmp_path)
        assert any(one.method == "POST" and "uploads" in one.path for one in seen.asked)


@contextmanager
def azurite(folder: Path) -> Iterator[int]:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    command = [str(shutil.which("azurite-blob")), "--blobPort", str(port), "--location", str(folder), "--silent",
               "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ) as process:
        try:
            for _ in range(200):
                with socket.socket() as tried:
                    if tried.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield port
        finally:
            process.kill()


@pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="Azurite (npm install -g azurite) is not installed")
def test_microsofts_store_is_read_and_written(tmp_path: Path) -> None:
    with azurite(tmp_path / "azurite") as port:
        how = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY, "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}"}
        _make_container(port)
        with store_options(how):
            there_and_back("az://box/prefix", client_of("az://box/prefix", tuple(sorted(how.items()))), tmp_path)


def _make_container(port: int) -> None:
    """By a signed request: obstore cannot."""
    import base64
    import hashlib
    import hmac
    import http.client
    from email.utils import formatdate

    date, version = formatdate(usegmt=True), "2021-08-06"
    resource = f"/{ACCOUNT}/{ACCOUNT}/box\nrestype:container"
    text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    signed = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
    headers = {"x-ms-date": date, "x-ms-version": version, "Content-Length": "0",
               "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}"}  # fmt: skip
    ask = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    ask.request("PUT", f"/{ACCOUNT}/box?restype=container", headers=headers)
    assert ask.getresponse().status == 201
