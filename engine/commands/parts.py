"""The commands that share a conversion out among machines."""

from __future__ import annotations

import shlex
from typing import Any

import click

from engine.commands.options import asks, reports_errors
from engine.commands.say import answer, say

_PLAN = click.option("--plan", "path", required=True, metavar="FILE", help="A plan that `engine plan -o` saved.")
_OUT = click.option("--out", "-o", metavar="DIR", help="The output folder.  [default: SRC-hf]")
_QUIET = click.option("--quiet", "-q", is_flag=True, help="Print only errors.")


@click.command()
@click.argument("which", metavar="[K/N]", required=False)
@_PLAN
@_OUT
@asks("workers", "max_memory")
@_QUIET
@reports_errors
def part(as_json: bool, /, which: str | None, path: str, out: str | None, quiet: bool, **options: Any) -> None:
    """Write one of N parts of a saved plan.

    Parts run at any time, on any machines that can reach the plan, the checkpoint and the output; nothing is
    visible before `engine commit`. Without K, the number comes from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX.
    An interrupted part can be run again; a finished one returns at once.

    \b
    Examples:
      engine part 3/8 --plan plan.json -o hf
      sbatch --array=1-8 --wrap "engine part --plan plan.json -o hf"
    """
    from engine import api
    from engine.commands import progress

    with progress.progress(show=not (quiet or as_json), also=None) as listener:
        nbytes = api.part(path, which or "", out, progress=listener, **options)
    told = f"wrote {nbytes:,} bytes" if nbytes else "this part was done already"
    if as_json or not quiet:
        answer(as_json, {"bytes": nbytes}, lambda: f"{told}\nnext: engine commit, when all parts are done")


@click.command()
@_PLAN
@_OUT
@asks("overwrite", "tokenizer", "code")
@_QUIET
@reports_errors
def commit(as_json: bool, /, path: str, out: str | None, quiet: bool, **options: Any) -> None:
    """Make the output from what all parts wrote.

    Checks that every part is there and belongs to the same plan, writes what remains, and puts the output in place.

    \b
    Example:
      engine commit --plan plan.json -o hf
    """
    from engine import api
    from engine.show import render

    report = api.commit(path, out, **options)
    if as_json:
        answer(True, report.as_dict(), str)
    elif not quiet:
        say(f"{render.report(report)}\nnext: engine verify {shlex.quote(str(report.out))}")
