"""Rules for a mapping that has none: every tensor is the model class's tensor of the same name.

A checkpoint that was saved with the target's own names and shapes needs no rules, only a proof that nothing is
missing. So rules are made from the model class: each of its tensors must be stored, in its shape. Any other stored
tensor matches no rule and is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from engine.errors import EngineError, Place
from engine.language.axes import Axes, Axis
from engine.language.documents import grouped
from engine.language.keys import Key, Limits
from engine.language.model import Expression, Layout, MappingFile, Prefix, Rule, Target
from engine.language.names import numbers_in, without_numbers
from engine.planning.attempts import Checkpoint
from engine.planning.facts import present_in
from engine.planning.wanted import Shape, Wanted


class _Kind(NamedTuple):
    """What tensors of one family have in common."""

    shape: Shape
    tied_to: str | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Family:
    """Tensors whose names differ only in numbers, each counting from 0: a name pattern with its counts."""

    name: str
    counts: Mapping[str, int]
    kind: _Kind


def fit_to_model(
    mapping: MappingFile, layout: Layout, wanted: Wanted, checkpoint: Checkpoint
) -> tuple[MappingFile, Layout, Checkpoint]:
    """The mapping with its rules, the layout with its prefix, and the checkpoint with only the model's tensors.

    The model's tensors have the prefix under which all of the class's tensors are, followed by a start of one of them.
    Some trainers replace the class's own prefix, `model.`, by theirs: XTuner's head is `model.lm_head.weight`.

    Raises:
        EngineError: E207 when the checkpoint lacks a tensor of the class under every prefix.
    """
    wanted, prefix, own = _named(wanted, shapes_of(checkpoint))
    held = present_in({tensor.name for file in checkpoint.files for tensor in file.tensors})

    begins = tuple({prefix + _first(name.removeprefix(own)) for name in (*wanted.shapes, *wanted.tied)})
    files = tuple(file.only(lambda name: name.startswith(begins)) for file in checkpoint.files)
    fitted = rules_of(
        mapping, wanted, checkpoint.target_config, lambda name: name.removeprefix(own), lambda name: held(prefix + name)
    )
    return fitted, replace(layout, prefixes=(Prefix(prefix, None),)), replace(checkpoint, files=files)


def rules_of(
    mapping: MappingFile,
    wanted: Wanted,
    config: Mapping[str, Any],
    stored: Callable[[str], str] = str,
    held: Callable[[str], bool] = lambda name: True,
) -> MappingFile:
    """The mapping with rules for every tensor of a model class.

    Args:
        config: the target's configuration.
        stored: maps a name to that in training files, without their prefix.
        held: whether training files hold a tied tensor of that name. Written files do: trainers load all tensors.
    """
    families = _families(wanted)
    tied = config.get("tie_word_embeddings") is not False  # otherwise transformers 4 would initialize it randomly
    counted = next((f.counts["layer"] for f in families if "layer" in f.counts), None)
    rules: list[Rule] = []
    dims: dict[str, int] = {}
    seen = False
    for family in families:
        if 0 in family.kind.shape:
            raise EngineError(
                "E218",
                f"`{family.name}` of the model class would have no elements",
                place=Place("config.json"),
                got=f"the shape {' × '.join(map(str, family.kind.shape))}",
                expected="1 or more of each dimension",
                fix="A size in config.json is 0: give this model's config.json with --config FILE.",
            )
        dims |= family.counts
        dims |= {f"n{size}": size for size in family.kind.shape}
        axes = Axes(tuple(map(Axis, _axes(family.kind.shape, dims))))
        seen = seen or "layer" in family.counts
        rules.append(
            Rule(
                name=family.name,
                sources=(stored(family.name),),
                axes=axes,
                targets=(Target(family.name, axes, mapping.place),),
                place=mapping.place,
                stage=None if "layer" in family.counts else "last" if seen or counted is None else "first",
                optional=tied and family.kind.tied_to is not None and not held(stored(family.name)),
                tied_to=family.kind.tied_to,
                dtype=family.kind.dtype,
            )
        )
    named, told = "tie_word_embeddings", mapping.keys.get("source", {})
    default = {named: Key(named, Limits(("boolean", "null")), mapping.place, default=True)} if wanted.ties else {}
    return replace(
        mapping,
        keys={**mapping.keys, "source": {**told, **default}},
        rules=tuple(rules),
        dims={name: Expression(str(size), Place("config.json")) for name, size in dims.items()},
        model_type=str(config.get("model_type")),
        architecture=class_named(config) or "the model class of config.json",
        transformers=wanted.versions or mapping.transformers,
    )


_LAYERS, _EXPERTS = re.compile("layers?$"), re.compile("experts?$")  # at the end of a key's name
_MOST = {_LAYERS: 2_000, _EXPERTS: 20_000, re.compile("labels$"): 1_000_000}
_MOST_TOGETHER = 600_000  # layers times experts, each of which may have its own tensors; Doge has 32 times 16,384


def beyond_building(config: Mapping[str, Any]) -> str | None:
    """A count in a config.json that would make transformers build a model forever; None if there is none.

    >>> beyond_building({"text_config": {"num_hidden_layers": 10**7, "vocab_size": 10**7}})
    '`num_hidden_layers` of config.json is 10000000'
    >>> beyond_building({"num_hidden_layers": 32, "num_experts": 16384, "num_experts_per_tok": 64})
    >>> beyond_building({"num_hidden_layers": 200, "num_local_experts": 9999})
    'config.json has 200 layers of 9999 experts'
    """
    parts = [config]
    for part in parts:  # grows while iterating: by nested configurations, such as a vision model's
        parts += [one for one in part.values() if isinstance(one, Mapping)]
        counts = {key: value for key, value in part.items() if isinstance(value, int | float)}
        for key, value in counts.items():
            if any(value > most for name, most in _MOST.items() if name.search(key)):
                return f"`{key}` of config.json is {value:.12g}"
        layers, experts = (max((counts[k] for k in counts if n.search(k)), default=0) for n in (_LAYERS, _EXPERTS))
        if layers * experts > _MOST_TOGETHER:
            return f"config.json has {layers} layers of {experts} experts"
    return None


def class_named(config: Mapping[str, Any]) -> str:
    """The class that a config.json names; empty if it names none, or not as text.

    >>> class_named({"architectures": ["LlamaForCausalLM"]}), class_named({"architectures": None})
    ('LlamaForCausalLM', '')
    """
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def _axes(shape: Shape, dims: dict[str, int]) -> list[str]:
    """An axis for each dimension, named by its size, so that sizes of different tensors are not confused."""
    names: list[str] = []
    for size in shape:
        name = f"n{size}"
        while name in names:
            name += "_"
        names.append(name)
        dims[name] = size
    return names


def _first(name: str) -> str:
    """
    >>> _first("layers.0.norm.weight"), _first("scale")
    ('layers.', 'scale')
    """
    head, dot, _ = name.partition(".")
    return head + dot


def shapes_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The shapes of a checkpoint's tensors; for parts that record it, the whole shape."""
    every = (tensor for file in checkpoint.files for tensor in file.tensors)
    return {one.name: one.shape if one.recorded is None else one.recorded.whole for one in every}


