"""Fetching from a real HTTP server and a real S3 server."""

import pytest

from sid_ray.errors import UserError
from sid_ray.storage import cached, digest, fetch, s3_client


def test_a_local_path_passes_through(tmp_path):
    assert fetch(str(tmp_path / "none"), "teacher.path") == tmp_path / "none"


def test_a_file_of_the_web_is_fetched_once(web):
    folder, address = web
    (folder / "ref.npz").write_bytes(b"first")
    assert cached(f"{address}/ref.npz") is None
    file = fetch(f"{address}/ref.npz", "evaluation.reference")
    assert file.read_bytes() == b"first" and file.name == "ref.npz"
    assert cached(f"{address}/ref.npz") == file
    (folder / "ref.npz").unlink()
    assert fetch(f"{address}/ref.npz", "evaluation.reference") == file
    with pytest.raises(UserError, match=r"evaluation\.reference: http.*none\.npz cannot be fetched"):
        fetch(f"{address}/none.npz", "evaluation.reference")


def test_another_digest_is_refused(web):
    folder, address = web
    (folder / "a.pt").write_bytes(b"right")
    right = digest(folder / "a.pt")
    assert fetch(f"{address}/a.pt", "x", right).read_bytes() == b"right"
    (folder / "b.pt").write_bytes(b"wrong")
    for path in (f"{address}/b.pt", str(folder / "b.pt")):
        with pytest.raises(UserError, match=r"^x: "):
            fetch(path, "x", right)


def test_a_folder_of_s3_is_fetched_whole_and_again_when_it_changes(bucket):
    client = s3_client()
    for key in ("teacher/config.json", "teacher/sub/weights", "teacher-2/config.json"):
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    folder = fetch(f"s3://{bucket}/teacher", "teacher.path")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "sub/weights",
    ]
    changed = (folder / "config.json").stat().st_mtime_ns
    assert (fetch(f"s3://{bucket}/teacher", "teacher.path") / "config.json").stat().st_mtime_ns == changed
    client.put_object(Bucket=bucket, Key="teacher/config.json", Body=b"new")
    assert (fetch(f"s3://{bucket}/teacher", "teacher.path") / "config.json").read_bytes() == b"new"
    assert fetch(f"s3://{bucket}/teacher/config.json", "teacher.path").read_bytes() == b"new"


def test_what_s3_has_not_is_named(bucket):
    with pytest.raises(UserError, match=rf"teacher\.path: there is nothing at s3://{bucket}/none"):
        fetch(f"s3://{bucket}/none", "teacher.path")
    with pytest.raises(UserError, match=r"teacher\.path: s3://no-such-bucket-here/x cannot be fetched"):
        fetch("s3://no-such-bucket-here/x", "teacher.path")


def test_names_that_leave_the_folder_are_refused(bucket):
    s3_client().put_object(Bucket=bucket, Key="t/../../evil", Body=b"")
    with pytest.raises(UserError, match="would leave the folder"):
        fetch(f"s3://{bucket}/t", "teacher.path")
