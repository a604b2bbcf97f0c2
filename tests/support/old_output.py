"""An output as an earlier run left it, without running one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def old_output(folder: Path, **files: bytes) -> dict[str, bytes]:
    """Make a folder that is an output of the engine with these small files; returns what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"mine.txt": b"keep"} | {name.replace("__", "."): data for name, data in files.items()}
    nothing = {"name": "x", "version": "1", "digest": "0"}
    manifest = {
        "manifest": 1,
        "engine": "0",
        "mapping": {**nothing, "resolved": {}},
        "layout": nothing,
        "sources": {},
        "variants": {},
        "options": {},
        "dtype": "auto",
        "sizes": {},
        "tensors": {},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in names.items()},
    }
    contents = {**names, "conversion.json": json.dumps(manifest).encode()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return dict(sorted(contents.items()))
