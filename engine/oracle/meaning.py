"""The meaning of a config.json or generation_config.json: with defaults filled in and spellings unified."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from engine.language.documents import leaves

# Written by programs about themselves, not about the model.
_BESIDE = ("transformers_version", "_name_or_path", "_commit_hash", "_from_model_config", "_attn_implementation")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flattened configuration, where null equals absent and spellings of transformers 4 become those of 5.

    >>> plain_config({"rope_theta": 5000, "rope_scaling": {"type": "linear", "factor": 2}, "torch_dtype": "float16"})
    {'dtype': 'float16', 'rope_parameters.rope_type': 'linear', 'rope_parameters.factor': 2, \
'rope_parameters.rope_theta': 5000}
    """
    values = {key: value for key, value in config.items() if key not in _BESIDE and value is not None}
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), Mapping):
            rope |= values.pop(key)
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if "rope_theta" in values:
        rope.setdefault("rope_theta", values.pop("rope_theta"))
    if "torch_dtype" in values:
        values.setdefault("dtype", values.pop("torch_dtype"))
    if rope:
        values["rope_parameters"] = {"rope_type": "default", **rope}
    labels = values.pop("id2label", None)
    values.pop("label2id", None)
    if isinstance(labels, Mapping):
        values["num_labels"] = len(labels)
    for key in ("hidden_act", "hidden_activation"):
        values |= {key: "silu"} if values.get(key) == "swish" else {}  # two names of one function
    if "dtype" in values:
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    flat = {key: _plain(value) for key, value in leaves(values) if value is not None}
    return {key: value[0] if key in _TOKENS and isinstance(value, list) and len(value) == 1 else value
            for key, value in flat.items()}  # fmt: skip


def _plain(value: Any) -> Any:
    """
    >>> _plain(2.0), _plain((1, 2)), _plain(True)
    (2, [1, 2], True)
    """
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def full_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]] | None:
    """A configuration with what transformers' own class fills in, and the keys that this class has.

    Returns:
        None for a model type that transformers does not have built in, and for a configuration it refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    given = {key: value for key, value in config.items() if key not in ("auto_map", "transformers_version")}
    try:
        full, own = CONFIG_MAPPING[kind].from_dict(given).to_dict(), _own_keys(kind)
    except Exception:  # a configuration may make transformers raise anything
        return None
    hidden, heads = full.get("hidden_size"), full.get("num_attention_heads")
    if full.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        full["head_dim"] = hidden // heads  # as the classes' attention takes it, not all of their configurations
    return plain_config(full | {"model_type": kind}), own


@lru_cache(maxsize=64)
def _own_keys(kind: str) -> frozenset[str]:
    """The keys that transformers' class for a model type has, in either spelling."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = CONFIG_MAPPING[kind]().to_dict()
    return frozenset(plain_config(own)) | frozenset(own)


def full_generation(generation: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation: those of the file, or, without a file, the tokens of config.json."""
    given = {key: config.get(key) for key in _TOKENS} if generation is None else generation
    return plain_config(given)


def default_generation() -> dict[str, Any]:
    """The defaults of transformers for absent generation settings."""
    from transformers.generation.configuration_utils import GenerationConfig

    made = GenerationConfig()
    later = getattr(made, "_get_default_generation_params", dict)  # transformers 5 fills them in when it generates
    return plain_config(made.to_dict() | later())
