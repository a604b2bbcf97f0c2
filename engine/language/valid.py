"""Documents that were found valid before, so that none is checked against its schema twice.

Importing `jsonschema` and checking a mapping takes as long as copying a few hundred megabytes. What
is remembered is a digest of schema and document, as an empty file in the user's cache folder, of the
last few hundred; where that cannot be written, every document is checked every time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST = 256  # documents that are remembered


def key(schema: str, data: Mapping[str, Any]) -> str:
    """A digest of a schema and of data it is to hold for."""
    # Not as JSON, which would take a number for a text where it is a key.
    return hashlib.sha256(f"{len(schema)}\0{schema}{data!r}".encode("utf-8", "surrogatepass")).hexdigest()


def known(digest: str) -> bool:
    """Whether this was found valid before."""
    folder = _folder()
    return folder is not None and (folder / digest).exists()


def remember(digest: str) -> None:
    """Note that this was found valid, if there is somewhere to note it."""
    folder = _folder()
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / digest).touch()
            files = sorted((file.stat().st_mtime_ns, file) for file in folder.iterdir())
            for _, file in files[:-MOST]:
                file.unlink(missing_ok=True)


def _folder() -> Path | None:
    """`internlm-engine/valid` in the user's cache folder, by the XDG convention; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "internlm-engine" / "valid"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "internlm-engine" / "valid" if os.path.isabs(home) else None
