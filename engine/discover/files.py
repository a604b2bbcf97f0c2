"""The surroundings of a draft: the layout that fits, families to extend, its name, and its file."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from engine.discover.scaffold import Request, Scaffold, draft
from engine.discover.steps import read_any
from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.search import bundled, list_names
from engine.planning.given import check_type
from engine.storage.places import last_name
from engine.storage.replacing import check_file_free, given_path, write_file
from engine.storage.store import write_error

_DRAFTED = "# as drafted by engine new: "
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def new_mapping(
    src: str | Path = ".",
    *,
    name: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    config: str | Path | None = None,
) -> Scaffold:
    """A first draft of a mapping for a checkpoint: what fits, what is a guess, what a person must decide.

    >>> print(engine.new_mapping("ckpt/1000", name="mine-7b").text)
    # yaml-language-server: ...
    mapping: 1
    name: mine-7b
    ...

    Args:
        name: the mapping's name; default: that of the file or of the folder.
        out: the file to write; without it the text is only returned.
        overwrite: replace a file that exists.
        config: the model's config.json, or its folder, if the framework saves none.

    Raises:
        EngineError: E401 when the file exists; E2xx and E3xx for a checkpoint that cannot be read.
    """
    check_type("name", name, str | None)
    file = None if out is None else given_path(out, "the mapping")
    if file is not None:
        check_file_free(file, overwrite, is_draft)
    called = _name(name, file, Path(str(src)))
    families = [(name, load_mapping(name)) for name in list_names() if name.startswith("families/")]
    layout, checkpoint = read_any(src, config=config, needed=True)
    made = draft(Request(checkpoint, layout, families, called, _schema(file)))
    made = replace(made, text=_signed(made.text))
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(file, error, "there") from error
        write_file(file, made.text.encode(), overwrite=overwrite, ours=is_draft)
    return made


def _name(given: str | None, out: Path | None, src: Path) -> str:
    if given is not None:
        if _NAME.fullmatch(given) is None:
            raise EngineError(
                "E001",
                "this cannot be the name of a mapping",
                got=given,
                expected="lower-case letters, digits, dots, dashes and underscores, like internlm2-7b",
                fix="Give another --name.",
            )
        return given
    stem = out.stem if out is not None else last_name(src)
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-") or "new-mapping"


def _schema(out: Path | None) -> str | None:
    """The schema's path relative to the file, if both are in one project."""
    root = bundled("mappings").resolve().parent
    if out is None:
        return "../schemas/mapping.schema.json"
    folder = out.resolve().parent
    if not folder.is_relative_to(root):
        return None
    return Path(os.path.relpath(root / "schemas" / "mapping.schema.json", folder)).as_posix()


def _signed(text: str) -> str:
    """A draft with a last line that shows whether a person has edited it since."""
    return f"{text}{_DRAFTED}{hashlib.sha256(text.encode()).hexdigest()[:32]}\n"


def is_draft(content: bytes) -> bool:
    """Whether a file holds an unedited draft."""
    text, _, _ = content.decode("utf-8", "replace").rpartition(_DRAFTED)
    return _signed(text).encode() == content
