"""A server answers as the Hub does, with files byte for byte those of a run, and refuses what is not served."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine
from engine import api
from engine.api import serving
from engine.checkpoint.grid import NoWeights, read_grid
from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.run.execute import Small
from engine.serve import revisions
from engine.serve.hub import refusal
from engine.serve.server import _request, is_loopback
from engine.storage.objects import ObjectState
from engine.storage.places import store_at
from engine.storage.store import Store, walk
from tests.support.serving import MAPPING, STEP, Running

FOLDER: Any = SimpleNamespace(notices=())  # what is served, where its files do not matter

FILE = "/org/name/resolve/main/model-00001-of-00003.safetensors"


def test_every_file_is_that_of_a_run(hub: Running, written: Path) -> None:
    for path in written.iterdir():
        status, headers, body = hub.ask(f"/org/name/resolve/200/{path.name}")
        assert status == 200 and body == path.read_bytes(), path.name
        assert headers["content-length"] == str(len(body)) and headers["accept-ranges"] == "bytes"


def test_main_is_the_newest_complete_step_and_steps_are_revisions(hub: Running) -> None:
    told = {name: json.loads(hub.ask(f"/api/models/org/name/revision/{name}")[2]) for name in ("main", "200", "100")}
    assert told["main"]["sha"] == told["200"]["sha"] != told["100"]["sha"]
    assert json.loads(hub.ask("/api/models/org/name")[2]) == told["main"]
    by_sha = hub.ask(f"/org/name/resolve/{told['100']['sha']}/config.json")
    assert by_sha[1]["x-repo-commit"] == told["100"]["sha"]
    status, headers, body = hub.ask("/org/name/resolve/300/config.json")
    assert status == 404 and headers["x-error-code"] == "RevisionNotFound"
    assert "model_tp1_pp1.pt` is missing" in headers["x-error-message"] and "E201" in json.loads(body)["error"]


def test_a_step_is_found_when_training_has_written_it(run: Path, tmp_path: Path, serve: Callable[..., Any]) -> None:
    moving = tmp_path / "run"
    moving.mkdir()
    shutil.copytree(run / "100", moving / "iter_0000100")
    with serve([api.Model("a/b", MAPPING, moving)]) as running:

        def sha(revision: str = "main") -> str:
            return str(json.loads(running.ask(f"/api/models/a/b/revision/{revision}")[2]).get("sha"))

        first = sha()
        assert first == sha("iter_0000100") == sha("100")
        (moving / "iter_0000200").mkdir()
        assert sha() == first
        for path in sorted(STEP.iterdir()):
            shutil.copy(path, moving / "iter_0000200")
            assert sha() in (first, sha("200"))
        assert sha() == sha("200") != first
        second, etag = sha(), running.ask("/a/b/resolve/main/model.safetensors", "HEAD")[1]["etag"]
        (moving / "iter_0000200" / "model_tp0_pp0.pt").touch()
        status, _, body = running.ask(f"/a/b/resolve/{second}/model.safetensors")
        assert status == 409 and b"E405" in body
        assert sha() != second
        status, headers, _ = running.ask("/a/b/resolve/main/model.safetensors", "HEAD")
        assert status == 200 and headers["etag"] == etag  # the same bytes
        shutil.rmtree(moving / "iter_0000200")
        assert sha() == first
    assert [line for line in running.told if "iter_0000200 is not served: E" in line]
    assert running.told[0].startswith("iter_0000100 is served as ")
    assert any(line.startswith("  note no tokenizer: ") for line in running.told)  # what a run would print


def test_a_commit_is_another_when_anything_that_determines_bytes_is(tmp_path: Path) -> None:
    shutil.copytree(STEP, tmp_path / "step")
    src, file = store_at(tmp_path / "step", "the checkpoint"), tmp_path / "step" / "model_tp0_pp0.pt"

    def commit(salt: str, make: Callable[[Any], Any] = lambda store: FOLDER) -> str:
        (one,) = revisions.Revisions(src, make, lambda: salt).all()
        return one.commit

    first = commit("one mapping")
    assert first == commit("one mapping") != commit("another mapping")
    file.touch()
    assert first != commit("one mapping")
    with pytest.raises(EngineError, match="E405 the step changed while it was planned"):
        commit("one mapping", lambda store: file.touch())


def test_a_commit_is_another_when_only_a_size_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a web server that gives no ETags, and times in seconds."""
    commits = set()
    for size in (1, 2, 1):
        monkeypatch.setattr(revisions, "walk", lambda _, size=size: [("a", ObjectState(size, None, None, "12:00:00"))])
        (one,) = revisions.Revisions(store_at(tmp_path, "the step"), lambda store: FOLDER, lambda: "").all()
        commits.add(one.commit)
    assert len(commits) == 2


