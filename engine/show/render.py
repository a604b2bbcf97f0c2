"""What the terminal shows: facts of the API as text. No decisions are made here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from engine.errors import EngineError, counted, visible
from engine.language.documents import plain
from engine.show.render_inspect import grid
from engine.show.text import amount, duration, note, shown, shows, table, times, title

if TYPE_CHECKING:
    from engine.comparing.verify import Verified
    from engine.language.model import MappingFile
    from engine.run.execute import Report


def error(problem: EngineError) -> str:
    """An error as it prints itself, its code in red."""
    return click.style(problem.code, fg="red", bold=True) + str(problem).removeprefix(problem.code)


@shows
def report(done: Report) -> str:
    """What a run did."""
    rate = f", {amount(done.bytes / done.seconds)}/s" if done.seconds > 0 else ""
    lines = [
        f"{click.style('converted', fg='green')} {counted(done.tensors, 'tensor')}, {amount(done.bytes)} "
        f"in {duration(done.seconds)}{rate}",
        f"  to {done.out}",
    ]
    if done.kept:
        lines.append(f"  {amount(done.kept)} of it kept from the interrupted run")
    if done.variants:
        lines.append("  as " + ", ".join(f"{name}={choice}" for name, choice in done.variants.items()))
    lines += [note(notice) for notice in done.notices]
    return "\n".join(lines)


def plan(facts: Mapping[str, Any], *, why: bool = False) -> str:
    """The plan: source, decisions with their evidence, rules with layers folded, outputs.

    Args:
        why: also the expressions that decided.
    """
    facts = shown(facts)
    mapping, layout, source = facts["mapping"], facts["layout"], facts["source"]
    lines = [
        f"{title(mapping['name'])} {mapping['version']}, layout {layout['name']} ({layout['mode']})",
        f"  {source['folder']}: {grid(source['ranks'], source['chunks'])}, "
        f"{counted(source['tensors'], 'tensor')} in {counted(source['files'], 'file')}, {amount(source['bytes'])}",
        "  " + ", ".join(f"{axis} {size}" for axis, size in facts["sizes"].items()),
    ]
    if facts["variants"]:
        lines += ["", title("decisions")]
        lines += table(
            ("variant", "choice", "by", "because"),
            [(name, d["choice"], d["how"], d["evidence"] or "") for name, d in facts["variants"].items()],
        )
        if why:
            lines += [f"    {name}: {d['expression']}" for name, d in facts["variants"].items() if d["expression"]]
    if facts.get("options"):
        lines += ["", title("options"), *(f"  {n} = {_scalar(v)}" for n, v in facts["options"].items())]
    lines += ["", title("rules")]
    lines += table(
        ("target", "shape", "dtype", "tensors", "shards", "from", "rule"),
        [
            (
                row["target"],
                times(row["shape"]),
                row["dtype"],
                row["count"],
                row["sources"],
                row["source"],
                _rule_label(row),
            )
            for row in facts["rules"]
        ],
    )
    replicas = facts.get("replicas", {})
    if replicas.get("sets"):
        told = f"{counted(replicas['tensors'], 'replica')} in {counted(replicas['sets'], 'set')}"
        lines.append(f"  {told} will be compared")
    for name, why in facts.get("ignored", {}).items():
        lines.append(f"  ignored {name}: {why}")
    lines += ["", title("outputs")]
    lines += table(
        ("file", "tensors", "size"),
        [(o["file"], str(o["tensors"]), amount(o["bytes"])) for o in facts["outputs"]],
    )
    lines.append(
        f"  {counted(facts['tensors'], 'tensor')}, {amount(facts['bytes'])}; "
        f"peak memory about {facts['predicted_memory'] / 2**20:.0f} MiB"
    )
    lines += [note(notice) for notice in facts.get("notices", ())]
    return "\n".join(lines)


@shows
def comparison(facts: Mapping[str, Any]) -> str:
    """Two checkpoints compared: verdicts with layers folded, what they mean, and a count."""
    colours = {"equal": "green", "cast": "green", "padded": "yellow"}
    rows = [
        (row["name"], str(row["tensors"]), row["verdict"], row["out"], row["ref"], _deviation(row))
        for row in facts["rows"]
    ]
    lines = [f"{title(facts['out'])} against {title(facts['ref'])}"]
    lines += table(("tensor", "tensors", "verdict", "here", "reference", "how"), rows)
    if facts["diagnoses"]:
        lines += ["", *(f"{click.style('means', fg='yellow')} {text}" for text in facts["diagnoses"])]
    if facts["differences"]:
        lines += ["", *(_difference(one) for one in facts["differences"])]
    if facts["unchecked"]:
        lines += ["", *map(note, facts["unchecked"])]
    counts = [click.style(f"{n:,} {kind}", fg=colours.get(kind, "red")) for kind, n in facts["counts"].items()]
    return "\n".join([*lines, "", ", ".join(counts) or "no tensors"])


def _difference(one: Mapping[str, Any]) -> str:
    """A difference in something other than tensors, and what it does."""
    colour = "yellow" if one["grade"] == "told" else "red"
    told = f"{one['what']} is {one['out']} here, {one['ref']} in the reference: {one['effect']}"
    return f"{click.style(one['part'], fg=colour)} {told}"


def _deviation(row: Mapping[str, Any]) -> str:
    """How the tensors of a row differ; where elements were counted, how many and how far."""
    if row["differing"] is None:
        return str(row["note"])
    note = f"{row['note']}; " if row["note"] else ""
    largest = row["largest_deviation"]
    by = largest if isinstance(largest, str) else f"{largest:.3g}"
    first = row["first_difference"]
    return f"{note}{row['differing']:,} of {row['elements']:,} elements, by up to {by}, first at {first['index']}"


def _rule_label(row: Mapping[str, Any]) -> str:
    """The rule's name if it has one, with its file and line, and what it does to values."""
    place = ":".join(str(row["place"]).rsplit("/", 1)[-1].split(":")[:2])
    name = "" if "." in row["rule"] else f"{row['rule']} "
    return f"{name}{place}" + (f", {row['transform']}" if row.get("transform") else "")


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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


