"""A mount is the folder that a run would write: read only, mappable, and gone when it is interrupted."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import engine
from engine import api
from engine.errors import EngineError
from engine.serve.mount import WINDOW, Ahead
from engine.storage.virtual import Stretch, VirtualFile
from tests.support.depth import sampled
from tests.support.fuse import missing
from tests.support.serving import MAPPING, SPLIT, STEP

ROOT = Path(__file__).parents[2]


needs_fuse = pytest.mark.skipif(missing() is not None, reason=f"no FUSE: {missing()}")


def start(at: Path, src: Path, **variables: str) -> subprocess.Popen[str]:
    options = ["-m", MAPPING, "-s", str(src), "--max-shard-size", str(SPLIT)]
    return subprocess.Popen(
        [sys.executable, "-m", "engine", "mount", str(at), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def mounted(at: Path, src: Path = STEP) -> Iterator[subprocess.Popen[str]]:
    started = start(at, src)
    assert started.stderr is not None
    try:
        line = started.stderr.readline()
        assert line.startswith("mounted at"), line + started.stderr.read()
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGINT)
        started.wait(20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount, whose folder goes with it."""
    at = tmp_path_factory.mktemp("mounts") / "model"
    with mounted(at):
        yield at
    assert not at.exists()


@needs_fuse
def test_it_holds_what_a_run_writes_and_programs_map_it(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine.convert(MAPPING, STEP, tmp_path / "out", max_shard_size=SPLIT)
    oracle = torch.load(STEP / "oracle.pt", weights_only=True)
    assert subprocess.run(["diff", "-r", str(model), str(tmp_path / "out")]).returncode == 0
    name = "model-00001-of-00003.safetensors"
    with (model / name).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == (tmp_path / "out" / name).read_bytes()
    assert not api.verify(model).problems
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        assert (loaded(oracle["input_ids"]).logits - oracle["logits"]).abs().max() < 1e-4


@sampled(2)
@needs_fuse
@pytest.mark.parametrize("how", ["terminate", "unmount"])
def test_it_ends_cleanly_and_leaves_a_folder_that_was_there(how: str, tmp_path: Path) -> None:
    at = tmp_path / "model"
    at.mkdir()
    with mounted(at) as running:
        assert os.path.ismount(at)
        if how == "unmount":
            tool = shutil.which("fusermount3") or shutil.which("fusermount") or "umount"
            subprocess.run([tool, *(["-u"] if "fuser" in tool else []), str(at)], check=True)
        else:
            running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        said = running.stderr.read()
    assert running.returncode == 0 and said.endswith("\nunmounted\n")
    assert "  note no tokenizer: " in said  # what a run would print
    assert at.is_dir() and not os.path.ismount(at) and not list(at.iterdir())


@needs_fuse
def test_nothing_can_be_written_there(model: Path) -> None:
    for attempt in (
        lambda: (model / "new").write_bytes(b"x"),
        lambda: (model / "config.json").write_bytes(b"x"),
        lambda: (model / "config.json").open("ab"),
        lambda: (model / "config.json").unlink(),
        lambda: (model / "folder").mkdir(),
        lambda: (model / "config.json").rename(model / "other"),
        lambda: os.truncate(model / "config.json", 0),
        lambda: os.chmod(model / "config.json", 0o777),
    ):
        with pytest.raises(OSError) as raised:
            attempt()
        assert raised.value.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS)
    for path in ("nothing", "folder/file"):
        with pytest.raises(FileNotFoundError):
            (model / path).read_bytes()


@needs_fuse
def test_a_source_that_changes_is_an_input_error_with_its_reason(tmp_path: Path) -> None:
    src, at = tmp_path / "step", tmp_path / "model"
    shutil.copytree(STEP, src)
    with mounted(at, src) as running:
        (src / "model_tp0_pp0.pt").touch()
        with pytest.raises(OSError) as raised:
            (at / "model-00001-of-00003.safetensors").read_bytes()
        assert raised.value.errno == errno.EIO
        running.send_signal(signal.SIGINT)
        assert "E405" in running.communicate(timeout=20)[1]


def test_where_there_is_no_fuse_a_plain_reason_is_given(tmp_path: Path) -> None:
    started = start(tmp_path / "model", STEP, FUSE_LIBRARY_PATH=str(tmp_path / "none.so"))
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 2 and "E001 nothing can be mounted here" in said and "Traceback" not in said
    assert "pip install" in said or "apt-get install" in said or "engine serve" in said
    assert not (tmp_path / "model").exists()


@needs_fuse
@pytest.mark.parametrize("what", ["full", "file", "below nothing"])
def test_it_is_not_mounted_over_what_is_there(what: str, tmp_path: Path) -> None:
    at = tmp_path / "model"
    if what == "full":
        at.mkdir()
        (at / "mine").write_text("mine")
    elif what == "file":
        at.write_text("mine")
    else:
        at = at / "below"
    with engine.virtual(engine.plan(MAPPING, STEP)) as folder, pytest.raises(EngineError, match=r"E401|E001"):
        api.mount(folder, at)
    assert what != "full" or (at / "mine").read_text() == "mine"


def read(ahead: Ahead, file: VirtualFile, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: ahead.read_into(file, start, memoryview(buffer))])


def test_reading_ahead_gives_the_bytes_of_the_file_in_any_order() -> None:
    data = random.Random(1).randbytes(3 * WINDOW + 12345)
    asked: list[tuple[int, int]] = []

    def fill(at: int, target: memoryview) -> None:
        asked.append((at, len(target)))
        target[:] = data[at : at + len(target)]

    file = VirtualFile("f", len(data), "tag", (Stretch(0, len(data), fill),))
    draw = random.Random(2)
    spans = [(draw.randrange(WINDOW) + i % 2 * 2 * WINDOW, draw.randrange(200_000)) for i in range(100)]
    step = 128 << 10
    with Ahead() as ahead, ThreadPoolExecutor(4) as users:
        for start_, size in spans:
            assert read(ahead, file, start_, size) == data[start_ : start_ + size]
        assert max(size for _, size in asked) <= 200_000  # no window for one that jumps
        asked.clear()
        pieces = users.map(lambda at: read(ahead, file, at, step), range(0, len(data), step))
        assert b"".join(pieces) == data
        assert len(asked) < 12  # by windows
        assert read(ahead, file, len(data) - 5, 100) == data[-5:] and read(ahead, file, len(data), 5) == b""
        assert read(ahead, file, len(data) + 3, 5) == b""


def test_a_window_that_failed_is_read_again() -> None:
    broken = True

    def fill(at: int, target: memoryview) -> None:
        if broken:
            raise EngineError("E305", "a checkpoint file cannot be read")

    file = VirtualFile("f", 4 * WINDOW, "tag", (Stretch(0, 4 * WINDOW, fill),))
    with Ahead() as ahead:
        for at in range(0, 5 << 17, 1 << 17):
            with pytest.raises(EngineError):
                read(ahead, file, at, 1 << 17)
        broken = False
        assert read(ahead, file, 5 << 17, 1 << 17) == bytes(1 << 17)
