"""Whole folders, on a disk and on S3: there with their marker, damaged without what it promises."""

import json

import pytest

from sid_ray.storage.depot import MARKER, Damaged, Depot, S3Depot
from sid_ray.storage.s3 import S3Folder, StorageError


@pytest.fixture(params=["local", "s3"])
def depot(request, tmp_path):
    if request.param == "local":
        return Depot(tmp_path / "depot")
    return S3Depot(tmp_path / "copy", S3Folder(f"s3://{request.getfixturevalue('bucket')}/runs/depot"))


def write(depot, name, **files):
    depot.begin(name)
    written = []
    for file, content in files.items():
        (depot.aside(name) / file).write_bytes(content)
        written.append(depot.put(name, file))
    depot.commit(name, written, nimg=5)
    depot.abandon(name)


def replace(depot, name, file, content):
    """Change a file behind the depot's back; None removes it."""
    if isinstance(depot, S3Depot):
        depot.remote.delete([f"{name}/{file}"])
        if content is not None:
            depot.remote.write(f"{name}/{file}", content)
    elif content is None:
        (depot.folder / name / file).unlink()
    else:
        (depot.folder / name / file).write_bytes(content)


def test_a_folder_is_there_once_its_marker_is(depot):
    assert depot.names() == []
    depot.begin("one")
    (depot.aside("one") / "a").write_bytes(b"first")
    written = [depot.put("one", "a")]
    assert depot.marker("one") is None and depot.problem("one") == f"it has no readable {MARKER}"
    depot.commit("one", written, nimg=5)
    depot.abandon("one")
    assert depot.problem("one") is None and depot.marker("one")["nimg"] == 5
    path = depot.fetch("one")
    assert (path / "a").read_bytes() == b"first"
    write(depot, "two", a=b"second", b=b"")
    assert depot.names() == ["one", "two"] and (depot.fetch("two") / "b").read_bytes() == b""
    depot.remove("one")
    assert depot.names() == ["two"] and depot.marker("one") is None


@pytest.mark.parametrize(
    ("file", "content", "seen_by_size"),
    [("a", b"firsT", False), ("a", b"fir", True), ("a", None, True), (MARKER, None, True), (MARKER, b"{", True),
     (MARKER, b'{"files": {"a": {"size": 5}}}', True), (MARKER, b"[]", True)],
    ids=["flipped", "truncated", "gone", "no-marker", "cut-marker", "odd-marker", "list-marker"],
)  # fmt: skip
def test_damage_is_seen(depot, file, content, seen_by_size):
    write(depot, "one", a=b"first", b=b"other")
    replace(depot, "one", file, content)
    assert (depot.problem("one") is not None) == seen_by_size
    with pytest.raises(Damaged, match=file):
        depot.fetch("one")
    write(depot, "one", a=b"again")
    assert (depot.fetch("one") / "a").read_bytes() == b"again"


def test_a_stale_working_copy_is_not_taken_for_the_folder(bucket, tmp_path):
    """Same name, same sizes, other content and one file more: what was downloaded before does not count."""
    remote = S3Folder(f"s3://{bucket}/depot")
    here, there = S3Depot(tmp_path / "here", remote), S3Depot(tmp_path / "there", remote)
    write(here, "one", a=b"old", surplus=b"x")
    here.fetch("one")
    there.remove("one")
    write(there, "one", a=b"new")
    path = here.fetch("one")
    assert (path / "a").read_bytes() == b"new" and not (path / "surplus").exists()
    write(there, "two", a=b"next")
    here.fetch("two")
    assert not path.exists(), "only one folder is kept on this machine"


def test_a_file_that_did_not_arrive_is_no_folder(bucket, tmp_path):
    depot = S3Depot(tmp_path, S3Folder(f"s3://{bucket}/depot"))
    depot.begin("one")
    (depot.aside("one") / "a").write_bytes(b"first")
    written = [depot.put("one", "a")]
    replace(depot, "one", "a", b"fir")
    with pytest.raises(StorageError, match="a did not arrive whole"):
        depot.commit("one", written)
    assert depot.marker("one") is None


def test_the_marker_holds_size_and_sha256(tmp_path):
    depot = Depot(tmp_path)
    write(depot, "one", a=b"")
    entry = json.loads((tmp_path / "one" / MARKER).read_text())["files"]["a"]
    assert entry == {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
