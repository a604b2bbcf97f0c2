"""The target model as transformers builds it, without memory: the names and shapes of its tensors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from engine.assets.apart import call_apart
from engine.errors import EngineError, Place, shape_text
from engine.language.documents import grouped
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout, MappingFile
from engine.language.names import without_numbers
from engine.planning.as_model import beyond_building, class_named, fit_to_model, rules_of, shapes_of
from engine.planning.attempts import Checkpoint
from engine.planning.pieces import Pieces
from engine.planning.stored import Instance
from engine.planning.wanted import Wanted, wanted_by_mapping
from engine.proving.class_names import wanted_of
from engine.proving.proof import Failure
from engine.proving.targets import known_of


def wanted(config: Mapping[str, Any], architecture: str = "") -> Wanted | str:
    """Name → shape of every parameter and saved buffer, with ties separate; or the reason why it is unknown.

    Raises:
        EngineError: E502 when transformers refuses the configuration.
    """
    found = built(config, architecture)
    if isinstance(found, str):
        return found
    return wanted_of(*found)


def wanted_by_class(mapping: MappingFile, config: Mapping[str, Any]) -> Wanted:
    """The tensors of a configuration's model class, with ties separate, from a file of the mapping or from the class.

    Raises:
        EngineError: E209 when transformers has no such class, E502 when it refuses the configuration.
    """
    if not config:
        raise EngineError(
            "E202",
            "the model's configuration is missing, so its tensors are not known",
            expected="config.json beside the weights, or --config",
            fix="Give the config.json of the model with --config FILE.",
            answers={"config": ()},
        )
    beyond = beyond_building(config)
    if beyond is not None:
        raise EngineError("E218", beyond, expected="a model that can be built", fix="Give this model's config.json.")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    told = load_mapping(mapping.classes[name]) if isinstance(name, str) and name in mapping.classes else None
    if told is not None and told.model_type == config.get("model_type"):
        known = wanted_by_mapping(told, config)
        if known is not None:
            return known
    return asked(config)


def asked(config: Mapping[str, Any]) -> Wanted:
    """The tensors by the model class itself; the same errors."""
    if "transformers" in sys.modules:
        return _wanted_here(config)
    # Torch and transformers take ten times the memory of a conversion; it is freed when the process ends.
    return call_apart(_wanted_apart, dict(config)) or _wanted_here(config)


_CORRECT = "Correct it in config.json, or give this model's with --config FILE; in a mapping, under `config`."


def _wanted_apart(config: Mapping[str, Any]) -> Wanted:
    from torch import distributed

    distributed.is_available = lambda: False  # saves imports that take a third of the time
    return _wanted_here(config)


def _wanted_here(config: Mapping[str, Any]) -> Wanted:
    try:
        found = wanted(config)
    except EngineError as error:
        error.place = Place("config.json")
        raise
    if isinstance(found, str):
        raise EngineError(
            "E209",
            "the model's tensors are not known without its class",
            got=found.removeprefix("not checked: "),
            expected="a config.json of a model that transformers has",
            fix="Use a mapping of the model's family: its rules say what the model needs.",
        )
    return found


def written_as_model(mapping: MappingFile, checkpoint: Checkpoint) -> MappingFile:
    """A mapping with its rules for tensors to write, even if these come from the model class."""
    if not mapping.as_model or mapping.rules:
        return mapping
    wanted, held = wanted_by_class(mapping, checkpoint.config), shapes_of(checkpoint)
    named = next((one for one in (wanted, *wanted.others) if one.fits(held)), wanted)
    return rules_of(mapping, named, checkpoint.config)


def fitted(mapping: MappingFile, layout: Layout, checkpoint: Checkpoint) -> tuple[MappingFile, Layout, Checkpoint]:
    """A mapping with its rules, even if these come from the model class of the checkpoint's configuration.

    In that case the returned checkpoint has only the model's tensors, and the layout the prefix of their names.
    """
    if not mapping.as_model:
        return mapping, layout, checkpoint
    return fit_to_model(mapping, layout, wanted_by_class(mapping, checkpoint.target_config), checkpoint)


def load_classes() -> None:
    """Load torch and transformers in advance, if they are installed."""
    with suppress(ImportError):
        import torch  # noqa: F401
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: F401


def built(config: Mapping[str, Any], architecture: str) -> tuple[Any, bool] | str:
    """The model without memory, and whether embedding and head are tied; or the reason why it is unknown."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return f"not checked: transformers {transformers.__version__} has no model of type {kind}"
    named = class_named(config) or architecture
    found = getattr(transformers, named, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)  # nothing else is called
    made: Any = found if known else _generating(CONFIG_MAPPING[kind]).from_config
    of_kind = known_of(kind)
    if known and made.config_class is not CONFIG_MAPPING[kind] and (of_kind is None or named not in of_kind.classes):
        raise EngineError(
            "E502",
            f"`architectures` and `model_type` name two models: {named} is not a class of {kind}",
            got=f"{named}, whose type is {getattr(made.config_class, 'model_type', 'unknown')}",
            expected=f"a class of {kind}",
            fix=f"Programs disagree about which of the two counts. {_CORRECT}",
        )
    quiet = logging.getLogger("transformers")
    level, quiet.level = quiet.level, logging.ERROR
    try:
        loaded = transformers.AutoConfig.for_model(**{**_with_infinities(config), "dtype": "bfloat16"})
        with torch.device("meta"), _unfilled():
            model = made(loaded)
    except Exception as error:  # their validation may raise anything
        raise EngineError(
            "E502",
            "transformers refuses the configuration",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix=_CORRECT,
        ) from error
    finally:
        quiet.setLevel(level)
    return model, bool(getattr(loaded, "tie_word_embeddings", False))


