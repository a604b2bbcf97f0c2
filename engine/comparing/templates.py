"""Compares two chat templates by what they render, in Jinja's sandbox."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, TemplateError, nodes

from engine.assets.chat import unmarked
from engine.assets.ready import MORE
from engine.comparing.effects import Difference, both, presence
from engine.comparing.texts import Files
from engine.comparing.tokenizers import TOKENS
from engine.planning.config_keys import shown

_REFUSED = "refused: "
_SECONDS = 5  # that a conversation may take; any genuine template takes milliseconds
_ENDLESS = f"{_REFUSED}no end within {_SECONDS} s"
_TEMPLATE, _JSON, _SETTINGS = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


def compare_templates(ours: Files, theirs: Files) -> list[Difference]:
    """The differences in what two chat templates, given by the folders' files, render."""
    one, two = (_templates(files) for files in (ours, theirs))
    found: list[Difference] = []
    for name in sorted(one.keys() | two.keys()):
        called = "the template" if name == "default" else f"template `{name}`"
        if name in (_SETTINGS, _JSON):  # the other side may have this template only as the default
            one, two = ({name: side["default"], **side} if "default" in side else side for side in (one, two))
        if name not in one or name not in two:
            told = presence(one.get(name), two.get(name))
            found.append(Difference("chat template", called, *told, "chat() works on one side only"))
        elif one[name] != two[name]:
            found += _rendered(called, (one[name], _named(ours)), (two[name], _named(theirs)))
    return found


def _rendered(
    called: str, one: tuple[str, Mapping[str, Any]], two: tuple[str, Mapping[str, Any]]
) -> Iterator[Difference]:
    unlike = []
    loaded = yaml.safe_load(Path(__file__).with_name("conversations.yaml").read_text("utf-8"))
    conversations: dict[str, dict[str, Any]] = loaded["conversations"]
    for name, conversation in conversations.items():
        here, there = (_render(template, named, conversation) for template, named in (one, two))
        endless = _ENDLESS in (here, there)  # nothing is known of both
        optional = conversation.get("optional") and _REFUSED in (here[: len(_REFUSED)], there[: len(_REFUSED)])
        if endless or (here != there and not optional):
            unlike.append((name, here, there))
        if endless:
            break
    reads = [_read_by(template) for template, _ in (one, two)]
    if not unlike and reads[0] != reads[1]:
        told = both(lambda names: ", ".join(sorted(names)) or "no more", reads[0] - reads[1], reads[1] - reads[0])
        yield Difference("chat template", f"what {called} reads", *told, "prompts differ where a program gives it")
        return
    if not unlike:
        effect = f"all {len(conversations)} conversations that were tried are rendered alike"
        yield Difference("chat template", called, "other text", "its own", effect, "told")
        return
    name, here, there = unlike[0]
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    low = max(at - 10, 0)
    more = f" and {len(unlike) - 1} more conversations" if len(unlike) > 1 else ""
    effect = "the model sees prompts in a different form than in training"
    it = "it" if called == "the template" else called
    told = both(lambda text: shown(text[low : low + 50]), here, there)
    yield Difference("chat template", f"what {it} renders of {name}{more}", *told, effect)


def _read_by(template: str) -> frozenset[str]:
    """The variables that a template reads, such as `documents`; none of one that cannot be parsed.

    >>> sorted(_read_by("{% generation %}{{ messages[0] }}{% endgeneration %}{% if tools %}{% set x = 1 %}{% endif %}"))
    ['messages', 'tools']
    """
    try:
        tree = Environment().parse(unmarked(template))
    except TemplateError:
        return frozenset()
    names = [*tree.find_all(nodes.Name)]
    asked = {one.node.name for one in tree.find_all(nodes.Test) if isinstance(one.node, nodes.Name)}  # is it defined?
    own = {one.name for one in names if one.ctx != "load"} - asked
    return frozenset(one.name for one in names if one.name not in own)


def _templates(files: Files) -> dict[str, str]:
    """A folder's templates by name, as transformers finds them, and by file name one that only other programs use."""
    templates: dict[str, str] = {}
    if _TEMPLATE in files:
        templates["default"] = files[_TEMPLATE].decode("utf-8", "replace")
    for name in (_JSON, _SETTINGS):
        found = _settings(files, name).get("chat_template")
        if isinstance(found, str) and templates.setdefault("default", found) != found:
            templates[name] = found
        elif isinstance(found, list) and not templates:
            templates = {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
    named = {Path(name).stem: data.decode("utf-8", "replace") for name, data in files.items() if name.startswith(MORE)}
    return templates | named


def _settings(files: Files, name: str) -> dict[str, Any]:
    try:
        data = json.loads(files.get(name, b"{}"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _named(files: Files) -> dict[str, Any]:
    """Special tokens by name, for templates that write them."""
    settings = _settings(files, "special_tokens_map.json") | _settings(files, _SETTINGS)
    return {name: token.get("content") if isinstance(token, dict) else token
            for name in TOKENS if (token := settings.get(name)) is not None}  # fmt: skip


def _render(template: str, named: Mapping[str, Any], conversation: Mapping[str, Any]) -> str:
    """What a template renders, or why it does not; Jinja bounds neither its time nor its memory, so a thread does."""
    from transformers.utils.chat_template_utils import render_jinja_template  # not timed: it may take longer

    found = [_ENDLESS]

    def render() -> None:
        talk, tools, speaking = (conversation[name] for name in ("messages", "tools", "speaking"))
        how = {"tools": tools, "chat_template": template, "add_generation_prompt": speaking}
        with suppress(SystemExit):
            try:
                texts, _ = render_jinja_template([talk], **how, **named)
                found.append(str(texts[0]))
            except Exception as error:  # a template raises its own errors
                found.append(f"{_REFUSED}{' '.join(str(error).split())[:120]}")

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():  # end it at its next instruction
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        return _ENDLESS
    return found[-1]
