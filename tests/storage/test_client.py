"""What the client of object stores makes of a server's answers and of options, without a server."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from engine.storage import client
from engine.storage.sources import WINDOW
from engine.storage.upload import Upload
from engine.storage.uploads import _client, _end_uploads
from tests.storage.conftest import refused

pytest.importorskip("obstore", reason="the extra `store` is not installed")
CUT_OFF = "Generic S3 error: error sending request, source: reqwest::Error { kind: %s, source: ... }"


def answers(*told: str) -> Any:
    from obstore.exceptions import GenericError

    left = iter(told)

    def ask() -> str:
        if (one := next(left)) == "whole":
            return one
        raise GenericError(one)

    return ask


@pytest.mark.parametrize(
    "told", [CUT_OFF % "Body", CUT_OFF % "Decode", "hyper::Error(IncompleteMessage)", "UnexpectedEof: tls close"]
)
def test_a_response_that_is_cut_off_is_asked_for_three_times_more(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    assert client.asked("s3://b/x", answers(told, told, told, "whole")) == "whole"
    assert waited == sorted(waited) and len(waited) == 3
    refused("E305", lambda: client.asked("s3://b/x", answers(told, told, told, told, "whole")))
    assert len(waited) == 6


def test_another_failure_is_not_asked_for_again() -> None:
    assert refused("E305", lambda: client.asked("s3://b/x", answers("500 Internal", "whole"))).got == "500 Internal"


@pytest.mark.parametrize(
    ("told", "code", "message"),
    [
        ("<Code>NoSuchBucket</Code><Message>gone</Message>", "E304", "no such bucket"),
        ("ContainerNotFound", "E304", "no such bucket"),
        ("got invalid path", "E305", "whose name cannot be read"),
        ("403 Forbidden: <Code>InvalidObjectState</Code><Message>its storage class</Message>", "E305", "is archived"),
        ("409 Conflict: BlobArchived", "E305", "is archived"),
        ("status 403 Forbidden", "E305", "refuses access"),
        ("status 401 Unauthorized", "E305", "refuses access"),
        ("error sending request for url (http://169.254.169.254/latest/api/token)", "E305", "no credentials"),
        ("Generic GCS error: metadata.google.internal", "E305", "no credentials"),
        ("connection refused", "E305", "cannot be read"),
    ],
)
def test_what_a_server_says_is_told_with_what_to_do(told: str, code: str, message: str) -> None:
    error = client.refused("s3://b/x", told)
    assert error.code == code and message in error.message and error.fix
    assert client.refused("s3://b/x", told, writing=True).code == "E403"


KEYS = ("endpoint_url", "region", "access_key_id", "secret_access_key", "session_token")


@pytest.mark.parametrize(
    ("options", "variables", "how"),
    [
        (dict(zip(("endpoint", "region", *KEYS[2:4], "token"), KEYS, strict=True)), {}, KEYS),
        ({f"aws_{name}": name for name in KEYS}, {"AWS_REGION": "no", "AWS_ENDPOINT_URL": "http://no"}, KEYS),
        ({}, {"AWS_REGION": "r", "AWS_ENDPOINT_URL": "http://u"}, ("http://u", "r", None, None, None)),
        ({}, {"AWS_DEFAULT_REGION": "r", "AWS_ENDPOINT": "http://u"}, ("http://u", "r", None, None, None)),
        ({"default_region": "r", "session_token": "t"}, {}, (None, "r", None, None, "t")),
    ],
)  # fmt: skip
def test_uploads_are_ended_with_the_options_that_the_store_was_given(
    options: dict[str, str], variables: dict[str, str], how: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, str] = {}
    session = types.SimpleNamespace(create_client=lambda kind, **given: made.update(given))
    monkeypatch.setitem(sys.modules, "botocore", types.SimpleNamespace(
        session=types.SimpleNamespace(get_session=lambda: session)
    ))  # fmt: skip
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _client(types.SimpleNamespace(options=tuple(options.items())))  # type: ignore[arg-type]
    names = ("endpoint_url", "region_name", "aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    assert made == {name: value for name, value in zip(names, how, strict=True) if value}


def test_uploads_of_other_stores_cannot_be_ended() -> None:
    store = types.SimpleNamespace(url="gs://bucket/x", place=lambda: "gs://bucket/x")
    assert "lifecycle" in refused("E001", lambda: _end_uploads(store, lambda _: True)).fix  # type: ignore[arg-type]


@pytest.mark.parametrize(("end", "taken"), [(None, ["mine"]), ("another's", ["mine"]), ("this", [])])
def test_only_what_this_run_made_visible_is_taken_back(end: str | None, taken: list[str]) -> None:
    """Nothing once the whole output is there from the same work: it was completed elsewhere."""
    marks = {"mine": "this", "another's": "that", "nobody's": None, "conversion.json": end}
    gone: list[str] = []
    store: Any = types.SimpleNamespace(attribute=lambda name, key: marks.get(name), delete=gone.append, block=WINDOW)
    Upload(store, "this", set(), mark="conversion.json")._take_back([*marks][:3], "conversion.json")
    assert gone == taken
