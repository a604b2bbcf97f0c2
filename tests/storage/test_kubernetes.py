"""The manifests of `docs/clusters.md`, run pod by pod as the controller of Jobs runs them.

No cluster is needed: what is tried is that the files say what an Indexed Job needs, that their commands do the work in
whatever order pods start, fail and are repeated, and that the commit waits for the parts by failing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import engine
from engine import api
from engine.commands.main import cli
from tests.storage.conftest import MAPPING, STEP, Bucket, files
from tests.support.depth import deep
from tests.support.object_server import options

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def jobs() -> list[dict[str, Any]]:
    """The manifests of the page, in its order."""
    return [yaml.safe_load(one) for one in re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.M | re.S)]


def pod(job: Mapping[str, Any], bucket: Bucket, plan: Path, index: int | None = None) -> Result:
    """Run the command of one pod, with the plan's volume and the store of this test in the places of the page's."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    program, *arguments = container["command"]
    assert program == "engine"
    arguments = [one.replace(mount["mountPath"], str(plan.parent)) for one in arguments]
    arguments = [one.replace("s3://models", bucket.url) for one in arguments]
    assert str(plan) in arguments
    given = {"endpoint_url" if key == "endpoint" else key: value for key, value in options(bucket.proxy.port).items()}
    env = {f"AWS_{key.upper()}": value for key, value in given.items()}
    if index is not None:
        env["JOB_COMPLETION_INDEX"] = str(index)
    return CliRunner().invoke(cli, arguments, env=env)


def test_the_manifests_say_what_an_indexed_job_needs() -> None:
    parts, commit = jobs()
    assert parts["spec"]["completionMode"] == "Indexed"
    (container,) = parts["spec"]["template"]["spec"]["containers"]
    assert container["command"][1:3] == ["part", str(parts["spec"]["completions"])]
    for job in (parts, commit):
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        inside = job["spec"]["template"]["spec"]
        assert inside["restartPolicy"] in ("Never", "OnFailure")  # a Job takes no other
        volumes = {volume["name"] for volume in inside["volumes"]}
        assert {mount["name"] for one in inside["containers"] for mount in one["volumeMounts"]} == volumes


@deep
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_manifests_give_the_bytes_of_one_run(seed: int, bucket: Bucket, tmp_path: Path) -> None:
    engine.convert(MAPPING, STEP, tmp_path / "hf", max_shard_size=50_000)
    (tmp_path / "plans").mkdir()
    plan = tmp_path / "plans" / "plan.json"
    api.save_plan(plan, MAPPING, bucket.upload(STEP, "step"), max_shard_size=50_000)
    parts, commit = jobs()
    order = list(range(parts["spec"]["completions"]))
    random.Random(seed).shuffle(order)
    for index in order:
        waits = pod(commit, bucket, plan)
        assert waits.exit_code == 1 and "E409" in waits.output, waits.output
        for _ in range(2):  # a pod may run more than once for an index
            assert (done := pod(parts, bucket, plan, index)).exit_code == 0, done.output
    assert (done := pod(commit, bucket, plan)).exit_code == 0, done.output
    assert bucket.contents("internlm2-20b") == files(tmp_path / "hf")
    for again in (pod(commit, bucket, plan), pod(parts, bucket, plan, 0)):  # nothing that is there is touched
        assert again.exit_code == 1 and "E401" in again.output, again.output
    assert bucket.contents("internlm2-20b") == files(tmp_path / "hf")
