"""Options of every command that reads or writes a checkpoint: how stores are reached."""

from __future__ import annotations

from collections.abc import Sequence

import click

from engine.commands.values import SETTING, SIZE

_FOLDERS = {"src", "out", "like", "folder", "ref"}


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


def _reach(ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, object]]) -> None:
    if pairs:
        from engine.storage.places import store_options

        shown = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in pairs}
        ctx.with_resource(store_options(shown))


def _read_ahead(ctx: click.Context, param: click.Parameter, window: int | None) -> None:
    if window is not None:
        from engine.storage.places import store_options

        ctx.with_resource(store_options(window=window))