def _named(wanted: Wanted, held: Mapping[str, Shape]) -> tuple[Wanted, str, str]:
    """The class's tensors under the names, current or older, that the checkpoint has, with their prefixes."""
    lacking: list[EngineError] = []
    found: list[tuple[Wanted, str, str]] = []
    for one in (wanted, *wanted.others):
        try:
            prefix, own = _prefix(one, held)
        except EngineError as error:
            if error.code != "E207":
                raise
            lacking.append(error)
            continue
        found.append((one, prefix, own))
        shapes = {name: held.get(prefix + name.removeprefix(own)) for name in one.shapes}
        if shapes == one.shapes:
            return found[-1]
    if not found:
        raise lacking[0]
    return found[0]


def _prefix(wanted: Wanted, names: Collection[str]) -> tuple[str, str]:
    """The prefix of the class's names in the checkpoint, and the class's own prefix that it replaces."""
    held = set(names)
    first = next(iter(wanted.shapes))
    lacking: dict[str, str] = {}
    fitting: list[tuple[str, str]] = []
    for own in ("", _first(first)):
        ending = first.removeprefix(own)
        candidates = {name[: -len(ending)] for name in held if name.endswith(ending)}
        whole: list[str] = []
        for prefix in sorted(candidates, key=lambda p: (len(p), p)):
            missing = next((name for name in wanted.shapes if prefix + name.removeprefix(own) not in held), None)
            if missing is None:
                whole.append(prefix)
            else:
                lacking.setdefault(prefix, missing)
        if len(whole) > 1:
            raise EngineError(
                "E206",
                f"the checkpoint holds {len(whole)} models, each with every tensor of the class",
                place=Place(first),
                got=f"under {', '.join(f'`{one}`' for one in whole[:4])}",
                expected="one",
                fix="One may be an average of the model. Take out the one that you want: torch's dcp_to_torch_save "
                f'makes one file of a distributed checkpoint, and torch.save(torch.load(FILE)["{_key(whole)}"], '
                '"ONE/model.pt") a folder ONE that is read.',
            )
        fitting += [(prefix, own) for prefix in whole]
    if fitting:  # several if only a tied head would distinguish them
        return max(fitting, key=lambda one: sum(one[0] + name.removeprefix(one[1]) in held for name in wanted.tied))
    best = max(lacking, key=lambda p: list(wanted.shapes).index(lacking[p]), default="")
    raise EngineError(
        "E207",
        f"the checkpoint has no `{lacking.get(best, first)}`, which the model class of its configuration needs",
        place=Place(lacking.get(best, first)),
        got=", ".join(sorted(held)[:3]) + f", … ({len(held)} tensors)" if held else "no tensors of a model",
        expected=f"all {len(wanted.shapes)} tensors of the class" + (f", behind `{best}`" if best else ""),
        fix="The configuration is another model's, or the checkpoint has the trainer's own names: then a mapping of "
        "its family reads it, as `engine inspect` says.",
    )


