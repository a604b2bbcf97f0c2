"""Facts of the API as text, by the templates of this room. No decisions are made here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.assets.model_card import environment
from engine.errors import EngineError, counted, rounded, span
from engine.language.documents import grouped, plain
from engine.planning.given import amount
from engine.show.text import Styled, duration, note, quoted, shown, table, times, title

if TYPE_CHECKING:
    from jinja2 import Environment

    from engine.discover.inspect import Inspection
    from engine.language.model import MappingFile
    from engine.proving.proof import Mutant

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, /, **facts: Any) -> Styled:
    """The text that a template makes of facts, of which each is shown as one visible line."""
    return Styled(_templates().get_template(f"{name}.j2").render(shown(facts)).removesuffix("\n"))


@cache
def _templates() -> Environment:
    made = environment(TEMPLATES)
    made.globals.update(row=_row)
    made.filters.update(
        amount=amount, counted=counted, duration=duration, grid=_grid, note=note, pairs=_pairs,
        rounded=rounded, sizes=sizes, span=span, stage=_stage, style=click.style, table=_table, times=times,
        title=title,
    )  # fmt: skip
    return made


def _row(*cells: object) -> str:
    """A row of a table, for the filter below; a cell holds no tab, as facts are shown in visible characters."""
    return "\t".join(map(str, cells))


def _table(rows: str) -> str:
    """Rows, of which the first is the header, as a table that fits the terminal."""
    header, *cells = (line.split("\t") for line in rows.removesuffix("\n").split("\n"))
    return "".join(f"{line}\n" for line in table(header, cells))


def _pairs(facts: Mapping[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in facts.items())


def _grid(facts: Mapping[str, Any]) -> str:
    """
    >>> _grid({"ranks": {"tp": 2, "pp": 3}, "chunks": 2}), _grid({"ranks": {}, "chunks": 1})
    ('tp 2 × pp 3, 2 chunks', 'any number of ranks')
    """
    text = " × ".join(f"{name} {size}" for name, size in facts["ranks"].items()) or "any number of ranks"
    return f"{text}, {facts['chunks']} chunks" if facts["chunks"] > 1 else text


def sizes(found: Mapping[str, int]) -> str:
    """
    >>> sizes({"layer": 32, "hidden": 4096, "groups": 8})
    '32 layers, hidden 4096, 8 key/value heads'
    """
    several = {"layer": "layers", "heads": "heads", "groups": "key/value heads", "expert": "experts"}
    told = {"vocab": "vocabulary"}
    return ", ".join(f"{n} {several[axis]}" if axis in several else f"{told.get(axis, axis)} {n}"
                     for axis, n in found.items())  # fmt: skip


def _stage(one: Mapping[str, Any], chunked: bool) -> str:
    """
    >>> _stage({"pp": 1, "chunk": 0, "first": 2, "layers": 3}, False)
    'pp1: layers 2…4'
    """
    told = [f"{dim}{rank}" for dim, rank in one.items() if dim not in ("chunk", "first", "layers")]
    told += [f"chunk {one['chunk']}"] if chunked else []
    layers = span((one["first"], one["first"] + one["layers"])) if one["layers"] else ""
    held = f"layer{'s' if one['layers'] > 1 else ''} {layers}" if layers else "no layer"
    return f"{' '.join(told) or 'one stage'}: {held}"


def error(problem: EngineError) -> Styled:
    """An error as it prints itself, its code in red; that of a warning in yellow."""
    colour = "red" if problem.severity == "error" else "yellow"
    return Styled(click.style(problem.code, fg=colour, bold=True) + str(problem).removeprefix(problem.code))


_CHOICE = {
    "target": "the architecture to load it as; remote code needs `trust_remote_code`",
    "chat": "a base model has no chat template; no file of the checkpoint tells",
    "stops at": "the tokens that end an answer",
    "length": "the longest sequence to serve",
}


def inspection(found: Inspection, config: str | None = None, *, every: bool = False) -> Styled:
    """What a folder is, and what to do next.

    Args:
        config: the file of the target's configuration, where one was given.
        every: also why each mapping does not fit.
    """
    others = [fit for fit in found.fits if not fit.fits]
    sized = [fit for fit in others if fit.differing]
    axes = list(dict.fromkeys(axis for fit in sized for axis in fit.differing))
    here = {axis: got for fit in sized for axis, (got, _) in fit.differing.items()}
    alike = grouped((tuple(fit.differing.get(axis, ("", "same"))[1] for axis in axes), fit.name) for fit in sized)
    rows = [("(this checkpoint)", *here.values()), *((", ".join(names), *row) for row, names in alike.items())]
    reasons = grouped((fit.why, fit.name) for fit in others if not fit.differing)
    given = "" if config is None else f" --config {quoted(config)}"
    step = quoted(f"{found.folder.rstrip('/')}/{found.step}") if found.kind == "steps" else ""
    return render(f"{found.kind}.txt", found=found, folder=quoted(found.folder), step=step, given=given, every=every,
                  others=others, axes=axes, sized=rows, reasons=reasons, choice=_CHOICE)  # fmt: skip


def proofs(found: Sequence[Any]) -> Styled:
    """Proofs one under another, and how many hold."""

    def caught_by(mutants: Sequence[Mutant]) -> dict[str, Counter[str]]:
        """What caught the mutants of each kind, and how many."""
        pairs = grouped((one.kind, one.caught_by or "nothing") for one in mutants)
        return {kind: Counter(by) for kind, by in pairs.items()}

    words = {True: ("proved", "green"), False: ("fails", "red"), None: ("open", "yellow")}
    return render("proofs.txt", found=found, words=words, caught_by=caught_by)


def resolved(mapping: MappingFile) -> str:
    """A mapping after inheritance, as YAML, headed by the files it came from."""
    import yaml

    data = plain(mapping.resolved)
    if isinstance(data.get("rules"), dict):  # by name, as merging needs them; a file has a list
        data["rules"] = [_rule(name, rule) for name, rule in data["rules"].items()]
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return f"# {mapping.name} {mapping.version}, from {' < '.join(mapping.files)}\n{body}"


def _rule(name: str, rule: dict[str, Any]) -> dict[str, Any]:
    """A rule as a file writes it: a name that is only its first source goes unsaid."""
    sources = rule.get("source")
    first = sources[0] if isinstance(sources, list) and sources else sources
    rest = {key: value for key, value in rule.items() if key != "name"}
    return rest if name == first else {"name": name, **rest}
