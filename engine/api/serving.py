"""The public functions that read a checkpoint as if it had been converted, without a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from engine.api.outputs import small_files
from engine.api.plans import plan
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.version import __version__
from engine.planning.given import check_type
from engine.planning.model import Plan
from engine.planning.request import WholeOptions
from engine.serve.readers import reading_threads
from engine.serve.tensors import Tensors
from engine.serve.virtual import VirtualFolder
from engine.storage.local import LocalStore
from engine.storage.places import Source, store_at
from engine.storage.replacing import given_path
from engine.storage.store import Store, walk

if TYPE_CHECKING:
    from engine.serve.server import Line, Patience, Server


def open(src: Source | Plan = ".", mapping: str | Path | MappingFile = "", **options: Unpack[WholeOptions]) -> Tensors:
    """A training checkpoint as a lazy state dict of its Hugging Face model.

    Args:
        src: the training checkpoint: a folder, a URL, or a plan, which needs no other argument.
        mapping, others: as for `plan`.

    >>> with engine.open("ckpt/1000", mapping="internlm") as tensors:
    ...     tensors["model.norm.weight"].shape
    torch.Size([64])

    Raises:
        EngineError: as for `plan`; on reading a tensor, E402 when its replicas differ, E405 when a source has changed.
    """
    return Tensors(src if isinstance(src, Plan) else plan(mapping, src, **options))


def virtual(compiled: Plan, *, tokenizer: str | Path | None = None, code: str | Path | None = None) -> VirtualFolder:
    """The files that a run of a plan would write, each readable at any byte; nothing is written.

    Args:
        tokenizer, code: as for `convert`.

    >>> with engine.virtual(engine.plan("internlm", "ckpt/1000")) as folder:
    ...     sorted(folder), folder["config.json"].read(0, 2)
    (['README.md', 'config.json', ...], b'{\\n')

    Raises:
        EngineError: as for `convert`, as far as it is known without reading tensors.
    """
    check_type("compiled", compiled, Plan, "a plan, as `engine.plan` gives it")
    return VirtualFolder(compiled, lambda: small_files(compiled, tokenizer, code))


_MOST_FILES = 1000  # of a tokenizer or code
_NAME = re.compile(r"(?!api/)[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, slots=True)
class Model:
    """A model to serve: its name, `org/name`, and its source: a checkpoint, or a run's folder of steps."""

    name: str
    mapping: str | Path | MappingFile
    src: Source


def serve(
    models: Sequence[Model],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    tokenizer: str | Path | None = None,
    code: str | Path | None = None,
    log: Callable[[Line], None] = lambda _: None,
    told: Callable[[str], None] = lambda _: None,
    patience: Patience | None = None,
    **options: Unpack[WholeOptions],
) -> Server:
    """A Hub-compatible endpoint for some models, bound and ready; its `run` serves until it is stopped.

    Args:
        host, port: where to listen; port 0 takes a free one.
        token: the secret that every request must carry; required unless only this machine can reach `host`.
        log: called with every request.
        told: called with one line of text for each step that is found.
        patience: time limits on clients.
        Others as for `convert`.

    Raises:
        EngineError: E001 for a name, an address or a missing token; else as for `plan`.
    """
    from engine.serve.hub import Hub, Served
    from engine.serve.revisions import Revisions
    from engine.serve.server import Server, is_loopback

    names = [one.name for one in models]
    for name in names:
        if not _NAME.fullmatch(name) or "--" in name or ".." in name or names.count(name) > 1:
            raise EngineError(
                "E001", "a model cannot be served under this name", got=name[:200] or "nothing",
                expected="org/name of letters, digits, `-`, `_` and `.`, each name only once", fix="Change --as.",
            )  # fmt: skip
    if token is None and not is_loopback(host):
        raise EngineError(
            "E001", "anyone who can reach this address could read the model", got=f"--host {host} without a token",
            fix="Give --token-file FILE with a secret in it, or listen on 127.0.0.1.",
        )  # fmt: skip
    threads = reading_threads()

    def served(one: Model) -> Served:
        mapping = one.mapping if isinstance(one.mapping, MappingFile) else load_mapping(str(one.mapping))

        def make(store: Store) -> VirtualFolder:
            compiled = plan(mapping, store, **options)
            return VirtualFolder(compiled, lambda: small_files(compiled, tokenizer, code), threads)

        def salt() -> str:
            given = [_states(path) for path in (tokenizer, code, options.get("config")) if path]
            return repr((__version__, mapping.digest, sorted(options.items()), str(tokenizer), str(code), given))

        return Served(one.name, Revisions(store_at(one.src, "the checkpoint"), make, salt, told))

    return Server(Hub([served(one) for one in models], token), host, port, log, patience)


def _states(given: str | Path) -> list[tuple[str, Any]]:
    """The files of a folder that was given, or one file, with what changes when they do."""
    path = given_path(given, "a file or folder to serve with")
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        found = walk(LocalStore(folder)) if name is None else LocalStore(folder).states([name]).items()
        return [(file, dict(state.told())) for file, state in islice(found, _MOST_FILES)]
    except (OSError, EngineError):  # planning says what is wrong with it
        return []
