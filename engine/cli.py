"""The command line: each command parses, calls one function of `engine.api`, and renders.

Nothing heavy is imported here, so that `--help` and `--version` answer at once. Exit codes: 0 done;
1 the job failed or found a problem; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec

import click

from engine import __version__
from engine.errors import CODES, EngineError, EngineErrors

P = ParamSpec("P")


def parse_size(text: str) -> int:
    """Bytes from `5GB` (powers of 1000), `2GiB` (powers of 1024) or a plain number.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("500")
    (5000000000, 1610612736, 500)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"`{text}` is not a size; write it like 5GB, 2GiB, 500MB or plain bytes")
    number, letter, binary = match.groups()
    base = 1024 if binary else 1000
    size = int(float(number) * base ** (" kmgt".index(letter.lower()) if letter else 0))
    if size <= 0:
        raise ValueError(f"`{text}` is no size to fill a file with; it must be positive")
    return size


def parse_value(text: str) -> int | float | bool | str:
    """The value of `--set NAME=VALUE`: a whole number, a number, true or false, or text.

    >>> parse_value("4096"), parse_value("1e-5"), parse_value("true"), parse_value("w2_is_up")
    (4096, 1e-05, True, 'w2_is_up')
    """
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return text


class Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Setting(click.ParamType[tuple[str, Any]]):
    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            self.fail(f"`{value}` has no name and value; write it like rotary=halves", param, ctx)
        return name.strip(), parse_value(text.strip())


class Workers(click.ParamType[int | None]):
    name = "auto|n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if str(value).isdecimal() and int(value) > 0:
            return int(value)
        self.fail(f"`{value}` is neither `auto` nor a positive number", param, ctx)


