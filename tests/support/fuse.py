"""Whether folders can be mounted here."""

from __future__ import annotations

from engine.errors import EngineError
from engine.serve import mount


def missing() -> str | None:
    """What is not there, in words; None when nothing is."""
    try:
        mount._fuse()
    except EngineError as error:
        return error.got
    return None
