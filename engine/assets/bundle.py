"""The files beside the weights: configuration, tokenizer, generation settings, template, card."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.assets.apart import APART, convert_apart, predicted_memory
from engine.assets.beside import other_ids, tokens_beside
from engine.assets.chat import chat_template, never_written, unmarked
from engine.assets.generation import GENERATION, as_json, generation_config, within
from engine.assets.model_card import model_card
from engine.assets.ready import (
    PER_BYTE,
    TEMPLATES,
    fewer,
    is_ready,
    names_of,
    read_ready,
    ready_beside,
    template_of,
    together,
    writes,
)
from engine.assets.releases import releases, untried
from engine.assets.remote_code import read_code, remote_facts
from engine.assets.tokenizer import convert_understood
from engine.assets.tokenizer_read import check_tokenizer
from engine.errors import EngineError, Place, first_of, rounded
from engine.formats.headers import TORCH_NAMES
from engine.language.expressions import names_in, render_tree
from engine.language.version import __version__
from engine.planning.as_model import class_named
from engine.planning.model import Plan
from engine.run.execute import Small
from engine.storage.local import LocalStore
from engine.storage.places import local_copy
from engine.storage.store import Store


def make_assets(plan: Plan, tokenizer: Path | None, code: Path | None = None) -> Small:
    """Every small file of the output, and notices for the user; a large tokenizer is converted later.

    Whatever can be wrong with any of them is reported here, before a run writes anything.

    Args:
        tokenizer: a SentencePiece model, or a folder with it or with a tokenizer in Hugging Face's form; default: the
            mapping's file beside the checkpoint, or else what lies beside the configuration.
        code: if the target's classes are remote code, the folder with their files.

    Raises:
        EngineError: E5xx.
    """
    remote = read_code(plan, code)
    made = _with_tokenizer(plan, tokenizer, _own_files(plan))
    files, notices = dict(made.files), list(made.notices)
    if remote is not None:
        files |= {**remote.files, "config.json": as_json({**plan.config, "auto_map": dict(remote.auto_map)})}
    elif plan.mapping.remote_code is not None:
        missing = f"model type `{plan.mapping.model_type}` is remote code, which is missing; add it with --code DIR"
        notices.insert(0, f"no program loads it as it is: {missing}")
    versions = render_tree(plan.mapping.transformers, plan.names) or ""
    own = plan.mapping.remote_code is None  # else the keys are not those of transformers' own classes
    facts = {
        "tokenizer": made.later is not None or "tokenizer.json" in files,
        "remote": remote_facts(plan, remote),
        "transformers": releases(plan.config, versions) if own else versions,
        "untried": own and untried(plan.config),
    }
    files["README.md"] = model_card({**card_facts(plan, notices), **facts})
    return replace(made, files=files, notices=tuple(notices))


def _own_files(plan: Plan) -> Small:
    """The configuration, and the mapping's chat template and generation settings."""
    files: dict[str, bytes] = {"config.json": as_json(plan.config)}
    left_out: list[str] = []
    if plan.mapping.chat_template is not None:
        files[TEMPLATES[0]] = chat_template(plan.mapping.chat_template).encode()
    if plan.mapping.generation is not None:
        generation, left_out = within(plan.mapping.generation, plan.sizes.get("vocab"))
        files[GENERATION] = generation_config(generation, plan.config)
    return Small(files, tuple(left_out))


def _with_tokenizer(plan: Plan, given: Path | None, own: Small) -> Small:
    """The mapping's `own` files with those of the tokenizer that was given or lies beside the checkpoint."""
    spec, store = plan.mapping.tokenizer, plan.files[0].file.store
    near = ready_beside(store, plan.layout)
    model, ready = _find_tokenizer(plan, spec, given, near)
    if ready is not None:
        return _with_ready(plan, ready, own, required=given is not None)
    if model is not None and spec is not None:
        around = [name for names in near for name in names if "/" not in name]
        if given is not None:
            store = LocalStore(model.parent)
            around = names_of(store, "") if given.is_dir() else []
        made, tokens = _with_model(plan, model, spec, own, *tokens_beside(store, around))
        name = model.name if given is not None else str(spec.get("file", "tokenizer.model"))
        return replace(made, notices=(*made.notices, *_unread(given, name, near, tokens)))
    notices = [*own.notices]
    if spec is not None:
        name = spec.get("file", "tokenizer.model")
        notices.append(f"no tokenizer: `{name}` is not beside the checkpoint; add one with --tokenizer")
    return replace(own, notices=(*notices, *_unread(None, "", near, [])))


