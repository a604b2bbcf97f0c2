"""Checks that configurations agree: the written one with the one read, the one given and the one that repeats it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice, product
from typing import Any

from engine.checkpoint.joined import Joined
from engine.errors import EngineError, Place
from engine.formats.python_source import UNTOLD
from engine.language.declared import paths_in
from engine.language.documents import leaves, merged, plain, prefixes, value_at
from engine.language.expressions import render_tree
from engine.language.keys import Key, as_declared, find_key
from engine.language.model import Layout, MappingFile
from engine.planning.config_keys import Read, Side, read_config, shown, whole_side

_MOST_TRIED = 2000  # combinations of values of options
_MISSING = object()
_COPY_BOTH = (
    "One of the two files is from another run: copy both again from the training run. If you know which is right, "
    "correct the other, or move it away."
)


def check_returns(
    read: Read,
    forth: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    mapping: MappingFile,
    options: Mapping[str, Any],
) -> None:
    """E209 for the first key of a configuration that does not survive the way to the other side and back.

    Args:
        read: the configuration that was read.
        forth: converts the configuration to be written back, with the same mapping and given options.
    """
    found = _lost(read, forth(options), mapping)
    if found is None:
        return
    side, (path, value, other, tree) = read.side, found
    named = _options_in(tree)
    fit: dict[str, Any] = {}
    if named:
        fit = fitting(mapping, read.config, options, lambda tried: _lost(read, forth(tried), mapping) is None)
    told = " ".join(f"--set {name}={one}" for name, one in fit.items()) or f"--set: {', '.join(named)}"
    there = value_at(read.config, path) is not None
    key = find_key(side.keys, path)
    why = f": {key.why}" if key is not None and key.why else ""
    raise EngineError(
        "E209",
        f"`{side.spelt.get(path, path)}` of {side.file} would be {'lost' if there else 'added'}{why}",
        place=Place(side.file),
        got="no such key" if value is None else f"{side.spelt.get(path, path)}: {shown(value)}",
        expected=f"{shown(other)}, as what is written would be read" if other is not None else
                 "a value that comes back" if why else "no such key",
        fix=(f"Training files do not hold it. If it is only how the model is served, say so with {told}."
             if named else
             "Write the model's value into the file: programs take a missing key for something else."
             if not there else
             "Training files cannot say it: use a mapping that can express it."
             if why else
             "The configuration contradicts itself or the weights, or training files cannot express it: it is "
             "another model's, or the mapping is not the one for it."),
        answers={name: (one,) for name, one in fit.items()},
    )  # fmt: skip


def _lost(read: Read, forth: Mapping[str, Any], mapping: MappingFile) -> tuple[str, Any, Any, Any] | None:
    """The first key that does not come back: its path and value, what comes back, and what makes that.

    Below a key, as in `rope_parameters`, no new key may come back either: programs would take a missing one for
    another value. An ignored key counts if its `unless` holds.
    """
    side, written = read.side, dict(leaves(mapping.config))
    back, there = dict(leaves(forth)), dict(leaves(read.config))
    absent = [
        path
        for path in back.keys() - there.keys()
        if isinstance(value_at(read.config, path.rpartition(".")[0]), Mapping)
        and ((key := find_key(side.keys, path)) is None or key.same_as is None)  # else read by its other spelling
    ]
    for path, value in (*there.items(), *dict.fromkeys(sorted(absent)).items()):
        tree = next((written[p] for p in prefixes(path) if p in written), None)
        key = find_key(side.keys, path)
        if tree is None or (key is not None and key.ignores(read.config)):
            continue
        found = back.get(path, value_at(forth, path))
        if found is None and key is not None:
            found = key.default
        if plain(found) == plain(value):
            continue
        return path, value, found, tree
    return None


def _options_in(tree: Any) -> list[str]:
    return sorted({path.split(".")[1] for path in paths_in(tree) if path.startswith("options.")})


def _settings(tree: Any, value: Any, mapping: MappingFile) -> list[str]:
    """`--set` texts for the options that a key is made from; with the key's value, where that fits."""
    fits = {name: mapping.options[name].limits.fits(value) for name in _options_in(tree)}
    return [f"--set {name}={shown(value) if fits[name] else '…'}" for name in fits]


