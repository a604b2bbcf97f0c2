"""What every output needs: its place, the files beside the weights, and cleaning up; also the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.assets.bundle import make_assets
from engine.checkpoint.manifests import NAME
from engine.errors import EngineError
from engine.formats.configs import encode_config
from engine.language.layout_file import load_layout
from engine.language.names import pattern
from engine.language.search import layout_names
from engine.language.version import __version__
from engine.planning.model import Plan
from engine.planning.saved_plan import SavedPlan, check_tokenizer
from engine.run.execute import Small
from engine.storage.objects import ObjectStore
from engine.storage.output import clean as remove
from engine.storage.output import leftovers
from engine.storage.places import is_url, on_this_machine, store_at
from engine.storage.replacing import given_path
from engine.storage.uploads import clean as remove_objects


def small_files(compiled: Plan, tokenizer: str | Path | None, code: str | Path | None) -> Small:
    """The files that go beside the weights of a plan's output."""
    if compiled.written is not None:
        for name, given in (("tokenizer", tokenizer), ("code", code)):
            if given is not None:
                raise EngineError("E001", f"--{name} has no effect: the plan writes rank files", got=str(given),
                                  fix=f"Leave --{name} out.")  # fmt: skip

        return Small({name: encode_config(name, kind, content) for name, (kind, content) in compiled.beside.items()})

    beside = given_path(tokenizer, "the tokenizer") if tokenizer else None
    return make_assets(compiled, beside, None if code is None else Path(code))


def tokenizer_beside(compiled: Plan) -> tuple[Mapping[str, str], list[str]]:
    """The digests of the tokenizer's files beside the checkpoint.

    And a notice if running the plan is refused unless another tokenizer is given: parts are written before that.
    """
    try:
        return small_files(compiled, None, None).taken, []
    except EngineError as error:
        got = "" if error.got is None else f", got {error.got}"
        return {}, [f"running this plan is refused: {error.message}{got}; correct it, or run it with --tokenizer"]


def small_files_as_saved(
    saved: SavedPlan, compiled: Plan, tokenizer: str | Path | None, code: str | Path | None
) -> Small:
    """As `small_files`, of a saved plan: unless a tokenizer is given, it is the one that was there when it was saved.

    Raises:
        EngineError: E217 for another one, as well.
    """
    small = small_files(compiled, tokenizer, code)
    if tokenizer is None:
        check_tokenizer(saved, small.taken)
    return small


def default_out(src: str | Path) -> Path | str:
    """Where `convert` writes by default."""
    if is_url(src):
        return str(src).rstrip("/") + "-hf"
    real = Path(src).resolve()
    return real.with_name(real.name + "-hf")


def clean(out: str | Path) -> list[Path | str]:
    """Remove what interrupted runs left beside an output; returns what was removed.

    In an object store these are pending uploads at the output's prefix, and objects that the engine wrote there, unless
    they form a whole output. Other outputs below the prefix are left alone.
    """
    store = store_at(out, "the output")
    if isinstance(store, ObjectStore):
        modes = [mode for name in layout_names() for mode in load_layout(name).modes]
        nested = [pattern(file.name) for mode in modes for file in mode.files if "/" in file.name]

        def ours(name: str) -> bool:
            return "/" not in name or any(one.match(name) is not None for one in nested)

        return [*remove_objects(store, ours, NAME)]
    return [*remove(on_this_machine(store, "the output"))]


def kept(out: str | Path | None, src: str | Path | None = None) -> tuple[str, list[tuple[str, int]]]:
    """An output's path, and what interrupted runs left beside it: each folder with its size in bytes.

    Args:
        out: as it was given to the run; default: where a run of `src` writes by default.
    """
    final = default_out(src or ".") if out is None else out
    if is_url(final):
        return str(final), []
    final = Path(final)
    found = [path for path in leftovers(final.absolute()) if path.is_dir()]
    sizes = [sum(file.stat().st_blocks * 512 for file in path.iterdir()) for path in found]
    return str(final), [(str(path), size) for path, size in zip(found, sizes, strict=True)]


def environment() -> dict[str, str]:
    """What a bug report needs: versions of the engine and of what it uses, Python and the system."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, requires, version

    facts = {
        "engine": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    try:
        wanted = [text.split(";")[0] for text in requires("internlm-engine") or ()]
    except PackageNotFoundError:
        wanted = []
    for name in sorted("".join(c if c.isalnum() or c in "-_" else " " for c in text).split()[0] for text in wanted):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    named = ("ENGINE_MAPPINGS", "ENGINE_DEBUG", "TMPDIR")
    return facts | {name: os.environ[name] for name in named if name in os.environ}
