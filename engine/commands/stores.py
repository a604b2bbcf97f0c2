"""Options of every command that reads or writes a checkpoint: how stores are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from engine.commands.values import SETTING, SIZE

_FOLDERS = {"src", "sources", "out", "like", "folder", "ref"}


def add_store_options(command: click.Command) -> None:
    """Give a command `--store-option` and `--window`, if it takes a checkpoint folder."""
    if _FOLDERS.isdisjoint(param.name for param in command.params):
        return
    command.params += [
        click.Option(
            ["--store-option"], type=SETTING, multiple=True, callback=_reach, expose_value=False,
            help="For URLs: how to reach the store, like endpoint=URL or region=NAME; may be repeated.",
        ),
        click.Option(
            ["--window"], type=SIZE, callback=_read_ahead, expose_value=False,
            help="For URLs: how much to read ahead.  [default: 16MiB]",
        ),
    ]  # fmt: skip


def check_reaching(ctx: click.Context, given: Mapping[str, str]) -> None:
    """A usage error for an option of stores where no path that was given, or that a saved plan holds, is a URL."""
    flag = given.get("store_option") or given.get("window")
    if flag is None:
        return
    from engine.api.plans import read_saved
    from engine.storage.places import is_url

    plan = ctx.params.get("path") or ctx.params.get("saved")
    asked = read_saved(plan).request if plan else None
    places: list[object] = [] if asked is None else [asked.src, asked.like, asked.config]
    for value in ctx.params.values():
        places += value if isinstance(value, tuple) else [value]
    if not any(is_url(one) for one in places if isinstance(one, str)):
        raise click.UsageError(f"{flag} has no effect without a URL: all that is given lies in folders", ctx)


def _reach(ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, object]]) -> None:
    if pairs:
        from engine.storage.places import store_options

        shown = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in pairs}
        ctx.with_resource(store_options(shown))


def _read_ahead(ctx: click.Context, param: click.Parameter, window: int | None) -> None:
    if window is not None:
        from engine.storage.places import store_options

        ctx.with_resource(store_options(window=window))
