"""The folder of an output: what is there before, meanwhile and after a failure."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.run.parts import MARKER, WHOLE, Part
from engine.storage import output, replacing
from engine.storage.output import OutputFolder, clean
from engine.storage.sinks import Checksum, SinkFiles

Usage = namedtuple("Usage", "total used free")


def folder_of(out: Path, **how: Any) -> OutputFolder:
    return OutputFolder(out, out.parent / "step", **{"overwrite": False, **how})


def filled(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [".hf.partial-00000000", ".hf.old-00000000/step"])
def test_a_source_in_what_was_left_beside_an_output_is_refused(name: str, tmp_path: Path) -> None:
    """A run to this output would remove it."""
    filled(tmp_path / name, "a source")
    with pytest.raises(EngineError, match="E404"):
        OutputFolder(tmp_path / "hf", tmp_path / name, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_the_place_of_an_output_meanwhile_is_kept_and_so_is_the_new_output(
    overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    folder = folder_of(out, overwrite=overwrite)
    with pytest.raises(EngineError, match="E401"), folder as store:
        store.put("model.safetensors", b"new")
        filled(out, "another's")
    assert (out / "file").read_text(encoding="utf-8") == "another's"
    assert (folder.partial / "model.safetensors").read_bytes() == b"new"


def test_what_came_before_the_lock_was_taken_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf")
    filled(tmp_path / "hf", "another's")
    with pytest.raises(EngineError, match="E401"), folder:
        raise AssertionError("it was let in")
    assert os.listdir(tmp_path) == ["hf"]


def test_the_old_output_is_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = filled(tmp_path / "hf", "old"), os.rename
    folder = folder_of(out, overwrite=True, foreign=lambda store: None)
    monkeypatch.setattr(output, "exchange", lambda one, other: False)

    def failing(one: Path, other: Path) -> None:
        if one == folder.partial:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(one, other)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(EngineError, match="E403"), folder as store:
        store.put("file", b"new")
    assert (out / "file").read_text(encoding="utf-8") == "old"


def test_what_is_left_of_an_old_output_that_was_being_removed_is_not_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = filled(tmp_path / "hf", "old")
    folder = folder_of(out, overwrite=True, foreign=lambda store: None)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output, "exchange", lambda one, other: False)
        patch.setattr(output, "remove", killed)
        with pytest.raises(KeyboardInterrupt), folder as store:
            store.put("file", b"new")
    os.rename(out, tmp_path / "published")
    assert clean(out) == [folder.partial]
    assert os.listdir(tmp_path) == ["published"]


def test_a_name_that_leaves_no_room_for_that_of_the_partial_folder_is_refused_as_too_long(tmp_path: Path) -> None:
    for name, fits in (("n" * 237, True), ("n" * 238, False), ("模" * 80, False)):
        with nullcontext() if fits else pytest.raises(EngineError, match="this cannot be an output") as caught:
            folder_of(tmp_path / name)
        assert caught is None or (caught.value.code == "E001" and "too long" in str(caught.value))


def test_beside_a_path_that_is_too_long_nothing_was_left(tmp_path: Path) -> None:
    """As of a relative one in a folder that is very deep."""
    assert clean(Path(tmp_path, *(["d" * 200] * 30), "hf")) == []


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(filled(tmp_path / "hf", "old"))
    for out in (Path(), tmp_path / "hf"):
        with pytest.raises(EngineError, match="E001 the current folder cannot be replaced"):
            OutputFolder(out, tmp_path / "step", overwrite=True, foreign=lambda store: None)


@pytest.mark.parametrize("old", [False, True])
def test_what_was_written_is_on_stable_storage_before_it_has_its_name_and_its_name_before_the_old_one_goes(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "hf", list[str]()
    if old:
        filled(out, "old")
    folder = folder_of(out, overwrite=True, foreign=lambda store: None)

    def told(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(*given: Any) -> Any:
            named = os.readlink(f"/proc/self/fd/{given[0]}") if what == "fsync" else str(given[-1])
            done.append(f"{what} {os.path.relpath(named, folder.partial).partition('.file')[0] or '.file'}")
            return call(*given)

        return calling

    with folder as store:
        (folder.partial / "below").mkdir()
        for name in ("fsync", "replace", "rename"):
            monkeypatch.setattr(os, name, told(name, getattr(os, name)))
        monkeypatch.setattr(output, "exchange", told("rename", replacing.exchange))
        monkeypatch.setattr(output, "remove", told("remove", replacing.remove))
        store.put("file", b"new")
    moved = ["fsync .file", "replace file", "fsync below", "fsync .", "rename ../hf", "fsync .."]
    assert done == [*moved, *(["remove ."] if old else [])]


def test_of_several_left_overs_the_newest_is_put_back_or_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    for number, name in enumerate(("partial-bbbbbbbb", "partial-aaaaaaaa", "partial-cccccccc")):
        os.utime(filled(tmp_path / f".hf.{name}", name), (number % 2, number % 2))
    folder = folder_of(out, resume=True)
    with folder:
        assert (folder.partial / "file").read_text(encoding="utf-8") == "partial-aaaaaaaa"
    assert os.listdir(tmp_path) == ["hf"]
    os.rename(out, tmp_path / "away")
    filled(tmp_path / ".hf.old-bbbbbbbb", "older")
    os.rename(tmp_path / ".hf.old-bbbbbbbb", tmp_path / ".hf.old-cccccccc")
    newest = filled(tmp_path / ".hf.old-aaaaaaaa", "newest")
    while newest.lstat().st_ctime_ns <= (tmp_path / ".hf.old-cccccccc").lstat().st_ctime_ns:
        newest.chmod(0o755)
    assert [path.name for path in clean(out)] == [".hf.old-cccccccc"]
    assert (out / "file").read_text(encoding="utf-8") == "newest"


@pytest.mark.parametrize("code", ["E501", "E409"])
def test_what_parts_wrote_is_kept_whatever_keeps_them_from_being_joined(code: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "hf", shared=("0123456789", ".part-"))
    with pytest.raises(EngineError), folder as store:
        store.put("model.safetensors", b"all parts")
        raise EngineError(code, "no")
    assert (folder.partial / "model.safetensors").read_bytes() == b"all parts"


def test_the_marker_of_the_whole_goes_last_so_that_an_interrupted_commit_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    unlink = Path.unlink

    def told(path: Path, **how: bool) -> None:
        gone.append(path.name)
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", told)
    names = [part.marker for part in (WHOLE, Part(1, 3), Part(3, 3), Part(2, 3))]
    with folder_of(tmp_path / "hf", shared=("0123456789", MARKER)) as store:
        for name in names:
            store.put(name, b"")
    assert [name for name in gone if name in names][-1] == WHOLE.marker and os.listdir(tmp_path / "hf") == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_where_nothing_can_be_locked_what_another_run_may_be_writing_is_left(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(replacing.fcntl, "flock", refusing)
    other = filled(tmp_path / ".hf.partial-00000000", "another run's")
    with folder_of(tmp_path / "hf"):
        pass
    assert (other / "file").is_file() and (tmp_path / "hf").is_dir()


def test_where_nothing_can_be_locked_a_run_whose_folder_another_one_resumes_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both once wrote to it, and the first to end left a mixture as its output."""

    def refusing(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(replacing.fcntl, "flock", refusing)
    second = folder_of(tmp_path / "hf", resume=True)
    with pytest.raises(EngineError, match="E403"), folder_of(tmp_path / "hf") as store:
        store.put("file", b"first")
        store = second.__enter__()
    store.put("file", b"second")
    second.__exit__(None, None, None)
    assert (tmp_path / "hf" / "file").read_bytes() == b"second"


def test_what_an_interrupted_run_takes_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".hf.partial-00000000"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(1 << 20))
    taken = (left / "model.safetensors").lstat().st_blocks * 512
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    for more, fits in ((0, True), (1, False)):
        folder = folder_of(tmp_path / "hf", resume=True)
        folder.need = 1000 + taken + more
        if fits:
            folder.__enter__()
            folder.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        else:
            with pytest.raises(EngineError, match="E403 there is not enough room"), folder:
                pass


