"""Values on the command line: parsing, usage errors, and options for stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from engine.planning.given import DTYPES, dtype_name, parse_size

if TYPE_CHECKING:
    from click import ParamType
else:

    class ParamType(click.ParamType):  # generic since click 8.4
        def __class_getitem__(cls, _: object) -> type:
            return cls


_LONGEST_VALUE = 1000  # characters
_LARGEST = 1e30
_MOST = 1 << 20
_FOLDERS = {"src", "sources", "out", "like", "folder", "ref"}


def parse_value(text: str) -> int | float | bool | str:
    """The value of `--set NAME=VALUE`: a whole number, a number, true or false, or text.

    >>> parse_value("4096"), parse_value("1e-5"), parse_value("true"), parse_value("w2_is_up")
    (4096, 1e-05, True, 'w2_is_up')
    """
    if text in ("true", "false"):
        return text == "true"
    if len(text) > _LONGEST_VALUE:
        raise ValueError(f"a value of {len(text)} characters is too long")
    if re.fullmatch(r"[+-]?[0-9]+", text):
        value: int | float = int(text)
    elif re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        value = float(text)
    else:
        return text
    if abs(value) > _LARGEST:
        raise ValueError(f"the number {text[:40]} is larger than any setting")
    return value


def parse_pair(text: str, like: str = "region=eu-west-1") -> tuple[str, str]:
    """The name and the value of `--store-option`, both as text: a key may look like a number."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ValueError(f"`{text}` has no name and value; write it like {like}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{name}: it is not text")
    return name, value


def parse_setting(text: str) -> tuple[str, Any]:
    """The name and the value of `--set`."""
    name, value = parse_pair(text, "rotary=halves")
    try:
        return name, parse_value(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parse_workers(text: str) -> int | None:
    """A number of threads; None for `auto`."""
    from engine.run.memory import MOST_WORKERS

    if text == "auto":
        return None
    if re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= MOST_WORKERS:
        return int(text)
    raise ValueError(f"`{text}` is neither `auto` nor a number from 1 to {MOST_WORKERS}")


def parse_count(text: str) -> int:
    """A number of ranks, chunks or parts, from 1 to a limit beyond any real use."""
    if re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= _MOST:
        return int(text)
    raise ValueError(f"{text[:80]!r} is not a whole number from 1 to {_MOST:,}")


class Parsed(ParamType[Any]):
    """A value that a function parses; its ValueError becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any], known: Sequence[str] = ()) -> None:
        self.name, self._parse, self._known = name, parse, known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._known if name.startswith(incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, SETTING = Parsed("size", parse_size), Parsed("name=value", parse_setting)
PAIR = Parsed("name=value", parse_pair)
COUNT = Parsed("n", parse_count)
WORKERS, DTYPE = Parsed("auto|n", parse_workers), Parsed("|".join(DTYPES), dtype_name, DTYPES)


def settings_of(ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Collect `--set`; a usage error for a name that is given twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"`{name}` is set twice", ctx, param)
    return dict(pairs)


def listed(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> str | None:
    """An option that takes a list, given once or several times, as one list."""
    return ",".join(given) if given else None


def add_store_options(command: click.Command) -> None:
    """Give a command `--store-option` and `--window`, if it takes a checkpoint folder."""
    if _FOLDERS.isdisjoint(param.name for param in command.params):
        return
    command.params += [
        click.Option(
            ["--store-option"], type=PAIR, multiple=True, callback=_reach, expose_value=False,
            help="For URLs: how to reach the store, such as endpoint=URL or region=NAME; may be repeated.",
        ),
        click.Option(
            ["--window"], type=SIZE, callback=_reach, expose_value=False,
            help="For URLs: how much to read ahead.  [default: 16MiB]",
        ),
    ]  # fmt: skip


def check_reaching(ctx: click.Context, given: Mapping[str, str]) -> None:
    """A usage error for options of stores if no given path, nor one in a saved plan, is a URL."""
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
        raise click.UsageError(f"{flag} has no effect without a URL: all given paths are local", ctx)


def _reach(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Take an option of stores for as long as the command runs."""
    if value:
        from engine.storage.places import store_options

        window = param.name == "window"
        ctx.with_resource(store_options(window=value) if window else store_options(settings_of(ctx, param, value)))
