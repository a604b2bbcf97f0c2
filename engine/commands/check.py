"""Commands that check what is there: two checkpoints, an output, what a run left, a mapping."""

from __future__ import annotations

from typing import Any

import click

from engine.commands.options import reports_errors, verifying_options
from engine.commands.say import say


@click.command()
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
    from engine import api
    from engine.commands import progress
    from engine.show import render

    with progress.progress(show=not (quiet or as_json), doing="comparing") as listener:
        done = api.compare(out, ref, progress=listener)
    if as_json:
        say(render.as_json(done.as_dict()))
    elif not quiet:
        say(render.comparison(done.as_dict()))
    if not done.same(allow_cast=allow_cast):
        ctx.exit(1)


@click.command()
@click.argument("out", metavar="OUT")
@verifying_options
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but problems.")
@reports_errors
@click.pass_context
def verify(ctx: click.Context, as_json: bool, /, out: str, quiet: bool, **options: Any) -> None:
    """Check an output against its own manifest, byte for byte, and in other ways if asked.

    With --src and --mapping, against the training checkpoint; with --load, whether transformers
    runs it; with --src and --logits, against a forward pass as training computes it.
    """
    from engine import api
    from engine.commands import progress
    from engine.show import render

    with progress.progress(show=not (quiet or as_json), doing="verifying") as listener:
        found = api.verify(out, progress=listener, **options)
    if as_json:
        say(render.as_json(found.as_dict()))
    elif found.problems or not quiet:
        say(render.verified(found))
    if found.problems:
        ctx.exit(1)


@click.command()
@click.argument("out", metavar="OUT")
@reports_errors
def clean(as_json: bool, /, out: str) -> None:
    """Remove what interrupted runs left beside an output."""
    from engine import api
    from engine.show import render

    removed = [str(path) for path in api.clean(out)]
    if as_json:
        say(render.as_json({"removed": removed}))
    else:
        say("\n".join(f"removed {path}" for path in removed) or "nothing to remove")


@click.command()
@click.argument("mappings", nargs=-1, metavar="[MAPPINGS]...")
@click.option("--all", "every", is_flag=True, help="Prove every bundled mapping.")
@click.option("--mutants", is_flag=True, help="Perturb each rule too, and say what would have caught it.")
@click.option("--write-meaning", "--write-facts", "write_meaning", is_flag=True,
              help="First commit what each mapping means now as what it should mean.")  # fmt: skip
@reports_errors
@click.pass_context
def prove(
    ctx: click.Context, as_json: bool, mappings: tuple[str, ...], every: bool, mutants: bool, write_meaning: bool
) -> None:
    """Prove mappings total, injective and invertible in every layout, no checkpoint needed.

    Exits with 0 when everything holds, else with 1.
    """
    from engine import api
    from engine.show import render, render_prove

    if bool(mappings) == every:
        raise click.UsageError("Give mappings to prove, or --all.")
    if write_meaning:
        api.write_meanings(mappings)
    proofs = api.prove(mappings, mutants=mutants)
    say(render.as_json(render_prove.proofs_data(proofs)) if as_json else render_prove.proofs(proofs))
    if not all(proof.holds for proof in proofs):
        ctx.exit(1)
