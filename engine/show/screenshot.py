"""A picture of a page, by an installed Chromium where there is one."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.replacing import write_file

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip
_SECONDS = 60
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WIDTH, _ABOVE, _PER_FIGURE, _TALLEST = 1200, 2200, 520, 16_000  # pixels


def browser() -> str | None:
    """The path of an installed Chromium, or of its like."""
    return next((found for name in _NAMES if (found := shutil.which(name)) is not None), None)


def is_picture(start: bytes) -> bool:
    """Whether a file of these first bytes was drawn by `screenshot`."""
    return start.startswith(_SIGNATURE) and _mark() in start[:100]


def _mark() -> bytes:
    """A chunk of text of a PNG that says who drew it."""
    body = b"tEXtSoftware\0engine view"
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def screenshot(page: Path, out: Path, *, overwrite: bool = False) -> None:
    """Draw an HTML file as a PNG, high enough for its figures.

    The browser gets a profile of its own, which is removed, and is asked for no network; the page
    itself loads nothing.

    Args:
        overwrite: replace a picture that was drawn before; no other file is.

    Raises:
        EngineError: E001 when there is no browser, E403 when it draws nothing.
    """
    found = browser()
    if found is None:
        raise EngineError(
            "E001",
            "there is no Chromium to draw the page with",
            expected=", ".join(_NAMES),
            fix="Install one, or leave --png out and open the page in any browser.",
        )
    height = min(_TALLEST, _ABOVE + _PER_FIGURE * page.read_text("utf-8").count("<figure"))
    with tempfile.TemporaryDirectory() as profile:
        drawn = Path(profile) / "page.png"
        command = [found, *_FLAGS, f"--user-data-dir={profile}/profile", f"--window-size={_WIDTH},{height}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # of which root has none
        command += [f"--screenshot={drawn}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = [str(error)]
        if not drawn.is_file():
            raise EngineError(
                "E403",
                "the page could not be drawn",
                place=Place(str(out)),
                got=said[0][:300],
                fix=f"Try `{Path(found).name} --headless --screenshot` by hand, or leave --png out.",
            )
        data = drawn.read_bytes()
        first = len(_SIGNATURE) + 25  # the chunk that must come first, IHDR, has 25 bytes
        write_file(out, data[:first] + _mark() + data[first:], overwrite=overwrite, ours=is_picture)