@pytest.mark.parametrize("inside", ["", "tokenizer.json"], ids=["a folder", "a file in it"])
def test_a_commit_is_another_when_the_tokenizer_that_was_given_is(
    inside: str, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else clients take what they have of the model for the same."""
    monkeypatch.setattr(serving, "small_files", lambda *_: Small({}))
    given = tmp_path / "tokenizer.json"

    def commit(running: Running) -> Any:
        return json.loads(running.ask("/api/models/a/b")[2])["sha"]

    given.write_text("{}")
    for _ in range(2):
        with serve([api.Model("a/b", MAPPING, STEP)], tokenizer=tmp_path / inside) as running:
            first = commit(running)
            assert first == commit(running)
            given.write_text(given.read_text() + " ")
            assert first != (second := commit(running))
    with serve([api.Model("a/b", MAPPING, STEP)], tokenizer=tmp_path / inside) as running:
        assert second == commit(running)


def test_a_step_that_could_not_be_read_for_a_moment_is_served_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, failing = [100.0], {"200"}

    def make(store: Store) -> Any:
        name = store.place().rpartition("/")[2]
        if name == tmp_path.name:
            raise NoWeights("E304", "no checkpoint")
        if name in failing:
            raise EngineError("E305", "a file cannot be read")
        return FOLDER

    monkeypatch.setattr(revisions, "monotonic", lambda: now[0])
    for name in ("100", "200"):
        (tmp_path / name).mkdir()
    found = revisions.Revisions(store_at(tmp_path, "the run"), make, lambda: "")
    assert found.find("main")[0].name == "100"
    failing.clear()
    assert found.find("main")[0].name == "100"  # planning may take long, so a refusal is kept for a moment
    now[0] += 6
    assert found.find("main")[0].name == "200"


def test_a_checkpoint_that_is_refused_is_not_taken_for_a_run_though_folders_of_its_ranks_have_numbers(
    tmp_path: Path,
) -> None:
    """As Megatron's have: users were told that `mp_rank_01` holds no weights."""

    def make(store: Store) -> Any:
        raise EngineError("E304", "the training configuration is missing")

    (tmp_path / "mp_rank_01").mkdir()
    with pytest.raises(EngineError, match="the training configuration is missing"):
        revisions.Revisions(store_at(tmp_path, "the step"), make, lambda: "")


def test_the_steps_of_a_run_are_served_though_a_configuration_lies_beside_them(tmp_path: Path) -> None:
    def make(store: Store) -> Any:
        if store.place() == str(tmp_path):
            read_grid(store.names(), load_layout("internevo"), store.place())
        return FOLDER

    (tmp_path / "100").mkdir()
    (tmp_path / "model_config.pt").touch()
    assert revisions.Revisions(store_at(tmp_path, "the run"), make, lambda: "").names() == ["100"]


def test_plans_of_the_steps_that_were_asked_for_last_are_kept_and_a_step_is_reported_once(tmp_path: Path) -> None:
    made: list[str] = []
    told: list[str] = []

    def make(store: Store) -> Any:
        made.append(store.place().rpartition("/")[2])
        if made == [tmp_path.name]:
            raise NoWeights("E304", "no checkpoint")
        return FOLDER

    for step in range(9):
        (tmp_path / str(step)).mkdir()
    found = revisions.Revisions(store_at(tmp_path, "the run"), make, lambda: "", told.append)
    for step in (*range(8), 0, 8, 0, 1):  # eight are kept, so that 8 takes the place of 1
        found.find(str(step))
    assert made[1:] == [*map(str, range(9)), "1"]
    assert [line.split()[0] for line in told] == [*map(str, range(9))]


def test_a_commit_is_found_while_a_newer_step_is_being_removed(
    run: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(store: Store) -> Any:
        if store.place().endswith("200"):
            raise FileNotFoundError(store.place())
        return walk(store)

    with serve([api.Model("a/b", MAPPING, run)]) as running:
        branches = json.loads(running.ask("/api/models/a/b/refs")[2])["branches"]
        (commit,) = (one["targetCommit"] for one in branches if one["name"] == "100")
        monkeypatch.setattr(revisions, "walk", gone)
        assert running.ask(f"/a/b/resolve/{commit}/config.json")[0] == 200


def test_a_number_of_two_steps_is_asked_for_by_name(run: Path, tmp_path: Path, serve: Callable[..., Any]) -> None:
    moving = tmp_path / "run"
    for name, of in (("100", "100"), ("ema-100", "200"), ("0100", "200"), ("x20", "200"), ("y20", "100")):
        shutil.copytree(run / of, moving / name)
    (moving / "100" / "note").touch()
    with serve([api.Model("a/b", MAPPING, moving)]) as running:

        def sha(revision: str) -> Any:
            return json.loads(running.ask(f"/api/models/a/b/revision/{revision}")[2]).get("sha")

        branches = {
            one["name"]: one["targetCommit"] for one in json.loads(running.ask("/api/models/a/b/refs")[2])["branches"]
        }
        for name in ("100", "0100", "ema-100", "x20"):
            assert sha(name) == branches[name]
        for name, several in (("20", "y20, x20"), ("main", "ema-100, 100, 0100")):
            status, headers, _ = running.ask(f"/a/b/resolve/{name}/config.json")
            assert status == 404 and f"several steps: {several}" in headers["x-error-message"]


def test_a_run_without_a_complete_step_waits_for_one(tmp_path: Path, serve: Callable[..., Any]) -> None:
    (tmp_path / "run" / "10").mkdir(parents=True)
    with serve([api.Model("a/b", MAPPING, tmp_path / "run")]) as running:
        assert running.ask("/api/models/a/b")[0] == 404
        assert b"is not there" in running.ask("/")[2]
        shutil.copytree(STEP, tmp_path / "run" / "20")
        assert running.ask("/api/models/a/b")[0] == 200


def test_the_hub_lists_files_refs_and_models(hub: Running, written: Path) -> None:
    info = json.loads(hub.ask("/api/models/org/name")[2])
    sizes = {path.name: path.stat().st_size for path in written.iterdir()}
    assert {one["rfilename"]: one["size"] for one in info["siblings"]} == sizes
    tree = json.loads(hub.ask("/api/models/org/name/tree/main?recursive=true&expand=false")[2])
    assert {one["path"]: one["size"] for one in tree} == sizes and {one["type"] for one in tree} == {"file"}
    refs = json.loads(hub.ask("/api/models/org/name/refs")[2])["branches"]
    assert [one["name"] for one in refs] == ["main", "300", "200", "100"]
    assert refs[0]["targetCommit"] == refs[2]["targetCommit"] == info["sha"]
    assert [one["id"] for one in json.loads(hub.ask("/api/models")[2])] == ["org/name", "single"]


def test_head_says_what_get_sends(hub: Running) -> None:
    for path in (FILE, "/org/name/resolve/main/conversion.json", "/", "/api/models/single", "/nothing", "/org/name"):
        get, head = hub.ask(path), hub.ask(path, "HEAD")
        for headers in (get[1], head[1]):
            headers.pop("date")
        assert head == (get[0], get[1], b"") and int(get[1]["content-length"]) == len(get[2]) > 0


def test_ranges_and_conditions(hub: Running, written: Path) -> None:
    data = (written / "model-00001-of-00003.safetensors").read_bytes()
    etag = hub.ask(FILE, "HEAD")[1]["etag"]
    for asked, start, stop in (("0-99", 0, 100), ("100-", 100, len(data)), ("-7", len(data) - 7, len(data))):
        status, headers, body = hub.ask(FILE, Range=f"bytes={asked}")
        assert (status, body) == (206, data[start:stop])
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{len(data)}"
    for asked in ("bytes=0-1,5-6", "bytes=999999999999-", "bytes=9-1", "bytes=x"):
        status, headers, _ = hub.ask(FILE, Range=asked)
        assert status == 416 and headers["content-range"] == f"bytes */{len(data)}"
    assert hub.ask(FILE, If_None_Match=etag)[0::2] == (304, b"")
    assert hub.ask(FILE, Range="bytes=0-1", If_Range=etag)[2] == data[:2]
    assert hub.ask(FILE, Range="bytes=0-1", If_Range='"older"')[2] == data
    assert hub.ask(FILE, If_Match='"older"')[0] == 412


@pytest.mark.parametrize(
    "path",
    [
        "/org/name/resolve/main/../../../etc/passwd",
        "/org/name/resolve/main/%2e%2e/%2e%2e/model_config.pt",
        "/org/name/resolve/main/..%2f..%2fmodel_config.pt",
        "/org/name/resolve/main//etc/passwd",
        "/org/name/resolve/main/model_config.pt",
        "/org/name/resolve/main/.",
        "/org/name/resolve",
        "/org/name/resolve/main",
        "/org/name/resolve/main/",
        "/org/name/resolve/main/config.json%00",
        "/org/name/resolve/main/config.json/",
        "/org/name/resolve/../config.json",
        "/org/name/resolve/..%2F200/config.json",
        "/org/name/resolve/notes/config.json",
        "/org/name/resolve/./config.json",
        "/org/name/resolve/400/config.json",
        "/org/name/resolve//config.json",
        "/org/name/resolve/" + "a" * 5000 + "/config.json",
        "/org/nam/resolve/main/config.json",
        "/org/name2/resolve/main/config.json",
        "/org",
        "/name",
        "/api",
        "/api/models/org",
        "/api/models/org/name/tree/main/folder",
        "/api/models/org/name/anything",
        "/api/datasets/org/name",
        "//org/name/resolve/main/config.json",
        "/favicon.ico",
        "/%ff%fe",
        "/org/name/upload/main/config.json",
    ],
)
def test_what_is_not_served_is_not_found(hub: Running, path: str) -> None:
    status, headers, body = hub.ask(path)
    assert status == 404 and json.loads(body)["error"] and b"Traceback" not in body
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MKCOL", "get"])
def test_it_is_read_only(hub: Running, method: str) -> None:
    for path in (FILE, "/api/models/org/name", "/", "/api/repos/create"):
        status, headers, _ = hub.ask(path, method)
        assert status == 405 and headers["allow"] == "GET, HEAD"


def test_replicas_that_differ_are_a_conflict_before_a_byte_is_sent(
    run: Path, tmp_path: Path, serve: Callable[..., Any]
) -> None:
    import torch

    src = tmp_path / "step"
    shutil.copytree(run / "100", src)
    state = torch.load(src / "model_tp1_pp0.pt", weights_only=True)
    key = next(key for key in state if key.endswith("attention_norm.weight"))
    state[key] += 1
    torch.save(state, src / "model_tp1_pp0.pt")
    with serve([api.Model("a/b", MAPPING, src)]) as running:
        assert running.ask("/a/b/resolve/main/config.json")[0] == 200
        index = json.loads(
            running.ask("/a/b/resolve/main/model.safetensors", Range="bytes=8-20000")[2].split(b"}}")[0] + b"}}"
        )
        start = 8 + int.from_bytes(running.ask("/a/b/resolve/main/model.safetensors", Range="bytes=0-7")[2], "little")
        name = next(name for name in index if name.endswith("layers.0.input_layernorm.weight"))
        at = start + index[name]["data_offsets"][0]
        status, headers, body = running.ask("/a/b/resolve/main/model.safetensors", Range=f"bytes={at}-{at + 3}")
        assert status == 409 and b"E402" in body and "replicas" in headers["x-error-message"]
        running.ask("/")
        running.logged("/")
        assert [line for line in running.lines if line.status == 409 and "model_tp1_pp0.pt" in str(line.problem)]


def test_a_token_is_asked_for_and_compared(run: Path, serve: Callable[..., Any]) -> None:
    basic = base64.b64encode(b"anybody:secret").decode()
    with serve([api.Model("a/b", MAPPING, run / "100")], token="secret") as running:
        for path in ("/", "/api/models/a/b", "/a/b/resolve/main/config.json", "/nothing"):
            wrong = ("Bearer wrong", "Bearer", "secret", "Basic !!", "Basic c2VjcmV0", "Bearer sécret", "Digest secret")
            for given in ({}, *({"Authorization": one} for one in wrong)):
                status, headers, body = running.ask(path, **given)
                assert status == 401 and "Bearer" in headers["www-authenticate"] and b"HF_TOKEN" in body
            for given in ({"Authorization": "Bearer secret"}, {"authorization": f"basic {basic}"}):
                assert running.ask(path, Host="other.example", **given)[0] == (404 if path == "/nothing" else 200)


def test_a_header_that_is_sent_twice_has_both_values() -> None:
    sent = [(b"authorization", b"Bearer a"), (b"host", b"x"), (b"authorization", b"Bearer b")]
    request = _request({"method": "GET", "path": "/", "headers": sent})
    assert request.headers == {"authorization": "Bearer a, Bearer b", "host": "x"}


def test_a_page_of_another_name_cannot_read_what_is_served_without_a_token(hub: Running) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1:8000", "", "[::2]"):
        assert hub.ask("/api/models", Host=host)[0] in (400, 421), host
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:80", "[::1]"):
        assert hub.ask("/api/models", Host=host)[0] == 200, host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "host.invalid"])
