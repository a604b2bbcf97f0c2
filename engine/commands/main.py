"""The command line: each command parses, calls one function of `engine.api`, and renders.

Nothing heavy is imported here, so that `--help` and `--version` answer at once. Exit codes: 0 done;
1 the job failed or found a problem; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from engine import __version__
from engine.commands.check import clean, compare, prove, verify
from engine.commands.diff import diff
from engine.commands.explain import explain, view
from engine.commands.new import new
from engine.commands.options import SAVED, asks, only_plan, rank_options, reports_errors, writing_options
from engine.commands.say import say
from engine.errors import CODES

if TYPE_CHECKING:
    from engine.run.execute import Report


class Commands(click.Group):
    """Commands listed in the order people use them, and exit codes in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.Abort:
            say("interrupted; nothing was put at the output, and --resume goes on from here", err=True)
            sys.exit(143 if _terminated else 130)
        except click.ClickException as error:
            error.show(shown := io.StringIO())
            say(shown.getvalue(), err=True, nl=False)
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="engine", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert tensor- and pipeline-parallel training checkpoints to Hugging Face, from rules in YAML."""


def write(as_json: bool, command: str, quiet: bool, log_file: str | None, **asked: Any) -> None:
    """Run an API function that writes a checkpoint, with progress and a log, and say what it did."""
    from engine import api
    from engine.commands import progress
    from engine.commands.logs import logged
    from engine.show import render

    functions: dict[str, Callable[..., Report]] = {
        "run": api.convert,
        "run --plan": api.run_plan,
        "reverse": api.reverse,
        "reshard": api.reshard,
    }
    with (
        logged(log_file, command, asked) as log,
        progress.progress(show=not (quiet or as_json), also=None if log is None else log.progress) as listener,
    ):
        report = functions[command](**asked, progress=listener)
        if log is not None:
            log.event("finished", **report.as_dict())
    if as_json:
        say(render.as_json(report.as_dict()))
    elif not quiet:
        say(render.report(report))


@cli.command()
@asks(*SAVED)
@click.option("--plan", "saved", metavar="FILE", help="Run a plan that `engine plan -o` saved, if it still holds.")
@click.option("--out", "-o", metavar="DIR", help="The folder to write.  [default: SRC-hf]")
@asks("tokenizer", "code")
@writing_options
@reports_errors
@click.pass_context
def run(ctx: click.Context, as_json: bool, /, saved: str | None, **options: Any) -> None:
    """Convert a training checkpoint to a Hugging Face checkpoint.

    The output is complete when the command ends, or not there at all.
    """
    only_plan(ctx, saved)
    if saved is None:
        write(as_json, "run", **options)
        return
    write(as_json, "run --plan", path=saved, **{name: v for name, v in options.items() if name not in SAVED})


@cli.command()
@rank_options
@writing_options
@asks("src", "lossy", required=["src"], src="The Hugging Face checkpoint.")
@reports_errors
def reverse(as_json: bool, /, **options: Any) -> None:
    """Write a Hugging Face checkpoint as training rank files.

    What is not given is as in --like, or 1.
    """
    write(as_json, "reverse", **options)


@cli.command()
@rank_options
@writing_options
@asks("src")
@reports_errors
def reshard(as_json: bool, /, **options: Any) -> None:
    """Write a training checkpoint for other ranks, from shards to shards.

    What is not given stays as it is, or is as in --like.
    """
    write(as_json, "reshard", **options)


@cli.command()
@click.argument("folder", metavar="DIR", default=".")
@asks("config")
@reports_errors
def inspect(as_json: bool, /, folder: str, config: str | None) -> None:
    """Say what a checkpoint is, and which mappings fit it."""
    from engine import api
    from engine.show import render

    facts = api.inspect(folder, config)
    say(render.as_json(facts) if as_json else render.checkpoint(facts))


@cli.command()
@asks(*SAVED, required=["mapping"])
@click.option("--out", "-o", metavar="FILE", help="Save the plan, for `engine run --plan FILE`.")
@click.option("--overwrite", is_flag=True, help="Replace a plan that was saved there before.")
@reports_errors
def plan(as_json: bool, /, mapping: str, src: str, out: str | None, overwrite: bool, **options: Any) -> None:
    """Show what `run` would do, without reading tensor data."""
    from engine import api
    from engine.show import render

    if out is None:
        made = api.plan(mapping, src, **options)
    else:
        made = api.save_plan(out, mapping, src, overwrite=overwrite, **options)
    facts = api.describe_plan(made)
    say(render.as_json(facts) if as_json else render.plan(facts))


cli.add_command(compare)
cli.add_command(verify)
cli.add_command(clean)


@cli.command()
@click.argument("files", nargs=-1, metavar="[FILES]...")
@reports_errors
@click.pass_context
def lint(ctx: click.Context, as_json: bool, files: tuple[str, ...]) -> None:
    """Check mapping files, no checkpoint needed.

    Without FILES, all bundled mappings are checked.
    """
    from engine import api
    from engine.show import render

    findings = api.lint(files)
    say(render.as_json(render.findings_data(findings)) if as_json else render.findings(findings))
    if any(finding.severity == "error" for finding in findings):
        ctx.exit(1)


cli.add_command(prove)


@cli.command()
@click.argument("mapping", metavar="FILE|NAME")
@click.option("--resolved", is_flag=True, help="Merge in what it extends, as the engine reads it.")
@reports_errors
def show(as_json: bool, /, mapping: str, resolved: bool) -> None:
    """Print a mapping, as written or resolved."""
    from engine import api
    from engine.show import render

    if as_json or resolved:
        from engine.language.documents import plain

        loaded = api.load_mapping(mapping)
        text = render.as_json(plain(loaded.resolved)) + "\n" if as_json else render.resolved(loaded)
    else:
        from engine.language.search import find_file

        text = render.read_text(find_file(mapping))
    say(text, nl=False)


@cli.command("format")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if a file is not formatted.")
@reports_errors
@click.pass_context
def format_(ctx: click.Context, as_json: bool, files: tuple[str, ...], check: bool) -> None:
    """Put mapping files in their usual form."""
    from engine import api
    from engine.show import render

    changed = []
    for file in files:
        before = render.read_text(file)
        after = api.format_mapping(before)
        if after != before:
            changed.append(file)
            if not check:
                Path(file).write_text(after, encoding="utf-8")
    if as_json:
        say(render.as_json({"changed": changed, "checked": len(files)}))
    else:
        for file in changed:
            say(f"{'would format' if check else 'formatted'} {file}")
    if check and changed:
        ctx.exit(1)


cli.add_command(diff)
cli.add_command(explain)
cli.add_command(view)
cli.add_command(new)


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for what nobody foresaw: where it happened and what to send."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    text = " ".join(str(error).split())
    say(
        f"E901 {CODES['E901']}: {kind.__name__}: {text} ({where}, engine {__version__}); please report it, "
        "with what ENGINE_DEBUG=1 prints",
        err=True,
    )


_terminated: list[int] = []


def terminate(number: int, _: object) -> NoReturn:
    """End as an interruption from the keyboard does, so that what was done is kept in order."""
    _terminated.append(number)
    raise KeyboardInterrupt


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, terminate)
    gc.set_threshold(100_000, 20, 100)  # plans are large and hold hardly any cycles to look for
    if os.environ.get("ENGINE_DEBUG") != "1":
        warnings.simplefilter("ignore")  # of libraries: what a user must know is an error or a notice
        sys.excepthook = internal_error
    cli.main()


if __name__ == "__main__":
    main()
