"""The manifest of an output, `conversion.json`: what it was made from, how, and a digest of everything in it.

It holds no times and no paths, so equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from engine.checkpoint.manifests import VERSION
from engine.formats.safetensors import INDEX, index_json
from engine.language.documents import plain
from engine.language.version import __version__
from engine.planning.model import Plan
from engine.run.digests import ALGORITHM, content_id
from engine.run.journal import Done
from engine.run.schedule import layout_of


def manifest(
    plan: Plan, done: Mapping[int, Done], small: Mapping[str, bytes], made: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest as data; its shape is `schemas/conversion.schema.json`.

    Args:
        done: digests of every output; if they are empty, digests and the content id are left out.
        small: the other files of the output by name.
        made: the result of `making`, if it is known already.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for file in plan.shards:
        for index in file.outputs:
            output = plan.outputs[index]
            entry: dict[str, Any] = {"dtype": output.dtype, "shape": list(output.shape), "file": file.name}
            if done[index].digest:
                entry["digest"] = done[index].digest
            tensors[tensor_key(plan, file.name, output.name)] = entry
    result: dict[str, Any] = {
        "manifest": VERSION,
        "engine": __version__,
        **(made or making(plan)),
        "tensors": tensors,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted({**_bare(plan), **small}.items())},
    }
    if all("digest" in entry for entry in tensors.values()):
        result["digest"] = ALGORITHM
        result["content_id"] = content_id(
            {name: (entry["dtype"], tuple(entry["shape"]), entry["digest"]) for name, entry in tensors.items()}
        )
    return result


def _bare(plan: Plan) -> dict[str, bytes]:
    """Weights files without a tensor, which no tensor's entry names: of ranks for which a small model has no rows."""
    found: dict[str, bytes] = {}
    for file in plan.shards:
        if not file.outputs:
            layout = layout_of(plan, file)
            data = bytearray(layout.size)
            for offset, part in [*layout.start(), *layout.finish(())]:
                data[offset : offset + len(part)] = part
            found[file.name] = bytes(data)
    return found


def index_file(plan: Plan) -> dict[str, bytes]:
    """The index of several weights files, by its name; empty if there is no index."""
    if len(plan.shards) < 2 or plan.written is not None:
        return {}
    files = {plan.outputs[i].name: one.name for one in plan.shards for i in one.outputs}
    return {INDEX: index_json(files, plan.nbytes)}


def making(plan: Plan) -> dict[str, Any]:
    """The part of a manifest that says what an output was made from, and how."""
    result: dict[str, Any] = {
        "mapping": {
            "name": plan.mapping.name,
            "version": plan.mapping.version,
            "digest": plan.mapping.digest,
            "resolved": plain(plan.mapping.resolved),
        },
        "layout": {"name": plan.layout.name, "version": plan.layout.version, "digest": plan.layout.digest},
        # zeros for padding come from no file
        "sources": {file.name: {"bytes": file.size, "identity": file.identity} for file in plan.files if file.size},
        "variants": {
            name: {"choice": d.choice, "how": d.how, "evidence": d.evidence} for name, d in plan.decisions.items()
        },
        "options": dict(plan.options),
        "unread": dict(plan.noted),
        "dtype": plan.dtype,
        "sizes": {name: plan.sizes[name] for name in sorted(plan.sizes)},
    }
    if plan.departures:
        result["mapping"]["not_the_release"] = {
            one.key: {"got": one.got, "expected": one.expected} for one in plan.departures
        }
    return result


def tensor_key(plan: Plan, file: str, name: str) -> str:
    """A tensor's key in the manifest: with its file for rank files, which hold tensors of the same name."""
    return f"{file}:{name}" if plan.written is not None else name


def encode_manifest(data: Mapping[str, Any]) -> bytes:
    """A manifest as JSON: each entry of a section, such as a tensor, on its own line.

    >>> print(encode_manifest({"version": 1, "tensors": {"a": {"sha256": "0f"}, "b": {}}}).decode(), end="")
    {
     "version": 1,
     "tensors": {
      "a": {"sha256": "0f"},
      "b": {}
     }
    }
    """
    encode = json.JSONEncoder(ensure_ascii=False).encode  # `indent` would use Python's slow encoder, not C's
    text = bytearray()  # grown piece by piece: a list of all pieces takes several times the memory
    for name, part in data.items():
        text += f"{',' if text else '{'}\n {encode(name)}: ".encode()
        if not isinstance(part, dict) or not part:
            text += encode(part).encode()
            continue
        for number, (key, value) in enumerate(part.items()):
            text += f"{',' if number else '{'}\n  {encode(key)}: {encode(value)}".encode()
        text += b"\n }"
    return bytes(text + b"\n}\n")
