"""What is asked of a plan; each option is declared once.

The API takes the options as keywords, the command line turns them into flags, and a saved plan holds
the request. A new option is a field of `Request`, and the same line in the keywords below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from engine.errors import EngineError
from engine.planning import DEFAULT_SHARD_SIZE
from engine.planning.given import check_keywords, dtype_name, parse_size, ranks_given
from engine.storage.places import Source

if TYPE_CHECKING:
    from engine.language.model import MappingFile
    from engine.planning.stored import End

# Rank dimensions of bundled layouts with their own keywords and command line options, and their help.
RANK_OPTIONS = {"tp": "Tensor-parallel ranks.", "pp": "Pipeline ranks.", "wp": "Weight-parallel ranks, in mode isp."}


def option(default: Any, help: str, kind: str = "text", *, flags: str = "", metavar: str = "", shown: str = "") -> Any:
    """A field that the command line turns into an option.

    Args:
        default: what it is if nobody gives it, or what makes that, such as `dict`; `...` if it must be given.
        help: what it does, in one line.
        kind: text, flag, no-flag, count, size, workers, dtype, setting, list or texts (may be repeated).
        flags: how it is spelled, when not as the field is named.
        shown: the default as `--help` shows it.
    """
    told = {"help": help, "kind": kind, "flags": flags, "metavar": metavar, "shown": shown}
    if default is ...:
        return field(metadata=told)
    return field(default_factory=default, metadata=told) if callable(default) else field(default=default, metadata=told)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan; the options say what each field is.

    Attributes:
        mapping: may also be a loaded one.
        reads, writes: the ends of the mapping: `training` for rank files, `whole` for a Hugging Face checkpoint.
        dtype: one of `DTYPES`, a short form like `bf16`, or a torch dtype.
        ranks: ranks to write per rank dimension; others default to those of `like`, else of `src`, else 1.
        mode: may also be an alias.

    Raises:
        EngineError: E001 for an invalid value.
    """

    mapping: str | Path | MappingFile = option(
        ..., "A mapping file, or the name of a bundled one, such as internlm2-7b.", flags="--mapping -m",
        metavar="FILE|NAME",
    )  # fmt: skip
    src: Source = option(".", "The checkpoint folder.", flags="--src -s", metavar="DIR", shown="current folder")
    config: str | Path | None = option(
        None, "The target's config.json, or its folder, if the framework saves none or an incomplete one.",
        metavar="FILE|DIR",
    )  # fmt: skip
    settings: Mapping[str, Any] = option(
        dict, "Set a variant or an option of the mapping or layout; may be repeated.", "setting", flags="--set"
    )
    dtype: str = option("auto", "Element type to write, such as bf16 or float32; auto: each tensor's own.", "dtype")
    max_shard_size: int = option(
        DEFAULT_SHARD_SIZE, "Largest size of an output file, such as 2GB or 5GiB.", "size", shown="2GB"
    )
    strict: bool = option(False, "Refuse sizes other than the release's.", "flag")
    reads: End = "training"
    writes: End = "whole"
    ranks: Mapping[str, int] = option(dict, "Ranks to write, of dimensions of the layout.", "list", metavar="DIM=N,…")
    chunks: int | None = option(None, "Model chunks per pipeline rank (interleaved pipeline).", "count")
    mode: str | None = option(None, "Parallel mode of the layout, such as mtp or isp.", metavar="NAME")
    like: str | Path | None = option(
        None, "Copy mode, ranks, names and variants of this training checkpoint.", metavar="DIR"
    )
    lossy: Sequence[str] = option(
        (), "Write a rule's tensors as they are if it cannot be inverted; may be repeated.", "texts", metavar="RULE"
    )
    to: str | Path | None = option(
        None, "The mapping to write with, for rank files of another framework.", metavar="FILE|NAME"
    )

    def __post_init__(self) -> None:
        for name, read in (("dtype", dtype_name), ("max_shard_size", parse_size)):
            try:
                object.__setattr__(self, name, read(getattr(self, name)))
            except ValueError as error:
                raise EngineError(
                    "E001",
                    f"{name} cannot be used as given",
                    got=repr(getattr(self, name))[:100],
                    fix=f"{error}.".replace("?.", "?"),
                ) from None


class PlanOptions(TypedDict, total=False):
    """Keywords of every function that makes a plan."""

    settings: Mapping[str, Any] | None
    config: str | Path | None
    dtype: object  # a name, or a torch dtype


class WholeOptions(PlanOptions, total=False):
    """Keywords of functions that plan a Hugging Face checkpoint."""

    max_shard_size: int | str
    strict: bool


class RankOptions(PlanOptions, total=False):
    """Keywords of functions that plan rank files; `RANK_OPTIONS` are short for entries of `ranks`."""

    ranks: Mapping[str, int] | str | None
    tp: int | None
    pp: int | None
    wp: int | None
    chunks: int | None
    mode: str | None
    like: str | Path | None


class ReverseOptions(RankOptions, total=False):
    """Keywords of functions that plan rank files from a Hugging Face checkpoint."""

    lossy: Sequence[str]


class ReshardOptions(RankOptions, total=False):
    """Keywords of functions that plan rank files from rank files."""

    to: str | Path | None


class AnyOptions(ReverseOptions, total=False):
    """Keywords of functions that plan any of these."""

    max_shard_size: int | str
    strict: bool


def keywords(options: Mapping[str, Any], takes: type) -> Any:
    """The keywords that a function takes, out of some."""
    return {name: value for name, value in options.items() if name in takes.__annotations__}


@dataclass(frozen=True, slots=True)
class Job:
    """What a job reads and writes, and the keywords that plan it."""

    reads: End
    writes: End
    takes: type


JOBS = {
    "run": Job("training", "whole", WholeOptions),
    "reverse": Job("whole", "training", ReverseOptions),
    "reshard": Job("training", "training", ReshardOptions),
}


def request_of(mapping: str | Path | MappingFile, src: Source, options: Mapping[str, Any], job: str) -> Request:
    """The request from keywords.

    Args:
        job: which of `JOBS`.

    Raises:
        TypeError: for a keyword that the job does not have, as in Python.
        EngineError: E001 for an unknown job, and as for `Request`.
    """
    if job not in JOBS:
        raise EngineError("E001", f"there is no job `{job}`", expected=", ".join(JOBS))
    does = JOBS[job]
    check_keywords(options, does.takes)
    ranks = ranks_given(options.get("ranks"))
    for name in RANK_OPTIONS:
        count = options.get(name)
        if count is not None and ranks.setdefault(name, count) != count:
            raise EngineError("E001", f"two numbers of {name} ranks are given", got=f"{ranks[name]} and {count}")
    given = {name: value for name, value in own(options, Request).items() if value is not None}
    return Request(mapping, src, **{**given, "ranks": ranks, "reads": does.reads, "writes": does.writes})


def own(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The keywords that are fields of a dataclass, out of some; None is as if not given."""
    return {one.name: options[one.name] for one in fields(kind) if options.get(one.name) is not None}
