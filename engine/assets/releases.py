"""The releases of transformers that load a config.json as the same model, by `schemas/releases.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from engine.errors import EngineError
from engine.language.expressions import evaluate
from engine.language.loader import load_yaml
from engine.language.mapping_file import expression
from engine.language.model import Expression
from engine.language.search import bundled


class _Row(NamedTuple):
    """What narrows the releases, for model types, or for all."""

    of: tuple[str, ...]
    when: Expression
    since: str
    before: str


class _Data(NamedTuple):
    """What `schemas/releases.yaml` says: a first release by model type, in three parts, and the rows."""

    types: Mapping[str, str]
    bases: Mapping[str, str]
    names: Mapping[str, str]
    rows: tuple[_Row, ...]


@lru_cache(maxsize=1)
def _data() -> _Data:
    read = load_yaml(bundled("schemas") / "releases.yaml")
    types, bases, names = (
        {name: since for since, names in read.data[part].items() for name in names}
        for part in ("types", "bases", "names")
    )
    rows = tuple(
        _Row(
            tuple(part.data.get("of", ())),
            expression(part.part("when")),
            part.data.get("since", ""),
            part.data.get("before", ""),
        )
        for part in read.parts("rows").values()
    )
    return _Data(types, bases, names, rows)


def releases(config: Mapping[str, Any], told: str) -> str:
    """Those that load it, by its keys and what a mapping has `told`; empty if nothing is known, `none` if none does.

    >>> scaled = {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4}}
    >>> releases(scaled, ""), releases({"model_type": "other"}, ">=4.41,<4.52"), releases({"model_type": "other"}, "")
    ('>=4.56', '>=4.41,<4.52', '')
    """
    bounds = [*_bounds(config, told), *filter(None, told.split(","))]
    since = max((one.removeprefix(">=") for one in bounds if one.startswith(">=")), key=_number, default="")
    before = min((one.removeprefix("<") for one in bounds if not one.startswith(">=")), key=_number, default="")
    if since and before and _number(since) >= _number(before):
        return "none"
    return ",".join([*([f">={since}"] if since else []), *([f"<{before}"] if before else [])])


def untried(config: Mapping[str, Any]) -> bool:
    """Whether its model type is none that was tried in all releases with every word of its configuration.

    >>> untried({"model_type": "llama"}), untried({"model_type": "other"})
    (False, True)
    """
    return str(config.get("model_type")) not in _data().types


def _bounds(config: Mapping[str, Any], told: str) -> Iterator[str]:
    kind, data = str(config.get("model_type")), _data()
    yield from (f">={since[kind]}" for since in (data.types, data.bases) if kind in since)
    if kind in data.names and told == ">=5":
        yield f">={data.names[kind]}"
    names = {**config, "rope_parameters": _angles(config)}
    for row in data.rows:
        if (not row.of or kind in row.of) and _holds(row, names):
            yield f">={row.since}" if row.since else f"<{row.before}"


def _holds(row: _Row, names: Mapping[str, Any]) -> bool:
    """Whether it does, also where a value is not of the kind that it reads: too few releases are no fault."""
    try:
        return bool(evaluate(row.when, names))
    except EngineError:
        return True


def _angles(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says about angles, in the form of transformers 5."""
    said = [config[key] for key in ("rope_scaling", "rope_parameters") if isinstance(config.get(key), Mapping)]
    angles = {key: value for one in said for key, value in one.items() if value is not None}
    return {"rope_type": angles.get("type", "default"), **angles}


def _number(release: str) -> tuple[int, ...]:
    """
    >>> _number("4.5") < _number("4.40") < _number("5") < _number("5.23")
    True
    """
    return tuple(map(int, release.split(".")))
