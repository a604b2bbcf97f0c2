"""Parts that write to an object store: whole files each, seen as an output only when they are committed."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine
from engine import api
from tests.storage.conftest import MAPPING, STEP, Bucket, files, pending, refused
from tests.support.depth import sampled
from tests.support.forked import run
from tests.support.object_server import Asked


def test_parts_in_a_store_give_the_bytes_of_one_run(bucket: Bucket, tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf", max_shard_size=100_000)
    step, out, plan = bucket.upload(STEP, "step"), f"{bucket.url}/hf", tmp_path / "plan.json"
    api.save_plan(plan, MAPPING, step, max_shard_size=100_000)
    for which in ("3/3", "1/3"):
        assert api.part(plan, which, out) > 0
    begun: list[str] = []

    def begins(one: Asked) -> None:
        if one.method == "POST" and "uploads" in one.path:
            begun.append(one.path)

    bucket.proxy.spoil = begins
    assert api.part(plan, "3/3", out) == 0 and not begun
    assert "missing: 2" in str(refused("E409", lambda: api.commit(plan, out)).got)
    assert not {"conversion.json", "config.json"} & bucket.contents("hf").keys()
    assert api.part(plan, "2/3", out) > 0
    api.commit(plan, out)
    assert bucket.contents("hf") == files(tmp_path / "hf") and not pending(bucket)
    refused("E401", lambda: api.part(plan, "1/3", out))


def test_of_more_parts_than_files_some_write_nothing(bucket: Bucket, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", f"{bucket.url}/hf"
    api.save_plan(plan, MAPPING, STEP)
    assert sorted(api.part(plan, which, out) > 0 for which in ("1/3", "2/3", "3/3")) == [False, False, True]
    api.commit(plan, out)
    assert not api.verify(out).problems


@sampled(2)
@pytest.mark.parametrize(("committed", "fails"), [(False, True), (True, True), (True, False)])
def test_a_part_that_runs_twice_leaves_what_the_same_part_made_elsewhere(
    committed: bool, fails: bool, bucket: Bucket, tmp_path: Path
) -> None:
    """As where a machine that was lost comes back; once it took weights away that were committed."""
    plan, out = tmp_path / "plan.json", f"{bucket.url}/hf"
    api.save_plan(plan, MAPPING, bucket.upload(STEP, "step"), max_shard_size=100_000)

    def twice(one: Asked) -> str | None:
        if one.method == "POST" and "uploadId" in one.path:
            bucket.proxy.spoil = lambda _: None
            assert api.part(plan, "1/1", out)
            if committed:
                api.commit(plan, out)
            bucket.proxy.spoil = lambda one: (
                "refuse" if fails and one.method == "POST" and "00001" in one.path else None
            )
        return None

    bucket.proxy.spoil = twice
    if committed:
        refused("E401", lambda: api.part(plan, "1/1", out))
    else:  # what could not be completed is there
        assert api.part(plan, "1/1", out)
    bucket.proxy.spoil = lambda _: None
    if not committed:
        api.commit(plan, out)
    assert not api.verify(out).problems
    assert not [name for name in bucket.contents("hf") if name.startswith(".")]


def test_parts_that_may_replace_an_output_are_no_output_for_each_other(bucket: Bucket, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", f"{bucket.url}/hf"
    api.save_plan(plan, MAPPING, STEP, max_shard_size=100_000)
    for which in ("1/2", "2/2"):
        assert api.part(plan, which, out, overwrite=True)
    api.commit(plan, out, overwrite=True)
    assert not api.verify(out).problems
    refused("E401", lambda: api.part(plan, "1/2", out, overwrite=True))


def test_a_fork_of_a_process_that_used_a_store_does_not_wait_without_end(bucket: Bucket, tmp_path: Path) -> None:
    step = bucket.upload(STEP, "step")
    engine.plan(MAPPING, step)
    ended = run(lambda: engine.plan(MAPPING, step), tmp_path)
    assert ended.returncode == 1 and b"E001 stores cannot be used in a fork" in ended.stderr


@pytest.mark.parametrize(("mark", "code"), [(None, "E401"), ("of another plan", "E407"), ("copied", "E409")])
def test_what_parts_wrote_and_somebody_replaced_is_not_committed(
    mark: str | None, code: str, bucket: Bucket, tmp_path: Path
) -> None:
    """Which once gave an output of other bytes than its manifest says."""
    step, plan = bucket.upload(STEP, "step"), tmp_path / "plan.json"
    api.save_plan(plan, MAPPING, step, max_shard_size=300_000)
    out = f"{bucket.url}/hf"
    for which in ("1/2", "2/2"):
        api.part(plan, which, out)
    name = "model-00001-of-00002.safetensors"
    client, data = bucket.client("hf"), bytearray(bucket.contents("hf")[name])
    own = client.get(name, options={"head": True}).attributes["enginework"]
    data[-1] ^= 1
    from obstore import put

    put(client, name, bytes(data), attributes={"enginework": own if mark == "copied" else mark} if mark else None)
    assert name in str(refused(code, lambda: api.commit(plan, out)))
    client.delete(name)
    refused("E409", lambda: api.commit(plan, out))
    assert "conversion.json" not in bucket.contents("hf")
    assert len(api.clean(out)) == 3 and not bucket.contents("hf")


def test_the_same_weights_written_in_another_way_are_read_and_committed(bucket: Bucket, tmp_path: Path) -> None:
    """As where a part ran twice with other windows: then the store gives its object another ETag."""
    plan, out = tmp_path / "plan.json", f"{bucket.url}/hf"
    api.save_plan(plan, MAPPING, bucket.upload(STEP, "step"), max_shard_size=300_000)
    api.part(plan, "1/1", out)
    name = "model-00001-of-00002.safetensors"
    client = bucket.client("hf")
    then = client.get(name, options={"head": True})
    from obstore import put

    put(client, name, bucket.contents("hf")[name], attributes=then.attributes, use_multipart=False)
    assert client.head(name)["e_tag"] != then.meta["e_tag"]
    read: list[str] = []
    bucket.proxy.spoil = lambda one: read.append(one.path) if one.method == "GET" and "hf/model-" in one.path else None
    api.commit(plan, out)
    assert read and all(name in path for path in read), "the other is as the part left it"
    assert not api.verify(out).problems