def _key(prefixes: Sequence[str]) -> str:
    """The last one as it stands between `["` and `"]` of Python.

    >>> _key(["ema.", "model."]), _key(["", "ema."]), _key(["app.ema.", "app.model."])
    ('model', 'ema', 'app"]["model')
    """
    return prefixes[-1].rstrip(".").replace(".", '"]["')


def _families(wanted: Wanted) -> list[_Family]:
    """Names folded by their numbers, if these count from 0 without gaps and all folded tensors have one shape."""
    every = {**wanted.shapes, **{name: wanted.shapes[to] for name, to in wanted.tied.items() if to in wanted.shapes}}
    kinds = {name: _Kind(shape, wanted.tied.get(name), wanted.types.get(name)) for name, shape in every.items()}
    listed = grouped(((without_numbers(name), kind), numbers_in(name)) for name, kind in kinds.items())
    full = {key: _counts(numbers) for key, numbers in listed.items()}
    alike = Counter(text for text, _ in full)
    layers = Counter(counts[0] for counts in full.values() if counts)
    layer = layers.most_common(1)[0][0] if layers else None
    families: list[_Family] = []
    for (text, kind), every_number in listed.items():
        counts = full[text, kind]
        if counts is None or alike[text] > 1:
            families += [_Family(_put(text, [str(number) for number in one]), {}, kind) for one in every_number]
            continue
        words: list[str] = [f"i{count}" + "_" * counts[:i].count(count) for i, count in enumerate(counts)]
        if counts and counts[0] == layer:
            words[0] = "layer"
        families.append(
            _Family(_put(text, [f"{{{word}}}" for word in words]), dict(zip(words, counts, strict=True)), kind)
        )
    return families


def _put(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.replace("{}", word, 1)
    return text


def _counts(numbers: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The count of each number, if all combinations from 0 on exist; else None."""
    counts = tuple(1 + max(column) for column in zip(*numbers, strict=True))
    return counts if len(numbers) == prod(counts) and len(set(numbers)) == len(numbers) else None
