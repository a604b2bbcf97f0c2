"""What an ended process left in a bucket: uploads that are pending, unseen but paid for, and objects of no output.

Uploads are found and ended through botocore.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError, Place, needs_extra
from engine.storage.client import refused
from engine.storage.objects import LOCK, MARK, ObjectStore
from engine.storage.store import walk

_KEYS = {
    "endpoint_url": ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"),
    "region_name": ("region", "aws_region", "default_region"),
    "aws_access_key_id": ("access_key_id", "aws_access_key_id"),
    "aws_secret_access_key": ("secret_access_key", "aws_secret_access_key"),
    "aws_session_token": ("session_token", "token", "aws_session_token"),
}


def clean(store: ObjectStore, ours: Callable[[str], bool], whole: str) -> list[str]:
    """End uploads that are pending at a prefix, and remove objects that interrupted runs left there.

    Args:
        ours: whether a name below the prefix is one that an output there would have: others are of outputs further in.
        whole: the file that marks a whole output, of which nothing is removed.

    Returns:
        What was removed.

    Raises:
        EngineError: E001 for a store whose uploads cannot be listed so, E403 when the store refuses.
    """
    removed: list[str] = []
    try:
        there = [] if store.has(whole) else [name for name, _ in walk(store) if ours(name)]
    except FileNotFoundError:
        there = []
    for name in [*there, LOCK]:
        marked = store.attribute(name, MARK) is not None
        if marked or (name == LOCK and re.fullmatch(rb"[0-9a-f]+ [0-9a-f]{16}", store.content(name) or b"")):
            store.delete(name)
            removed.append(store.place(name))
    return removed + ([] if removed and not store.url.startswith("s3:") else _end_uploads(store, ours))


def _end_uploads(store: ObjectStore, ours: Callable[[str], bool]) -> list[str]:
    kind, _, place = store.url.partition("://")
    if kind != "s3":
        raise EngineError(
            "E001",
            "pending uploads can be ended in S3 stores only",
            place=Place(store.place()),
            fix="Azure drops them after a week; in Google Cloud set a lifecycle rule AbortIncompleteMultipartUpload.",
        )
    client = _client(store)
    bucket, _, prefix = place.partition("/")
    prefix += "/" if prefix else ""
    ended: list[str] = []
    try:
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Uploads", ()):
                if ours(one["Key"].removeprefix(prefix)):
                    client.abort_multipart_upload(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
                    ended.append(f"s3://{bucket}/{one['Key']}")
    except Exception as error:  # botocore's own kinds
        raise refused(store.place(), str(error), writing=True) from error
    return ended


def _client(store: ObjectStore) -> Any:
    with needs_extra("store", "ending uploads needs"):
        from botocore import session
    given = dict(store.options)
    how = {name: next((given[key] for key in keys if key in given), None) for name, keys in _KEYS.items()}
    how["region_name"] = how["region_name"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    how["endpoint_url"] = how["endpoint_url"] or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    return session.get_session().create_client("s3", **{name: value for name, value in how.items() if value})
