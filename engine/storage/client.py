"""The client of object stores, obstore, which the extra `store` installs; its retries and its errors."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from engine.errors import EngineError, Place, needs_extra

T = TypeVar("T")

MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of mallopt
GIVEN_BACK = 1 << 20  # bytes: more than a block, or each block would get freshly cleared pages
_REQUESTS = 16  # requests at the same time
# Texts of errors for a response that was cut off.
_CUT_OFF = ("kind: Body", "kind: Decode", "IncompleteMessage", "UnexpectedEof")
_TRIES = 4  # for a request whose response was cut off; obstore itself retries earlier failures
_CLIENT = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout", "user_agent")


def asked(place: str, ask: Callable[[], T]) -> T:
    """The result of a request. The caller handles FileNotFoundError, and PermissionError (the state is gone).

    A request whose response is cut off is retried a few times.
    """
    known = library().exceptions
    for left in reversed(range(_TRIES)):
        try:
            return ask()
        except (FileNotFoundError, PermissionError):
            raise
        except known.PreconditionError as error:
            raise PermissionError from error
        except known.NotFoundError as error:
            raise FileNotFoundError(str(error)) from error
        except known.BaseError as error:
            told = str(error)
            if left and any(word in told for word in _CUT_OFF):
                time.sleep(0.2 * 2 ** (_TRIES - left))
                continue
            raise refused(place, told) from error
    raise AssertionError("unreachable")


def refused(place: str, told: str, *, writing: bool = False) -> EngineError:
    """A failure of the server or network as an error: E304 for no such bucket, else E305, or E403 when writing."""
    code, message, fix = "E305", "a store cannot be read or written", "Check the address and the network."
    if "NoSuchBucket" in told or "ContainerNotFound" in told:
        code, message, fix = "E304", "there is no such bucket", "Check its name, and the endpoint."
    elif "invalid path" in told:
        message, fix = "a store holds an object whose name cannot be read", "Rename it, or use another prefix."
    elif "InvalidObjectState" in told or "BlobArchived" in told:  # of S3 and Azure
        message, fix = "an object is archived", "Restore it from the archive, which takes hours, then run again."
    elif any(word in told for word in ("403 Forbidden", "401 Unauthorized", "PermissionDenied", "Unauthenticated")):
        message = "a store refuses access"
        fix = "Check the credentials: those of the environment, or --store-option NAME=VALUE."
    elif "credential" in told.lower() or "169.254." in told or "metadata.google" in told:
        message = "there are no credentials for a store"
        fix = "Set them as its provider says, like AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in --store-option."
    code = "E403" if writing else code
    return EngineError(code, message, place=Place(place), got=_short(told), fix=fix)


def _short(told: str) -> str:
    """A server's error on one line: its code and message if it gives them."""
    found = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", told, re.DOTALL)
    return f"{found[1]}: {found[2]}"[:300] if found else " ".join(told.split("Debug source")[0].split())[:300]


def library() -> Any:
    """The module obstore; E001 if its extra is not installed, and in a fork of a process that used it."""
    check_process(_first_process(), "stores")
    with needs_extra("store", "URLs need"):
        import obstore
    allocate(_M_ARENA_MAX, 2)  # threads share freed memory, of which each would keep some
    return obstore


_first_process = cache(os.getpid)


def check_process(used: int, what: str) -> None:
    """E001 in a fork of the process that used something: the fork lacks its threads, and would wait forever.

    Args:
        used: the id of that process.
        what: what was used, in words.
    """
    if used != os.getpid():
        raise EngineError(
            "E001", f"{what} cannot be used in a fork of the process that used them",
            got=f"process {os.getpid()}, forked from {used}",
            fix='Start processes anew, as with multiprocessing.get_context("spawn"), or open in each process.',
        )  # fmt: skip


@cache
def allocate(option: int, value: int) -> None:
    """Set an option of glibc's allocator, where that is the system's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(option, value)


_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}  # prefixes of the variables that the library reads


@cache
def client_of(url: str, options: tuple[tuple[str, str], ...]) -> Any:
    """The client of a store; E001 without the extra, and for an unknown address or option."""
    from datetime import timedelta

    library()
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    kind, _, path = url.partition("://")
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES.get(kind, ()))}
    _check_given(url, variables | dict(options))
    given: dict[str, Any] = {name: value for name, value in options if name not in _CLIENT}
    client: dict[str, Any] = {"timeout": "60s", "connect_timeout": "10s"}
    client |= {name: value for name, value in options if name in _CLIENT}
    said = (url, *dict(options).values(), *variables.values())
    if any(one.startswith("http://") for one in said):  # only if the user says so
        client.setdefault("allow_http", "true")
    client = {name: value == "true" if name.startswith("allow") else value for name, value in client.items()}
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=8), "base": 2}
    retry = {"max_retries": 6, "backoff": backoff, "retry_timeout": timedelta(seconds=120)}
    if not kind.startswith("http"):  # object names are used literally
        path = quote(path, safe="/$")
    try:
        return from_url(f"{kind}://{path}", client_options=client, retry_config=retry, **given)
    except (BaseError, ValueError, TypeError) as error:
        raise no_store(url.partition("?")[0], _short(str(error))) from None


def _check_given(url: str, given: Mapping[str, str]) -> None:
    """E001 for options and environment variables that would make the library panic."""
    for name, value in given.items():
        if re.fullmatch(r"(AWS_|AZURE_(STORAGE_)?)?ENDPOINT(_URL(_S3)?)?", name.upper()):
            try:
                sound = urlsplit(value).scheme in ("http", "https") and bool(urlsplit(value).hostname)
            except ValueError:
                sound = False
            got, fix = f"{name}={value}", "Write it as a URL, such as http://minio:9000."
        else:
            plain = re.fullmatch(
                r"(AWS_)?((DEFAULT_)?REGION|ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|TOKEN)", name.upper()
            )
            sound = plain is None or (value.isascii() and value.isprintable())
            got, fix = f"line breaks or letters beyond ASCII in {name}", "Copy it again; was it read from a file?"
        if not sound:
            raise EngineError("E001", "an option of a store cannot be used", place=Place(url), got=got, fix=fix)


def no_store(url: str, why: str) -> EngineError:
    fix = "Write it like s3://bucket/prefix, and options as obstore names them, such as region=eu-west-1."
    if "builder error" in why:  # from the client, before it looks at the URL
        what = "no client for this store can be made"
        fix = "Install CA certificates (Debian: `ca-certificates`), which small images lack, or correct `proxy_url`."
        return EngineError("E001", what, place=Place(url), got=why, fix=fix)
    return EngineError("E001", "this URL is not a store", place=Place(url), got=why, fix=fix)


def requests() -> ThreadPoolExecutor:
    """The threads that wait for responses."""
    check_process(_first_process(), "stores")
    return _requests()


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="request")
