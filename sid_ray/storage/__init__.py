"""Files that lie elsewhere, and writing that survives: fetching, S3, whole folders, a run's mirror and its lease."""

from sid_ray.storage.fetching import cache_folder, cached, digest, fetch, is_remote
from sid_ray.storage.s3 import s3_client, split_s3

__all__ = ["cache_folder", "cached", "digest", "fetch", "is_remote", "s3_client", "split_s3"]
