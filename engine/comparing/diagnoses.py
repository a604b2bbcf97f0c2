"""What the verdicts mean together: rows with layers folded, and diagnoses in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from os.path import commonpath
from typing import TYPE_CHECKING, Any

from engine.errors import first_of
from engine.explaining.describe import fold, leaf
from engine.language.documents import grouped
from engine.language.names import numbers_in, without_numbers

if TYPE_CHECKING:
    from engine.comparing.tensors import Verdict

# Names that `mlp_letters` exchanges, and names that only a mapping's own letters can.
_LETTERS = ({"up_proj", "down_proj"}, {"w2", "w3"})
_FIRST_LETTER = ({"gate_proj", "up_proj"}, {"gate_proj", "down_proj"}, {"w1", "w2"}, {"w1", "w3"})


def diagnose(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """One sentence per error, for any number of layers."""
    return tuple([*_rotary(verdicts), *_swaps(verdicts), *_renamed(verdicts), *_casts(verdicts), *_others(verdicts)])


def fold_verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """One row per name pattern and verdict, JSON-ready: `model.layers.{0…31}.mlp.up_proj.weight`."""
    rows = grouped(((without_numbers(v.name), v.kind, v.out_dtype, v.ref_dtype, without_numbers(v.note), v.rotary), v)
                   for v in verdicts)  # fmt: skip
    return [_row(group) for group in rows.values()]


def _row(group: Sequence[Verdict]) -> dict[str, Any]:
    first, counts = group[0], [v.count for v in group if v.count is not None]
    largest = max((v.largest for v in group if v.largest is not None), default=None)
    shapes = {(v.out_shape, v.ref_shape) for v in group}
    return {
        "name": _folded([v.name for v in group]),
        "tensors": len(group),
        "verdict": first.kind,
        "out": _type_and_shape(first.out_dtype, first.out_shape if len(shapes) == 1 else None),
        "ref": _type_and_shape(first.ref_dtype, first.ref_shape if len(shapes) == 1 else None),
        "note": _folded([v.note for v in group]) + (f", as rotary={first.rotary}" if first.rotary else ""),
        "differing": sum(counts) if counts else None,
        "elements": sum(math.prod(v.out_shape or ()) for v in group) if counts else None,
        "largest_deviation": largest if largest is None or math.isfinite(largest) else "infinite",
        "first_difference": {"name": first.name, "index": list(first.first)} if first.first is not None else None,
    }


def _type_and_shape(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    if dtype is None:
        return "-"
    return dtype if shape is None else f"{dtype} {' × '.join(map(str, shape)) or 'scalar'}"


def _folded(names: Sequence[str]) -> str:
    """Names of one pattern as one, their numbers folded.

    >>> _folded(["h.0.w", "h.1.w", "h.2.w", "h.7.w"])
    'h.{0…2,7}.w'
    """
    text = without_numbers(names[0]) if len(set(names)) > 1 else names[0]
    for values in zip(*map(numbers_in, names), strict=True) if text != names[0] else ():
        text = text.replace("{}", f"{{{fold(values)}}}", 1)
    return text


def _leaves(names: Sequence[str]) -> str:
    """
    >>> _leaves(["a.q.weight", "a.k.weight", "b.q.weight", "b.v.weight"])
    'q, k and v'
    """
    *head, last = dict.fromkeys(leaf(name) for name in names)
    return f"{', '.join(head)} and {last}" if head else last


def _layers(names: Sequence[str]) -> str:
    """
    >>> _layers(["h.0.w", "h.1.w"]), _layers(["h.3.w"]), _layers(["w"])
    (' in layers {0…1}', ' in layer 3', '')
    >>> _layers(["h.3.experts.0.w", "h.3.experts.2.w"])
    ' in layer 3, experts {0,2}'
    """
    layers = {numbers_in(name)[0] for name in names if numbers_in(name)}
    experts = {numbers_in(name)[1] for name in names if ".experts." in name and len(numbers_in(name)) > 1}
    told = [_counted(what, numbers) for what, numbers in (("layer", layers), ("expert", experts)) if numbers]
    return f" in {', '.join(told)}" if told else ""


def _counted(what: str, numbers: set[int]) -> str:
    return f"{what}s {{{fold(list(numbers))}}}" if len(numbers) > 1 else f"{what} {min(numbers)}"


def _equal(names: Sequence[str]) -> str:
    return "equals" if len({leaf(name) for name in names}) == 1 else "equal"


_WHOLE = ("rotary pairs in every head",)  # the sentence itself says it


def _rotary(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for rotary, said in (
        ("pairs", "after de-interleaving rotary pairs: `rotary` should be `pairs`"),
        ("halves", "after interleaving rotary pairs: `rotary` should be `halves`"),
        ("other", "with the rows of each rotary pair exchanged: `rotary` should be the other choice"),
    ):
        permuted = [verdict for verdict in verdicts if verdict.kind == "permuted" and verdict.rotary == rotary]
        notes = grouped(("" if one.note in _WHOLE else f" ({one.note})", one.name) for one in permuted)
        for note, names in notes.items():
            yield f"{_leaves(names)}{_layers(names)} {_equal(names)} the reference {said}{note}"


def _swaps(verdicts: Sequence[Verdict]) -> Iterator[str]:
    swapped = {v.name: v for v in verdicts if v.kind in ("swapped", "copied")}
    exchanged: dict[tuple[str, ...], list[Verdict]] = {}
    moved: dict[int, list[Verdict]] = {}
    single: dict[tuple[str, str], list[str]] = {}
    for name, verdict in swapped.items():
        other = verdict.other or ""
        back = swapped.get(other)
        if numbers_in(name) == numbers_in(other) and back is not None and back.other == name:
            exchanged.setdefault(tuple(sorted((leaf(name), leaf(other)))), []).append(verdict)
        elif verdict.kind == "swapped" and without_numbers(name) == without_numbers(other):
            at = next(
                i for i, pair in enumerate(zip(numbers_in(name), numbers_in(other), strict=True)) if pair[0] != pair[1]
            )
            moved.setdefault(at, []).append(verdict)
        else:
            single.setdefault((without_numbers(name), without_numbers(other)), []).append(name)
    for leaves, group in exchanged.items():
        names = [v.name for v in group]
        hint = ""
        if set(leaves) in _LETTERS:
            cut = ", and cut along the wrong dimension" if "cut the other way" in group[0].note else ""
            hint = f"{cut}: `mlp_letters` should be the other choice"
        elif set(leaves) in _FIRST_LETTER:
            hint = ": w1, w2 and w3 are assigned the wrong way; see `mlp_letters` and the mapping's rules"
        yield f"{_leaves(names)} are exchanged{_layers(names)}{hint}"
    for at, group in moved.items():
        yield from _orders(at, group, verdicts)
    told = {name for names in single.values() for name in names}
    also = [v for v in swapped.values() if v.name not in told and _besides(v) and "cut the other way" not in v.note]
    for more, names in grouped((_besides(verdict), verdict.name) for verdict in also).items():
        yield f"{_leaves(names)}{_layers(names)}: besides, {more}"
    for group_names in single.values():
        first = swapped[group_names[0]]
        what = "is a copy of" if first.kind == "copied" else "equals"
        more = _besides(first)
        yield f"{_leaves(group_names)}{_layers(group_names)} {what} {leaf(first.other or '')} of the reference" + (
            f"{_layers([swapped[name].other or '' for name in group_names])}{f', {more}' if more else ''}"
        )


def _orders(at: int, moved: Sequence[Verdict], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Layers (`at` 0) or experts of layers in another order; tensors that move alike are described once."""
    orders: dict[tuple[int, ...], dict[int, int]] = {}
    for one in moved:
        here, there = numbers_in(one.name), numbers_in(one.other or "")
        orders.setdefault(here[:at], {})[here[at]] = there[at]
    for order, places in grouped((tuple(sorted(order.items())), place) for place, order in orders.items()).items():
        held = first_of([f"{here} holds {there}" for here, there in order], 8)
        names = [one.name for one in moved if numbers_in(one.name)[:at] in places]
        alike = [one.name for one in verdicts if len(numbers_in(one.name)) > at and numbers_in(one.name)[:at] in places]
        where = f",{_layers([name.partition('.experts.')[0] for name in names])}" if at else ""
        yield f"{'experts' if at else 'layers'} are in another order: {held}{where}{_alone(names, alike, at)}"


