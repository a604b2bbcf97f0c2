"""Layout files: from YAML to a checked, frozen `Layout`, which describes how a framework lays out ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from engine.errors import EngineError, Place
from engine.language.declared import check_layout
from engine.language.documents import Document
from engine.language.keys import names_apart, read_keys
from engine.language.loader import content_of, load_bytes
from engine.language.mapping_file import digest_of, expression, read_option, read_tree, read_variant
from engine.language.model import (
    Beside,
    ConfigFile,
    Expression,
    FilePattern,
    LayerCut,
    Layout,
    Mode,
    Prefix,
    RankMap,
    RefusedFile,
)
from engine.language.names import check_file_name, pattern
from engine.language.rules import STORED
from engine.language.search import find_file, shown
from engine.language.validation import check_schema


def load_layout(name: str, named_at: Place | None = None) -> Layout:
    """Load a layout by name from the `layouts` folders, or by path; E002, E1xx.

    Args:
        named_at: the place where a mapping names it.
    """
    try:
        path = find_file(name, "layout")
    except EngineError as error:
        error.place = error.place or named_at
        raise
    shown_as = shown(path)
    return _read(shown_as, content_of(path, shown_as))


@lru_cache(maxsize=16)
def _read(name: str, content: bytes) -> Layout:
    """The layout of a file, cached until the file's content changes."""
    document = load_bytes(content, name)
    check_schema(document, "layout")
    document = names_apart(document)
    data, place = document.data, document.place
    configs = [document.part("config"), *document.parts("config", "or").values()]
    for one in configs:
        check_file_name(one.data["file"], one.value_place("file"), folders=True)
    if "training" in data:
        check_file_name(data["training"]["file"], document.value_place("training", "file"))
    training = data.get("training") or {}
    layers, says = data["layers"], data.get("says") or {}
    layout = Layout(
        name=data["name"],
        version=str(data["version"]),
        description=data.get("description", ""),
        place=place("name"),
        config_file=data["config"]["file"],
        configs=tuple(map(_config_file, configs)),
        config_of_target=data["config"].get("of") == "target",
        config_from_target=data["config"].get("else") == "target",
        config_has=frozenset(data["config"].get("has") or ()),
        training_file=training.get("file"),
        training_format=training.get("format"),
        training_repeats=training.get("repeats"),
        training_write=read_tree(document.part("training", "write")) or {},
        prefixes=tuple(
            Prefix(one.data["prefix"], _optional(one, "when")) for one in document.parts("prefixes").values()
        ),
        options={name: read_option(name, one) for name, one in document.parts("options").items()},
        layers=LayerCut(
            stage=expression(document.part("layers", "stage")),
            variants={name: read_variant(name, one) for name, one in document.parts("layers", "variants").items()},
            divides=_optional(document, "layers", "divides"),
            uneven=layers.get("uneven", "last"),
        ),
        uneven=data.get("uneven", "first"),
        even=tuple(data.get("even") or ()),
        whole=data.get("whole") or {},
        lone_rank=data.get("lone_rank") or {},
        joined=data.get("joined") or {},
        zip_root=data.get("zip_root"),
        says_ranks=_expressions(document.parts("says", "ranks")),
        says_alike=tuple(says.get("alike") or ()),
        sizes=_expressions(document.parts("sizes")),
        modes=tuple(_mode(name, one) for name, one in document.parts("modes").items()),
        skip=tuple(data.get("skip") or ()),
        skip_tensors=tuple(data.get("skip_tensors") or ()),
        wrappers=tuple(data.get("wrappers") or ()),
        refuse=tuple(map(_refused, document.parts("refuse").values())),
        files=(document.file,),
        digest=digest_of(data),
        keys=read_keys(document),
        indices=_expressions(document.parts("indices")),
    )
    check_layout(layout, document)
    return layout


def _expressions(parts: Mapping[str, Document]) -> dict[str, Expression]:
    return {name: expression(one) for name, one in parts.items()}


def _optional(part: Document, *path: str) -> Expression | None:
    found = part.part(*path)
    return None if found.data is None else expression(found)


def _config_file(part: Document) -> ConfigFile:
    body = part.data
    return ConfigFile(body["file"], body["format"], body.get("key"), body.get("as"), tuple(body.get("beside") or ()))


def _refused(part: Document) -> RefusedFile:
    files, tensors = (
        (one,) if isinstance(one := part.data.get(key, ()), str) else tuple(one) for key in ("file", "tensor")
    )
    return RefusedFile(files, part.data["why"], part.data["fix"], part.place(), _optional(part, "when"), tensors)


def _mode(name: str, mode: Document) -> Mode:
    body = mode.data
    return Mode(
        name,
        body.get("help", ""),
        tuple(map(_file, mode.parts("files").values())),
        tuple(body.get("aliases") or ()),
        tuple(map(_beside, mode.parts("beside").values())),
        body.get("only_read"),
        body.get("format", "torch"),
        tuple(body.get("state") or ()),
        _optional(mode, "when"),
        dict(body.get("choices") or {}),
    )


def _beside(part: Document) -> Beside:
    check_file_name(part.data["file"], part.value_place("file"))
    content = read_tree(part.part("content")) or {}
    return Beside(part.data["file"], content, part.data.get("format", "pickled_mapping"))


def _file(part: Document) -> FilePattern:
    body = part.data
    check_file_name(body["name"], part.value_place("name"), folders=True)
    pattern(body["name"], part.value_place("name"))
    ranks = part.parts("ranks")
    return FilePattern(
        body["name"],
        body.get("cuts") or {},
        RankMap(expression(ranks.pop("count")), _expressions(ranks)) if ranks else None,
        _optional(part, "number"),
        part.place(),
        body.get("boxes") == "recorded",
        {dim: STORED.index(cut) for dim, cut in (body.get("mesh") or {}).items()},
    )
