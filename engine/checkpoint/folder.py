"""Reading a checkpoint folder: its files, their headers and the configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from fnmatch import translate
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.configs import plain, read_config
from engine.formats.dcp import read_dcp, read_dcp_value
from engine.formats.headers import FileHeader
from engine.formats.rank_files import Pickles, read_rank_file
from engine.formats.safetensors import read_safetensors, read_sharded_safetensors
from engine.language.model import ConfigFile, Layout, Mode
from engine.language.names import pattern
from engine.storage.folders import listing
from engine.storage.store import File, Store

_KEPT = 256  # pickles of a folder that stay in memory while it is read
_READERS = 4  # threads: indexing waits for storage, not for the processor
_UNFINISHED = re.compile(r"[.]journal|[.]part-[0-9]{5}-of-[0-9]{5}")  # the engine's, until an output is complete


def list_folder(folder: Store, inside: Sequence[str] = (), files: Sequence[str] = ()) -> list[str]:
    """File names of a checkpoint folder, sorted; E304/E305 when there is none.

    Args:
        inside: patterns of subfolders whose files are listed too.
        files: patterns of names that some trainers give to the folder of a step too: such folders are left out.
    """
    below = [pattern(text) for text in dict.fromkeys(inside)]
    either = [pattern(text) for text in files]
    with listing(folder):
        every = folder.names()
        check_finished(folder, every)
        names = [name for name in every if not name.startswith(".")]
        alike = {name for name in names if any(one.match(name) is not None for one in either)}
        if alike:
            folders = {name for name, state in folder.entries().items() if state is None}
            names = [name for name in names if name not in alike & folders]
        for name in [n for n in names if any(one.match(n) is not None for one in below)]:
            try:
                names += (f"{name}/{one}" for one in folder.names(name) if not one.startswith("."))
            except NotADirectoryError:
                continue
            names.remove(name)
        names.sort()
    return names


def check_finished(folder: Store, names: Sequence[str]) -> None:
    """E304 for what an interrupted run or a part left, moved elsewhere: zeros are where it has not written yet."""
    found = next(filter(_UNFINISHED.fullmatch, names), None)
    if found is not None:
        raise EngineError(
            "E304",
            "this is an output that the engine did not finish",
            place=Place(folder.place()),
            got=found,
            expected="a complete checkpoint",
            fix="Convert again, with --resume where it was interrupted, or `engine commit` for parts.",
        )


def read_headers(
    folder: Store,
    names: Sequence[str],
    mode: Mode | None = None,
    skip: Sequence[str] = (),
    says: Sequence[str] = (),
    wrappers: Sequence[str] = (),
    *,
    some: bool = False,
) -> tuple[FileHeader, ...]:
    """Index rank files without reading their payload.

    Args:
        mode: gives the format of the files; default: files that torch saved.
        skip: globs of tensor names to leave out.
        says: dotted keys of values beside the tensors, in files that torch saved, that are kept.
        wrappers: parts of dotted names that are taken out.
        some: whether the checkpoint has more files than these.

    Raises:
        EngineError: E206 for two tensors with the same name once wrappers are taken out, E30x for unreadable files.
    """
    left_out = re.compile("|".join(map(translate, skip))) if skip else None

    def wanted(name: str) -> bool:
        return left_out is None or left_out.match(name) is None

    headers: Iterable[FileHeader]
    match "torch" if mode is None else mode.format:
        case "dcp":
            return _unwrapped(read_dcp(folder, names, wanted, some=some), wrappers)
        case "safetensors":
            headers = read_sharded_safetensors(folder, names)
        case "whole":
            headers = (read_safetensors(File(folder, name)) for name in names)
        case _:
            load = Pickles(_KEPT)
            keys = [pattern(text).regex for text in mode.state] if mode else []
            state = None if mode is not None and mode.format == "nested" else keys
            headers = side_by_side(lambda name: read_rank_file(File(folder, name), load, state, says), names)
            headers = (replace(one, left=tuple(n for n in one.left if wanted(f"{n}."))) for one in headers)
    return _unwrapped(tuple(header.only(wanted) for header in headers), wrappers)


def _unwrapped(headers: tuple[FileHeader, ...], wrappers: Sequence[str]) -> tuple[FileHeader, ...]:
    names = {tensor.name for header in headers for tensor in header.tensors}
    plain = {name: ".".join(word for word in name.split(".") if word not in wrappers) for name in names}
    if all(name == without for name, without in plain.items()):
        return headers
    owners: dict[str, str] = {}
    for name, without in plain.items():
        if owners.setdefault(without, name) != name:
            raise EngineError(
                "E206",
                f"the checkpoint holds `{without}` twice",
                place=Place(headers[0].name),
                got=" and ".join(sorted((name, owners[without]))),
                expected="one",
                fix="Save the model that you want by itself.",
            )
    return tuple(
        replace(header, tensors=tuple(replace(one, name=plain[one.name]) for one in header.tensors))
        for header in headers
    )


def side_by_side(read: Callable[[str], FileHeader], names: Sequence[str]) -> Iterator[FileHeader]:
    """Files indexed by a few threads; a single one by none."""
    if len(names) < 2:
        yield from map(read, names)
        return
    with ThreadPoolExecutor(min(_READERS, len(names))) as pool:
        yield from pool.map(read, names)


def read_configuration(
    folder: Store, layout: Layout, given: File | None = None, *, needed: bool = True
) -> tuple[str, dict[str, Any]]:
    """The model's configuration and its file: the first of the layout's places that holds one.

    Args:
        given: a file of the target's configuration. If the layout's configuration is the target's, it is read instead
            of any of the layout's places.
        needed: if false, a configuration that frameworks do not save may be missing and is then empty,
            as it also is when `given` takes its place.

    Raises:
        EngineError: E304 when none is found, E30x when it cannot be read.
    """
    if given is not None and layout.config_of_target:
        return given.name, read_config(given, "json")
    every = ((place.file, held) for place in layout.configs if (held := _held(folder, place)) is not None)
    found = ((file, held) for file, held in every if not layout.config_has or layout.config_has & held.keys())
    for file, value in found:
        if layout.config_of_target:
            _check_alone(file, value, found)
        return file, value
    if (layout.config_of_target and not needed) or (layout.config_from_target and (given is not None or not needed)):
        return layout.config_file if given is None else given.name, {}
    raise no_configuration(folder, layout)


# Keys of a transformers config that may differ: who wrote it, and the type to load weights in, which tensors have too.
_NO_MATTER = ("transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype")


def _check_alone(first: str, value: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """E218 when another of the layout's places holds another configuration: which one is the model's?"""
    for file, other in others:
        differ = [] if file == first else _differing(value, other)
        if differ:
            raise EngineError(
                "E218",
                f"`{differ[0]}` is not the same in {first} and {file}",
                place=Place(file),
                got=repr(other.get(differ[0]))[:100],
                expected=f"{value.get(differ[0])!r:.100}, as in {first}",
                fix="Either may be the model's. Give the right one with --config, or move the other away.",
            )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys that differ, first those that say something in both: an absent one may say what is the default."""
    keys = sorted({*one, *other}.difference(_NO_MATTER))
    differ = [key for key in keys if one.get(key) != other.get(key)]
    return sorted(differ, key=lambda key: not one.get(key) or not other.get(key))


