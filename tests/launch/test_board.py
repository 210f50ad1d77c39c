"""`sid-ray board` with real TensorBoard, asked over HTTP as a browser asks."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from torch.utils.tensorboard import SummaryWriter

from sid_ray.errors import UserError
from sid_ray.launch.board import EVENTS, find_runs, serve_board
from sid_ray.storage import s3_client
from sid_ray.storage.following import follow
from sid_ray.storage.s3 import S3Folder
from tests.launching import ROOT, free_port, upload

SECONDS = 90


def write(folder, *losses, start=0):
    """A run's event file with one scalar."""
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for i, loss in enumerate(losses):
            writer.add_scalar("loss/generator", loss, start + i)


@contextmanager
def board(where, tmp_path):
    """`sid-ray board` as a process; yields a function that asks it: path -> JSON."""
    port = free_port()
    log = tmp_path / "board.log"
    command = [sys.executable, "-m", "sid_ray", "board", str(where), "--port", str(port), "--every", "1"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def ask(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
            return json.load(answer)

    try:
        yield ask, process, log
    finally:
        process.terminate()
        process.wait(timeout=30)


def eventually(true, process, log):
    """Ask until it is so."""
    deadline, seen = time.monotonic() + SECONDS, None
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            seen = true()
            if seen:
                return
        except OSError:
            pass  # it has not started to listen
        time.sleep(0.5)
    raise AssertionError(f"{seen}\n{log.read_text()}")


def scalars(ask, run):
    name = run.replace("/", "%2F")
    return [value for _, _, value in ask(f"data/plugin/scalars/scalars?run={name}&tag=loss%2Fgenerator")]


def test_runs_on_s3_show_as_they_grow(bucket, tmp_path):
    runs = tmp_path / "runs"
    write(runs / "digits", 4.0, 2.0)
    write(runs / "sweep" / "trials" / "a1", 3.0)
    write(runs / "digits" / ".ray" / "x", 9.0)  # Ray's own files are nobody's run
    (runs / "digits" / "checkpoints").mkdir()
    (runs / "digits" / "checkpoints" / "large").write_bytes(b"0" * 100_000)
    where = upload(runs, bucket, "of/mine")
    with board(where, tmp_path) as (ask, process, log):
        eventually(lambda: sorted(ask("data/runs")) == ["digits", "sweep/a1"], process, log)
        eventually(lambda: scalars(ask, "digits") == [4.0, 2.0], process, log)
        (events,) = (runs / "digits" / "tensorboard").iterdir()
        before = events.read_bytes()
        write(tmp_path / "more", 1.0, start=2)
        (more,) = (tmp_path / "more" / "tensorboard").iterdir()
        events.write_bytes(before + more.read_bytes())  # as a writer that goes on does
        write(runs / "second", 7.0)
        upload(runs, bucket, "of/mine")
        eventually(lambda: sorted(ask("data/runs")) == ["digits", "second", "sweep/a1"], process, log)
        eventually(lambda: scalars(ask, "digits") == [4.0, 2.0, 1.0], process, log)
    assert "digits, sweep/a1" in log.read_text()
    assert not list((tmp_path / "cache").rglob("large")), "a checkpoint was fetched"


def test_a_local_folder_that_is_still_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    with board(tmp_path / "empty", tmp_path) as (ask, process, log):
        eventually(lambda: ask("data/runs") == [], process, log)
        write(tmp_path / "empty" / "first", 1.0)
        eventually(lambda: ask("data/runs") == ["first"], process, log)
    assert re.search(r"there are no runs in \S+ yet", log.read_text())


def test_names_of_runs_and_objects(tmp_path):
    for path in ("tensorboard", "a/tensorboard", "s/trials/t/tensorboard", ".x/tensorboard", "a/b/c/tensorboard"):
        (tmp_path / path).mkdir(parents=True)
    assert find_runs(tmp_path, "self").keys() == {"self", "a", "s/t"}
    assert find_runs(tmp_path / "s", "s").keys() == {"t"}
    events = "events.out.tfevents.1.host.2.0"
    for name in ("tensorboard/", "a/tensorboard/after-rollback-1/", "trials/t/tensorboard/", "s/trials/t/tensorboard/"):
        assert EVENTS.fullmatch(name + events)
    for name in ("a/checkpoints/", "a/.ray/x/tensorboard/", "a/b/c/tensorboard/", ".x/tensorboard/"):
        assert not EVENTS.fullmatch(name + events)


def test_only_what_is_new_is_fetched_and_files_keep_their_place(bucket, tmp_path):
    client, remote = s3_client(), S3Folder(f"s3://{bucket}/x")

    def look():
        return follow(tmp_path / "copy", remote, lambda name: name.endswith(".log"))

    client.put_object(Bucket=bucket, Key="x/a.log", Body=b"12345")
    client.put_object(Bucket=bucket, Key="x/b.txt", Body=b"not wanted")
    assert look() == 5 and look() == 0
    reader = (tmp_path / "copy" / "a.log").open("rb")
    assert reader.read() == b"12345"
    client.put_object(Bucket=bucket, Key="x/a.log", Body=b"12345678")
    assert look() == 3 and reader.read() == b"678", "a reader that holds the file open does not see it grow"
    client.put_object(Bucket=bucket, Key="x/a.log", Body=b"9")
    assert look() == 1 and (tmp_path / "copy" / "a.log").read_bytes() == b"9"
    client.delete_object(Bucket=bucket, Key="x/a.log")
    assert look() == 0 and not (tmp_path / "copy" / "a.log").exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [("nowhere", r"'nowhere' is not a folder"), ("s3://no-such-bucket/runs", r"cannot be read: .*NoSuchBucket")],
)
def test_what_is_not_there_is_named(where, words, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        serve_board(where, "127.0.0.1", 6006, 1)
