"""Responses of a Hub-compatible endpoint to requests. No sockets.

The paths and headers are those that `huggingface_hub`, transformers and a browser use. Nothing in a request
becomes a path on this machine: names of models, revisions and files are looked up among those served.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.assets.bundle import card_facts
from engine.errors import visible
from engine.serve.ranges import reply_to
from engine.serve.revisions import MAIN, NoRevision, Revision, Revisions
from engine.serve.virtual import VirtualFolder
from engine.show import page
from engine.storage.virtual import VirtualFile

_TYPES = {".json": "application/json", ".md": "text/plain; charset=utf-8", ".jinja": "text/plain; charset=utf-8"}
_LONGEST = 400  # characters of a reason
_TEMPLATE = Path(__file__).parent / "templates" / "models.html.j2"  # escapes all of its input


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is served: its name, `org/name` or `name`, and its revisions."""

    name: str
    revisions: Revisions


@dataclass(frozen=True, slots=True)
class Request:
    """Attributes: path: percent-decoded, without the query, which is ignored. headers: by lower-case names."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """A response to GET; for HEAD the same without a body.

    Attributes:
        body: the bytes to send, or the file whose bytes `start` to `start + length` are sent.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | VirtualFile = b""
    start: int = 0
    length: int = 0


class Hub:
    """Answers requests for some models."""

    def __init__(self, models: Sequence[Served], token: str | None = None) -> None:
        """Args: token: the secret that every request must carry; None: only requests to localhost are answered."""
        self._models, self._token = {one.name: one for one in models}, token

    def answer(self, request: Request) -> Response:
        """The response to a request. May plan a checkpoint, which takes time, but reads no tensors."""
        if request.method not in ("GET", "HEAD"):
            return refusal(405, "only GET and HEAD: this server is read only", Allow="GET, HEAD")
        refused = self._stranger(request)
        if refused is not None:
            return refused
        path = request.path
        if path == "/":
            return self._page(list(self._models.values()))
        if path in ("/api/models", "/api/models/"):
            return _json([self._listed(one) for one in self._models.values()])
        api = path.startswith("/api/models/")
        rest = path.removeprefix("/api/models/").removeprefix("/")
        for one in sorted(self._models.values(), key=lambda one: -len(one.name)):
            if rest == one.name or rest.startswith(one.name + "/"):
                left = rest[len(one.name) + 1 :].split("/")
                try:
                    return self._api(one, left) if api else self._files(one, left, request)
                except NoRevision as error:
                    return refusal(404, str(error), "RevisionNotFound")
        known = api or "/resolve/" in path
        return refusal(404, "this server has no such model", "RepoNotFound") if known else refusal(404, "nothing here")

    def _stranger(self, request: Request) -> Response | None:
        """Refuse a request without the token; if there is none, a request to another host name than localhost.

        Otherwise a web page could point its own host name here and read what is served (DNS rebinding).
        """
        if self._token is None:
            host = request.headers.get("host", "localhost")
            return None if _is_loopback(host) else refusal(421, "this server answers to localhost only")
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            given = _password(given)
        if kind.lower() in ("bearer", "basic") and hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return None
        return refusal(
            401, "a token is needed: set HF_TOKEN to this server's token",
            **{"WWW-Authenticate": 'Basic realm="engine", Bearer'},
        )  # fmt: skip

    def _api(self, one: Served, left: list[str]) -> Response:
        if left in ([""], []):
            return _json(_info(one.name, *one.revisions.find(MAIN)))
        if left[0] == "revision" and len(left) == 2:
            return _json(_info(one.name, *one.revisions.find(left[1])))
        if left[0] == "tree" and len(left) >= 2:
            _, folder = one.revisions.find(left[1])
            if left[2:] not in ([], [""]):
                return refusal(404, "there are no folders", "EntryNotFound")
            return _json([_listed(file) for file in folder.values()])
        if left == ["refs"]:
            return _json(_refs(one.revisions))
        return refusal(404, "there is no such endpoint here")

    def _files(self, one: Served, left: list[str], request: Request) -> Response:
        if left in ([""], []) or (left[0] == "tree" and len(left) == 2):
            return self._page([one], left[1] if len(left) == 2 else MAIN)
        if left[0] not in ("resolve", "raw") or len(left) < 3:
            return refusal(404, "there is no such page here")
        revision, folder = one.revisions.find(left[1])
        name = "/".join(left[2:])
        file = folder.get(name)
        if file is None:
            return refusal(404, "there is no such file", "EntryNotFound", **{"X-Repo-Commit": revision.commit})
        return _file(file, request, revision)

    def _listed(self, one: Served) -> dict[str, Any]:
        try:
            return _info(one.name, *one.revisions.find(MAIN))
        except NoRevision:
            return {"_id": one.name, "id": one.name, "modelId": one.name, "private": False, "tags": []}

    def _page(self, models: Sequence[Served], revision: str = MAIN) -> Response:
        told = [_told(one, revision, files=len(models) < len(self._models) or len(self._models) == 1) for one in models]
        style = (page.TEMPLATES / "view.css").read_text("utf-8")
        text = visible(page.template(_TEMPLATE).render(models=told, style=style), "\n\t")
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": page.policy(style, "")}
        return _response(200 if any("facts" in one for one in told) or len(told) != 1 else 404, text.encode(), headers)


