"""The output folder: built beside its final place, moved there when complete, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from engine.errors import EngineError, Place


class OutputFolder:
    """A context that yields a partial folder and renames it on success.

    On any failure the partial folder is removed and what was at the final path is untouched.
    """

    def __init__(self, out: Path, source: Path, *, overwrite: bool) -> None:
        self.final = Path(os.path.abspath(out))
        self._overwrite = overwrite
        _check_apart(self.final, source)
        if os.path.lexists(self.final) and not overwrite:
            raise EngineError(
                "E401",
                "the output exists already",
                place=Place(str(out)),
                fix="Choose another --out, or give --overwrite to replace it once the new one is complete.",
            )
        self.partial = self.final.with_name(f".{self.final.name}.partial-{secrets.token_hex(4)}")

    def __enter__(self) -> Path:
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except OSError as error:
            raise write_error(self.partial, error) from error
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        try:
            self._move()
        except OSError as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise write_error(self.final, error) from error

    def _move(self) -> None:
        old: Path | None = None
        if os.path.lexists(self.final):
            old = self.final.with_name(f".{self.final.name}.old-{secrets.token_hex(4)}")
            os.rename(self.final, old)
        try:
            os.rename(self.partial, self.final)
        except OSError:
            if old is not None:
                os.rename(old, self.final)
            raise
        if old is not None:
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()


def _check_apart(out: Path, source: Path) -> None:
    real_out, real_source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if real_out == real_source or real_source in real_out.parents or real_out in real_source.parents:
        raise EngineError(
            "E404",
            "source and output overlap",
            place=Place(str(out)),
            got=f"output inside or around {source}",
            expected="two folders apart",
            fix="Choose an --out beside the checkpoint, not in it.",
        )


def write_error(path: Path, error: OSError) -> EngineError:
    return EngineError(
        "E403",
        "writing failed",
        place=Place(str(path)),
        got=error.strerror or str(error),
        fix="Check free space and permissions at the output; nothing was left there.",
    )
