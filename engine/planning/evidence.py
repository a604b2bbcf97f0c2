"""Why a variant was decided as it was, in words: the keys that its expressions read, and their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.language.expressions import compile_expression
from engine.language.model import Expression
from engine.planning.config_keys import value_at

_LONGEST = 60  # characters of a value
_MISSING = object()


def because(expressions: Sequence[Expression], names: Mapping[str, Any], called: str = "the configuration") -> str:
    """What expressions saw: which of the keys they read are there, with their values, and which tensors.

    >>> from engine.errors import Place
    >>> rotary = Expression("qk_interleaved | default(not (adapt_hf | default(true)))", Place("x.yaml"))
    >>> because([rotary], {}, "model_config.pt")
    'model_config.pt has neither adapt_hf nor qk_interleaved'
    >>> because([rotary], {"adapt_hf": False}, "model_config.pt")
    'model_config.pt has adapt_hf false, and no qk_interleaved'
    """
    compiled = [compile_expression(one) for one in expressions]
    paths = sorted({path for one in compiled for path in one.paths})
    found = {path: value_at(names, path, _MISSING) for path in paths}
    has = [f"{path} {_shown(value)}" for path, value in found.items() if value is not _MISSING]
    lacks = [path for path, value in found.items() if value is _MISSING]
    told: list[str] = []
    if has and lacks:
        told.append(f"{called} has {_list(has)}, and no {_list(lacks, 'or')}")
    elif has:
        told.append(f"{called} has {_list(has)}")
    elif lacks:
        told.append(f"{called} has no {lacks[0]}" if len(lacks) == 1 else f"{called} has neither {_list(lacks, 'nor')}")
    patterns = sorted({text for one in compiled for text in one.patterns})
    if patterns and "present" in names:
        there = [text for text in patterns if names["present"](text)]
        absent = [text for text in patterns if text not in there]
        told += [f"there is {_list(there)}"] if there else []
        told += [f"there is no {_list(absent, 'or')}"] if absent else []
    return "; ".join(told)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _list(parts: Sequence[str], word: str = "and") -> str:
    """
    >>> _list(["a", "b", "c"]), _list(["a", "b"], "nor")
    ('a, b and c', 'a nor b')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