def test_an_address_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(engine.EngineError, match="E001") as raised:
        api.serve([api.Model("a/b", MAPPING, STEP)], host=host, port=0)
    assert "--token-file" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "api/models", "../x", "a/..", "a/b c", "-a", "a--b", "a/b\n", "é", "a" * 97]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(engine.EngineError, match="E001"):
        api.serve([api.Model(name, MAPPING, STEP)], port=0)


def test_two_models_of_one_name_an_address_in_use_and_no_checkpoint_are_refused(tmp_path: Path, hub: Running) -> None:
    one = api.Model("a/b", MAPPING, STEP)
    with pytest.raises(engine.EngineError, match="E001"):
        api.serve([one, one], port=0)
    with pytest.raises(engine.EngineError, match="E001") as raised:
        api.serve([one], port=hub.server.port)
    assert "--port" in str(raised.value)
    with pytest.raises(engine.EngineError, match="E304"):
        api.serve([api.Model("a/b", MAPPING, tmp_path)], port=0)


def test_the_page_lists_models_and_says_what_each_is(hub: Running) -> None:
    status, headers, body = hub.ask("/")
    page = body.decode()
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    for text in ("org/name", "single", "LlamaForCausalLM", "step <code>200</code>", "tp 2", "parameters", ">300<"):
        assert text in page
    status, _, body = hub.ask("/org/name/tree/100")
    assert status == 200 and "model-00002-of-00003.safetensors" in body.decode() and 'revision="100"' in body.decode()
    assert hub.ask("/org/name/tree/300")[0] == 404