def _told(one: Served, name: str, files: bool) -> dict[str, Any]:
    """What a page says about a model."""
    told: dict[str, Any] = {"name": one.name, "revision": name, "revisions": one.revisions.names()}
    try:
        revision, folder = one.revisions.find(name)
    except NoRevision as error:
        return {**told, "why": visible(str(error))}
    told |= {
        "step": revision.name,
        "commit": revision.commit,
        "facts": {**card_facts(folder.plan, []), "notices": folder.notices},
    }
    return {**told, "files": list(folder.values()) if files else []}


def _info(name: str, revision: Revision, folder: VirtualFolder) -> dict[str, Any]:
    """A model, described as by the Hub."""
    config = folder.plan.config
    return {
        "_id": revision.commit[:24],
        "id": name,
        "modelId": name,
        "author": name.rpartition("/")[0] or None,
        "sha": revision.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": ["transformers", "safetensors"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
        "siblings": [{"rfilename": file.name, "size": file.size, "blobId": file.etag} for file in folder.values()],
    }


def _listed(file: VirtualFile) -> dict[str, Any]:
    return {"type": "file", "path": file.name, "size": file.size, "oid": file.etag}


def _refs(revisions: Revisions) -> dict[str, Any]:
    def ref(name: str, commit: str) -> dict[str, str]:
        return {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}

    found = [ref(one.name, one.commit) for one in revisions.all()]
    with suppress(NoRevision):
        found.insert(0, ref(MAIN, revisions.find(MAIN)[0].commit))
    return {"branches": found, "tags": [], "converts": []}


def _file(file: VirtualFile, request: Request, revision: Revision) -> Response:
    reply = reply_to(request.method, request.headers, file.size, file.etag)
    headers = {
        "ETag": f'"{file.etag}"',
        "X-Repo-Commit": revision.commit,
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-cache",
    }
    if reply.status == 412:
        return refusal(412, "the file is not the one that `If-Match` names", **headers)
    if reply.status == 304:
        return Response(304, headers)
    if reply.status == 416:
        return refusal(
            416, "not one range of bytes of this file", **headers, **{"Content-Range": f"bytes */{file.size}"}
        )
    if reply.status == 206:
        headers["Content-Range"] = f"bytes {reply.start}-{reply.stop - 1}/{file.size}"
    suffix = "." + file.name.rpartition(".")[2]
    headers |= {
        "Content-Type": _TYPES.get(suffix, "application/octet-stream"),
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(file.name)}",
        "X-Content-Type-Options": "nosniff",
        "Content-Length": str(reply.stop - reply.start),
    }
    return Response(reply.status, headers, file, reply.start, reply.stop - reply.start)


def _response(status: int, body: bytes, headers: Mapping[str, str]) -> Response:
    told = {**headers, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
    return Response(status, told, body, 0, len(body))


def _json(value: object) -> Response:
    return _response(200, json.dumps(value).encode(), {"Content-Type": "application/json", "Cache-Control": "no-cache"})


def refusal(status: int, why: str, code: str = "", **headers: str) -> Response:
    """A refusal, with its reason in the body and in the headers that `huggingface_hub` reads."""
    why = visible(why)[:_LONGEST].strip()
    told = {"Content-Type": "application/json", "X-Error-Message": why.encode("ascii", "replace").decode(), **headers}
    if code:
        told["X-Error-Code"] = code
    return _response(status, json.dumps({"error": why}).encode(), told)


def _password(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _is_loopback(host: str) -> bool:
    """Whether a `Host` header names this machine.

    >>> [_is_loopback(host) for host in ("127.0.0.1:8000", "[::1]:80", "localhost", "evil.example:80")]
    [True, True, True, False]
    """
    name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