def test_a_file_system_that_does_not_say_its_size_or_whether_it_has_one_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path: Path) -> Usage:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for number, usage in enumerate((lambda path: Usage(0, 0, 0), unknown)):
        monkeypatch.setattr(output.shutil, "disk_usage", usage)
        folder = folder_of(tmp_path / f"hf {number}")
        folder.need = 1
        with folder:
            pass
        assert (tmp_path / f"hf {number}").is_dir()


@pytest.mark.parametrize("content", ["", "another's"])
def test_a_single_file_replaces_an_empty_one_or_its_own_kind_and_none_that_came_meanwhile(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"

    def ours(start: bytes) -> bool:
        return start.startswith(b"own")

    path.write_text(content, encoding="utf-8")
    with pytest.raises(EngineError, match="E401") if content else nullcontext():
        replacing.write_file(path, b"own", overwrite=True, ours=ours)
    path.unlink()

    def unsupported(file: Path, to: Path) -> None:
        path.write_text("another's", encoding="utf-8")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(EngineError):
        replacing.write_file(path, b"own", overwrite=False, ours=ours)
    assert os.listdir(tmp_path) == ["plan.json"] and path.read_text(encoding="utf-8") == "another's"


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("own", encoding="utf-8")
    path.chmod(0o640)
    replacing.write_file(path, b"own, new", overwrite=True, ours=lambda start: True)
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_bytes() == b"own, new"


@pytest.mark.parametrize("name", ["plain", "a b", "a\tb", "a\\b", "a\nb"])
def test_a_mount_point_is_found_whatever_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    escaped = "".join(f"\\{ord(one):03o}" if one in " \t\n\\" else one for one in str(tmp_path / name))
    (tmp_path / "mountinfo").write_text(f"36 35 98:0 / {escaped} rw,noatime - ext4 /dev/x rw\n", encoding="utf-8")
    monkeypatch.setattr(replacing, "_MOUNTS", tmp_path / "mountinfo")
    assert replacing.is_mount(tmp_path / name) and not replacing.is_mount(tmp_path / f"{name}2")


def test_where_modes_cannot_be_changed_outputs_and_files_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    filled(tmp_path / "hf" / "inside", "old")
    monkeypatch.setattr(os, "chmod", refusing)
    with folder_of(tmp_path / "hf", overwrite=True, foreign=lambda _: None):
        pass
    assert os.listdir(tmp_path) == ["hf"] and not os.listdir(tmp_path / "hf")
    for _ in range(2):
        replacing.write_file(tmp_path / "plan.json", b"own", overwrite=True, ours=lambda start: True)


def test_a_closed_old_output_gives_a_folder_that_its_owner_can_write(tmp_path: Path) -> None:
    out = filled(tmp_path / "hf", "old")
    out.chmod(0o550)
    folder = folder_of(out, overwrite=True, foreign=lambda store: None)
    with folder as store:
        assert folder.partial.stat().st_mode & 0o777 == 0o750
        store.put("file", b"new")
    assert (out / "file").read_bytes() == b"new" and [*tmp_path.iterdir()] == [out]


def test_closed_folders_are_removed_with_what_they_hold_and_what_links_lead_to_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.rmtree

    def seen(path: Path) -> None:  # root could remove closed ones too
        assert all(one.stat().st_mode & 0o700 == 0o700 for one in (path, path / "inside"))
        whole(path)

    monkeypatch.setattr(shutil, "rmtree", seen)
    other = filled(tmp_path / "other", "another's")
    inside = filled(tmp_path / "hf" / "inside", "old")
    (inside / "link").symlink_to(other)
    for folder in (inside, inside.parent, other):
        folder.chmod(0o500)
    replacing.remove(tmp_path / "hf")
    assert [*tmp_path.iterdir()] == [other] and other.stat().st_mode & 0o777 == 0o500


def test_an_old_output_that_cannot_be_removed_is_told_beside_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    out = filled(tmp_path / "hf", "old")
    monkeypatch.setattr(shutil, "rmtree", busy)
    told, folder = (
        "E403 the new output is in its place, but what",
        folder_of(out, overwrite=True, foreign=lambda _: None),
    )
    with pytest.raises(EngineError, match=told) as caught, folder as store:
        store.put("file", b"new")
    assert (out / "file").read_bytes() == b"new"
    assert caught.value.place is not None and (Path(caught.value.place.file) / "file").read_bytes() == b"old"


def test_a_file_with_a_second_name_is_not_written_to(tmp_path: Path) -> None:
    filled(tmp_path / "others", "another's")
    os.link(tmp_path / "others" / "file", tmp_path / "model.safetensors")
    with SinkFiles(tmp_path, ["model.safetensors"]) as sinks, pytest.raises(OSError, match="second name"):
        sinks.write(0, 0, (b"new",))
    assert (tmp_path / "others" / "file").read_text(encoding="utf-8") == "another's"


def test_a_checksum_is_of_bytes_in_their_order_whenever_they_arrive() -> None:
    data, total = bytes(range(100)), Checksum()
    for low, high in ((0, 10), (70, 100), (10, 30), (50, 70), (30, 50)):
        total.add(low, memoryview(data)[low:high])
    assert total.result() == zlib.crc32(data)
