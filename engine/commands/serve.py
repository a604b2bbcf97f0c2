"""`engine serve` and `engine mount`: a checkpoint as a run would write it, without the run."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

import engine
from engine.commands.options import QUIET, SAVED, asks, reports_errors
from engine.commands.progress import logged
from engine.commands.say import say
from engine.errors import EngineError, Place, visible
from engine.storage.places import last_name

if TYPE_CHECKING:
    from engine.serve.server import Line

_TOKEN = "ENGINE_TOKEN"
_LONGEST = 4096  # bytes of a token's file
_PLANNED = tuple(name for name in SAVED if name not in ("mapping", "src"))


@click.command()
@click.option("--mapping", "-m", "mappings", metavar="FILE|NAME", multiple=True, required=True,
              help="A mapping file, or the name of a bundled one; once for all models, or once for each.")  # fmt: skip
@click.option("--src", "-s", "sources", metavar="DIR", multiple=True, default=["."],
              help="A checkpoint, or a run's folder of steps; may be repeated.  [default: current folder]")  # fmt: skip
@click.option("--as", "names", metavar="ORG/NAME", multiple=True,
              help="The name to serve each --src under.  [default: local/ and its folder's name]")  # fmt: skip
@asks(*_PLANNED, "tokenizer", "code")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    help="The port; 0 picks a free one.  [default: 8000]",
)
@click.option("--token-file", metavar="FILE",
              help=f"A file with the secret that requests must carry as HF_TOKEN; or set {_TOKEN}.")  # fmt: skip
@QUIET
@click.option("--log-file", metavar="FILE", help="Append one JSON line per request to this file.")
@reports_errors
def serve(
    as_json: bool, /, mappings: tuple[str, ...], sources: tuple[str, ...], names: tuple[str, ...], host: str,
    port: int, token_file: str | None, quiet: bool, log_file: str | None, **options: Any,
) -> None:  # fmt: skip
    """Serve checkpoints as the Hugging Face Hub does.

    Weights files are computed as they are read. Steps of a run are revisions; main is the newest
    complete one. The server is read-only, and stops on Ctrl-C.

    \b
    Example:
      engine serve -m internlm2-7b -s ckpt --as internlm/mine
      HF_ENDPOINT=http://127.0.0.1:8000 hf download internlm/mine
    """
    models = _models(mappings, sources, names)
    asked = {"mapping": mappings, "src": sources, "as": [one.name for one in models], "host": host, "port": port}
    with logged(log_file, "serve", asked) as log:

        def line(one: Line) -> None:
            if log is not None:
                log.event("request", **{name: getattr(one, name) for name in one.__slots__})
            if not quiet:
                told = f"{one.client} {one.method} {one.path} {one.status} {one.bytes} {one.seconds:.3f}s"
                say(visible(told + (f" {' '.join(one.problem.split())}" if one.problem else "")), err=True)

        server = engine.api.serve(
            models, host=host, port=port, token=_token(token_file), log=line,
            told=lambda text: None if quiet else say(visible(text), err=True), **options,
        )  # fmt: skip
        if not quiet:
            served = ", ".join(one.name for one in models)
            say(f"serving {visible(served)}\n  HF_ENDPOINT={server.url}\nCtrl-C ends it", err=True)
        if log is not None:
            log.event("serving", url=server.url)
        with suppress(KeyboardInterrupt):  # the way to stop it
            server.run()
        if log is not None:
            log.event("finished")
    if not quiet:
        say("stopped", err=True)


def _models(mappings: tuple[str, ...], sources: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
    from engine.api import Model

    if len(mappings) not in (1, len(sources)) or (names and len(names) != len(sources)):
        raise click.UsageError("Give --mapping once or once for each --src, and --as once for each --src.")
    mappings = mappings * len(sources) if len(mappings) == 1 else mappings
    names = names or tuple(f"local/{last_name(one)}" for one in sources)
    return [Model(*one) for one in zip(names, mappings, sources, strict=True)]


def _token(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        with open(file, "rb") as opened:  # it may be a pipe from a secret store
            raw = opened.read(_LONGEST + 1)
    except OSError as error:
        raise EngineError(
            "E305", "the token cannot be read", place=Place(file), got=error.strerror, fix="Check the path."
        ) from error
    token = raw.decode("utf-8", "replace").strip()
    if not token or len(raw) > _LONGEST or not token.isascii() or not token.isprintable():
        raise EngineError(
            "E001", "there is no token in the file", place=Place(file), expected="one line of ASCII characters",
            fix="`openssl rand -hex 32 > FILE` makes one.",
        )  # fmt: skip
    return token


@click.command()
@click.argument("at", metavar="DIR")
@asks(*SAVED, "tokenizer", "code", required=["mapping"])
@reports_errors
def mount(
    as_json: bool, /, at: str, mapping: str, src: str, tokenizer: str | None, code: str | None, **options: Any
) -> None:
    """Mount the folder that `run` would write, read-only.

    Its files appear at DIR; weights files are computed as they are read. It stays until Ctrl-C or
    `fusermount -u DIR`. Needs FUSE and `pip install 'internlm-engine[mount]'`.

    \b
    Example:
      engine mount -m internlm2-7b -s ckpt/20000 model &
      vllm serve ./model
    """

    def ready() -> None:
        say(f"mounted at {visible(at)}; Ctrl-C ends it", err=True)
        for notice in folder.notices:  # as a run would print them
            say(visible(f"  note {notice}"), err=True)

    compiled = engine.api.plan(mapping, src, **options)
    with engine.api.virtual(compiled, tokenizer=tokenizer, code=code) as folder:
        engine.api.mount(folder, at, log=lambda text: say(visible(text), err=True), ready=ready)
    say("unmounted", err=True)
