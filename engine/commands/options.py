"""Shared parts of commands: groups of options, and the rendering of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, Field, fields
from functools import wraps
from traceback import walk_tb
from typing import Any, Concatenate, ParamSpec

import click
from click.core import ParameterSource

import engine
from engine.commands.completion import BY_METAVAR, folders
from engine.commands.progress import live
from engine.commands.say import answer, say
from engine.commands.values import COUNT, DTYPE, SETTING, SIZE, WORKERS, check_reaching, listed, settings_of
from engine.errors import RESUMABLE, EngineError, Place
from engine.planning.request import JOBS, RANK_OPTIONS, Request
from engine.run.running import Running
from engine.show.render import error as in_red
from engine.show.render import render
from engine.show.text import Styled, quoted

P = ParamSpec("P")

_OPTIONAL = ("torch", "transformers")  # of the extra `model`


def check_text(ctx: click.Context) -> None:
    """A usage error for an argument that is empty, as from an unset shell variable, or contains NUL."""
    for param in ctx.command.params:
        given = ctx.params.get(param.name or "")
        for text in given if isinstance(given, tuple) else (given,):
            if isinstance(text, str) and (not text or "\0" in text):
                raise click.BadParameter("it is empty" if not text else "it holds a NUL", ctx, param)


def _loading(error: BaseException) -> str | None:
    """The library whose import failed with any error; None if no import failed."""
    for one in (error, error.__cause__ or error.__context__):
        frames = [] if one is None else [frame for frame, _ in walk_tb(one.__traceback__)]
        names = [f.f_globals.get("__name__") or "" for f in frames if f.f_code.co_name == "<module>"]
        library = next((name.partition(".")[0] for name in names if name.partition(".")[0] in _OPTIONAL), None)
        if library is not None:
            return library
    return None


def _in_words(error: Exception) -> EngineError:
    """An `EngineError` for a missing library, memory or thread, or a system error of a path; raises anything else."""
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        memory = isinstance(error, MemoryError)
        what, limit = ("is not enough memory", "-v") if memory else ("are no more threads", "-u")
        fix = f"Raise the limit (`ulimit {limit}`, or that of the job or the container)."
        return EngineError("E305", f"there {what} to go on", got=str(error) or None, fix=fix)
    library = _loading(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _OPTIONAL:
        return EngineError(
            "E001",
            f"this needs {error.name}, which is not installed",
            fix="Install it with: pip install 'internlm-engine[model]'.",
        )
    if isinstance(error, ModuleNotFoundError) and library is None:
        raise error
    mapped = isinstance(error, OSError) and error.filename is None and ".so" in str(error)  # torch raises it too
    if library is not None or mapped or isinstance(error, ImportError):
        why = str(error).strip().rpartition("\n")[2]
        fix = "Raise the limit of memory, if there is one (`ulimit -v`); else install it again."
        return EngineError("E305", f"{library or 'a library'} cannot be loaded", got=why or None, fix=fix)
    if not isinstance(error, OSError):
        raise error
    if error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            return EngineError("E001", "the current folder is not there any more", fix="Change to one that does.")
        raise error
    place = Place(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename))
    return EngineError(
        "E305", "a file cannot be read or written", place=place, got=error.strerror, fix="Check the path."
    )


def reports_errors(command: Callable[Concatenate[bool, P], None]) -> Callable[..., None]:
    """Give a command `--json` and `--no-color`, and render its errors.

    The exit code of an error is 2 for unusable arguments (E0xx), else 1.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the result, or the errors, as JSON.")
    @click.option("--no-color", is_flag=True, help="Print without colours; so does NO_COLOR.")
    @click.pass_context
    @wraps(command)
    def wrapped(ctx: click.Context, /, as_json: bool, no_color: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        if no_color or os.environ.get("NO_COLOR"):
            ctx.color = False
        check_text(ctx)

        waiting = nullcontext() if as_json or kwargs.get("quiet") or not sys.stderr.isatty() else live("working")
        try:
            check_together(ctx)
            with waiting:
                command(as_json, *args, **kwargs)
        except Exception as raised:  # other errors are raised again
            if isinstance(raised, click.ClickException | click.Abort | click.exceptions.Exit):
                raise
            error = raised if isinstance(raised, EngineError) else _in_words(raised)

            errors = error.errors
            if as_json:
                answer(True, {"errors": [one.as_dict() for one in errors]}, str)
            else:
                say(Styled("\n\n".join(in_red(one) for one in errors)), err=True)
                if "resume" in kwargs and any(one.code in RESUMABLE for one in errors):
                    given: dict[str, Any] = dict(kwargs)
                    left = engine.api.kept(given.get("out"), given.get("src"))
                    say(render("kept.txt", out=quoted(left[0]), partial=left[1]), err=True)
            ctx.exit(2 if all(one.code == "E001" for one in errors) else 1)

    return wrapped


Command = Callable[..., None]
_DECLARED = {one.name: one for kind in (Request, Running) for one in fields(kind) if one.metadata}


def asks(*names: str, required: Sequence[str] = (), **helps: str) -> Callable[[Command], Command]:
    """Options of a command, in this order: fields of `Request` or `Running`, which declare them.

    Args:
        required: options that must be given.
        helps: other help texts for this command; these options have no default.
    """
    return group(*(_option(_DECLARED[name], name in required, helps.get(name)) for name in names))


def _option(one: Field[Any], required: bool, other: str | None) -> Callable[[Command], Command]:
    declared = one.metadata
    flags = declared["flags"].split() or [f"--{one.name.replace('_', '-')}"]
    how: dict[str, Any] = {"help": other or declared["help"], "metavar": declared["metavar"] or None}
    if required:
        how["required"] = True
    elif other is None and one.default is not MISSING and one.default not in (None, False, True, ()):
        how["default"] = declared["shown"] if declared["kind"] == "size" else one.default
        told = "" if declared["kind"] == "size" else declared["shown"]
        how["show_default"] = not told
        how["help"] += f"  [default: {told}]" if told else ""
    kinds: dict[str, dict[str, Any]] = {
        "text": {},
        "flag": {"is_flag": True},
        "no-flag": {"is_flag": True, "flag_value": False, "default": True},
        "count": {"type": COUNT, "metavar": "N"},
        "size": {"type": SIZE},
        "workers": {"type": WORKERS, "metavar": "auto|N", "default": "auto", "show_default": True},
        "dtype": {"type": DTYPE, "metavar": "TYPE"},
        "setting": {"type": SETTING, "multiple": True, "callback": settings_of},
        "texts": {"multiple": True},
        "list": {"multiple": True, "callback": listed},
    }
    how |= kinds[declared["kind"]]
    metavar = how.get("metavar") or ("NAME=VALUE" if declared["kind"] == "setting" else "")
    how["shell_complete"] = BY_METAVAR.get(metavar)
    flags = [f"--no-{one.name}"] if declared["kind"] == "no-flag" else flags
    return click.option(*flags, one.name, **how)


def given(ctx: click.Context) -> dict[str, str]:
    """The options that were given: name → spelling."""
    params = [(param.name or "", param.opts[0]) for param in ctx.command.params]
    return {name: flag for name, flag in params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}


# Command and option → options of which one must be given too, as it has no effect alone.
_TOGETHER = {
    **{(command, "parts"): ("--executor",) for command in ("run", "reverse", "reshard")},
    **{(command, "overwrite"): ("--out",) for command in ("plan", "new")},
    **{("verify", name): ("--mapping",) for name in ("config", "dtype")},
    **{("compare", name): ("--mapping",) for name in ("config", "dtype", "settings")},
    ("verify", "settings"): ("--mapping", "--logits"),
}


def check_together(ctx: click.Context) -> None:
    """A usage error for an option that has no effect without another."""
    said = given(ctx)
    for name, flag in said.items():
        needed = _TOGETHER.get((ctx.command.name or "", name))
        if needed is not None and not set(needed) & set(said.values()):
            raise click.UsageError(f"{flag} has no effect without {' or '.join(needed)}", ctx)
    check_reaching(ctx, said)


def chosen(mapping: str | None, src: str, config: str | None = None, *, quiet: bool = False) -> str:
    """The given mapping, else the only one that fits, which is reported; E003 if none or several fit."""
    if mapping is not None:
        return mapping

    fit = engine.api.find_mapping(src, config)
    if not quiet:
        say(f"using mapping {fit.name}, the only one that fits: {fit.description}", err=True)
    return fit.name


EXPLAINED = ("mapping", "src", "config", "settings", "dtype")
SAVED = (*EXPLAINED, "max_shard_size", "strict")  # options that a saved plan contains


def of_job(ctx: click.Context, job: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a job; a usage error for a given option that the job does not have."""
    takes = JOBS[job].takes.__annotations__
    for name, flag in given(ctx).items():
        if name in options and name not in takes:
            has = " or ".join(f"--for {other}" for other, one in JOBS.items() if name in one.takes.__annotations__)
            raise click.UsageError(f"{flag} is no option of {job}" + (f"; it needs {has}" if has else ""), ctx)
    return {name: value for name, value in options.items() if name in takes}


def group(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options of a command as one, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


QUIET = click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
# Numbers of ranks of the dimensions that have their own options.
RANK_FLAGS = group(
    *(click.option(f"--{name}", type=COUNT, metavar="N", help=told) for name, told in RANK_OPTIONS.items())
)
# How `reverse` and `reshard` cut the model.
CUT = group(
    click.option("--out", "-o", required=True, metavar="DIR", shell_complete=folders, help="The folder to write."),
    RANK_FLAGS,
    asks("ranks", "chunks", "mode", "like", "config", "settings", "dtype"),
)
# Shared options of the commands that write a checkpoint.
WRITING = group(
    asks("overwrite", "resume", "workers", "max_memory", "digests", "check_source", "executor", "parts"),
    click.option("--log-file", metavar="FILE", help="Append one JSON line per event to this file."),
    QUIET,
)
# What `verify` can compare an output with, besides its manifest.
VERIFYING = group(
    asks("src", src="The training checkpoint it was made from."),
    asks("mapping", "config", "settings", mapping="Compare tensors with what this mapping makes of --src."),
    asks("dtype", dtype="Element type it was written in.  [default: as in the manifest]"),
    click.option("--sample", metavar="N%", help="Compare only a share of the blocks of each tensor."),
    click.option(
        "--load", is_flag=True, help="Load the model with transformers, without remote code, and run it once."
    ),
    click.option(
        "--logits",
        is_flag=True,
        help="Compare its layers with a forward pass computed from the rank files of --src.",
    ),
)