def fitting(
    mapping: MappingFile, config: Mapping[str, Any], options: Mapping[str, Any], fits: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Values for as few options as possible that reproduce a configuration; empty if none are found.

    For each option it tries its choices, or else the numbers in the keys it is written to and their quotients.
    """
    tried: dict[str, list[Any]] = {}
    for name, option in mapping.options.items():
        paths = [path for path, tree in leaves(mapping.config) if name in _options_in(tree)]
        held = (dict(leaves(value if isinstance(value, Mapping) else {path: value})).values()
                for path in paths for value in (value_at(config, path),))  # fmt: skip
        numbers = [one for values in held for one in values if isinstance(one, int | float) and one > 0]
        found = [*numbers, *(a // b for a in numbers for b in numbers if b and a % b == 0)]
        listed = option.choices or [option.limits.written(one) for one in map(_whole, found) if option.limits.fits(one)]
        tried[name] = list(dict.fromkeys((options.get(name), *(listed if paths else ()))))
    every = islice(product(*tried.values()), _MOST_TRIED)
    changes = ({n: v for n, v in zip(tried, one, strict=True) if v != options.get(n)} for one in every)
    return next((one for one in sorted(changes, key=len) if one and fits({**options, **one})), {})


def _whole(number: float) -> float:
    """A whole number as an integer, which every numeric option accepts."""
    return int(number) if number == int(number) else number


def check_repeated(config: Mapping[str, Any], training: Mapping[str, Any], side: Side, layout: Layout) -> None:
    """E218 for the first key that matters and differs in the training configuration, which repeats this one."""
    file, repeats = layout.training_file, layout.training_repeats or ""
    again = value_at(training, repeats)
    again = again if isinstance(again, Mapping) else {}
    untold = training.get(UNTOLD, {})
    for path, value in leaves(config if again else {}):
        key, there = find_key(side.keys, path), f"{repeats}.{path}"
        has, may_have = value_at(training, there, _MISSING) is not _MISSING, any(map(untold.get, prefixes(there)))
        if value is None or has or may_have:
            continue
        if key is not None and side.reads(path) and not key.adds(value, config):
            raise EngineError(
                "E218",
                f"`{path}` is in {side.file} and not in {file}, and training adds no such value",
                place=Place(side.file),
                got=f"{path}: {shown(value)}",
                expected=f"no such key, or `{path}` in `{repeats}` of {file} too",
                fix=_COPY_BOTH,
            )
    for path, value in leaves(again):
        key, here = find_key(side.keys, path), value_at(config, path)
        limited = key is not None and key.only is not None
        if not (side.reads(path) or limited) or plain(here) == plain(value):
            continue
        if here is None and limited and key is not None and key.allows(value):
            continue  # it may be absent
        raise EngineError(
            "E218",
            f"`{path}` is not the same in {side.file} and {file}",
            place=Place(side.file),
            got="no such key" if here is None else f"{path}: {shown(here)}",
            expected=f"{path}: {shown(value)}, as {file} says",
            fix=_COPY_BOTH,
        )


def told_by_places(read: Read, joined: Mapping[str, Joined]) -> dict[str, bool]:
    """The keys that a configuration lacks and that the places of tensors tell; E218 for one that contradicts them."""
    found = {key: seen for key, seen in joined.items() if read.side.reads(key)}
    for key, seen in found.items():
        if read.config.get(key) is None or read.config[key] == seen.one:
            continue
        names = ", ".join(f"`{name}`" for name in seen.names)
        raise EngineError(
            "E218",
            f"`{key}` of {read.side.file} contradicts where tensors are stored",
            place=Place(seen.file, tensor=seen.names[0]),
            got=f"{key}: {shown(read.config[key])}",
            expected=f"{shown(seen.one)}: {names} are stored as "
            + ("one parameter, which training cuts when it saves it" if seen.one else "parameters of their own"),
            fix="Copy the configuration again from the training run, or correct the key. If another program moved the "
            "tensors, save the file again with a copy of each: "
            "`torch.save({name: tensor.clone() for name, tensor in state.items()}, file)`.",
        )
    return {key: seen.one for key, seen in found.items() if read.config.get(key) is None}


def with_given(
    config: Mapping[str, Any], given: Mapping[str, Any], mapping: MappingFile, layout: Layout
) -> dict[str, Any]:
    """A configuration to be written, completed by the given one; keys in both must agree.

    Raises:
        EngineError: E218 for the first key that differs between the checkpoint and the given configuration; E209
            for one that training cannot express, E219 for an unknown one.
    """
    side = whole_side(mapping, layout)
    if not given:
        return as_declared(config, side.keys)
    read, written = read_config(given, side), dict(leaves(mapping.config))
    left_out = {path: None for path in written if value_at(config, path) is None}
    said = {path.rpartition(".")[0] for path in (*dict(leaves(given)), *read.side.spelt)} - {""}
    for path, value in (*leaves(config), *left_out.items()):
        other = value_at(read.config if path in read.side.spelt or path in left_out else given, path)
        key = read.side.keys.get(path)
        if other is None and key is not None and path.rpartition(".")[0] in said:
            other = key.default  # it says other keys of these, and this one by leaving it out
        as_good = key is not None and (key.ignores(read.config) or plain(other) == plain(key.default))
        if other is None or plain(other) == plain(value) or (as_good if path in left_out else value is None):
            continue
        raise EngineError(
            "E218",
            f"the given configuration does not belong to this checkpoint: `{path}` is {shown(other)}",
            place=Place(read.side.file),
            got=f"{path}: {shown(other)}",
            expected=f"{'no such key' if value is None else shown(value)}, as mapping `{mapping.name}` reads the "
            "checkpoint",
            fix="Give the configuration of this model, or correct that key in it"
            + "".join(
                f", or where the checkpoint does not say it, with {told}"
                for told in _settings(written.get(path), other, mapping) or _unsaid(key)
            )
            + ".",
        )
    kept = {name: value for name, value in given.items() if name not in left_out or value is None}
    return as_declared(merged(_without_nulls(kept, read.side.keys), config), read.side.keys)


def _unsaid(key: Key | None) -> list[str]:
    """What says a key that training files do not hold, such as a token, where no option does."""
    return ["`config` of a mapping of your own"] if key is not None and key.ignored is not None else []


def with_parts(config: Mapping[str, Any], mapping: MappingFile, layout: Layout) -> dict[str, Any]:
    """A configuration in which each part, such as `text_config`, is completed as that of a whole model is."""
    result = dict(config)
    for name, part in config.items():
        if isinstance(part, Mapping) and isinstance(part.get("model_type"), str):
            of_part = replace(layout, config_file=f"{layout.config_file} ({name})")
            read = read_config(part, whole_side(mapping, of_part))
            made = as_declared(render_tree(mapping.config, read.config), mapping.keys.get("target", {}))
            result[name] = with_parts(with_given(made, part, mapping, of_part), mapping, of_part)
    return result


def _without_nulls(given: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """A given configuration without nulls, except where the key's type allows null."""
    result: dict[str, Any] = {}
    for name, value in given.items():
        key = keys.get(f"{prefix}{name}")
        if isinstance(value, Mapping):
            result[name] = _without_nulls(value, keys, f"{prefix}{name}.")
        elif value is not None or key is None or "null" in key.limits.types:
            result[name] = value
    return result
