"""Commands that write checkpoints, and `plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import engine
from engine.commands import progress
from engine.commands.completion import folders
from engine.commands.options import (
    CUT,
    QUIET,
    RANK_FLAGS,
    SAVED,
    WRITING,
    asks,
    chosen,
    given,
    of_job,
    reports_errors,
)
from engine.commands.progress import logged
from engine.commands.say import answer
from engine.errors import visible
from engine.planning.given import amount
from engine.planning.request import JOBS
from engine.show.render import render
from engine.show.text import quoted

if TYPE_CHECKING:
    from engine.planning.model import Plan
    from engine.run.execute import Report


def write(
    as_json: bool,
    command: str,
    quiet: bool,
    log_file: str | None,
    then: Callable[[str], Sequence[str]] = lambda out: (f"engine inspect {out}",),
    **asked: Any,
) -> None:
    """Run an API function that writes a checkpoint, with progress and a log; print the result, and what to do next."""
    functions: dict[str, Callable[..., Report]] = {
        "run": engine.api.convert,
        "run --plan": engine.api.run_plan,
        "reverse": engine.api.reverse,
        "reshard": engine.api.reshard,
    }
    out = log_file and engine.api.kept(asked.get("out"), asked.get("src"))[0]
    try:
        with (
            logged(log_file, command, asked, out) as log,
            progress.progress(show=not (quiet or as_json), also=None if log is None else log.progress) as listener,
        ):
            report = functions[command](**asked, progress=listener)
            if log is not None:
                log.event("finished", **report.as_dict())
    except KeyboardInterrupt:
        left = engine.api.kept(asked.get("out"), asked.get("src"))
        raise click.Abort(f"interrupted: {render('kept.txt', out=quoted(left[0]), partial=left[1])}") from None
    text = partial(render, "report.txt", done=report, then=then(quoted(report.out)))
    answer(as_json, report.as_dict(), text, quiet=quiet)


@click.command()
@asks(*SAVED)
@click.option(
    "--plan", "saved", metavar="FILE", help="Run a plan saved by `engine plan -o`, if nothing has changed since."
)
@click.option("--out", "-o", metavar="DIR", help="The folder to write.  [default: SRC-hf]")
@asks("tokenizer", "code")
@WRITING
@reports_errors
@click.pass_context
def run(ctx: click.Context, as_json: bool, /, saved: str | None, **options: Any) -> None:
    """Convert a training checkpoint to Hugging Face.

    The output is complete when the command ends, or does not exist. Without --mapping, the only
    mapping that fits is used; if several fit, they are listed.

    \b
    Examples:
      engine run --src ckpt/20000
      engine run -m internlm2-chat-7b -s ckpt/20000 -o hf --dtype bf16
    """
    said = next((flag for name, flag in given(ctx).items() if name in SAVED), None)
    if saved is not None and said:
        raise click.UsageError(f"--plan already contains {said}; give one or the other", ctx)
    if saved is not None:
        how = {name: value for name, value in options.items() if name not in SAVED}
        write(as_json, "run --plan", path=saved, then=lambda out: (f"engine verify {out}",), **how)
        return
    silent = options["quiet"] or as_json
    options["mapping"] = chosen(options["mapping"], options["src"], options["config"], quiet=silent)
    same = "".join(f" --{name} {quoted(options[name])}" for name in ("mapping", "src", "config") if options[name])
    same += "".join(f" --set {quoted(f'{name}={value}')}" for name, value in options["settings"].items())
    write(
        as_json,
        "run",
        then=lambda out: (
            f"engine verify {out}{same}   (every tensor against the checkpoint)",
            f"hf upload ORG/NAME {out}   (publishes it)",
        ),
        **options,
    )


@click.command()
@asks(*SAVED)
@click.option(
    "--for", "job", type=click.Choice(list(JOBS)), default="run", show_default=True, help="The command to plan."
)
@RANK_FLAGS
@asks("ranks", "chunks", "mode", "like", "lossy")
@click.option("--out", "-o", metavar="FILE", help="Save the plan, for `engine run --plan FILE`.")
@click.option("--overwrite", is_flag=True, help="Replace a plan that was saved there before.")
@click.option("--why", is_flag=True, help="Also show the expressions of the mapping that decided.")
@reports_errors
@click.pass_context
def plan(
    ctx: click.Context,
    as_json: bool,
    /,
    mapping: str | None,
    src: str,
    job: str,
    out: str | None,
    overwrite: bool,
    why: bool,
    **options: Any,
) -> None:
    """Show what `run`, `reverse` or `reshard` would do.

    Reads headers and configurations, but no tensor data.

    \b
    Examples:
      engine plan -m internlm2-7b -s ckpt/20000
      engine plan -m internlm2-7b -s ckpt/20000 -o plan.json && engine run --plan plan.json
      engine plan --for reverse -m internlm2-7b -s hf --tp 4 -o plan.json
    """
    from engine.explaining.describe import own_sizes  # late, as it is slow to import

    options = of_job(ctx, job, options)
    if mapping is None and JOBS[job].reads != "training":
        raise click.UsageError("Missing option '--mapping': only a training checkpoint shows which one fits", ctx)
    mapping = chosen(mapping, src, options["config"], quiet=as_json)
    if out is not None:
        made = engine.api.save_plan(out, mapping, src, job=job, overwrite=overwrite, **options)
    else:
        plans: dict[str, Callable[..., Plan]] = {
            "run": engine.api.plan,
            "reverse": engine.api.plan_reverse,
            "reshard": engine.api.plan_reshard,
        }
        made = plans[job](mapping, src, **options)
    facts = engine.api.describe_plan(made)
    answer(as_json, facts, lambda: render("plan.txt", **{**facts, "sizes": own_sizes(made)}, why=why))


@click.command()
@asks("mapping", "src", required=["mapping", "src"], src="The Hugging Face checkpoint.")
@CUT
@asks("lossy")
@WRITING
@reports_errors
def reverse(as_json: bool, /, **options: Any) -> None:
    """Write a Hugging Face checkpoint as training rank files.

    The numbers of ranks default to those of --like, or to 1.

    \b
    Examples:
      engine reverse -m internlm2-7b -s hf -o ranks --tp 4 --pp 2
      engine reverse -m internlm2-7b -s hf -o ranks --like ckpt/20000
    """
    write(as_json, "reverse", **options)


@click.command()
@asks("mapping", "src", required=["mapping"])
@CUT
@asks("to")
@WRITING
@reports_errors
def reshard(as_json: bool, /, **options: Any) -> None:
    """Write a training checkpoint as files for other ranks.

    Ranks and modes default to those of --like, or of the source. With --to, a second mapping writes
    the rank files of another framework.

    \b
    Examples:
      engine reshard -m internlm2-7b -s ckpt/20000 -o tp6 --tp 6
      engine reshard -m internlm2-7b -s ckpt/20000 --to transformers -o dcp --ranks dp=8
    """
    write(as_json, "reshard", **options)


@click.command()
@click.argument("out", metavar="OUT", shell_complete=folders)
@reports_errors
def clean(as_json: bool, /, out: str) -> None:
    """Remove what interrupted runs left beside an output.

    \b
    Example:
      engine clean hf
    """
    removed = [str(path) for path in engine.api.clean(out)]
    told = "\n".join(f"removed {visible(path)}" for path in removed) or "nothing to remove"
    answer(as_json, {"removed": removed}, lambda: told)


_PLAN = click.option("--plan", "path", required=True, metavar="FILE", help="A plan that `engine plan -o` saved.")
_OUT = click.option("--out", "-o", metavar="DIR", help="The output folder.  [default: SRC-hf]")


@click.command()
@click.argument("which", metavar="[K/N]", required=False)
@_PLAN
@_OUT
@asks("workers", "max_memory")
@QUIET
@reports_errors
def part(as_json: bool, /, which: str | None, path: str, out: str | None, quiet: bool, **options: Any) -> None:
    """Write one of N parts of a saved plan.

    Parts run at any time, on any machines that can reach the plan, the checkpoint and the output; nothing is
    visible before `engine commit`. Without K, it is taken from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX.
    An interrupted part can be run again; a finished one returns at once.

    \b
    Examples:
      engine part 3/8 --plan plan.json -o hf
      sbatch --array=1-8 --wrap "engine part --plan plan.json -o hf"
    """
    with progress.progress(show=not (quiet or as_json), also=None) as listener:
        nbytes = engine.api.part(path, which or "", out, progress=listener, **options)
    told = f"wrote {amount(nbytes)}" if nbytes else "this part was done already"
    to = f" --out {quoted(out)}" if out else ""
    text = f"{told}\nnext: engine commit --plan {quoted(path)}{to}   (when all parts are done)"
    answer(as_json, {"bytes": nbytes}, lambda: text, quiet=quiet)


@click.command()
@_PLAN
@_OUT
@asks("overwrite", "tokenizer", "code")
@QUIET
@reports_errors
def commit(as_json: bool, /, path: str, out: str | None, quiet: bool, **options: Any) -> None:
    """Join all parts into the output.

    Checks that every part is there and belongs to the same plan, writes what remains, and puts the output in place.

    \b
    Example:
      engine commit --plan plan.json -o hf
    """
    report = engine.api.commit(path, out, **options)
    text = partial(render, "report.txt", done=report, then=[f"engine verify {quoted(report.out)}"])
    answer(as_json, report.as_dict(), text, quiet=quiet)
