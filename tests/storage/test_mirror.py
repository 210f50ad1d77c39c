"""A working copy and its likeness on S3."""

import pytest

from sid_ray.storage import mirror as mirror_module
from sid_ray.storage.lease import Taken
from sid_ray.storage.mirror import Mirror, pull, push
from sid_ray.storage.s3 import S3Folder, StorageError

SKIP = ("checkpoints",)


@pytest.fixture
def remote(bucket):
    return S3Folder(f"s3://{bucket}/runs/one")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "copy"
    (folder / "generator").mkdir(parents=True)
    return folder


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def test_what_changes_is_pushed_and_pulled_elsewhere(folder, remote, tmp_path):
    with Mirror(folder, remote, SKIP, print) as mirror:
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "generator" / "config.json").write_text("{}")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "big").write_text("not here")
        (folder / ".hidden").write_text("not here")
        assert mirror.flush()
        assert sorted(remote.objects()) == ["generator/config.json", "metrics.jsonl"]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
    assert remote.read("metrics.jsonl")[0] == b"1\n2\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "left-over").write_text("of a run that is gone")
    (other / "checkpoints").mkdir()
    (other / "checkpoints" / "kept").write_text("kept")
    pull(other, remote, SKIP)
    assert content(other) == {"metrics.jsonl": "1\n2\n", "generator/config.json": "{}", "checkpoints/kept": "kept"}
    unchanged = (other / "metrics.jsonl").stat().st_mtime_ns
    (other / "generator" / "config.json").write_text("[]")
    pull(other, remote, SKIP)
    assert (other / "metrics.jsonl").stat().st_mtime_ns == unchanged
    assert content(other)["generator/config.json"] == "{}"


def test_the_thread_pushes_by_itself(folder, remote, monkeypatch):
    import time

    monkeypatch.setattr(mirror_module, "POLL_SECONDS", 0.05)
    with Mirror(folder, remote, SKIP, print):
        (folder / "metrics.jsonl").write_text("1\n")
        deadline = time.monotonic() + 60
        while "metrics.jsonl" not in remote.objects():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_failure_is_told_once_and_tried_again(folder, remote, monkeypatch):
    from sid_ray.storage import s3_client

    monkeypatch.setattr(mirror_module, "LAST_PAUSES", (0.01,))
    notes = []
    missing = S3Folder("s3://there-is-no-such-bucket/x")
    mirror = Mirror(folder, missing, SKIP, notes.append)
    (folder / "a").write_text("1")
    assert not mirror.flush() and not mirror.flush()
    assert len(notes) == 1 and "s3://there-is-no-such-bucket/x" in notes[0]
    with pytest.raises(StorageError):
        mirror.close()
    mirror = Mirror(folder, missing, SKIP, notes.append)
    (folder / "a").write_text("22")
    assert not mirror.flush()
    s3_client().create_bucket(Bucket="there-is-no-such-bucket")
    mirror.close()
    assert missing.read("a")[0] == b"22"


def test_a_taken_run_is_not_written(folder, remote):
    def refuse():
        raise Taken("by another")

    mirror = Mirror(folder, remote, SKIP, print, may_write=refuse)
    assert mirror.flush(), "nothing changed"
    (folder / "a").write_text("1")
    with pytest.raises(Taken):
        mirror.push()
    assert remote.objects() == {}


def test_push_once(folder, remote):
    (folder / "generator" / "model.safetensors").write_text("w")
    push(folder, remote)
    assert sorted(remote.objects()) == ["generator/model.safetensors"]
