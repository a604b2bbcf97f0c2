"""A Slurm cluster of one machine, without systemd, that runs the job array of `docs/clusters.md`; `make soak` does.

    python -m tests.slurm

Needs root, and Debian's slurmctld, slurmd, slurm-client and munge; says so and does nothing where they are not there.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine

ROOT = Path(__file__).parents[1]
STEP = ROOT / "tests" / "fixtures" / "internevo" / "v2_tp2_pp2"
MAPPING = "families/internlm2.yaml"
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster; gives the environment that its commands need."""
    folder.chmod(0o755)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = CONFIG.format(host=socket.gethostname().split(".")[0], ports=free_ports(2), folder=folder)
    (folder / "slurm.conf").write_text(config)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = (
        ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            quiet = subprocess.DEVNULL
            started.append(subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet))
            time.sleep(2)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)


def script() -> str:
    """The script of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "sbatch" in block)


def convert(folder: Path, environment: dict[str, str]) -> None:
    """Submit the script, wait for its output, and compare it with that of one run."""
    (folder / "convert.sh").write_text(script())
    (folder / "bin").mkdir()
    command = folder / "bin" / "engine"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m engine "$@"\n')
    command.chmod(0o755)
    environment = {**environment, "PATH": f"{folder / 'bin'}:{environment['PATH']}"}
    out = folder / "out"
    submit = ["bash", "convert.sh", MAPPING, str(STEP), str(out), "5"]
    subprocess.run(submit, cwd=folder, env=environment, check=True)
    for _ in range(600):
        left = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=True).stdout
        if out.is_dir() or not left.strip():
            break
        time.sleep(0.5)
    told = "\n".join(path.read_text() for path in sorted(folder.glob("slurm-*.out")))
    assert out.is_dir(), told or "the jobs wrote nothing"
    engine.convert(MAPPING, STEP, folder / "once")
    written, once = ({path.name: path.read_bytes() for path in one.iterdir()} for one in (out, folder / "once"))
    assert written == once, "a Slurm array wrote other bytes than one run"


def main() -> None:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"Slurm is not tried: {', '.join(missing) + ' missing' if missing else 'it needs root'}")
        return
    with tempfile.TemporaryDirectory(prefix="slurm-") as made, cluster(Path(made)) as environment:
        convert(Path(made), environment)
    print("a Slurm array of 5 parts and a dependent commit wrote the bytes of one run")


if __name__ == "__main__":
    main()
