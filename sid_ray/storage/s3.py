"""A folder on S3. Everything boto3 raises becomes an `OSError` here, as if the disk had failed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple


class StorageError(OSError):
    """S3 did not do what was asked, after retries; the message says what and why."""


class S3Object(NamedTuple):
    """What a listing says of an object."""

    size: int
    etag: str


def s3_client() -> Any:
    """A boto3 client that retries with backoff; endpoint, credentials and AWS_MAX_ATTEMPTS are the environment's."""
    import boto3
    from botocore.config import Config

    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", 5))
    return boto3.client("s3", config=Config(retries={"mode": "standard", "total_max_attempts": attempts}))


def split_s3(address: str) -> tuple[str, str]:
    """(bucket, key) of `s3://bucket/key`, the key without a slash at its end."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return bucket, key.strip("/")


@dataclass(frozen=True)
class S3Folder:
    """The objects below an `s3://` address, by their names relative to it.

    StorageError from every method if S3 cannot be reached or refuses.
    """

    address: str
    """`s3://bucket/prefix`, without a slash at its end."""

    def __truediv__(self, name: str) -> S3Folder:
        return S3Folder(f"{self.address}/{name}")

    @cached_property
    def _client(self) -> Any:
        return s3_client()

    def _place(self, name: str) -> dict[str, str]:
        bucket, prefix = split_s3(self.address)
        return {"Bucket": bucket, "Key": f"{prefix}/{name}" if prefix else name}

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StorageError(f"{self.address}: {what}: {error}") from error

    def objects(self) -> dict[str, S3Object]:
        """Every object by its name; names that would leave the folder are left out."""
        bucket, prefix = split_s3(self.address)
        prefix = f"{prefix}/" if prefix else ""
        with self._doing("listing"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            items = [item for page in pages for item in page.get("Contents", ())]
        found = {item["Key"].removeprefix(prefix): S3Object(item["Size"], item["ETag"]) for item in items}
        return {name: o for name, o in found.items() if name[-1:] != "/" and ".." not in name.split("/")}

    def read(self, name: str) -> tuple[bytes, str] | None:
        """(content, ETag) of an object; None if it is not there."""
        with self._doing(f"reading {name}"):
            try:
                answer = self._client.get_object(**self._place(name))
                return answer["Body"].read(), answer["ETag"]
            except self._client.exceptions.NoSuchKey:
                return None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes of an object from `start` up to, but not including, `end`; at least one."""
        with self._doing(f"reading {name}"):
            answer = self._client.get_object(**self._place(name), Range=f"bytes={start}-{end - 1}")
            return answer["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        """Write an object of a few bytes."""
        with self._doing(f"writing {name}"):
            self._client.put_object(**self._place(name), Body=content)

    def swap(self, name: str, content: bytes | None, etag: str | None) -> bool:
        """Replace the object whose ETag this is (None: create it), or delete it if `content` is None.

        Returns whether that was done; False if the object has changed since. One of several callers succeeds.
        """
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self._doing(f"writing {name}"):
            try:
                if content is None:
                    self._client.delete_object(**self._place(name), **condition)
                else:
                    self._client.put_object(**self._place(name), Body=content, **condition)
            except ClientError as error:
                # 409: another conditional write is under way. 404: there is nothing to match.
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412):
                    return False
                raise
        return True

    def upload(self, file: Path, name: str) -> None:
        """Write a file as an object, in parts if it is large."""
        with self._doing(f"writing {name}"):
            self._client.upload_file(str(file), *self._place(name).values())

    def download(self, name: str, file: Path) -> None:
        """Read an object into a file, which appears whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._doing(f"reading {name}"):
            self._client.download_file(*self._place(name).values(), str(file))

    def delete(self, names: list[str]) -> None:
        """Delete objects; those that are not there do not matter."""
        with self._doing("deleting"):
            for name in names:
                self._client.delete_object(**self._place(name))
