"""Following files on S3 that only grow, such as TensorBoard's: what is new is fetched and appended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sid_ray.storage.s3 import S3Folder


def follow(folder: Path, remote: S3Folder, wanted: Callable[[str], bool]) -> int:
    """Bring the local copies of the wanted objects up to date; returns the bytes fetched. StorageError if it fails.

    `wanted` is asked for each object by its name below `remote`. Files that are there are appended to, never
    replaced by another: a reader that holds one open sees it grow. One that became shorter is begun anew, and one
    that is gone from S3 is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fetched = 0
    with FileLock(folder / ".follow.lock"):
        there = {name: found for name, found in remote.objects().items() if wanted(name)}
        here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for name in here - there.keys() - {".follow.lock"}:
            (folder / name).unlink()
        for name, found in there.items():
            file = folder / name
            size = file.stat().st_size if file.is_file() else 0
            if size > found.size:
                file.unlink()
                size = 0
            if size < found.size:
                content = remote.read_range(name, size, found.size)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("ab") as local:
                    local.write(content)
                fetched += len(content)
    return fetched