def test_names_of_steps_cannot_write_markup(tmp_path: Path, serve: Callable[..., Any]) -> None:
    shutil.copytree(STEP, tmp_path / "run" / "<script>alert(1)<7")
    with serve([api.Model("a/b", MAPPING, tmp_path / "run")]) as running:
        page = running.ask("/")[2]
        assert b"<script" not in page and b"&lt;script&gt;" in page


def test_requests_are_logged(run: Path, serve: Callable[..., Any]) -> None:
    with serve([api.Model("a/b", MAPPING, run)]) as running:
        running.ask("/a/b/resolve/main/config.json?x=1")
        line = running.logged("/a/b/resolve/main/config.json")
        assert (line.method, line.status, line.client, line.problem) == ("GET", 200, "127.0.0.1", None)
        assert line.bytes > 100 and line.seconds > 0


def test_a_reason_is_one_short_line_whatever_it_quotes() -> None:
    response = refusal(409, "caf\u00e9\r\nX-Forged: 1 " + "x" * 1000)
    told = response.headers["X-Error-Message"]
    assert told.isascii() and told.isprintable() and told.startswith("caf?") and len(told) == 400
    assert isinstance(response.body, bytes) and len(json.loads(response.body)["error"]) == 400


@pytest.mark.parametrize(("addresses", "alone"), [(["127.0.0.1", "::1"], True), (["127.0.0.1", "10.0.0.1"], False)])
def test_a_host_that_others_reach_too_is_not_this_machine_alone(
    addresses: list[str], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(0, 0, 0, "", (address, 0)) for address in addresses]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    assert is_loopback("host.example") == alone