def passed_over(folder: Store, layout: Layout, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of which a folder's own configurations of the target have other values than the given one, and the file."""
    told: list[str] = []
    for place in layout.configs if layout.config_of_target else ():
        with suppress(EngineError):  # the given one may take the place of one that cannot be read
            told += [f"{key} in {place.file}" for key in _differing(given, _held(folder, place) or given)]
    return tuple(told)


def _held(folder: Store, place: ConfigFile) -> dict[str, Any] | None:
    """The configuration in one of the layout's places; None when there is none."""
    file = File(folder, place.file)
    if not file.exists:
        return None
    if place.format != "dcp":
        value: Any = read_config(file, place.format)
        keys = place.key.split(".") if place.key is not None else []
        if keys and isinstance(value, dict) and keys[0] not in value:
            return None
    else:
        name, _, inside = (place.key or "").partition(":")
        try:
            value = plain(read_dcp_value(folder, name), place.file)
        except KeyError:
            return None
        keys = inside.split(".") if inside else []
    extra = _below(value, keys[:-1], place.file) if place.beside else {}
    told = {key: extra[key] for key in place.beside if key in extra}
    return {**_below(value, keys, place.file), **told}


def no_configuration(folder: Store, layout: Layout) -> EngineError:
    """E304: none of the layout's places holds the configuration."""
    places = ", ".join(dict.fromkeys(place.file for place in layout.configs))
    return EngineError(
        "E304",
        "the training configuration is missing" if layout.config_from_target else f"`{layout.config_file}` is missing",
        place=Place(folder.place()),
        expected=f"the model's configuration beside the weights, in {places}"
        if len(layout.configs) > 1
        else "the model's configuration beside the rank files",
        fix="This framework does not save it: give the config.json of the model with --config FILE, or put it there."
        if layout.config_of_target
        else "Copy it from the training run. Or give the config.json of the model with --config FILE: then its sizes "
        "count, and the engine asks for what it does not say."
        if layout.config_from_target
        else "Copy it from the training run; sizes are checked against it.",
    )


def _below(value: Any, keys: Sequence[str], file: str) -> dict[str, Any]:
    """The value under dotted keys; a number is an index into a list."""
    for key in keys:
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            value = None
    if not isinstance(value, dict) or not value:
        got = "an empty dict" if isinstance(value, dict) else type(value).__name__
        raise EngineError(
            "E303",
            "the configuration holds no settings",
            place=Place(file),
            got=f"{got} under {'.'.join(keys)}" if keys else got,
            expected="the model's settings by name",
            fix="Copy the file again from the training run. A class that keeps settings in attributes cannot be read "
            "without running it: save a plain dict of them in the training environment.",
        )
    return value
