"""Files that lie elsewhere: teachers, detectors and reference statistics at `https://` and `s3://` addresses.

What is fetched is kept in a cache of this machine (`SID_RAY_CACHE`, else `~/.cache/sid-ray`), so that several
workers and later runs fetch once. Local paths pass through untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from urllib.error import URLError

from sid_ray.errors import UserError
from sid_ray.storage.s3 import s3_client, split_s3

REMOTE = ("https://", "http://", "s3://")


def is_remote(path: str) -> bool:
    """Whether a path is an address to fetch from."""
    return path.startswith(REMOTE)


def cache_folder() -> Path:
    """Where fetched files are kept on this machine."""
    return Path(os.environ.get("SID_RAY_CACHE", "~/.cache/sid-ray")).expanduser()


def fetch(path: str, field: str, sha256: str | None = None) -> Path:
    """A local path for `path`: itself if it is local, else its copy in the cache, fetched now if it must be.

    `s3://` may name an object or a folder of objects; a folder is fetched whole, and again if an object has
    changed. An `https://` file in the cache is taken as it is. `sha256`: hex digest the file must have.
    UserError, naming `field` and the address, if it is not there or has another digest.
    """
    local = Path(path).expanduser() if not is_remote(path) else _fetch_once(path, field, sha256)
    if sha256 is not None and local.is_file() and (found := digest(local)) != sha256:
        raise UserError(f"{field}: {path!r} is not the expected file: its sha256 is {found}, expected {sha256}")
    return local


def cached(path: str) -> Path | None:
    """The copy that `fetch` has made of a remote file, if it has; nothing is fetched or asked for."""
    target = _cache_target(path)
    return target if target.exists() else None


def digest(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_target(address: str) -> Path:
    name = address.rstrip("/").rsplit("/", 1)[-1] or "fetched"
    return cache_folder() / hashlib.sha256(address.encode()).hexdigest()[:16] / name


def _fetch_once(address: str, field: str, sha256: str | None) -> Path:
    """The cached copy, made by one process of this machine while others wait."""
    from filelock import FileLock

    target = _cache_target(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(".lock")):
        if address.startswith("s3://"):
            _fetch_s3(address, target, field)
        elif not target.exists():
            _fetch_http(address, target, field, sha256)
    return target


def _fetch_http(address: str, target: Path, field: str, sha256: str | None) -> None:
    from torch.hub import download_url_to_file

    try:
        # With a digest torch checks it before the file gets its name.
        download_url_to_file(address, str(target), hash_prefix=sha256)
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(f"{field}: {address} cannot be fetched: {error}") from error


def _fetch_s3(address: str, target: Path, field: str) -> None:
    """An object, or all objects below a folder, unless the cache holds just those."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(address)
    try:
        client = s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        found = {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", ())}
        if key in found:
            wanted = {key: found[key]}
        else:
            wanted = {k: tag for k, tag in found.items() if k.startswith(f"{key}/" if key else "") and k[-1] != "/"}
        if not wanted:
            raise UserError(f"{field}: there is nothing at {address}")
        if any(".." in name.split("/") for name in wanted):
            raise UserError(f"{field}: {address} holds names with '..', which would leave the folder")
        record = target.with_name(f".{target.name}.json")
        if target.exists() and record.is_file() and json.loads(record.read_text()) == wanted:
            return
        aside = target.with_name(f".{target.name}.partial")
        _remove(aside)
        for name in wanted:
            file = aside if name == key else aside / name.removeprefix(key).lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, name, str(file))
    except (BotoCoreError, ClientError, OSError) as error:
        raise UserError(f"{field}: {address} cannot be fetched: {error}") from error
    record.unlink(missing_ok=True)
    _remove(target)
    aside.rename(target)
    record.write_text(json.dumps(wanted))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
