"""Results of lint and proofs: findings, checks, counter-examples in words, and what detected mutants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.errors import EngineError, Place


class Finding(EngineError):
    """What a check of lint finds; a warning does not make `engine lint` fail. Whoever runs the check adds its code."""

    def __init__(
        self, place: Place | None, message: str, fix: str | None, severity: Literal["error", "warning"] = "error"
    ) -> None:
        super().__init__("", message, place=place, fix=fix)
        self.severity = severity


@dataclass(frozen=True, slots=True)
class Failure:
    """A counter-example in words, and where it is: the place in the mapping, the choices, the layout."""

    message: str
    place: str | None = None
    where: str | None = None

    @staticmethod
    def of(error: EngineError, where: str | None = None) -> Failure:
        told = [f"{error.code} {error.message}"]
        told += [f"{label} {text}" for label, text in (("got", error.got), ("expected", error.expected)) if text]
        return Failure("; ".join(told), None if error.place is None else str(error.place), where)


@dataclass(frozen=True, slots=True)
class Check:
    """A claim and how it was checked; `holds` is None if it could not be checked."""

    name: str
    holds: bool | None
    told: str
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mapping changed in one place: where, the change, and what detected it (None: nothing)."""

    where: str
    what: str
    caught_by: str | None
    told: str
    kind: str


@dataclass(frozen=True, slots=True)
class Proof:
    """All checks of one mapping."""

    mapping: str
    checks: tuple[Check, ...]
    mutants: tuple[Mutant, ...] = ()
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether nothing failed. An impossible check is no failure, an undetected mutant is one."""
        return all(check.holds is not False for check in self.checks) and all(m.caught_by for m in self.mutants)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds, "seconds": round(self.seconds, 3)}


def check_of(name: str, told: str, failures: Sequence[Failure]) -> Check:
    return Check(name, not failures, told, tuple(failures))