def _unfilled() -> Any:
    """A context in which tensors are not initialised, as they have no memory."""
    from torch.overrides import TorchFunctionMode

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "") == "torch.nn.init":
                return kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    return Unfilled()


def _generating(kind: Any) -> Any:
    """The auto class for a configuration without a class name, as transformers 4 saved some models of two parts."""
    import transformers

    listed = [getattr(transformers, f"AutoModelFor{task}") for task in ("CausalLM", "ImageTextToText", "Seq2SeqLM")]
    return next((one for one in listed if kind in one._model_mapping), listed[0])


def _with_infinities(value: Any) -> Any:
    """A configuration with infinities in place of the mappings that transformers 5 writes for them.

    >>> _with_infinities({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    {'time_step_limit': [0.0, inf]}
    """
    if isinstance(value, list):
        return [_with_infinities(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if {*value} == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _with_infinities(one) for key, one in value.items()}


def _missing(name: str, shape: tuple[int, ...], every: Sequence[Instance]) -> Failure:
    """A tensor that the model has and nothing writes, with the rule that writes it for other checkpoints."""
    text = f"`{name}` ({shape_text(shape)}) is missing"
    for one in every:
        sometimes = one.param == "bias" or one.rule.optional
        if sometimes and any(target.match(name) is not None for target, _ in one.targets):
            when = f"rule `{one.rule.name}` writes it only if `{one.sources[0].text}` is there"
            return Failure(f"{text}: {when}", str(one.rule.place))
    return Failure(f"{text}: no rule writes it")


def misfits(
    shapes: Mapping[str, tuple[int, ...]],
    model: Mapping[str, tuple[int, ...]],
    pieces: Pieces,
    every: Sequence[Instance],
) -> list[Failure]:
    """Names that only one side has, and shapes that differ; one line per target of a rule.

    Args:
        every: the tensors of all rules, also of those that may be absent, which `pieces` may lack.
    """
    told: list[tuple[str, Failure]] = []  # each with what makes it one of several that are alike
    for name, shape in shapes.items():
        spec = next((s for s in pieces.targets.values() if s.name.match(name) is not None), None)
        place = None if spec is None else str(spec.instances[0].rule.place)
        text = name if spec is None else spec.name.text
        if name not in model:
            told.append((f"-{text}", Failure(f"`{name}` is unexpected: the model has no such tensor", place)))
        elif model[name] != shape:
            both = f"is {shape_text(shape)}, the model's is {shape_text(model[name])}"
            told.append((f"*{text}", Failure(f"`{name}` {both}", place)))
    for name, shape in model.items():
        if name not in shapes:
            told.append((f"+{without_numbers(name)}", _missing(name, shape, every)))
    return [
        replace(first, message=f"{first.message}, and {len(more)} like it" if more else first.message)
        for first, *more in grouped(told).values()
    ]
