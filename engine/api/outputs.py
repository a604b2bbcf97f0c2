"""What belongs to every output: where it goes, and the files beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.run.execute import Small
from engine.storage.places import is_url

if TYPE_CHECKING:
    from engine.planning.model import Plan


def small_files(compiled: Plan, tokenizer: str | Path | None, code: str | Path | None) -> Small:
    """The files that belong beside the weights that a plan writes."""
    if compiled.written is not None:
        from engine.formats.configs import encode_config

        return Small({name: encode_config(name, kind, content) for name, (kind, content) in compiled.beside.items()})
    from engine.assets.bundle import make_assets

    return make_assets(compiled, Path(tokenizer) if tokenizer else None, None if code is None else Path(code))


def default_out(src: str | Path) -> Path | str:
    """Where `convert` writes when it is not told."""
    if is_url(src):
        return str(src).rstrip("/") + "-hf"
    real = Path(src).resolve()
    return real.with_name(real.name + "-hf")
