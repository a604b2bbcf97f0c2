"""The known names of the target's classes: keys of configurations, names of models, activations.

`make targets` takes them from transformers into `schemas/targets.json`, so that mappings can be checked without
transformers and its slow import. Other model types are looked up in transformers, if it is installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from engine.language.search import bundled


@dataclass(frozen=True, slots=True)
class Known:
    """The keys that transformers' configuration of a model type has, and its model classes."""

    keys: frozenset[str]
    classes: frozenset[str]


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundled("schemas") / "targets.json").read_text("utf-8"))
    return data


def listed(part: str) -> tuple[str, ...]:
    """The names of one kind that transformers has.

    Args:
        part: `model types`, `generation` for the keys of generation_config.json, `activations` for `hidden_act`,
            `heads` for the ends of names of model classes, such as `ForCausalLM`.
    """
    return tuple(_data()[part])


def common_keys() -> frozenset[str]:
    """Keys of every configuration, including those that transformers 4 reads."""
    return frozenset((*_data()["common"], "rope_theta", "rope_scaling", "torch_dtype"))


def every_key() -> frozenset[str]:
    """Keys that some configuration has. A class may read more keys than it declares."""
    data = _data()
    return frozenset(key for found in data["configurations"].values() for key in found["keys"])


def known_of(model_type: str) -> Known | None:
    """The names for a model type; None if transformers does not have it, or is needed but not installed."""
    found = _data()["configurations"].get(model_type)
    if found is None and model_type in listed("model types") and find_spec("transformers") is not None:
        found = _of(model_type)
    return None if found is None else Known(frozenset(found["keys"]), frozenset(found["classes"]))


def _of(model_type: str) -> dict[str, list[str]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    classes = {name for listed in _auto().values() for name in _texts(listed.get(model_type))}
    return {"keys": sorted(_keys(CONFIG_MAPPING[model_type])), "classes": sorted(classes)}


def _auto() -> dict[str, dict[str, Any]]:
    """transformers' tables of model classes by model type."""
    from transformers.models.auto import modeling_auto

    return {name: dict(getattr(modeling_auto, name)) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")}


def _keys(kind: Any) -> set[str]:
    """The keys that a configuration class reads: its fields, their other names, and settable properties."""
    made = kind()
    found = {*made.to_dict(), *getattr(kind, "attribute_map", {})}
    for one in kind.__mro__:
        found |= {name for name in vars(one).get("__annotations__", {}) if not name.startswith("_")}
        found |= {name for name, value in vars(one).items() if isinstance(value, property) and value.fset}
    return {name for name in found if not name.startswith("_")}


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [one for one in value if one]
