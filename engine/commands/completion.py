"""Shell completion: of mapping names, files, folders, codes and settings; and the script for a shell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_ENGINE_COMPLETE"


def script(shell: str, cli: click.Command) -> str:
    """The script that a shell evaluates to complete the command line."""
    kind = get_completion_class(shell)
    if shell == "bash" or kind is None:  # click's own script drops names beside files, and values after `=`
        return Path(__file__).with_suffix(".bash").read_text("utf-8")
    return kind(cli, {}, "engine", _VARIABLE).source()


def paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders."""
    return [CompletionItem(incomplete, type="file")]


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders."""
    return [CompletionItem(incomplete, type="dir")]


def mapping_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of mappings, and files."""
    from engine.language.search import list_names, spelled

    names = [name for name in dict.fromkeys(map(spelled, list_names())) if name.startswith(incomplete)]
    return [*map(CompletionItem, names), *paths(ctx, param, incomplete)]


def codes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Error and lint codes, with their titles."""
    from engine.explaining.codes import list_codes

    return [CompletionItem(code, help=text) for code, text in list_codes().items() if code.startswith(incomplete)]


def settings(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`NAME=VALUE` for the variants and options of the mapping that was given before."""
    from engine.errors import EngineError
    from engine.language.mapping_file import load_mapping

    try:
        found = load_mapping(ctx.params.get("mapping") or "")
    except (EngineError, OSError):
        return []

    def pairs() -> Iterator[tuple[str, str]]:
        for variant in found.variants.values():
            yield from ((f"{variant.name}={choice}", variant.help) for choice in variant.choices)
        for option in found.options.values():
            yield from ((f"{option.name}={choice}", option.help) for choice in option.choices or ("",))

    return [CompletionItem(text, help=told) for text, told in pairs() if text.startswith(incomplete)]


BY_METAVAR = {"DIR": folders, "FILE": paths, "FILE|NAME": mapping_names, "NAME=VALUE": settings}
