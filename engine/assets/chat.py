"""Chat templates: files of `mappings/chat_templates/`, copied unchanged."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.language.search import search_folders

_MARK = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def chat_template(name: str) -> str:
    """The Jinja text of a bundled template, or of one in a folder of `ENGINE_MAPPINGS`.

    It is read and checked for syntax. It is never rendered here: transformers does that.

    Raises:
        EngineError: E002 if there is none with that name, E502 if it is not valid Jinja.
    """
    folders = [folder / "chat_templates" for folder in search_folders()]
    found = next((path for folder in folders if os.path.isfile(path := folder / f"{name}.jinja")), None)
    if found is None or Path(name).name != name:
        known = sorted(path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.jinja"))
        raise EngineError(
            "E002",
            f"there is no chat template `{name}`",
            expected=f"one of: {', '.join(known)}",
            fix="Correct `chat_template` in the mapping, or add the file to chat_templates/ of a folder that "
            "ENGINE_MAPPINGS names.",
        )
    data = found.read_bytes()
    check_template(data, Place(found.name))
    return data.decode()


def check_template(data: bytes, place: Place) -> None:
    """E502 unless the bytes are valid Jinja, as transformers reads it. It is not rendered."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(unmarked(data.decode()))
    except (TemplateSyntaxError, ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise EngineError(
            "E502",
            "the chat template is not valid Jinja",
            place=Place(place.file, getattr(error, "lineno", None)),
            got=str(getattr(error, "message", error)),
            fix="Correct the template.",
        ) from error


def never_written(template: str, generation: Mapping[str, Any], names: Mapping[int, str], own: bool) -> list[str]:
    """A notice if a template writes none of the tokens at which generation stops.

    Args:
        names: the tokens by id.
        own: whether it is the mapping's, which can rename tokens.

    >>> never_written("{{ m.content }}<e>", {"eos_token_id": [1, 2]}, {1: "</s>", 2: "[UNUSED]"}, own=True)
    ['the chat template never writes `[UNUSED]`, id 2, at which generation stops; see `rename` of the tokenizer']
    >>> never_written("{{ m.content }}<e>", {"eos_token_id": [1, 2]}, {1: "</s>", 2: "<e>"}, own=True)
    []
    """
    ends = generation.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    known = {one: names[one] for one in ids if isinstance(one, int) and one in names}
    if not known or "eos_token" in template or any(name in template for name in known.values()):
        return []
    last = max(known)
    told = f"the chat template never writes `{known[last]}`, id {last}, at which generation stops"
    return [f"{told}; {'see `rename` of the tokenizer' if own else 'a chat may not stop after an answer'}"]


def unmarked(text: str) -> str:
    """A template without the `generation` tags around the assistant's text, which only transformers' Jinja knows.

    transformers reads `chat_template.jinja`, which keeps them: training masks are made from them. Programs that read
    `chat_template` in tokenizer_config.json, like llama.cpp's converter and old transformers, get it without them:
    a Jinja that does not know the tag would refuse the whole template. A tag that strips the space around it becomes
    a comment that strips it too; so does one before a line break, since Jinja drops that line break.

    >>> unmarked("{{ a }}{% generation %}{{ b }}{%- endgeneration %}")
    '{{ a }}{{ b }}{#- #}'
    """

    def plain(mark: re.Match[str]) -> str:
        before, after = text[: mark.start()].rpartition("\n")[2], text[mark.end() : mark.end() + 1]
        matters = mark[1] or mark[2] or after in ("\n", "") or not before.strip()
        return f"{{#{mark[1]} {mark[2]}#}}" if matters else ""

    return _MARK.sub(plain, text)