def _alone(names: Sequence[str], alike: Sequence[str], at: int) -> str:
    """What alone moved, where it is one kind of tensor, or all that one module holds; `at`: as above.

    >>> _alone(["h.1.attn.q.w", "h.1.attn.k.w"], ["h.1.attn.q.w", "h.1.attn.k.w", "h.1.up.w"], 0)
    ', in attn alone'
    """
    if len({*map(leaf, names)}) == len({*map(leaf, alike)}):
        return ""
    if len({*map(leaf, names)}) == 1:
        return f", in {leaf(names[0])} alone"
    below = [without_numbers(name).split("{}")[at + 1].strip(".").replace(".", "/") for name in names]
    module = commonpath(below).replace("/", ".")
    return f", in {module} alone" if module else ""


def _besides(verdict: Verdict) -> str:
    """How else a tensor differs that is another one of the reference."""
    more = verdict.note.partition(" of the reference, ")[2]
    return more + (f": `rotary` should be {'the other choice' if verdict.rotary == 'other' else f'`{verdict.rotary}`'}"
                   if verdict.rotary else "")  # fmt: skip


def _renamed(verdicts: Sequence[Verdict]) -> Iterator[str]:
    pairs = [(v.name, v.other) for v in verdicts if v.kind == "extra" and v.other is not None]
    for group in grouped((tuple(map(without_numbers, pair)), pair) for pair in pairs).values():
        here, there = (_folded(names) for names in zip(*group, strict=True))
        yield f"{here} is {there} in the reference"


def _casts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    casts = Counter((verdict.out_dtype, verdict.ref_dtype) for verdict in verdicts if verdict.kind == "cast")
    for (one, two), count in casts.items():
        what = "tensors are" if count > 1 else "tensor is"
        yield f"{count} {what} {one} here and {two} in the reference, equal after casting"


# What a relation means for the model.
_MEANS = {
    "padded": "the vocabulary is padded on one side",
    "truncated": "what was cut off is lost",
}
_ROWS_OF_TOKENS = ("embed_tokens", "lm_head", "tok_embeddings", "output")


def _others(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Other relations; equal ones of several tensors are described once."""
    elsewhere = ("equal", "cast", "swapped", "copied", "missing", "extra")
    others = [v for v in verdicts if v.kind not in elsewhere and v.note and not (v.kind == "permuted" and v.rotary)]
    for (kind, _), group in grouped(((v.kind, without_numbers(v.note)), v) for v in others).items():
        names = [v.name for v in group]
        means = _MEANS.get(kind, "")
        if kind == "transposed" and all(v.note == "rows are columns" for v in group):
            yield f"{_leaves(names)}{_layers(names)} {_equal(names)} the reference after transposing"
            continue
        if kind == "permuted" and all(leaf(name) in _ROWS_OF_TOKENS for name in names):
            means = "is the tokenizer's vocabulary the same?"
        note = _folded([v.note for v in group])
        what = note if note.startswith(kind) else f"{kind}, {note}"
        yield f"{_leaves(names)}{_layers(names)}: {what}" + (f": {means}" if means else "")