def _with_model(
    plan: Plan, model: Path, spec: Mapping[str, Any], own: Small, beside: Mapping[int, Any], naming: Mapping[str, bytes]
) -> tuple[Small, list[str]]:
    """Files converted from a SentencePiece model, later if it is large; and the tokens that files beside it name.

    Args:
        beside, naming: these tokens and the files, from `tokens_beside`.
    """
    rows, template = plan.sizes.get("vocab"), template_of(own.files)
    spec = {**spec, "beside": beside, **({"chat_template": unmarked(template)} if template else {})}
    settings = _settings(plan, own.files)
    found = check_tokenizer(model, spec, rows, settings)
    notices = never_written(template, settings, dict(enumerate(found.names)), own=True) if template else []
    notices += [] if rows is None else fewer(len(found.names), "pieces", rows)
    read = {model.name: found.data, **(naming if found.beside else {})}
    later, files = None, own.files
    if len(found.data) < APART:
        files = {**files, **convert_understood(found, spec, str(model))}
    else:
        later = partial(_convert_later, model, spec, hashlib.sha256(found.data).digest())
    made = Small(files, (*own.notices, *notices), later, predicted_memory(model), _digests(read))
    return made, [token["content"] for token in found.beside.values()]


def _settings(plan: Plan, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The configuration, and what the generation settings say instead."""
    return {**plan.config, **json.loads(files.get(GENERATION, b"{}"))}


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _convert_later(
    model: Path, spec: Mapping[str, Any], checked: bytes, stopped: threading.Event
) -> Mapping[str, bytes]:
    """The files of a tokenizer that has been checked; its bytes must still have this SHA-256."""
    files = convert_apart(model, spec, stopped)
    if files and hashlib.sha256(files["tokenizer.model"]).digest() != checked:
        raise EngineError(
            "E405",
            "the tokenizer changed while it was read",
            place=Place(str(model)),
            fix="Wait until nothing writes to it, then run again.",
        )
    return files


def _unread(given: Path | None, taken: str, near: list[list[str]], tokens: list[str]) -> list[str]:
    """A notice for files of a tokenizer that are not read: beside the one that is `taken`, in a given folder or `near`
    the weights; or of which only these tokens are."""
    of_folder = given is not None and os.path.isdir(given)
    folders = [names_of(LocalStore(given), "")] if given is not None and of_folder else near
    beside = [name for names in folders for name in names if name != taken]
    told = first_of(beside, 4)
    if not beside:
        return []
    if not taken:
        return [f"not written: {told}; give the folder of the model's tokenizer with --tokenizer"]
    where = taken if of_folder else "the weights"
    if tokens:
        return [f"beside {where}: {told}; of these only the names of tokens are read: {first_of(tokens, 4)}"]
    return [f"beside {where} and not read: {told}; the tokenizer is of {taken} alone"]


_Ready = tuple[Store, list[str]]  # files in Hugging Face's form


def _find_tokenizer(
    plan: Plan, spec: Mapping[str, Any] | None, given: Path | None, near: list[list[str]]
) -> tuple[Path | None, _Ready | None]:
    """A SentencePiece model, as the mapping describes it, or files in Hugging Face's form; E501 for a wrong path."""
    file = None if spec is None else str(spec.get("file", "tokenizer.model"))
    if given is not None and os.path.isdir(given):
        store = LocalStore(given)
        return (None, (store, names_of(store, ""))) if file is None or not store.has(file) else (given / file, None)
    if given is not None:
        if not os.path.isfile(given):
            raise EngineError(
                "E501", "there is no such tokenizer file", place=Place(str(given)), fix="Check --tokenizer."
            )
        if spec is None:
            raise EngineError(
                "E501",
                f"mapping `{plan.mapping.name}` does not describe how a tokenizer is converted",
                place=plan.mapping.place,
                expected="a folder with tokenizer.json, whose files are copied",
                fix="Give the folder of the model's tokenizer, add a `tokenizer` block, or leave --tokenizer out.",
            )
        return given, None
    beside = None if file is None else local_copy(plan.files[0].file.beside(file))
    if beside is not None and os.path.lexists(beside):
        return beside, None
    ready = next((names for names in near if is_ready(names)), None)
    return None, None if ready is None else (plan.files[0].file.store, ready)


def _with_ready(plan: Plan, found: _Ready, own: Small, required: bool) -> Small:
    """The files of a tokenizer in Hugging Face's form.

    The mapping's own are written instead of its (see `together`). Files that merely lie beside the weights are left
    out, with the reason, where given ones would be refused.
    """
    store, names = found
    chat = plan.mapping.chat_template is not None
    kept = set(own.files) if chat else set(own.files) - {GENERATION}
    renamed = (plan.mapping.tokenizer or {}).get("rename") or {} if chat else {}
    taken = [name for name in names if name.rpartition("/")[2] not in kept]
    told = first_of(taken, 4)
    rows = plan.sizes.get("vocab", plan.config.get("vocab_size"))
    try:
        read, ids = read_ready(store, names, rows, _settings(plan, own.files), renamed)
    except EngineError as error:
        if required:
            raise
        got = "" if error.got is None else f", got {error.got}"
        why = f"not written: {told}: {error.message}{got}; give the model's own with --tokenizer"
        return replace(own, notices=(*own.notices, why))
    notices = [] if required else [f"copied from beside the weights: {told}"]
    notices += [] if rows is None else fewer(max(ids.values()) + 1, "tokens", rows)
    if "tokenizer.model" in read and writes(plan.config):  # some other models' classes shift its ids
        notices += other_ids(read["tokenizer.model"], ids)
    files = together(read, own.files, chat=chat)
    if template := template_of(files):
        notices += never_written(template, _settings(plan, files), {i: name for name, i in ids.items()}, own=chat)
    return Small(files, (*own.notices, *notices), memory=PER_BYTE * max(map(len, read.values())), taken=_digests(read))


def title(plan: Plan) -> str:
    """A title for the model: its release if one was chosen, else its family and size."""
    if not plan.departures:
        return plan.mapping.name
    return f"{plan.mapping.family} of {rounded(sum(output.elements for output in plan.outputs))} parameters"


def card_facts(plan: Plan, notices: list[str]) -> dict[str, Any]:
    """The facts that the model card states."""
    fixed = {name for name, dim in plan.mapping.dims.items() if not names_in(dim)}  # the same in every model
    main, types = plan.config.get("dtype"), Counter(TORCH_NAMES.get(o.dtype, o.dtype.lower()) for o in plan.outputs)
    return {
        "engine_version": __version__,
        "mapping": plan.mapping.name,
        "mapping_version": plan.mapping.version,
        "mapping_description": None if plan.departures else plan.mapping.description,
        "title": title(plan),
        "departures": [{"key": d.key, "got": d.got, "expected": d.expected} for d in plan.departures],
        "mapping_digest": plan.mapping.digest,
        "architecture": class_named(plan.config) or plan.mapping.architecture,
        "model_type": plan.mapping.model_type,
        "layout": plan.layout.name,
        "layout_version": plan.layout.version,
        "mode": plan.grid.mode.name,
        "ranks": dict(plan.grid.sizes),
        "chunks": plan.stages.chunks,
        "decisions": [
            {"variant": d.variant, "choice": d.choice, "how": d.how, "evidence": d.evidence}
            for d in plan.decisions.values()
        ],
        "options": dict(plan.options),
        "dtype": main,
        "other_dtypes": sorted((one, count) for one, count in types.items() if one != main),
        "sizes": {name: plan.sizes[name] for name in sorted(plan.sizes) if name not in fixed},
        "parameters": sum(output.elements for output in plan.outputs),
        "bytes": plan.nbytes,
        "files": [file.name for file in plan.shards],
        "notices": [*plan.notices, *notices],
    }
