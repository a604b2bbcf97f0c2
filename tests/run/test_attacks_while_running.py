"""Faults that happen between planning and the end of a run, and around its output."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.errors import EngineError
from engine.storage import output
from engine.storage.local import LocalStore
from tests.support.depth import crossed, sampled
from tests.support.forked import run_engine
from tests.support.old_output import old_output
from tests.support.readers import read_rank_file, read_safetensors
from tests.support.shards import Model, save

V1 = Model()
with tempfile.TemporaryDirectory() as _folder:
    OLD = old_output(Path(_folder))
LETTERS = {"mlp_letters": "w2_is_down"}
RANK = "model_tp1_pp1.pt"
ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(V1, tmp_path / "step", tp=2, pp=2)
    return tmp_path / "step"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An old output, which must survive."""
    (tmp_path / "out").mkdir()
    assert old_output(tmp_path / "out" / "hf") == OLD
    return tmp_path / "out" / "hf"


def convert(source: Path, out: Path, **how: Any) -> Any:
    return engine.convert(V1.mapping, source, out, settings=LETTERS, overwrite=True, **how)


def fails(source: Path, out: Path, *codes: str, **how: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        convert(source, out, **how)
    assert caught.value.code in codes, str(caught.value)
    assert contents(out) == OLD
    return caught.value


def after_planning(monkeypatch: pytest.MonkeyPatch, harm: Callable[[], object]) -> None:
    """Do something when everything has been planned and the output folder is made."""
    enter = output.OutputFolder.__enter__

    def harmful(self: output.OutputFolder) -> Path:
        folder = enter(self)
        harm()
        return folder

    monkeypatch.setattr(output.OutputFolder, "__enter__", harmful)


def replaced(path: Path, put: Callable[[Path], object]) -> Callable[[], None]:
    def harm() -> None:
        path.unlink()
        put(path)

    return harm


@sampled(2, "code")
@pytest.mark.parametrize(
    ("put", "code"),
    [
        (lambda path: None, "E305"),
        (os.mkfifo, "E305"),
        (os.mkdir, "E305"),
        (lambda path: path.symlink_to("/dev/zero"), "E305"),
        (lambda path: path.symlink_to(path.name), "E305"),
        (lambda path: path.write_bytes(b"x"), "E405"),
        (lambda path: path.write_bytes(b""), "E405"),
    ],
    ids=["vanishes", "becomes a pipe", "becomes a folder", "becomes a device", "becomes a loop", "shrinks", "empties"],
)
def test_a_source_that_changes_after_planning_is_refused(
    put: Callable[[Path], object], code: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_planning(monkeypatch, replaced(source / RANK, put))
    assert RANK in str(fails(source, out, code))


def test_a_source_that_grows_after_planning_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_planning(monkeypatch, lambda: (source / RANK).open("ab").write(b"x"))
    fails(source, out, "E405")


def test_a_source_that_shrinks_while_it_is_read_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.storage.sources import SourceFiles
    from engine.storage.store import Ranges

    opened = SourceFiles.opened

    def shrinking(self: SourceFiles, file: int) -> Ranges:
        found = opened(self, file)
        os.truncate(self._files[file].file.place, 100)
        return found

    monkeypatch.setattr(SourceFiles, "opened", shrinking)
    fails(source, out, "E301", "E405")


@pytest.mark.parametrize("name", [RANK, "model_config.pt"])
def test_a_source_that_vanishes_after_it_was_listed_is_refused(
    name: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.planning import reading

    listed = reading.list_folder
    monkeypatch.setattr(reading, "list_folder", lambda *where: (listed(*where), (source / name).unlink())[0])
    fails(source, out, "E305", "E304")


TAKES: dict[str, Callable[[Path], object]] = {
    "run": lambda folder: engine.convert(V1.mapping, folder, folder.with_name("new"), settings=LETTERS, overwrite=True),
    "reverse": lambda folder: engine.reverse(V1.mapping, folder, folder.with_name("new"), overwrite=True),
    "verify": lambda folder: engine.verify(folder),
    "compare": lambda folder: engine.compare(folder, folder),
}


@pytest.mark.parametrize("command", TAKES)
def test_a_folder_that_vanishes_before_it_is_listed_is_refused(
    command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source
    if command != "run":
        engine.convert(V1.mapping, source, folder := tmp_path / "hf", settings=LETTERS)
    names, listed, last = LocalStore.names, [], 0

    def vanishing(self: LocalStore, inside: str = "") -> list[str]:
        if (self.path, inside) == (folder, ""):
            listed.append(inside)
            if len(listed) == last:
                folder.rename(tmp_path / "gone")
        return names(self, inside)

    monkeypatch.setattr(LocalStore, "names", vanishing)
    TAKES[command](folder)
    for last in range(1, len(listed) + 1):  # noqa: B007  # read above
        listed.clear()
        with pytest.raises(EngineError):
            TAKES[command](folder)
        (tmp_path / "gone").rename(folder)
    assert last > 0


def before_headers(monkeypatch: pytest.MonkeyPatch, harm: Callable[[], object]) -> None:
    """Do something when the configuration has been read."""
    from engine.planning import reading

    read = reading.read_headers
    monkeypatch.setattr(reading, "read_headers", lambda *what, **how: (harm(), read(*what, **how))[1])


def other_step(folder: Path) -> Path:
    """A step of another run: other tensors, and another epsilon."""
    save(Model(seed=1), folder, tp=2, pp=2)
    torch.save({**V1.config(1), "layer_norm_epsilon": 1e-6}, folder / "model_config.pt")
    return folder


def test_a_link_that_moves_on_while_training_saves_gives_the_step_it_led_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest = tmp_path / "latest"
    latest.symlink_to(source.name)
    convert(latest, tmp_path / "still")
    (tmp_path / "next").symlink_to(other_step(tmp_path / "step2").name)
    before_headers(monkeypatch, lambda: (tmp_path / "next").replace(latest))
    convert(latest, tmp_path / "moved")
    assert os.readlink(latest) == "step2"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "still" / name).read_bytes()


def test_a_link_that_moves_on_while_its_model_is_written_for_ranks_gives_the_model_it_led_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.api import plans

    convert(source, tmp_path / "first")
    convert(other_step(tmp_path / "step2"), tmp_path / "second")
    latest, settings = tmp_path / "latest", {"mlp_letters": "w2_is_down"}
    latest.symlink_to("first")
    engine.reverse(V1.mapping, latest, tmp_path / "still", tp=2, settings=settings)
    (tmp_path / "next").symlink_to("second")
    read = plans.read_hf_config
    monkeypatch.setattr(plans, "read_hf_config", lambda found: ((tmp_path / "next").replace(latest), read(found))[1])
    engine.reverse(V1.mapping, latest, tmp_path / "moved", tp=2, settings=settings)
    assert os.readlink(latest) == "second"
    for name in ("model_tp0_pp0.pt", "model_config.pt"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "still" / name).read_bytes()


def test_a_configuration_and_headers_of_two_steps_are_refused(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_step(tmp_path / "step2")
    before_headers(monkeypatch, lambda: [shutil.copy(file, source) for file in other.iterdir()])
    assert "model_config.pt" in str(fails(source, out, "E405"))


def test_a_disk_that_fails_to_read_is_told(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    assert "Input/output" in str(fails(source, out, "E305"))


@sampled(2)
@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_files_that_may_not_grow_end_the_run_and_it_resumes(limit: int, source: Path, out: Path) -> None:
    convert(source, out.parent / "whole")
    command = ["run", "-m", V1.mapping, "-s", str(source), "-o", str(out), "--set", "mlp_letters=w2_is_down",
               "--overwrite", "-q"]  # fmt: skip
    done = run_engine(*command, cwd=ROOT, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1
    assert b"E403" in done.stderr and b"Traceback" not in done.stderr
    assert contents(out) == OLD
    convert(source, out, resume=True)
    assert contents(out) == contents(out.parent / "whole")


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "posix_fallocate", "pwritev"])
def test_any_call_that_writes_may_fail(call: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "major", lambda device: 8)  # as on a disk, where room is taken first
        patch.setattr(os, call, failing)
        assert "No space" in str(fails(source, out, "E403"))
    convert(source, out, resume=True)
    assert not engine.api.verify(out).problems


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
def test_no_call_that_only_helps_a_disk_is_needed(
    code: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may forbid them, and a file system lack them."""

    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "major", lambda device: 8)  # as on a disk, where room is taken first
    for call in ("posix_fallocate", "posix_fadvise", "copy_file_range"):
        monkeypatch.setattr(os, call, failing)
    convert(source, out)
    assert not engine.api.verify(out).problems


@pytest.mark.parametrize("path", ["/proc/made/hf", "/dev/null/hf", "/sys/made"])
def test_an_output_where_nothing_can_be_written_is_told(path: str, source: Path) -> None:
    with pytest.raises(EngineError) as caught:
        convert(source, Path(path))
    assert caught.value.code == "E403"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_output_folder_that_is_read_only_is_told(source: Path, out: Path) -> None:
    out.parent.chmod(0o500)
    try:
        fails(source, out, "E403")
    finally:
        out.parent.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_source_that_may_not_be_read_is_told(source: Path, out: Path) -> None:
    (source / RANK).chmod(0)
    fails(source, out, "E305")


def test_a_parent_that_is_a_file_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(EngineError) as caught:
        convert(source, tmp_path / "file" / "hf")
    assert caught.value.code == "E403"
    assert (tmp_path / "file").read_text() == "keep"


@sampled(2)
@pytest.mark.parametrize(
    "name", [b"\xff\xfe not utf-8", "größe 模型, with space, new\nline, tab\t '\"$(touch ran)".encode()]
)
def test_paths_may_have_any_name(name: bytes, tmp_path: Path) -> None:
    """From the command line, in text and as JSON, on both sides."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.mkdir()
    save(V1, folder / "step", tp=2, pp=2)
    for i, how in enumerate(([], ["--json"])):
        out = folder / f"hf{i}"
        command = ["run", "-m", V1.mapping, "-s", folder / "step", "-o", out, "--set", "mlp_letters=w2_is_down", *how]
        done = run_engine(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        if how:
            assert json.loads(done.stdout)["files"]
        assert not engine.api.verify(out).problems
        failed = run_engine(*command, cwd=ROOT)
        assert failed.returncode == 1
        assert b"E401" in failed.stdout + failed.stderr and b"Traceback" not in failed.stderr
    assert sorted(os.listdir(folder)) == ["hf0", "hf1", "step"]


# Around the output: what others may have put there.


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        fails(source, out, "E403")
    (partial,) = out.parent.glob(f".{out.name}.partial-*")
    return partial


def test_a_stranger_in_a_partial_output_does_not_become_part_of_it(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(source, out, monkeypatch)
    (partial / "modeling_evil.py").write_text("import os")
    (partial / "folder").mkdir()
    (partial / "folder" / "file").write_text("x")
    (partial / "link").symlink_to("/etc/passwd")
    convert(source, out.parent / "whole")
    convert(source, out, resume=True)
    assert contents(out) == contents(out.parent / "whole")


def test_nothing_is_written_through_a_link_in_a_partial_output(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, out.parent / "whole")
    for name in ("config.json", "conversion.json", "README.md", ".journal", "model.safetensors"):
        partial = interrupted(source, out, monkeypatch)
        victim = tmp_path / "victim"
        victim.write_text("keep")
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(victim)
        convert(source, out, resume=True)
        assert victim.read_text() == "keep", name
        assert contents(out) == contents(out.parent / "whole")
        assert not any(path.is_symlink() for path in out.iterdir())
        shutil.rmtree(out)
        old_output(out)


def test_a_partial_output_that_is_a_link_is_not_followed(source: Path, out: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (out.parent / f".{out.name}.partial-00000000").symlink_to(victim)
    convert(source, out, resume=True)
    assert not list(victim.iterdir())
    assert not out.is_symlink()
    assert not engine.api.verify(out).problems


LINES = {
    "deep": b"[" * 100_000, "null": b'{"0": [null, null]}', "text": b'{"0": ["x", "y"]}',
    "long": b'{"' + b"9" * 5000 + b'": ["x", 1]}', "bytes": b"\xff", "none": b"null", "infinite": b'{"0": [1, 1e999]}',
    "others": b'{"-1": ["x", 1], "99999": ["x", 1]}',
}  # fmt: skip


@sampled(2)
@pytest.mark.parametrize(("what", "first"), crossed(list(LINES), [True, False]))
def test_a_damaged_journal_costs_work_and_nothing_else(
    what: str, first: bool, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = LINES[what]
    convert(source, out.parent / "whole")
    partial = interrupted(source, out, monkeypatch)
    lines = (partial / ".journal").read_bytes().split(b"\n")
    (partial / ".journal").write_bytes(b"\n".join([line, *lines] if first else [lines[0], line, *lines[1:]]))
    try:
        convert(source, out, resume=True)
    except EngineError as error:
        assert first and error.code == "E407"
        convert(source, out)
    assert contents(out) == contents(out.parent / "whole")


@pytest.mark.parametrize("put", [os.mkdir, lambda path: path.symlink_to("nothing"), os.mkfifo])
def test_something_else_at_the_place_of_the_lock_is_told(put: Callable[[Path], None], source: Path, out: Path) -> None:
    lock = out.parent / f".{out.name}.lock"
    put(lock)
    try:
        convert(source, out)
    except EngineError as error:
        assert error.code == "E403"
        assert contents(out) == OLD
    else:
        assert not engine.api.verify(out).problems


# Every point at which a file can end, and every bit of what describes it.


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_truncation_of_a_rank_file_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    assert read_rank_file(path).tensors
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(EngineError) as caught:
            read_rank_file(path)
        assert caught.value.code in ("E301", "E303"), length


def test_every_flipped_bit_beside_the_payload_of_a_rank_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(3.0)}, path)
    raw, whole = path.read_bytes(), read_rank_file(path)
    payload = range(whole.tensors[0].offset, whole.tensors[0].offset + 12)
    refused = 0
    for at in range(len(raw)):
        if at in payload:
            continue
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert read_rank_file(path).tensors == whole.tensors, at
        except EngineError as error:
            assert error.code in ("E301", "E303"), at
            refused += 1
    assert refused > 300


def test_every_flipped_bit_in_the_header_of_a_safetensors_file_is_refused_or_told_by_names(tmp_path: Path) -> None:
    """It has no checksum: what a flip can change without notice is a name, or a type of the same width."""
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}, path)
    raw, whole = path.read_bytes(), read_safetensors(path)
    for at in range(8 + int.from_bytes(raw[:8], "little")):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                read = read_safetensors(path)
            except EngineError as error:
                assert error.code == "E301"
            else:
                assert [t.offset for t in read.tensors] == [t.offset for t in whole.tensors]
                assert [t.nbytes for t in read.tensors] == [t.nbytes for t in whole.tensors]


def test_a_file_system_without_locks_and_hard_links_is_written_too(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without `-o flock`, and FAT."""

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr("os.link", unsupported)
    (other := out.with_name(".hf.partial-0123abcd")).mkdir()  # another run may be writing there
    convert(source, out)
    assert other.exists()
    plan = source.parent / "plan.json"
    engine.save_plan(plan, V1.mapping, source, settings=LETTERS)
    assert engine.run_plan(plan, source.parent / "hf").content_id
    with pytest.raises(EngineError):
        engine.save_plan(plan, V1.mapping, source, settings=LETTERS)
