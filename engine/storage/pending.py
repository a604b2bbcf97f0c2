"""Uploads that an ended process left pending in a bucket: unseen, but paid for. Found and ended through botocore."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from engine.errors import EngineError, Place, needs_extra
from engine.storage.client import refused
from engine.storage.objects import ObjectStore

_KEYS = {
    "endpoint_url": ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"),
    "region_name": ("region", "aws_region", "default_region"),
    "aws_access_key_id": ("access_key_id", "aws_access_key_id"),
    "aws_secret_access_key": ("secret_access_key", "aws_secret_access_key"),
    "aws_session_token": ("session_token", "token", "aws_session_token"),
}


def end_uploads(store: ObjectStore) -> list[str]:
    """End every pending upload below a prefix; returns what they would have become.

    Raises:
        EngineError: E001 for a store whose uploads cannot be listed so, E403 when the store refuses.
    """
    parts = urlsplit(store.url)
    if parts.scheme != "s3":
        raise EngineError(
            "E001",
            "pending uploads can be ended in S3 stores only",
            place=Place(store.place()),
            fix="Azure drops them after a week; in Google Cloud set a lifecycle rule AbortIncompleteMultipartUpload.",
        )
    client = _client(store)
    prefix = parts.path.strip("/") + "/"
    ended: list[str] = []
    try:
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=parts.netloc, Prefix=prefix):
            for one in page.get("Uploads", ()):
                client.abort_multipart_upload(Bucket=parts.netloc, Key=one["Key"], UploadId=one["UploadId"])
                ended.append(f"s3://{parts.netloc}/{one['Key']}")
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
