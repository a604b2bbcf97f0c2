"""Checkpoints in a real object store: the same bytes as in folders, few requests, and nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save_file

import engine
from engine import api
from engine.checkpoint.folder import read_headers
from engine.errors import EngineError
from engine.run.journal import identity_of
from engine.storage.client import client_of
from engine.storage.objects import LOCK, MARK
from engine.storage.places import store_at, store_options
from tests.storage.conftest import MAPPING, STEP, Bucket, files, pending, refused
from tests.support.depth import SOAK, deep, sampled
from tests.support.object_server import Asked, options
from tests.support.readers import read_hf_folder, read_rank_file

SMALL = {"max_shard_size": 100_000}


def test_run_reverse_and_reshard_between_stores_give_the_bytes_of_folders(bucket: Bucket, tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf", **SMALL)
    step = bucket.upload(STEP, "step")
    report = engine.convert(MAPPING, step, f"{bucket.url}/hf", **SMALL)
    assert report.out == f"{bucket.url}/hf" and set(report.files) == set(files(tmp_path / "hf"))
    assert bucket.contents("hf") == files(tmp_path / "hf")
    engine.convert(MAPPING, step, tmp_path / "down", **SMALL)
    assert files(tmp_path / "down") == files(tmp_path / "hf")
    engine.reverse(MAPPING, tmp_path / "hf", tmp_path / "tp4", tp=4)
    engine.reverse(MAPPING, f"{bucket.url}/hf", f"{bucket.url}/tp4", tp=4)
    assert bucket.contents("tp4") == files(tmp_path / "tp4")
    engine.reshard(MAPPING, STEP, tmp_path / "pp4", tp=1, pp=4)
    engine.reshard(MAPPING, step, f"{bucket.url}/pp4", tp=1, pp=4)
    assert bucket.contents("pp4") == files(tmp_path / "pp4")
    assert not engine.api.verify(f"{bucket.url}/hf", src=step, mapping=MAPPING).problems
    assert engine.api.compare(f"{bucket.url}/hf", tmp_path / "hf").as_dict()["equal"]
    assert not pending(bucket, "hf", "tp4", "pp4")


def test_the_headers_of_a_large_file_cost_two_requests(bucket: Bucket, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "step").mkdir()
    tensors = {f"layers.{i}.weight": torch.randn(64, 300 + i) for i in range(64)}
    torch.save(tensors, tmp_path / "step" / "model_tp0_pp0.pt")
    save_file(tensors, tmp_path / "step" / "model.safetensors")
    store = store_at(bucket.upload(tmp_path / "step", "step"), "the checkpoint")
    store.names()
    before = len(bucket.proxy.asked)
    (header,) = read_headers(store, ["model_tp0_pp0.pt"])
    assert len(bucket.proxy.asked) == before + 2
    local = read_rank_file(tmp_path / "step" / "model_tp0_pp0.pt")
    assert (header.tensors, header.identity, header.root) == (local.tensors, local.identity, local.root)
    from engine.checkpoint.hf_folder import read_hf_folder as read

    (header,) = read(store)
    assert len(bucket.proxy.asked) <= before + 4
    assert header.tensors == read_hf_folder(tmp_path / "step")[0].tensors


@deep
def test_a_thousand_files_are_indexed_with_a_request_each_and_few_at_once(bucket: Bucket) -> None:
    client, data = bucket.client("step"), (STEP / "model_tp0_pp0.pt").read_bytes()
    names = [f"model_tp{i}_pp0.pt" for i in range(1024)]
    for name in names:
        client.put(name, data)
    store = store_at(f"{bucket.url}/step", "the checkpoint")
    listed = store.names()
    before = len(bucket.proxy.asked)
    assert before <= 3 and sorted(names) == listed
    read_headers(store, names)
    assert len(bucket.proxy.asked) - before <= 2 * len(names)
    assert 1 < bucket.proxy.most_at_once <= 16


def large(folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face checkpoint of some 20 MB."""
    import json

    made = engine.convert(MAPPING, STEP, folder)
    assert made.tensors
    config = json.loads((folder / "config.json").read_text())
    rows = 100_000
    config["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, tensors[name].shape[1]).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@deep
def test_every_byte_is_read_once_in_large_requests(bucket: Bucket, tmp_path: Path) -> None:
    large(tmp_path / "whole")
    engine.reverse(MAPPING, tmp_path / "whole", tmp_path / "tp2", tp=2)
    engine.convert(MAPPING, tmp_path / "tp2", tmp_path / "hf")
    step = bucket.upload(tmp_path / "tp2", "tp2")
    bucket.proxy.asked.clear()
    with store_options(options(bucket.proxy.port), window=4 << 20):
        report = engine.convert(MAPPING, step, f"{bucket.url}/hf")
    data = [one for one in bucket.proxy.gets("model_tp") if one.range]
    read = sum(one.sent for one in data)
    assert read <= 1.02 * report.bytes + (2 << 20)  # and the headers, and samples of what ranks hold
    assert len(data) <= 60, [one.range for one in data]
    assert bucket.contents("hf") == files(tmp_path / "hf")


def test_a_source_that_changes_after_planning_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    step = bucket.upload(STEP, "step")
    plan = engine.plan(MAPPING, step)
    data = (STEP / "model_tp1_pp0.pt").read_bytes()
    bucket.client("step").put("model_tp1_pp0.pt", data[:-1] + b"\1")
    error = refused("E405", lambda: dict(engine.iter_tensors(plan)))
    assert "model_tp1_pp0.pt" in str(error)


@pytest.mark.parametrize("harm", ["slow down", "cut"])
def test_what_a_server_spoils_is_asked_for_again(harm: str, bucket: Bucket, tmp_path: Path) -> None:
    step = bucket.upload(STEP, "step")
    engine.convert(MAPPING, STEP, tmp_path / "hf")
    seen: dict[Any, int] = {}

    def spoil(one: Asked) -> str | None:
        if harm == "cut" and one.method != "GET":
            return None
        key = one.method, one.path if SOAK else "partNumber" in one.path, "uploads" in one.path
        seen[key] = seen.get(key, 0) + 1
        return harm if seen[key] == 1 else None

    bucket.proxy.spoil = spoil
    engine.convert(MAPPING, step, f"{bucket.url}/hf")
    assert bucket.contents("hf") == files(tmp_path / "hf")


def test_wrong_credentials_and_a_bucket_that_is_not_there_are_told(bucket: Bucket) -> None:
    bucket.upload(STEP, "step")
    with store_options({**options(bucket.port), "secret_access_key": "hush-hush"}):
        error = refused("E305", lambda: engine.plan(MAPPING, f"{bucket.url}/step"))
        assert "refuses access" in error.message and "credentials" in error.fix and "hush" not in str(error)
    error = refused("E304", lambda: engine.plan(MAPPING, "s3://no-such-bucket/step"))
    assert "no such bucket" in error.message
    assert refused("E304", lambda: engine.plan(MAPPING, f"{bucket.url}/gone")).message.startswith("there is no such")


def test_an_output_that_is_there_is_kept_and_replaced_only_whole(bucket: Bucket, tmp_path: Path) -> None:
    step, out = bucket.upload(STEP, "step"), f"{bucket.url}/hf"
    engine.convert(MAPPING, step, out, **SMALL)
    before = bucket.contents("hf")
    refused("E401", lambda: engine.convert(MAPPING, step, out))
    harm = "slow down" if SOAK else "refuse"  # the first is asked for again for seconds
    bucket.proxy.spoil = lambda one: harm if one.method == "PUT" and "partNumber" in one.path else None
    refused("E403", lambda: engine.convert(MAPPING, step, out, overwrite=True))
    assert bucket.contents("hf") == before and not pending(bucket)
    bucket.proxy.spoil = lambda _: None
    engine.convert(MAPPING, STEP, tmp_path / "hf", dtype="float32", max_shard_size=300_000)
    engine.convert(MAPPING, step, out, overwrite=True, dtype="float32", max_shard_size=300_000)
    assert bucket.contents("hf") == files(tmp_path / "hf")
    bucket.client("hf").put("thesis.txt", b"mine")
    assert "thesis.txt" in str(refused("E401", lambda: engine.convert(MAPPING, step, out, overwrite=True)))


def test_a_file_that_cannot_be_completed_takes_those_back_that_are_visible(bucket: Bucket) -> None:
    completed: list[str] = []

    def refuse(one: Asked) -> str | None:
        if one.method == "POST" and "uploadId" in one.path:
            completed.append(one.path)
        return "refuse" if "partNumber" in one.path and "model-00001" in one.path else None

    bucket.proxy.spoil = refuse
    refused("E403", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/hf", **SMALL))
    assert completed and not bucket.contents("hf") and not pending(bucket)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_file_whose_completion_was_not_told_is_there_or_taken_back(replaces: bool, bucket: Bucket) -> None:
    """Where a store forgets an upload as it completes it, asking again fails."""
    out, lost = f"{bucket.url}/hf", list[str]()
    if replaces:
        engine.convert(MAPPING, STEP, out, dtype="float32")

    def spoil(one: Asked) -> str | None:
        if one.method == "POST" and "uploadId" in one.path:
            lost.append(one.path)
            return "refuse" if lost.count(one.path) > 1 else "lost"
        return None

    bucket.proxy.spoil = spoil
    if replaces:
        refused("E403", lambda: engine.convert(MAPPING, STEP, out, overwrite=True))
        assert bucket.contents("hf").keys() == {"README.md", "generation_config.json"}  # of the old one
    else:
        engine.convert(MAPPING, STEP, out)
        assert not api.verify(out).problems and not pending(bucket)
    assert len(lost) == 2


def test_the_configuration_appears_when_everything_else_is_there(bucket: Bucket) -> None:
    engine.convert(MAPPING, STEP, f"{bucket.url}/hf", **SMALL)
    put = [unquote(one.path).rpartition("/")[2] for one in bucket.proxy.asked if one.method == "PUT"]
    small = [name for name in put if name.endswith((".json", ".md"))]
    assert small[-2:] == ["config.json", "conversion.json"] and len(small) == 5


def test_what_the_same_run_resumed_made_whole_is_not_taken_back(bucket: Bucket) -> None:
    out = f"{bucket.url}/hf"

    def resume(one: Asked) -> None:
        if one.method == "PUT" and one.path.endswith("/conversion.json"):
            bucket.proxy.spoil = lambda _: None
            engine.convert(MAPPING, STEP, out, resume=True)

    bucket.proxy.spoil = resume
    engine.convert(MAPPING, STEP, out)
    assert not api.verify(out).problems and not pending(bucket)


def test_an_output_is_whole_though_the_response_to_its_mark_was_lost(bucket: Bucket) -> None:
    """The client asks again, and what is there then is its own."""
    lost: list[str] = []

    def spoil(one: Asked) -> str | None:
        if one.method == "PUT" and one.path.endswith(("conversion.json", LOCK)) and one.path not in lost:
            lost.append(one.path)
            return "lost"
        return None

    bucket.proxy.spoil = spoil
    engine.convert(MAPPING, STEP, f"{bucket.url}/hf")
    assert len(lost) == 2 and not api.verify(f"{bucket.url}/hf").problems and LOCK not in bucket.contents("hf")


@pytest.mark.parametrize("ends", [TimeoutError("no response"), KeyboardInterrupt()])
def test_a_mark_that_was_put_is_known_or_taken_back_however_its_request_ends(
    ends: BaseException, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    put = obstore.put

    def late(client: Any, name: str, *given: Any, **how: Any) -> Any:
        put(client, name, *given, **how)
        if name in ("conversion.json", LOCK):
            raise ends

    monkeypatch.setattr(obstore, "put", late)
    with pytest.raises(KeyboardInterrupt) if isinstance(ends, KeyboardInterrupt) else nullcontext():
        engine.convert(MAPPING, STEP, f"{bucket.url}/hf")
        assert not api.verify(f"{bucket.url}/hf").problems
    assert LOCK not in bucket.contents("hf") and not pending(bucket)


FOREIGN = {"model.safetensors": b"weights of somebody else", "config.json": b"{}", "thesis.txt": b"a thesis"}


@sampled(3)
@pytest.mark.parametrize(
    "how", [{}, {"resume": True}, {"overwrite": True}, {"overwrite": True, "resume": True}], ids=str
)
def test_objects_that_the_engine_did_not_write_stay(how: dict[str, Any], bucket: Bucket, tmp_path: Path) -> None:
    for name, data in FOREIGN.items():
        bucket.client("out").put(name, data)
    refused("E401", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/out", **how))
    if not how:
        engine.api.save_plan(tmp_path / "plan", MAPPING, STEP)
        refused("E401", lambda: engine.api.part(tmp_path / "plan", "1/1", f"{bucket.url}/out"))
    assert bucket.contents("out") == FOREIGN


def test_weights_that_somebody_put_in_place_of_the_engines_stay(bucket: Bucket) -> None:
    engine.convert(MAPPING, STEP, f"{bucket.url}/out")
    data = bucket.contents("out")["model.safetensors"]
    bucket.client("out").put("model.safetensors", data)  # the same, as when a folder was uploaded
    engine.convert(MAPPING, STEP, f"{bucket.url}/out", overwrite=True)
    bucket.client("out").put("model.safetensors", tuned := data[:-1] + b"?")
    refused("E401", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/out", overwrite=True))
    assert bucket.contents("out")["model.safetensors"] == tuned


def test_nothing_of_a_replaced_output_stays_in_folders_below(bucket: Bucket, tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "fixtures" / "megatron" / "torch-tp1pp1-tied"
    source, how = fixture / "ckpt" / "iter_0000010", {"config": fixture / "hf_config.json"}
    for tp in (4, 2):
        engine.reshard("megatron-llama", source, tmp_path / f"tp{tp}", ranks={"tp": tp}, **how)
        engine.reshard("megatron-llama", source, f"{bucket.url}/out", ranks={"tp": tp}, overwrite=True, **how)
    wanted = {str(p.relative_to(tmp_path / "tp2")) for p in (tmp_path / "tp2").rglob("*") if p.is_file()}
    assert bucket.contents("out").keys() == wanted


def test_an_interrupted_run_of_another_source_is_not_gone_on_from_but_cleaned(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("other/out", "out"):
        engine.convert(MAPPING, STEP, f"{bucket.url}/{name}", **SMALL)
    for name in ("config.json", "conversion.json"):
        bucket.client("out").delete(name)
    bucket.client("out").put("thesis.txt", b"a thesis")
    before = bucket.contents("")
    refused("E401", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/out", resume=True, **SMALL))
    bucket.client("out").delete("thesis.txt")
    refused("E407", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/out", resume=True, max_shard_size=200_000))
    bucket.client("out").put("thesis.txt", b"a thesis")
    assert bucket.contents("") == before
    engine.api.clean(bucket.url)
    engine.api.clean(f"{bucket.url}/other/out")
    assert bucket.contents("") == before
    engine.api.clean(f"{bucket.url}/out")
    assert bucket.contents("out") == {"thesis.txt": b"a thesis"}


def test_uploads_of_others_below_a_prefix_are_not_ended(bucket: Bucket) -> None:
    from obstore import open_writer

    writers = [open_writer(bucket.client(), name, buffer_size=5 << 20) for name in ("out/a", "out/run/model.pt")]
    for writer in writers:
        writer.write(bytes(6 << 20))
    writers.append(open_writer(bucket.client(), "out/mp_rank_00/model_optim_rng.pt", buffer_size=5 << 20))
    writers[-1].write(bytes(6 << 20))
    ended = [one.removeprefix(f"{bucket.url}/out/") for one in map(str, engine.api.clean(f"{bucket.url}/out"))]
    assert sorted(ended) == ["a", "mp_rank_00/model_optim_rng.pt"]
    writers[1].close()
    assert [*bucket.contents("out")] == ["run/model.pt"]


@sampled(2)
@pytest.mark.parametrize("name", ["a b", "a%20b", "run#2", "run?v=1", "a%2Fb", "é日"])
def test_a_name_is_taken_as_it_is(name: str, bucket: Bucket) -> None:
    engine.convert(MAPPING, STEP, f"{bucket.url}/{name}")
    client = bucket.client()
    assert {one["path"].partition("/")[0] for one in client.list().collect()} == {name}
    assert not engine.api.verify(f"{bucket.url}/{name}").problems


@sampled(2)
@pytest.mark.parametrize("name", ["a/../b", "a/./b", "..", "a//b", "/a", "a\nb"])
def test_a_name_that_is_another_ones_is_refused(name: str, bucket: Bucket) -> None:
    refused("E001", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/{name}"))
    assert bucket.contents("") == {}


@pytest.mark.parametrize(("when", "mark"), [("partNumber", {}), ("config.json", {}), ("config.json", {MARK: "other"})])
def test_an_output_that_came_meanwhile_is_not_overwritten(when: str, mark: dict[str, str], bucket: Bucket) -> None:
    step, others = bucket.upload(STEP, "step"), b"somebody's"

    def come(one: Asked) -> None:
        if one.method == "PUT" and when in one.path:
            bucket.client("hf").put("conversion.json", others, attributes=mark)

    bucket.proxy.spoil = come
    refused("E401", lambda: engine.convert(MAPPING, step, f"{bucket.url}/hf"))
    assert bucket.contents("hf") == {"conversion.json": others} and not pending(bucket)


SCRIPT = """
import signal, sys, engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
from engine.storage.places import store_options
with store_options({options}):
    engine.convert({mapping!r}, sys.argv[1], sys.argv[2], max_shard_size=100_000)
"""


def started(bucket: Bucket, step: str, out: str) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(options=options(bucket.proxy.port), mapping=MAPPING)
    return subprocess.Popen([sys.executable, "-c", script, step, out], stderr=subprocess.DEVNULL)


@deep
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_that_ends_while_it_writes_leaves_no_object(number: int, bucket: Bucket, tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf", **SMALL)
    step, out = bucket.upload(STEP, "step"), f"{bucket.url}/hf"
    parts: list[Asked] = []
    ended = threading.Event()

    def hold(one: Asked) -> str | None:
        if one.method == "PUT" and "partNumber" in one.path:
            parts.append(one)
            ended.wait(0.5 if len(parts) < 4 else 60)
        return None

    bucket.proxy.spoil = hold
    process = started(bucket, step, out)
    while len(parts) < 4 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, number)
    ended.set()
    process.wait()
    bucket.proxy.spoil = lambda _: None
    assert bucket.contents("hf").keys() == ({".engine-lock"} if number == signal.SIGKILL else set())
    left = pending(bucket)
    assert (len(left) > 0) == (number == signal.SIGKILL), left
    assert not pending(bucket) and not bucket.contents("hf")
    engine.convert(MAPPING, step, out, **SMALL)
    assert bucket.contents("hf") == files(tmp_path / "hf")


def test_an_output_that_is_cleaned_while_it_becomes_visible_is_no_output(bucket: Bucket) -> None:
    def clean(one: Asked) -> None:
        if one.method == "PUT" and one.path.endswith("/conversion.json"):
            bucket.proxy.spoil = lambda _: None
            engine.api.clean(f"{bucket.url}/hf")

    bucket.proxy.spoil = clean
    refused("E403", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/hf"))
    assert not bucket.contents("hf")

    def empty(one: Asked) -> None:
        for name in bucket.contents("hf") if "list-type" in one.path else ():
            if "conversion.json" in bucket.contents("hf") or name != ".engine-lock":
                bucket.client("hf").delete(name)

    bucket.proxy.spoil = empty
    refused("E403", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/hf"))


def test_two_runs_into_one_prefix_are_not_mixed(bucket: Bucket) -> None:
    """The second once completed its files among those of the first, before it was refused."""
    out = f"{bucket.url}/hf"

    def second(one: Asked) -> None:
        if one.method == "PUT" and "partNumber" in one.path:
            bucket.proxy.spoil = lambda _: None
            for how in ("workers", "resume", "overwrite"):
                with pytest.raises(EngineError, match=r"(?s)E408.*engine clean"):
                    engine.convert(MAPPING, STEP, out, dtype="float32", **{how: 1 if how == "workers" else True})

    bucket.proxy.spoil = second
    engine.convert(MAPPING, STEP, out)
    assert not api.verify(out).problems and not pending(bucket)
    assert ".engine-lock" not in bucket.contents("hf")


def test_the_lock_of_a_killed_run_is_taken_over_by_the_same_run_only(bucket: Bucket) -> None:
    out, plan = f"{bucket.url}/hf", engine.plan(MAPPING, STEP)
    left = f"{identity_of(plan)} 0123456789abcdef".encode()
    bucket.client("hf").put(".engine-lock", left)
    refused("E408", lambda: engine.convert(MAPPING, STEP, out))
    refused("E408", lambda: engine.convert(MAPPING, STEP, out, dtype="float32", resume=True))
    engine.convert(MAPPING, STEP, out, resume=True)
    bucket.client("hf").put(".engine-lock", left)  # of one that was killed while it replaced the output
    refused("E408", lambda: engine.convert(MAPPING, STEP, out, overwrite=True))
    assert [str(one) for one in api.clean(out)] == [f"{out}/.engine-lock"]
    engine.convert(MAPPING, STEP, out, overwrite=True)
    assert not api.verify(out).problems
    bucket.client("hf").put(".engine-lock", b"somebody's notes")
    assert not api.clean(out) and bucket.contents("hf")[".engine-lock"] == b"somebody's notes"


def test_a_run_whose_lock_is_cleaned_away_leaves_no_output(bucket: Bucket) -> None:
    def clean(one: Asked) -> None:
        if one.method == "PUT" and "partNumber" in one.path:
            bucket.proxy.spoil = lambda _: None
            bucket.client("hf").delete(".engine-lock")

    bucket.proxy.spoil = clean
    refused("E403", lambda: engine.convert(MAPPING, STEP, f"{bucket.url}/hf"))
    assert not bucket.contents("hf")


@deep
def test_a_run_that_is_killed_while_files_become_visible_is_resumed_by_whole_files(
    bucket: Bucket, tmp_path: Path
) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf", **SMALL)
    step, out = bucket.upload(STEP, "step"), f"{bucket.url}/hf"
    completed: list[Asked] = []

    def hold(one: Asked) -> str | None:
        if one.method == "POST" and "uploadId" in one.path:
            completed.append(one)
            if len(completed) == 4:
                time.sleep(3)
        return None

    bucket.proxy.spoil = hold
    process = started(bucket, step, out)
    while len(completed) < 4 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = bucket.contents("hf")
    assert there.pop(".engine-lock")
    assert 3 <= len(there) <= 4 and "conversion.json" not in there and "config.json" not in there
    refused("E401", lambda: engine.convert(MAPPING, step, out, **SMALL))
    begun: list[str] = []
    bucket.proxy.spoil = lambda one: begun.append(one.path) if one.method == "POST" and "uploads" in one.path else None
    engine.convert(MAPPING, step, out, resume=True, **SMALL)
    assert bucket.contents("hf") == files(tmp_path / "hf")
    assert len(begun) == 6 - len(there)


ENDPOINTS = ["", "minio:9000", "x", "http://", "http://[", "//minio"]


@pytest.mark.parametrize(
    ("option", "value"),
    [*(("endpoint", one) for one in ENDPOINTS), ("access_key_id", "a\n"), ("region", "\u00e9"), ("token", "a\tb")],
)
def test_an_option_at_which_the_library_panics_is_wrong_usage(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells so in forty lines, as of an endpoint without `http://`."""
    with store_options({"region": "us-east-1", option: value}):
        error = refused("E001", lambda: engine.plan(MAPPING, "s3://bucket/step"))
    assert option in str(error)
    if option != "token":
        monkeypatch.setenv(f"AWS_{option.upper()}", value)
        refused("E001", lambda: engine.plan(MAPPING, "s3://bucket/other"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_USE_FIPS_ENDPOINT", "true"), ("AWS_USE_DUALSTACK_ENDPOINT", "true"), ("ENDPOINT", "staging"),
        ("AWS_S3_US_EAST_1_REGIONAL_ENDPOINT", "regional"), ("AZURE_ENDPOINT", "x"), ("TOKEN", "a\tb"),
    ],
)  # fmt: skip
def test_a_variable_that_is_no_endpoint_of_this_store_is_left_alone(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert client_of(f"s3://bucket/{variable}", (("region", "us-east-1"),)) is not None


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    error = refused("E001", lambda: engine.plan(MAPPING, "s3://bucket/step"))
    assert "internlm-engine[store]" in error.fix
    assert "s3://" in refused("E001", lambda: engine.plan(MAPPING, "ftp://host/step")).expected
