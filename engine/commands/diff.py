"""`engine diff`: two mapping files, or mapping files of two git revisions."""

from __future__ import annotations

import click

from engine.commands.options import reports_errors
from engine.commands.say import say

_PATHS = "engine.diff.paths"


class DiffCommand(click.Command):
    """What stands after `--` are paths, as git has it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_PATHS] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


@click.command(cls=DiffCommand, options_metavar="[OPTIONS]")
@click.argument("old", metavar="OLD|REVISION")
@click.argument("new", metavar="[NEW|REVISION] [-- FILES...]", required=False)
@click.option("--format", "form", type=click.Choice(["text", "markdown", "json", "github"]), default="text",
              show_default=True, help="How to print it; github is for a pull request's comment.")  # fmt: skip
@click.option("--exit-code", is_flag=True, help="Exit with 1 when there are differences.")
@reports_errors
@click.pass_context
def diff(ctx: click.Context, as_json: bool, /, old: str, new: str | None, form: str, exit_code: bool) -> None:
    """Say what changes between mappings: in their rules, and in where every tensor goes.

    OLD and NEW are mapping files or names of bundled ones. `engine diff main -- mappings/x.yaml`
    compares a git revision with the working tree, `engine diff v1 v2` two revisions; without FILES,
    all mappings below mappings/.
    """
    from engine import api
    from engine.proving.mapping_diff import is_mapping
    from engine.show.render_diff import rendered

    paths: tuple[str, ...] = ctx.meta.get(_PATHS, ())
    if new is not None and not paths and _PATHS not in ctx.meta and is_mapping(old):
        found = api.diff(old, new)
    elif new is not None and not paths and is_mapping(new):
        found = api.diff(old, None, [new])  # `engine diff main x.yaml`
    else:
        found = api.diff(old, new, paths, revisions=True)
    say(rendered(found, "json" if as_json else form))
    if exit_code and found:
        ctx.exit(1)
