"""Copies as text, those that differ by equal steps in one line."""

from __future__ import annotations

from collections.abc import Sequence

from engine.planning.copies import Copy

Label = tuple[tuple[str, int], ...]  # what tells a source from an output's other sources: (("tp", 1),)


def copy_texts(copies: Sequence[Copy], labels: Sequence[Label], names: Sequence[str]) -> list[str]:
    """Copies as text; those that differ by equal steps are one line.

    `tp0…1 @0 → @0+8i: 4 (8→16) × 8 (1→1)` are two: from shard tp0 and tp1, elements 0 on, to
    elements 0 on and 8 on; four rows, 8 apart there and 16 apart here, of 8 elements each.

    >>> row = Copy(0, 0, 0, 0, (4, 8), (8, 1), (16, 1))
    >>> copy_texts([row, Copy(1, 0, 0, 8, (4, 8), (8, 1), (16, 1))], [(("tp", 0),), (("tp", 1),)], ["a", "a"])
    ['tp0…1 @0 → @0+8i: 4 (8→16) × 8 (1→1)']
    """
    several = len(set(names)) > 1
    result: list[str] = []
    start = 0
    while start < len(copies):
        end = _run(copies, labels, names, start)
        first, last = copies[start], copies[end - 1]
        count = end - start
        label = " ".join(
            f"{dim}{low}" if low == high else f"{dim}{low}…{high}"
            for (dim, low), (_, high) in zip(labels[first.source], labels[last.source], strict=True)
        )
        told = [names[first.source]] if several else []
        told += [label] if label else []
        told.append(f"@{_offsets(first.source_offset, last.source_offset, count)}")
        told.append(f"→ @{_offsets(first.target_offset, last.target_offset, count)}:")
        shape = zip(first.shape, first.source_strides, first.target_strides, strict=True)
        told.append(" × ".join(f"{size} ({a}→{b})" for size, a, b in shape) or "1 element")
        same = all(labels[c.source] == labels[first.source] for c in copies[start:end])
        result.append(" ".join(told) + (f", {count} times" if count > 1 and same else ""))
        start = end
    return result


def _run(copies: Sequence[Copy], labels: Sequence[Label], names: Sequence[str], start: int) -> int:
    """The end of the longest run of copies from `start` on that differ by equal steps."""

    def step(index: int) -> tuple[object, ...] | None:
        a, b = copies[index], copies[index + 1]
        if (a.shape, a.source_strides, a.target_strides, names[a.source]) != (
            b.shape, b.source_strides, b.target_strides, names[b.source]
        ):  # fmt: skip
            return None
        moved = tuple(y - x for (_, x), (_, y) in zip(labels[a.source], labels[b.source], strict=True))
        if sorted(moved)[-1:] not in ([], [0], [1]) or sum(map(abs, moved)) > 1:
            return None
        return moved, b.source_offset - a.source_offset, b.target_offset - a.target_offset

    if start + 1 >= len(copies):
        return start + 1
    wanted = step(start)
    if wanted is None:
        return start + 1
    end = start + 2
    while end < len(copies) and step(end - 1) == wanted:
        end += 1
    return end


def _offsets(first: int, last: int, count: int) -> str:
    if first == last:
        return str(first)
    step = (last - first) // (count - 1)
    return f"{first}{'+' if step > 0 else '-'}{abs(step)}i"