def settings_of(ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Collect `--set`; a name given twice is a mistake that the last one should not hide."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"`{name}` is set twice", ctx, param)
    return dict(pairs)


class Commands(click.Group):
    """Commands listed in the order people use them, and exit codes in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.Abort:
            click.echo("interrupted; no output was written", err=True)
            sys.exit(130)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="engine", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert tensor- and pipeline-parallel training checkpoints to Hugging Face, from rules in YAML."""


def reports_errors(command: Callable[Concatenate[bool, P], None]) -> Callable[..., None]:
    """Give a command `--json` and `--no-color`, and render the errors it meets. Exit code 1."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result, or the errors, as JSON.")
    @click.option("--no-color", is_flag=True, help="Print without colours; so does NO_COLOR.")
    @click.pass_context
    @wraps(command)
    def wrapped(ctx: click.Context, /, as_json: bool, no_color: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        from engine import render

        if no_color or os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            command(as_json, *args, **kwargs)
        except (EngineError, EngineErrors) as error:
            errors = error.errors if isinstance(error, EngineErrors) else [error]
            if as_json:
                click.echo(render.as_json({"errors": [one.as_dict() for one in errors]}))
            else:
                click.echo("\n\n".join(render.error(one) for one in errors), err=True)
            ctx.exit(1)

    return wrapped


def planning_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `run` and `plan` share."""
    for option in reversed(
        (
            click.option("--mapping", "-m", required=True, metavar="FILE|NAME",
                         help="A mapping file, or the name of a bundled one, like internlm2-7b.yaml."),
            click.option("--src", "-s", default=".", show_default="current folder", metavar="DIR",
                         help="The checkpoint folder."),
            click.option("--set", "settings", multiple=True, type=Setting(), callback=settings_of,
                         help="Set a variant or an option of the mapping; may be repeated."),
            click.option("--dtype", default="auto", show_default=True,
                         type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
                         help="Element type to write; auto keeps each tensor's own."),
            click.option("--max-shard-size", default="5GB", show_default=True, type=Size(),
                         help="Most bytes of tensors in one output file, like 5GB or 2GiB."),
            click.option("--strict", is_flag=True, help="Refuse sizes other than those the release has."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command()
@planning_options
@click.option("--out", "-o", metavar="DIR", help="The folder to write.  [default: SRC-hf]")
@click.option("--tokenizer", metavar="FILE", help="The SentencePiece model, if not beside the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
@click.option("--workers", default="auto", show_default=True, type=Workers(), help="Threads that write.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@reports_errors
def run(
    as_json: bool, /, mapping: str, src: str, out: str | None, tokenizer: str | None, quiet: bool, **options: Any
) -> None:
    """Convert a training checkpoint to a Hugging Face checkpoint.

    The output is complete when the command ends, or not there at all.
    """
    from engine import api, progress, render

    with progress.progress(show=not (quiet or as_json)) as listener:
        report = api.convert(mapping, src, out, tokenizer=tokenizer, progress=listener, **options)
    if as_json:
        click.echo(render.as_json(report.as_dict()))
    elif not quiet:
        click.echo(render.report(report))


def rank_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `reverse` and `reshard` share: how to cut the model."""
    for option in reversed(
        (
            click.option("--mapping", "-m", required=True, metavar="FILE|NAME",
                         help="A mapping file, or the name of a bundled one, like internlm2-7b.yaml."),
            click.option("--out", "-o", required=True, metavar="DIR", help="The folder to write."),
            click.option("--tp", type=click.IntRange(1), metavar="N", help="Tensor-parallel ranks."),
            click.option("--pp", type=click.IntRange(1), metavar="N", help="Pipeline ranks."),
            click.option("--wp", type=click.IntRange(1), metavar="N", help="Weight-parallel ranks, in mode isp."),
            click.option("--chunks", type=click.IntRange(1), metavar="N",
                         help="Model chunks per pipeline rank (interleaved pipeline)."),
            click.option("--mode", metavar="NAME", help="Parallel mode of the layout, like mtp or isp."),
            click.option("--like", metavar="DIR",
                         help="A training checkpoint whose mode, ranks, names and variants to copy."),
            click.option("--set", "settings", multiple=True, type=Setting(), callback=settings_of,
                         help="Set a variant or an option of the mapping or its layout; may be repeated."),
            click.option("--dtype", default="auto", show_default=True,
                         type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
                         help="Element type to write; auto keeps each tensor's own."),
            click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists."),
            click.option("--workers", default="auto", show_default=True, type=Workers(), help="Threads that write."),
            click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command()
@rank_options
@click.option("--src", "-s", required=True, metavar="DIR", help="The Hugging Face checkpoint.")
@click.option("--lossy", multiple=True, metavar="RULE",
              help="Write a rule that does not invert all the same; may be repeated.")  # fmt: skip
@reports_errors
def reverse(as_json: bool, /, mapping: str, src: str, out: str, quiet: bool, **options: Any) -> None:
    """Write a Hugging Face checkpoint as training rank files.

    What is not given is as in --like, or 1.
    """
    from engine import api, progress, render

    with progress.progress(show=not (quiet or as_json)) as listener:
        report = api.reverse(mapping, src, out, progress=listener, **options)
    if as_json:
        click.echo(render.as_json(report.as_dict()))
    elif not quiet:
        click.echo(render.report(report))


@cli.command()
@rank_options
@click.option("--src", "-s", default=".", show_default="current folder", metavar="DIR", help="The checkpoint folder.")
@reports_errors
def reshard(as_json: bool, /, mapping: str, src: str, out: str, quiet: bool, **options: Any) -> None:
    """Write a training checkpoint for other ranks, from shards to shards.

    What is not given stays as it is, or is as in --like.
    """
    from engine import api, progress, render

    with progress.progress(show=not (quiet or as_json)) as listener:
        report = api.reshard(mapping, src, out, progress=listener, **options)
    if as_json:
        click.echo(render.as_json(report.as_dict()))
    elif not quiet:
        click.echo(render.report(report))


@cli.command()
@click.argument("folder", metavar="DIR", default=".")
@reports_errors
def inspect(as_json: bool, /, folder: str) -> None:
    """Say what a checkpoint is, and which mappings fit it."""
    from engine import api, render

    facts = api.inspect(folder)
    click.echo(render.as_json(facts) if as_json else render.checkpoint(facts))


@cli.command()
@planning_options
@reports_errors
def plan(as_json: bool, /, mapping: str, src: str, **options: Any) -> None:
    """Show what `run` would do, without reading tensor data."""
    from engine import api, render

    facts = api.describe_plan(api.plan(mapping, src, **options))
    click.echo(render.as_json(facts) if as_json else render.plan(facts))


@cli.command()
@click.argument("files", nargs=-1, metavar="[FILES]...")
@reports_errors
@click.pass_context
def lint(ctx: click.Context, as_json: bool, files: tuple[str, ...]) -> None:
    """Check mapping files, no checkpoint needed.

    Without FILES, all bundled mappings are checked.
    """
    from engine import api, render

    findings = api.lint(files)
    click.echo(render.as_json(render.findings_data(findings)) if as_json else render.findings(findings))
    if any(finding.severity == "error" for finding in findings):
        ctx.exit(1)


@cli.command()
@click.argument("mapping", metavar="FILE|NAME")
@click.option("--resolved", is_flag=True, help="Merge in what it extends, as the engine reads it.")
@reports_errors
def show(as_json: bool, /, mapping: str, resolved: bool) -> None:
    """Print a mapping, as written or resolved."""
    from engine import api, render

    if as_json or resolved:
        loaded = api.load_mapping(mapping)
        text = render.as_json(render.plain(loaded.resolved)) + "\n" if as_json else render.resolved(loaded)
    else:
        from engine.language.search import find_file

        text = render.read_text(find_file(mapping))
    click.echo(text, nl=False)


@cli.command("format")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a file is not formatted.")
@reports_errors
@click.pass_context
def format_(ctx: click.Context, as_json: bool, files: tuple[str, ...], check: bool) -> None:
    """Put mapping files in their usual form."""
    from engine import api, render

    changed = []
    for file in files:
        before = render.read_text(file)
        after = api.format_mapping(before)
        if after != before:
            changed.append(file)
            if not check:
                Path(file).write_text(after, encoding="utf-8")
    if as_json:
        click.echo(render.as_json({"changed": changed, "checked": len(files)}))
    else:
        for file in changed:
            click.echo(f"{'would format' if check else 'formatted'} {file}")
    if check and changed:
        ctx.exit(1)


@cli.command()
@click.argument("out", metavar="OUT")
@click.argument("ref", metavar="REF")
@click.option("--allow-cast", is_flag=True, help="Exit with 0 also where tensors are equal after casting.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@reports_errors
@click.pass_context
def compare(ctx: click.Context, as_json: bool, out: str, ref: str, allow_cast: bool, quiet: bool) -> None:
    """Compare two Hugging Face checkpoints, and say what the differences mean.

    OUT and REF are folders or weight files. Exits with 0 when every tensor is equal, else with 1.
    """
    from engine import api, progress, render

    with progress.progress(show=not (quiet or as_json), doing="comparing") as listener:
        done = api.compare(out, ref, progress=listener)
    if as_json:
        click.echo(render.as_json(done.as_dict()))
    elif not quiet:
        click.echo(render.comparison(done.as_dict()))
    if not done.same(allow_cast=allow_cast):
        ctx.exit(1)


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for what nobody foresaw: where it happened and what to send."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    text = " ".join(str(error).split())
    click.echo(
        f"E901 {CODES['E901']}: {kind.__name__}: {text} ({where}, engine {__version__}); please report it, "
        "with what ENGINE_DEBUG=1 prints",
        err=True,
    )


def main() -> NoReturn:
    """The console script."""
    if os.environ.get("ENGINE_DEBUG") != "1":
        sys.excepthook = internal_error
    cli.main()


if __name__ == "__main__":
    main()
