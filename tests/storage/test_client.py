"""What the client of object stores makes of a server's answers and of options, without a server."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import Any

import pytest

from engine.storage import client
from engine.storage.objects import LOCK
from engine.storage.sources import WINDOW
from engine.storage.upload import Upload
from engine.storage.uploads import Uploads, _client, _end_uploads
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


class Shelf:
    """An object store in memory, and what was done to it in order."""

    listable, block = True, WINDOW

    def __init__(self, url: str = "s3://b/hf", **objects: bytes) -> None:
        self.url, self.objects, self.done = url, {name: (data, "old") for name, data in objects.items()}, list[str]()

    def place(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def entries(self, inside: str = "") -> dict[str, Any]:
        found = {name: types.SimpleNamespace(size=len(data)) for name, (data, _) in self.objects.items()}
        found.pop(LOCK, None)
        if not found:
            raise FileNotFoundError
        return found

    def names(self, inside: str = "") -> list[str]:
        return sorted(self.entries())

    def content(self, name: str) -> bytes | None:
        return self.objects.get(name, (None,))[0]

    def attribute(self, name: str, key: str) -> str | None:
        return self.objects[name][1] if name in self.objects else None

    def states(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.entries()[name] for name in names}

    def write(self, name: str, data: bytes, work: str = "", *, new: bool = False) -> bool:
        if new and name in self.objects:
            return False
        self.done.append(f"write {name}")
        self.objects[name] = data, work
        return True

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")
        self.objects.pop(name, None)


def uploads_to(store: Shelf, source: str = "ckpt", **how: Any) -> Uploads:
    asked = {"mark": "conversion.json", "work": "this", "overwrite": False, "foreign": lambda _: None, **how}
    return Uploads(store, source, **asked)  # type: ignore[arg-type]


def test_a_prefix_that_only_begins_alike_is_not_the_source() -> None:
    for source in ("s3://b/h", "s3://b/hf2", "s3://b/hf-ckpt/1000"):
        uploads_to(Shelf(), source)
    for source in ("s3://b/hf", "s3://b/hf/", "s3://b/hf/1000", "s3://b"):
        refused("E404", lambda source=source: uploads_to(Shelf(), source))


def test_an_old_output_is_gone_before_a_new_one_is_whole_and_marks_of_parts_after() -> None:
    """A run that was killed once left files of both; a commit that is repeated needs the marks."""
    store = Shelf(**{"conversion.json": b"{}", "config.json": b"{}", "model.safetensors": b"", "old.txt": b""})
    store.objects[".part-00001-of-00001"] = b"{}", "this"
    with uploads_to(store, overwrite=True, resume=True) as upload:
        for name in ("conversion.json", "README.md", "config.json"):
            upload.put(name, b"new")
    told = [one for one in store.done if not one.endswith(LOCK)]
    assert told == [
        "delete conversion.json", "delete config.json",
        "delete model.safetensors", "delete old.txt",
        "write README.md", "write config.json", "write conversion.json",
        "delete .part-00001-of-00001",
    ]  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_goes_on_from_what_was_left_by_one_like_it_and_not_from_a_whole_output(whole: bool) -> None:
    """Whose weights may have been changed since, with their mark: the new manifest would say that they are right."""
    store = Shelf()
    store.objects = {name: (b"", "this") for name in ("model.safetensors", *(["conversion.json"] if whole else []))}
    with uploads_to(store, overwrite=True, resume=True) as upload:
        assert upload.whole("model.safetensors", 0) is not whole


def test_no_part_is_written_where_a_run_writes_unless_it_commits_that_part() -> None:
    """The run marked the part's weights among its own as whole."""
    store, closed, last = Shelf(), list[str](), ".part-00001-of-00001"
    for work, free in (("another", False), ("this", True)):
        part = uploads_to(store, resume=True).join()  # before the run began
        part.writers["model.safetensors"] = types.SimpleNamespace(close=lambda: closed.append("now"))  # type: ignore[assignment]
        with uploads_to(store, work=work):
            if free:
                uploads_to(store, resume=True).join()
                part.complete(last=last)
            else:
                refused("E408", lambda: uploads_to(store, resume=True).join())
                refused("E408", lambda part=part: part.complete(last=last))
        assert bool(closed) == free


def test_a_part_whose_prefix_another_run_took_meanwhile_leaves_nothing_there() -> None:
    """Its weights once stayed among those of an output that was whole."""
    store = Shelf()
    part = uploads_to(store, resume=True).join()
    shown = types.SimpleNamespace(close=lambda: store.objects.update({"model.safetensors": (b"", "this")}))
    part.writers["model.safetensors"] = shown  # type: ignore[assignment]
    part.complete(last=".part-00001-of-00001")
    store.objects |= {"conversion.json": (b"{}", "another"), "model_tp0_pp0.pt": (b"", "another")}
    part.put(".part-00001-of-00001", b"{}")
    refused("E401", part.complete)
    assert store.objects.keys() == {"conversion.json", "model_tp0_pp0.pt"}


def test_nothing_is_made_visible_once_another_run_has_the_output() -> None:
    store = Shelf()

    def close() -> None:
        store.objects[LOCK] = b"another's", ""

    def run() -> None:
        with uploads_to(store) as upload:
            upload.writers["model.safetensors"] = types.SimpleNamespace(close=close, abort=lambda: None)  # type: ignore[assignment]
            upload.put("config.json", b"new")

    refused("E403", run)
    assert "write config.json" not in store.done and store.content(LOCK) == b"another's"
