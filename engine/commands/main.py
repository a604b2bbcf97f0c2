"""The command line: each command parses, calls one function of `engine.api`, and renders.

Nothing heavy is imported here, so that `--help` and `--version` answer at once. Exit codes: 0 done;
1 the job failed or found a problem; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import codecs
import gc
import io
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from traceback import extract_tb
from types import TracebackType
from typing import Any, NoReturn

import click

from engine.commands import convert, look, review, serve
from engine.commands.say import say
from engine.commands.values import add_store_options
from engine.errors import EngineError, visible
from engine.language.version import __version__

# Sections of the help; each command is listed with the first sentence of its own help.
SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Convert": (convert.run, convert.plan, convert.reverse, convert.reshard, convert.clean),
    "Convert on many machines": (convert.part, convert.commit),
    "Inspect": (look.inspect, look.mappings, look.explain, look.view, look.verify, look.compare),
    "Write and review mappings": (
        review.new, review.lint, review.prove, review.diff, review.show, review.format_,
    ),
    "Use without converting": (serve.serve, serve.mount),
    "This program": (look.env, look.completion),
}  # fmt: skip
ALIASES = {"convert": "run"}
# Commands that are documented on another page than the others.
PAGES = {"serve": "serving", "mount": "serving", "part": "clusters", "commit": "clusters", "new": "adding-a-release",
         "completion": "editor", "format": "editor"}  # fmt: skip
EXAMPLES = """\
Examples:
  engine inspect ckpt/20000              what is this, and which mapping fits?
  engine run --src ckpt/20000            convert, if only one mapping fits
  engine run -m internlm2-chat-7b -s ckpt/20000 -o hf
  engine verify hf -m internlm2-chat-7b -s ckpt/20000
  engine explain E203                    what an error means, and what to do

Documentation: docs/commands.md shows each command with its output,
docs/troubleshooting.md says what to do when a command refuses."""

# docstrings are the text of the help
_LOST = "" if __doc__ else "Python was started with -OO or PYTHONOPTIMIZE=2, which removes most of this help.\n\n"


class Commands(click.Group):
    """Commands in sections, aliases, and exit codes in one place."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(name, name))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, self.commands))
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{c.name:<{widest}}", c.get_short_help_str(100)) for c in commands])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{_LOST}{EXAMPLES}\n")

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs |= {"standalone_mode": False, "prog_name": "engine"}
        try:
            code = super().main(*args, **kwargs)
        except click.Abort as interruption:
            say(str(interruption) or "interrupted", err=True)
            sys.exit(143 if _terminated else 130)
        except click.ClickException as error:
            error.show(shown := io.StringIO())
            usage = shown.getvalue().partition("Error: ")[0]
            say(f"{usage}Error: {visible(error.format_message())}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if extract_tb(error.__traceback__)[-1].name != "echo":  # click's function for all printing
                raise
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # else Python tries again at exit
            what, fix = "standard output cannot be written", "Free some space there."
            say(str(EngineError("E403", what, got=error.strerror, fix=fix)), err=True)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="engine", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert training checkpoints of InternLM and others to Hugging Face checkpoints and back.

    A mapping is a YAML file that says which tensor becomes which; `engine mappings` lists them all.
    """


for _commands in SECTIONS.values():
    for _command in _commands:
        add_store_options(_command)
        _command.epilog = f"{_LOST}Documentation: docs/{PAGES.get(str(_command.name), 'commands')}.md"
        cli.add_command(_command)


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for an unforeseen error: its place, and what to report."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "?" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    text = " ".join(str(error).split())
    say(
        f"E901 internal error: {kind.__name__}: {text} ({where}, engine {__version__}); please report it, "
        "with what `engine env` and ENGINE_DEBUG=1 print",
        err=True,
    )


_terminated: list[int] = []


def terminate(number: int, _: object) -> NoReturn:
    """End like an interruption from the keyboard, so that finished work is kept."""
    _terminated.append(number)
    raise KeyboardInterrupt


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def open_streams() -> None:
    """Make standard streams that accept everything a command prints.

    A stream that was closed when the program started discards its data. Else the next opened file would get its
    number, and libraries would print into that file. Characters that an encoding lacks are written as escapes that
    are also valid in JSON.
    """
    codecs.register_error("json", _escaped)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="json")


def main() -> NoReturn:
    """The console script."""
    open_streams()
    signal.signal(signal.SIGTERM, terminate)
    gc.set_threshold(100_000, 20, 100)  # plans are large, with hardly any reference cycles
    if os.environ.get("ENGINE_DEBUG") != "1":
        warnings.simplefilter("ignore")  # of libraries: the engine reports what users must know
        logging.disable()  # the same; what transformers logs holds values of configurations, as they are
        sys.excepthook = internal_error
    cli.main()


if __name__ == "__main__":
    main()
