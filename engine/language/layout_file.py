"""Layout files: how a framework lays out ranks, as a checked, frozen `Layout`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from engine.errors import EngineError, Place
from engine.language.declared import check_layout
from engine.language.documents import Document, KeyPath
from engine.language.keys import apart, read_keys
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
        named_at: where a mapping names it.
    """
    try:
        path = find_file(name, "layout")
    except EngineError as error:
        error.place = error.place or named_at
        raise
    return _read(shown(path), content_of(path, shown(path)))


@lru_cache(maxsize=16)
def _read(name: str, content: bytes) -> Layout:
    """The layout of a file, made anew when it holds something else."""
    document = load_bytes(content, name)
    check_schema(document, "layout")
    document = apart(document)
    data, place = document.data, document.place
    configs = [data["config"], *(data["config"].get("or") or ())]
    for i, one in enumerate(configs):
        at = ("config", "or", i - 1, "file") if i else ("config", "file")
        check_file_name(one["file"], document.value_place(*at), folders=True)
    if "training" in data:
        check_file_name(data["training"]["file"], document.value_place("training", "file"))
    training = data.get("training") or {}
    layers, says = data["layers"], data.get("says") or {}
    divides = layers.get("divides")
    layout = Layout(
        name=data["name"],
        version=str(data["version"]),
        description=data.get("description", ""),
        place=place("name"),
        config_file=data["config"]["file"],
        config_format=data["config"]["format"],
        configs=tuple(map(_config_file, configs)),
        config_of_target=data["config"].get("of") == "target",
        config_from_target=data["config"].get("else") == "target",
        training_file=training.get("file"),
        training_format=training.get("format"),
        training_repeats=training.get("repeats"),
        training_write=read_tree(document, ("training", "write"), training.get("write") or {}),
        prefixes=tuple(
            Prefix(p["prefix"], expression(document, ("prefixes", i, "when"), p["when"]) if "when" in p else None)
            for i, p in enumerate(data["prefixes"])
        ),
        options={n: read_option(document, ("options", n), o) for n, o in (data.get("options") or {}).items()},
        layers=LayerCut(
            stage=expression(document, ("layers", "stage"), layers["stage"]),
            variants={
                n: read_variant(document, ("layers", "variants", n), v)
                for n, v in (layers.get("variants") or {}).items()
            },
            divides=None if divides is None else expression(document, ("layers", "divides"), divides),
            uneven=layers.get("uneven", "last"),
        ),
        uneven=data.get("uneven", "first"),
        even=tuple(data.get("even") or ()),
        lone_rank=data.get("lone_rank") or {},
        zip_root=data.get("zip_root"),
        says_ranks=_expressions(document, ("says", "ranks"), says.get("ranks")),
        says_alike=tuple(says.get("alike") or ()),
        sizes=_expressions(document, ("sizes",), data.get("sizes")),
        modes=tuple(_mode(document, n, m) for n, m in data["modes"].items()),
        skip=tuple(data.get("skip") or ()),
        skip_tensors=tuple(data.get("skip_tensors") or ()),
        refuse=tuple(
            RefusedFile(
                (r["file"],) if isinstance(r["file"], str) else tuple(r["file"]),
                r["why"],
                r["fix"],
                place("refuse", i),
                expression(document, ("refuse", i, "when"), r["when"]) if "when" in r else None,
            )
            for i, r in enumerate(data.get("refuse") or [])
        ),
        files=(document.file,),
        digest=digest_of(data),
        keys=read_keys(document),
        indices=_expressions(document, ("indices",), data.get("indices")),
    )
    check_layout(layout, document)
    return layout


def _expressions(document: Document, path: KeyPath, texts: dict[str, Any] | None) -> dict[str, Expression]:
    return {name: expression(document, (*path, name), text) for name, text in (texts or {}).items()}


def _config_file(body: dict[str, Any]) -> ConfigFile:
    return ConfigFile(body["file"], body["format"], body.get("key"), body.get("as"), tuple(body.get("beside") or ()))


def _mode(document: Document, name: str, body: dict[str, Any]) -> Mode:
    for i, beside in enumerate(body.get("beside") or []):
        check_file_name(beside["file"], document.value_place("modes", name, "beside", i, "file"))
    return Mode(
        name,
        body.get("help", ""),
        tuple(_file(document, ("modes", name, "files", i), f) for i, f in enumerate(body["files"])),
        tuple(body.get("aliases") or ()),
        tuple(_beside(document, ("modes", name, "beside", i), b) for i, b in enumerate(body.get("beside") or [])),
        body.get("only_read"),
        body.get("format", "torch"),
        tuple(body.get("state") or ()),
        expression(document, ("modes", name, "when"), body["when"]) if "when" in body else None,
        dict(body.get("choices") or {}),
    )


def _beside(document: Document, path: tuple[str | int, ...], body: dict[str, Any]) -> Beside:
    check_file_name(body["file"], document.place(*path))
    content = read_tree(document, (*path, "content"), body.get("content", {}))
    return Beside(body["file"], content, body.get("format", "pickled_mapping"))


def _file(document: Document, path: tuple[str | int, ...], body: dict[str, Any]) -> FilePattern:
    check_file_name(body["name"], document.value_place(*path, "name"), folders=True)
    pattern(body["name"], document.value_place(*path, "name"))
    ranks = body.get("ranks")
    number = body.get("number")
    return FilePattern(
        body["name"],
        body.get("cuts") or {},
        None
        if ranks is None
        else RankMap(
            expression(document, (*path, "ranks", "count"), ranks["count"]),
            _expressions(document, (*path, "ranks"), {d: text for d, text in ranks.items() if d != "count"}),
        ),
        None if number is None else expression(document, (*path, "number"), number),
        document.place(*path),
        body.get("boxes") == "recorded",
        {dim: STORED.index(cut) for dim, cut in (body.get("mesh") or {}).items()},
    )
