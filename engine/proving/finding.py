"""What lint says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import EngineError, Place, in_words


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: an error makes `engine lint` fail, a warning does not."""

    code: str
    severity: str  # error | warning
    place: Place | None
    message: str
    fix: str | None
    got: str | None = None
    expected: str | None = None

    def in_words(self) -> str:
        """The finding in the shape of an error."""
        return in_words(self.code, self.message, self.place, self.got, self.expected, self.fix)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "place": None if self.place is None else self.place.as_dict()}


def finding_of(error: EngineError, place: Place | None = None) -> Finding:
    """An error as a finding."""
    return Finding(error.code, "error", error.place or place, error.message, error.fix, error.got, error.expected)
