"""The value changes that a rule may name. All else only moves elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Transform:
    """What one is.

    Attributes:
        loses: what cannot be restored; None for one that is undone by the same with the number's sign changed.
        written: the element type that holds its results, where that of its sources does not.
    """

    loses: str | None = None
    written: str | None = None


TRANSFORMS = {
    "normalize": Transform(loses="the lengths of the rows"),  # as norm_head divides each row by its length
    "add": Transform(written="F32"),  # as norms add 1 to what is stored, in float32
}


def said(change: tuple[str, str]) -> str:
    """A change in words.

    >>> said(("normalize", "hidden")), said(("add", "-1"))
    ('normalize along hidden', 'add -1')
    """
    return f"{change[0]} {change[1]}" if TRANSFORMS[change[0]].loses is None else f"{change[0]} along {change[1]}"


def loses(change: tuple[str, str] | None) -> str | None:
    """What a change loses that cannot be restored; None for one that can be undone, and for none."""
    return None if change is None else TRANSFORMS[change[0]].loses


def undone(change: tuple[str, str]) -> tuple[str, str] | None:
    """The change that takes one back; None where that cannot be."""
    return (change[0], f"{-float(change[1]):g}") if TRANSFORMS[change[0]].loses is None else None
