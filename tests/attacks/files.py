"""Something else where a file is expected: links, pipes, folders, devices, names that are no text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.attacks import add
from tests.attacks.pickles import RANK


def instead(put: Callable[[Path], object]) -> Callable[[Path, str], None]:
    def make(folder: Path, name: str) -> None:
        (folder / name).unlink()
        put(folder / name)

    return make


def in_a_chain(path: Path) -> None:
    path.symlink_to(path.with_name("loop"))
    path.with_name("loop").symlink_to(path)


def socket_at(path: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


for _what, _put in {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": socket_at,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link in a circle": in_a_chain,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a folder": lambda path: path.symlink_to("."),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a Git LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 9\n"
    ),
}.items():
    for _start, _name in (
        ("training", RANK),
        ("training", "model_config.pt"),
        ("training", "config_file.pt"),
        ("hf", "model-00002-of-00003.safetensors"),
        ("hf", "model.safetensors.index.json"),
        ("hf", "config.json"),
    ):
        _code = "E305 E201 E304" if _start == "hf" else "E305"
        add(f"{_what} for {_name}", _start, lambda folder, put=_put, name=_name: instead(put)(folder, name), _code)

add("a link to a memory image for a rank file", "training",
    lambda folder: instead(lambda path: path.symlink_to("/proc/self/mem"))(folder, RANK), "E301 E305")  # fmt: skip
add("a link to a file without size for a rank file", "training",
    lambda folder: instead(lambda path: path.symlink_to("/proc/self/status"))(folder, RANK), "E301 E305")  # fmt: skip


def linked(folder: Path) -> None:
    """Storage of many clusters: the rank file is a link to where it really lies."""
    (folder.parent / "elsewhere").mkdir()
    (folder / RANK).rename(folder.parent / "elsewhere" / "x")
    (folder / RANK).symlink_to(folder.parent / "elsewhere" / "x")


add("a link to a good rank file", "training", linked, None)


def stranger(name: bytes) -> Callable[[Path], object]:
    return lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"x")


for _what, _raw in {
    "a newline": b"10.step\nE000 all is well",
    "bytes that are not UTF-8": b"10.\xff\xfe",
    "an escape": b"\x1b[2J\x1b]0;owned\x07",
    "a backtick": b"`touch ran`$(touch ran);touch ran",
    "markdown": b"](http:example.invalid) <script>alert(1)<script>|",
    "YAML": b"--- !!python",
    "two hundred letters": b"x" * 200,
}.items():
    add(f"a stranger whose name has {_what}", "training", stranger(_raw), None)
for _name in ("model_tp1_pp0.pt ", "model_tp1_pp0.pt\n", "model_tp01_pp0.pt", "model_tp١_pp0.pt", "MODEL_TP1_PP0.PT"):
    add(f"a rank file named {_name!r}", "training",
        lambda folder, name=_name: (folder / RANK).rename(folder / name), "E201")  # fmt: skip


for _start in ("training", "hf"):
    for _left in (".journal", ".part-00001-of-00002"):
        add(f"a {_start} folder that an unfinished output was renamed to, with {_left}", _start,
            lambda folder, name=_left: (folder / name).touch(), "E304", "did not finish")  # fmt: skip
