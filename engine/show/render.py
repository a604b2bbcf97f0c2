"""What the terminal shows: facts of the API as text. No decisions are made here.

Tables are plain aligned text, never cut to the terminal's width, so that they can be grepped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from engine.errors import EngineError, Place, escaped_json, visible
from engine.language.documents import plain

if TYPE_CHECKING:
    from engine.comparing.verify import Verified
    from engine.language.model import Mapping as MappingFile
    from engine.run.execute import Report

T = TypeVar("T")


def as_json(data: Any) -> str:
    """JSON that any terminal can show: what is not to be seen is an escape, so are bytes of a path that are no text."""
    return escaped_json(json.dumps(data, indent=2, ensure_ascii=False))


def shown(value: Any) -> Any:
    """Data in which every text is one visible line, whatever a checkpoint, a mapping or a file's name holds."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {shown(key): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(shown, value)) if type(value) in (list, tuple) else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: shown(getattr(value, one.name)) for one in fields(value) if one.init})
    return value


def shows(render: Callable[[T], str]) -> Callable[[T], str]:
    """Make a function that turns facts into text show nothing of them but what is visible."""

    @wraps(render)
    def safe(facts: T) -> str:
        return render(shown(facts))

    return safe


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EngineError("E305", "a file cannot be read", place=Place(str(path)), got=reason,
                          fix="Check the path.") from error  # fmt: skip


