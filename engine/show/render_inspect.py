"""What `engine inspect` and `engine mappings` show. No decisions are made here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from engine.errors import counted, rounded
from engine.language.documents import grouped
from engine.show.text import amount, shown, table, title

if TYPE_CHECKING:
    from engine.discover.fits import Fit
    from engine.discover.inspect import Inspection
    from engine.language.model import MappingFile

_WORDS = {"layer": "layers", "groups": "key/value heads", "vocab": "vocabulary", "expert": "experts"}
_CHOICE = {
    "target": "the architecture to load it as; remote code needs `trust_remote_code`",
    "chat": "a base model has no chat template; no file of the checkpoint tells",
    "stops at": "the tokens that end an answer",
    "length": "the longest sequence to serve",
}


def inspection(found: Inspection, config: str | None = None, *, every: bool = False) -> str:
    """What a folder is, and what to do next.

    Args:
        config: the file of the target's configuration, where one was given.
        every: also why each mapping does not fit.
    """
    kinds = {"training": _training, "whole": _whole, "steps": _steps}
    return "\n".join(
        kinds[found.kind](shown(found), "" if config is None else f" --config {shlex.quote(shown(config))}", every)
    )


def _training(found: Inspection, given: str, every: bool) -> list[str]:
    facts = found.facts
    kind = f", {facts['model_type']}" if facts.get("model_type") else ""
    lines = [
        f"{title(found.folder)}: training checkpoint, {facts['layout']} ({facts['mode']}){kind}",
        f"  ranks       {grid(facts['ranks'], facts['chunks'])}",
        *_weights(facts),
    ]
    if facts["sizes"]:
        lines.append("  sizes       " + sizes(facts["sizes"]))
    if facts["stages"]:
        lines.append("  stages      " + "; ".join(_stage(one, facts["chunks"] > 1) for one in facts["stages"]))
    lines.append("  tokenizer   " + (facts["tokenizer"] or "none here; give one to run with --tokenizer FILE"))
    if facts["config_missing"]:
        lines.append("  config      none here; which mapping fits is sure with the model's config.json")
    for label in ("uneven", "unknown"):
        if facts[label]:
            lines.append(f"  {label:<11} {', '.join(facts[label])}")
    if facts["skipped"]:
        lines.append(f"  skipped     {counted(len(facts['skipped']), 'file')} of training state")
    lines += ["", *_fits(found)]
    others = [fit for fit in found.fits if not fit.fits]
    if others and not every:
        lines.append(
            f"  {counted(len(others), 'other mapping')} {'does' if len(others) == 1 else 'do'} not fit; --all says why"
        )
    elif others:
        lines += _reasons(others)
    source = shlex.quote(found.folder)
    if facts["config_missing"]:
        lines += ["", f"next: engine inspect --config config.json {source}"]
    elif found.fitting:
        first, more = found.fitting[0], len(found.fitting) > 1
        lines += [f"  choose by {name}: {_CHOICE[name]}" for name in found.differences if more]
        asked = _asked(first)
        told = "   (filled in as said above)" if asked else ""
        lines += ["", f"next: engine run --mapping {'NAME' if more else first.name} --src {source}{given}{asked}{told}"]
    elif found.blocked:
        near = found.blocked[0]
        lines += [f"  {fit.name} would fit, but {fit.why} ({fit.code})" for fit in found.blocked]
        lines += ["", f"next: engine plan --mapping {near.name} --src {source}{given}   (says where)"]
    else:
        lines += ["", f"next: engine new --src {source}   (drafts a mapping)"]
    return lines


def _asked(fit: Fit) -> str:
    """What a person must add to a run with a mapping, and fill in: the first of what answers its question."""
    return next((" --config FILE" if one == "config" else f" --set {one}=CHOICE" for one in fit.answers), "")


def _fits(found: Inspection) -> list[str]:
    """The mappings that fit, with what tells them apart."""
    if not found.fitting:
        return [title("no mapping fits")]
    differ, missing = found.differences, found.facts["config_missing"]
    rows = [(fit.name, *(fit.traits.get(name, "") for name in differ), fit.description) for fit in found.fitting]
    lines = [title("may fit" if missing else "fits" if len(rows) == 1 else f"{len(rows)} mappings fit")]
    lines += table(("mapping", *differ, "what it is"), rows)
    lines += [f"  {fit.name}: {fit.why}" for fit in found.fitting if fit.why]
    return lines


def _reasons(others: Sequence[Fit]) -> list[str]:
    """Why each other mapping does not fit, those of one reason together."""
    lines = [title("do not fit")]
    sized = [fit for fit in others if fit.differing]
    if sized:
        axes = list(dict.fromkeys(axis for fit in sized for axis in fit.differing))
        alike = grouped((tuple(str(fit.differing.get(axis, ("", "same"))[1]) for axis in axes), fit.name)
                        for fit in sized)  # fmt: skip
        here = {axis: str(got) for fit in sized for axis, (got, _) in fit.differing.items()}
        rows = [("(this checkpoint)", *(here[axis] for axis in axes))]
        rows += [(", ".join(names), *row) for row, names in alike.items()]
        lines += table(("other sizes", *axes), rows)
    reasons = grouped((fit.why, fit.name) for fit in others if not fit.differing)
    lines += table(("others", "why"), [(", ".join(names), why) for why, names in reasons.items()]) if reasons else []
    return lines


def _whole(found: Inspection, given: str, every: bool) -> list[str]:
    facts = found.facts
    folder = shlex.quote(found.folder)
    made = f", written by the engine with {facts['made_by']}" if facts["made_by"] else ""
    lines = [
        f"{title(found.folder)}: Hugging Face checkpoint, {facts['architecture'] or facts['model_type'] or '?'}{made}",
        *_weights(facts),
        f"  tokenizer   {facts['tokenizer'] or 'none'}" + (", with a chat template" if facts["chat_template"] else ""),
        "",
        title("what can be done with it"),
    ]
    back = [facts["made_by"]] if facts["made_by"] else [fit.name for fit in found.fits]
    done = [(f"engine verify {folder}", "against its manifest")] if facts["made_by"] else []
    done.append((f"engine compare {folder} OTHER", "with another Hugging Face checkpoint"))
    if back:
        name = back[0] if len(back) == 1 else "NAME"
        done.append((f"engine reverse -m {name} -s {folder} -o RANKS --tp 2", "back to rank files"))
    for command, told in done:
        lines += [f"  {told}", f"    $ {command}"]
    if len(back) > 1:
        lines.append(f"    NAME is the family it is to be trained as: {', '.join(back)}")
    if not back:
        lines.append(f"  no bundled mapping writes model_type {facts['model_type']} back to rank files")
    return lines


def _steps(found: Inspection, given: str, every: bool) -> list[str]:
    steps = found.facts["steps"]
    words = {
        True: click.style("complete", fg="green"),
        False: click.style("not complete", fg="red"),
        None: "not looked at",
    }
    rows = [
        (s["name"], words[s["complete"]], s["layout"] or "", "" if s["bytes"] is None else amount(s["bytes"]), s["why"])
        for s in steps
    ]
    lines = [f"{title(found.folder)}: {counted(len(steps), 'checkpoint')}"]
    lines += table(("step", "files", "layout", "size", "why"), rows)
    if any(s["complete"] is None for s in steps):
        lines.append("  only the newest were looked at; --all looks at every one")
    if found.facts["newest"] is not None:
        lines += ["", f"next: engine inspect {shlex.quote(found.folder.rstrip('/') + '/' + found.facts['newest'])}"]
    return lines


def _weights(facts: Mapping[str, Any]) -> list[str]:
    types = ", ".join(f"{name} {amount(size)}" for name, size in facts["dtypes"].items())
    held = f"{counted(facts['tensors'], 'tensor')} in {counted(facts['files'], 'file')}"
    told = f"{held}, {amount(facts['bytes'])} ({types})"
    known = facts["parameters"] is not None
    return ([f"  parameters  {rounded(facts['parameters'])}"] if known else []) + [f"  weights     {told}"]


def sizes(found: Mapping[str, int]) -> str:
    """
    >>> sizes({"layer": 32, "hidden": 4096, "groups": 8})
    '32 layers, hidden 4096, 8 key/value heads'
    """
    several = {"layer", "heads", "groups", "expert"}
    return ", ".join(
        f"{n} {_WORDS.get(axis, axis)}" if axis in several else f"{_WORDS.get(axis, axis)} {n}"
        for axis, n in found.items()
    )


def _stage(one: Mapping[str, Any], chunked: bool) -> str:
    """
    >>> _stage({"pp": 1, "chunk": 0, "first": 2, "layers": 3}, False)
    'pp1: layers 2…4'
    """
    told = [f"{dim}{rank}" for dim, rank in one.items() if dim not in ("chunk", "first", "layers")]
    told += [f"chunk {one['chunk']}"] if chunked else []
    name = " ".join(told) or "one stage"
    if not one["layers"]:
        return f"{name}: no layer"
    last = one["first"] + one["layers"] - 1
    return f"{name}: layer{'' if one['layers'] == 1 else 's'} {one['first']}" + (
        f"…{last}" if one["layers"] > 1 else ""
    )


def grid(ranks: Mapping[str, int], chunks: int) -> str:
    text = " × ".join(f"{name} {size}" for name, size in ranks.items()) or "one rank"
    return f"{text}, {chunks} chunks" if chunks > 1 else text


def mappings(found: Sequence[MappingFile]) -> str:
    """Every mapping there is, releases under the families they belong to."""
    lines: list[str] = []
    families = [m for m in found if not m.expect]
    lines += [title("families"), *table(("mapping", "version", "layout", "what it is"),
              [(m.name, m.version, m.layout, m.description) for m in map(shown, families)]), ""]  # fmt: skip
    releases = [m for m in found if m.expect]
    rows = [(m.name, m.version, f"{m.expect.get('layer', '?')} × {m.expect.get('hidden', '?')}", m.description)
            for m in map(shown, releases)]  # fmt: skip
    lines += [title("releases"), *table(("mapping", "version", "layers × hidden", "what it is"), rows), ""]
    return "\n".join([*lines, "next: engine show NAME   (prints one)"])
