"""What `engine explain` shows on the terminal. No decisions are made here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from engine.errors import counted
from engine.explaining.words import span
from engine.show.text import note, shows, times

MOST_TENSORS = 8  # shown on a terminal; `--json` has all
MOST_FLOWS = 8


def is_code(text: str) -> bool:
    """
    >>> is_code("E203"), is_code("L001"), is_code("E203.weight")
    (True, True, False)
    """
    return re.fullmatch(r"[EL]\d{3}", text) is not None


@shows
def explanation(facts: Mapping[str, Any]) -> str:
    """An explanation as text: what it is, in words, then each source or target with its bytes."""
    tensors = facts["tensors"]
    parts = [_tensor(one, facts["direction"]) for one in tensors[:MOST_TENSORS]]
    if len(tensors) > MOST_TENSORS:
        more = counted(len(tensors) - MOST_TENSORS, "more file")
        parts.append(f"… and {more}; name one, as in `FILE:TENSOR`")
    return "\n\n".join(parts)


def _tensor(one: Mapping[str, Any], direction: str) -> str:
    asked = one["asked"]
    lines = [f"{click.style(_name(asked), bold=True)}  {_kind(asked)}"]
    if one["rule"]:
        label = "" if one["rule_place"] is None else f", {one['rule_place']}"
        lines.append(f"  rule {one['rule']}{label}")
    lines += [f"  {sentence}" for sentence in one["words"]]
    lines += [f"  {note(text)}" for text in one["notes"]]
    for flow in one["flows"][:MOST_FLOWS]:
        lines += ["", *_flow(flow, direction)]
    if len(one["flows"]) > MOST_FLOWS:
        end = "source" if direction == "forward" else "target"
        more = counted(len(one["flows"]) - MOST_FLOWS, f"more {end} tensor")
        lines += ["", f"  … and {more}; `--json` lists all"]
    return "\n".join(lines)


def _flow(flow: Mapping[str, Any], direction: str) -> list[str]:
    source, target = flow["source"], flow["target"]
    place = f", {flow['place']}" if flow["place"] else ""
    if direction == "forward":
        head = f"  from {click.style(_name(source), bold=True)}  {_kind(source)}{place}"
    else:
        head = f"  to {click.style(_name(target), bold=True)}  {_kind(target)}"
    lines = [f"{head}: {counted(flow['elements'], 'element')}"]
    for stretch in flow["stretches"]:
        lines.append(f"    source {_indices(stretch['source'])} → target {_indices(stretch['target'])}")
        lines += [f"      {sentence}" for sentence in stretch["order"]]
    hidden = flow["stretch_count"] - len(flow["stretches"])
    if hidden > 0:
        lines.append(f"    … and {hidden:,} more boxes")
    lines.append(f"    {_bytes(flow['byte_ranges'], flow['range_count'])} of {source['file']}")
    if flow["replicas"]:
        shown = ", ".join(flow["replicas"][:4]) + (", …" if len(flow["replicas"]) > 4 else "")
        lines.append(f"    the same in {counted(len(flow['replicas']), 'other file')}, compared: {shown}")
    return lines


def _bytes(ranges: Sequence[Sequence[int]], total: int) -> str:
    """
    >>> _bytes([(64, 128)], 1), _bytes([(0, 2), (8, 10), (16, 18), (24, 26)], 90)
    ('bytes 64…127', 'bytes 0…1, 8…9, 16…17, … (90 ranges)')
    """
    shown = [span((low, high)) for low, high in ranges]
    if total <= len(shown) and total <= 4:
        return "bytes " + ", ".join(shown)
    return f"bytes {', '.join(shown[:3])}, … ({total:,} ranges)"


def _indices(parts: Sequence[str]) -> str:
    return f"[{'; '.join(parts)}]" if any("," in part for part in parts) else f"[{', '.join(parts)}]"


def _name(tensor: Mapping[str, Any]) -> str:
    held = f"{tensor['file']}:" if tensor["file"] else ""
    whole = set(tensor["slice"].strip("[]").split(", ")) == {":"}
    return f"{held}{tensor['name']}" + ("" if whole else tensor["slice"])


def _kind(tensor: Mapping[str, Any]) -> str:
    return f"{times(tensor['shape'])} {tensor['dtype']}"