def amount(nbytes: float) -> str:
    """Bytes as people say them, in powers of 1000 as file sizes are given.

    >>> amount(999), amount(14_482_000_000)
    ('999 B', '14.5 GB')
    """
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    units = ["kB", "MB", "GB", "TB"]
    nbytes /= 1000
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop(0)
    return f"{nbytes:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.42), duration(75), duration(3700)
    ('0.4 s', '1 min 15 s', '1 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "file"), count(1200, "file")
    ('1 file', '1,200 files')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, indent: str = "  ") -> list[str]:
    """Aligned columns; those whose cells are all numbers are aligned right."""
    cells = [list(map(str, row)) for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(c.replace(",", "").isdecimal() for c in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return (indent + "  ".join(padded)).rstrip()

    return [click.style(line(header), dim=True), *(line(row) for row in cells)]


def _title(text: str) -> str:
    return click.style(text, bold=True)


def error(problem: EngineError) -> str:
    """An error as it prints itself, its code in red."""
    return click.style(problem.code, fg="red", bold=True) + str(problem).removeprefix(problem.code)


@shows
def report(done: Report) -> str:
    """What a run did."""
    rate = f", {amount(done.bytes / done.seconds)}/s" if done.seconds > 0 else ""
    lines = [
        f"{click.style('converted', fg='green')} {count(done.tensors, 'tensor')}, {amount(done.bytes)} "
        f"in {duration(done.seconds)}{rate}",
        f"  to {done.out}",
    ]
    if done.variants:
        lines.append("  as " + ", ".join(f"{name}={choice}" for name, choice in done.variants.items()))
    lines += [f"{click.style('note', fg='yellow')} {notice}" for notice in done.notices]
    return "\n".join(lines)


@shows
def plan(facts: Mapping[str, Any]) -> str:
    """The plan: source, decisions with their evidence, rules with layers folded, outputs."""
    mapping, layout, source = facts["mapping"], facts["layout"], facts["source"]
    lines = [
        f"{_title(mapping['name'])} {mapping['version']}, layout {layout['name']} ({layout['mode']})",
        f"  {source['folder']}: {_grid(source['ranks'], source['chunks'])}, "
        f"{count(source['tensors'], 'tensor')} in {count(source['files'], 'file')}, {amount(source['bytes'])}",
        "  " + ", ".join(f"{axis} {size}" for axis, size in facts["sizes"].items()),
    ]
    if facts["variants"]:
        lines += ["", _title("decisions")]
        lines += table(
            ("variant", "choice", "by", "because"),
            [(name, d["choice"], d["how"], d["evidence"] or "") for name, d in facts["variants"].items()],
        )
    if facts.get("options"):
        lines += ["", _title("options"), *(f"  {n} = {_scalar(v)}" for n, v in facts["options"].items())]
    lines += ["", _title("rules")]
    lines += table(
        ("target", "shape", "dtype", "tensors", "shards", "from", "rule"),
        [
            (
                row["target"],
                " × ".join(map(str, row["shape"])) or "scalar",
                row["dtype"],
                str(row["count"]),
                str(row["sources"]),
                row["source"],
                _rule_label(row),
            )
            for row in facts["rules"]
        ],
    )
    replicas = facts.get("replicas", {})
    if replicas.get("sets"):
        lines.append(f"  {count(replicas['tensors'], 'replica')} in {count(replicas['sets'], 'set')} will be compared")
    for name, why in facts.get("ignored", {}).items():
        lines.append(f"  ignored {name}: {why}")
    lines += ["", _title("outputs")]
    lines += table(
        ("file", "tensors", "size"),
        [(o["file"], str(o["tensors"]), amount(o["bytes"])) for o in facts["outputs"]],
    )
    lines.append(
        f"  {count(facts['tensors'], 'tensor')}, {amount(facts['bytes'])}; "
        f"peak memory about {facts['predicted_memory'] / 2**20:.0f} MiB"
    )
    lines += [f"{click.style('note', fg='yellow')} {notice}" for notice in facts.get("notices", ())]
    return "\n".join(lines)


@shows
def comparison(facts: Mapping[str, Any]) -> str:
    """Two checkpoints compared: verdicts with layers folded, what they mean, and a count."""
    colours = {"equal": "green", "cast": "green", "padded": "yellow"}
    rows = [
        (row["name"], str(row["tensors"]), row["verdict"], row["out"], row["ref"], _deviation(row))
        for row in facts["rows"]
    ]
    lines = [f"{_title(facts['out'])} against {_title(facts['ref'])}"]
    lines += table(("tensor", "tensors", "verdict", "here", "reference", "how"), rows)
    if facts["diagnoses"]:
        lines += ["", *(f"{click.style('means', fg='yellow')} {text}" for text in facts["diagnoses"])]
    counts = [click.style(f"{n:,} {kind}", fg=colours.get(kind, "red")) for kind, n in facts["counts"].items()]
    return "\n".join([*lines, "", ", ".join(counts) or "no tensors"])


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


@shows
def checkpoint(facts: Mapping[str, Any]) -> str:
    """What a checkpoint folder is, and which mappings fit."""
    kind = f", {facts['model_type']}" if facts.get("model_type") else ""
    types = ", ".join(f"{name} {amount(size)}" for name, size in facts["dtypes"].items())
    lines = [
        f"{_title(facts['folder'])}: {facts['layout']} ({facts['mode']}){kind}",
        f"  ranks     {_grid(facts['ranks'], facts['chunks'])}",
        f"  weights   {count(facts['tensors'], 'tensor')} in {count(facts['files'], 'file')}, "
        f"{amount(facts['bytes'])} ({types})",
    ]
    if facts.get("stages"):
        chunked = facts["chunks"] > 1
        stages = []
        for stage in facts["stages"]:
            told = [f"{dim}{rank}" for dim, rank in stage.items() if dim not in ("chunk", "first", "layers")]
            told += [f"chunk {stage['chunk']}"] if chunked else []
            stages.append(f"{' '.join(told) or 'one stage'}: {_layers(stage)}")
        lines.append("  layers    " + "; ".join(stages))
    for label in ("missing", "uneven", "unknown"):
        if facts.get(label):
            lines.append(f"  {label:<9} {', '.join(map(str, facts[label]))}")
    if facts.get("skipped"):
        lines.append(f"  skipped   {count(len(facts['skipped']), 'file')} of training state")
    lines += ["", _title("mappings")]
    fits = [m for m in facts["mappings"] if m["fits"]]
    for mapping in fits:
        lines.append(f"  {click.style('fits', fg='green')}  {mapping['name']}{_because(mapping['why'])}")
    others: dict[str, list[str]] = {}
    for mapping in facts["mappings"]:
        if not mapping["fits"]:
            others.setdefault(mapping["why"], []).append(mapping["name"])
    for why, names in others.items():
        lines.append(f"  {click.style('no', dim=True)}    {', '.join(names)}{_because(why)}")
    if fits:
        lines += ["", f"next: engine run --mapping {fits[0]['name']} --src {facts['folder']}"]
    else:
        lines += ["", f"next: engine new --src {facts['folder']} drafts a mapping"]
    return "\n".join(lines)


def _because(why: str) -> str:
    return f": {why}" if why else ""


def _layers(stage: Mapping[str, Any]) -> str:
    """
    >>> _layers({"first": 2, "layers": 3})
    '2…4'
    """
    if not stage["layers"]:
        return "none"
    last = stage["first"] + stage["layers"] - 1
    return str(last) if stage["layers"] == 1 else f"{stage['first']}…{last}"


def _grid(ranks: Mapping[str, int], chunks: int) -> str:
    text = " × ".join(f"{name} {size}" for name, size in ranks.items()) or "one rank"
    return f"{text}, {chunks} chunks" if chunks > 1 else text


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def findings_data(found: Sequence[Any]) -> dict[str, Any]:
    """Lint findings, JSON-ready."""
    return {
        "findings": [
            {
                "code": f.code,
                "severity": f.severity,
                "place": None if f.place is None else str(f.place),
                "message": f.message,
                "fix": f.fix,
            }
            for f in found
        ]
    }


@shows
def findings(found: Sequence[Any]) -> str:
    """Lint findings one under another, and how many."""
    lines: list[str] = []
    for finding in found:
        colour = "red" if finding.severity == "error" else "yellow"
        place = f"{finding.place}: " if finding.place is not None else ""
        lines.append(f"{place}{click.style(finding.code, fg=colour, bold=True)} {finding.message}")
        if finding.fix:
            lines.append(f"  {finding.fix}")
    errors = sum(f.severity == "error" for f in found)
    rest = len(found) - errors
    if not found:
        lines.append(click.style("no findings", fg="green"))
    else:
        lines.append(f"{count(errors, 'error')}, {count(rest, 'warning')}")
    return "\n".join(lines)


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
    lines = [f"{told}: as they were written", f"  content {found.content_id or 'without digests'}"]
    if not found.manifest:
        lines = ["no manifest to compare with"]
    more = [one.summary() for one in (found.source, found.model, found.logits) if one is not None]
    if found.problems:
        return "\n".join([*found.problems[:50], *more, f"{count(len(found.problems), 'problem')} in {told}"])
    return "\n".join([*lines, *more])