@shows
def verified(found: Verified) -> str:
    """What `engine verify` found."""
    told = f"{found.tensors} tensors and {found.files} files, {amount(found.nbytes)}"
    whole = found.read == found.tensors
    lines = [f"{told}: {'' if whole else 'names, types and shapes '}as they were written"]
    lines += [f"  content {found.content_id}"] if found.content_id else []
    if not found.manifest:
        lines = ["no manifest to compare with"]
    lines += [one.summary() for one in (found.source, found.model, found.logits) if one is not None]
    notes = [f"{click.style('in the tensors', fg='yellow')} {one}" for one in found.values]
    notes += [f"{click.style('not checked', fg='yellow')} {one}" for one in found.unchecked]
    if found.problems:
        more = lines[2:] if found.manifest and found.content_id else lines[1:]
        return "\n".join([*found.problems[:50], *more, *notes, f"{counted(len(found.problems), 'problem')} in {told}"])
    return "\n".join([*lines, *notes])


def kept(out: str, partial: Sequence[tuple[str, int]]) -> str:
    """What an interrupted or failed run left, and what can be done with it."""
    if not partial:
        return "nothing was written"
    folders = ", ".join(f"{visible(path)} ({amount(nbytes)})" for path, nbytes in partial)
    return (
        f"what was written is kept in {folders}\n"
        "  continue  the same command with --resume\n"
        f"  remove    engine clean {shlex.quote(visible(out))}"
    )


@shows
def environment(facts: Mapping[str, Any]) -> str:
    """Versions and system, a line each."""
    widest = max(map(len, facts))
    return "\n".join(f"{name:<{widest}}  {value}" for name, value in facts.items())
