"""Storage that fails: nothing is lost beyond the last checkpoint, and a repeated command ends bitwise the same."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from sid_ray.storage.depot import MARKER
from sid_ray.storage.lease import Record, Taken
from sid_ray.storage.s3 import S3Folder
from sid_ray.training import checkpoints
from sid_ray.training.board import read_metrics
from sid_ray.training.checkpoints import complete_names
from sid_ray.training.guard import TrainingStopped
from tests.alone import Recorder, largest_file, train
from tests.conftest import job_writer
from tests.faults.flaky_s3 import HOW, FlakyS3
from tests.launching import s3_settings
from tests.training.test_board import scalars
from tests.training.test_worker import assert_same, end_state

FAULTS = pytest.mark.faults
"""What `make test-faults` adds to the corners in the default run."""
OFTEN = {"run__checkpoint_every_kimg": 0.016, "run__report_every_kimg": 0.016}
"""A checkpoint and a report after every iteration, of which there are six: at 16, 32, ..., 96 images."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_teacher):
    """The run `one` to which nothing happened; its two checkpoints are at 48 and 96 images."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run, _ = train(job_writer(folder, tiny_teacher)("one", run__keep_checkpoints=6))
    return run.path


@pytest.fixture(scope="module")
def told(undisturbed):
    return figures(undisturbed)


@pytest.fixture
def quick(monkeypatch):
    """No pauses between attempts."""
    monkeypatch.setattr(checkpoints, "PAUSES", (0.0, 0.0))


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """(server that fails on demand, storage on it); clients try twice."""
    server = FlakyS3()
    own = {"AWS_MAX_ATTEMPTS": "2", "SID_RAY_CACHE": str(tmp_path / "cache")}
    for name, value in (s3_settings(server.address) | own).items():
        monkeypatch.setenv(name, value)
    from sid_ray.storage import s3_client

    s3_client().create_bucket(Bucket="faults")
    yield server, f"s3://faults/{tmp_path.name}"
    server.close()


def figures(run):
    """What metrics.jsonl tells beside the speed and the failures: {(nimg, name): value}."""
    rows = [(row["nimg"], name, value) for row in read_metrics(run / "metrics.jsonl") for name, value in row.items()]
    kept = [(n, name, v) for n, name, v in rows if not name.startswith(("nimg", "speed", "checkpoint", "seconds"))]
    assert len({(n, name) for n, name, _ in kept}) == len(kept), "told twice"
    return {(n, name): value for n, name, value in kept}


def assert_undisturbed(run, undisturbed):
    """Same weights, moments and average, and the same generator."""
    path = run.depot.fetch(complete_names(run.depot)[0])
    assert json.loads((path / "progress.json").read_text())["nimg"] == 96
    assert_same(state_of(path), end_state(undisturbed))
    if run.remote is None:
        content = (run.generator / "model.safetensors").read_bytes()
    else:
        content = run.remote.read("generator/model.safetensors")[0]
    assert content == (undisturbed / "generator" / "model.safetensors").read_bytes()


def state_of(checkpoint):
    return {
        f"{role}.{name}.{key}": tensor
        for role in checkpoints.ROLES
        for name, tensors in checkpoints.read_network(checkpoint, role).items()
        for key, tensor in tensors.items()
    }


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "flipped byte": ("fake_score-00000-of-00001.safetensors", flip),
    "truncated": ("generator-00000-of-00001.safetensors", lambda content: content[:-100]),
    "missing marker": (MARKER, lambda content: None),
    "flipped counter": ("progress.json", flip),
    "truncated marker": (MARKER, lambda content: content[:50]),
    "missing file": ("generator-00000-of-00001.safetensors", lambda content: None),
}
CORNERS = {
    ("flipped byte", "local"),
    ("truncated", "local"),
    ("missing marker", "local"),
    ("flipped byte", "s3"),
}


@pytest.mark.parametrize(
    ("damage", "storage"),
    [
        pytest.param(d, s, marks=() if (d, s) in CORNERS else FAULTS, id=f"{d}-{s}")
        for d in DAMAGE
        for s in ("local", "s3")
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damage, storage, undisturbed, told, job, request, tmp_path):
    """The newest of two is damaged: the run goes on from the other, says so, and ends as if nothing had been."""
    name, change = DAMAGE[damage]
    newest = f"checkpoints/nimg-000000000096/{name}"
    if storage == "local":
        shutil.copytree(undisturbed, job.runs / "one")
        content = change((job.runs / "one" / newest).read_bytes())
        (job.runs / "one" / newest).unlink() if content is None else (job.runs / "one" / newest).write_bytes(content)
        config = job("one", run__keep_checkpoints=6)
    else:
        _, where = request.getfixturevalue("s3")
        there = S3Folder(f"{where}/one")
        for file in (p for p in undisturbed.rglob("*") if p.is_file() and not p.name.startswith(".")):
            there.upload(file, file.relative_to(undisturbed).as_posix())
        content = change(there.read(newest)[0])
        there.delete([newest]) if content is None else there.write(newest, content)
        config = job("one", run__keep_checkpoints=6, run__storage=where)
    outside = Recorder()
    run, progress = train(config, outside)
    assert progress.nimg == 96 and [r["nimg"] for r in outside.reports] == [96], "it did not go on from 48"
    if damage in ("flipped byte", "flipped counter"):  # the others show in a listing already
        assert any("nimg-000000000096 is damaged and passed over" in w for w in outside.warnings), outside.notes
    assert_undisturbed(run, undisturbed)
    assert figures(run.path) == told


@FAULTS
def test_a_run_without_any_usable_checkpoint_begins_again(undisturbed, job):
    shutil.copytree(undisturbed, job.runs / "one")
    for file in (job.runs / "one").glob("checkpoints/*/generator-*"):
        file.write_bytes(flip(file.read_bytes()))
    outside = Recorder()
    run, _ = train(job("one", run__keep_checkpoints=6), outside)
    assert len([w for w in outside.warnings if "is damaged and passed over" in w]) == 2
    assert outside.reports[0]["nimg"] == 0
    assert_undisturbed(run, undisturbed)


def test_checkpoints_that_cannot_be_written_do_not_stop_training(undisturbed, job, quick):
    """Files may be no larger than 20 kB for a while (RLIMIT_FSIZE): the previous checkpoint stays, training goes on."""
    config = job("limited", run__keep_checkpoints=1, **OFTEN)
    run_path, limit, seen = job.runs / "limited", largest_file(20_000), []

    def at_report(nimg):
        if nimg == 32:
            limit.__enter__()
        if nimg == 64:
            seen.extend(p.name for p in (run_path / "checkpoints").iterdir())
            limit.__exit__(None, None, None)

    outside = Recorder(at_report)
    _, progress = train(config, outside)
    assert progress.nimg == 96
    assert seen == ["nimg-000000000016"], "the last good checkpoint was lost, or half a one left"
    failures = [w for w in outside.warnings if "could not be written" in w]
    assert [w.split(" kimg")[0][-5:] for w in failures] == ["0.032", "0.048"] and "File too large" in failures[0]
    rows = [row for row in read_metrics(run_path / "metrics.jsonl") if "checkpoint/failures" in row]
    assert [(row["nimg"], row["checkpoint/failures"]) for row in rows] == [(32, 1.0), (48, 2.0)]
    assert [p.name for p in (run_path / "checkpoints").iterdir()] == ["nimg-000000000096"]
    assert_same(end_state(run_path), end_state(undisturbed))


def test_too_many_failures_stop_the_run_and_the_same_command_goes_on(undisturbed, job, quick):
    config = job("stopped", run__max_checkpoint_failures=2, **OFTEN)
    limit = largest_file(20_000)
    outside = Recorder(lambda nimg: limit.__enter__() if nimg == 48 else None)
    try:
        with pytest.raises(TrainingStopped, match=r"0\.064 kimg could not be written: .*2 in a row, run\.max_check"):
            train(config, outside)
    finally:
        limit.__exit__(None, None, None)
    outside = Recorder()
    run, _ = train(config, outside)
    assert outside.reports[0]["nimg"] == 48
    assert_same(end_state(run.path), end_state(undisturbed))


@contextmanager
def small_disk(folder, megabytes):
    """A file system of its own at `folder`; skips the test where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file):
    """Take all the space that the file system has left."""
    chunk = 65536
    with file.open("wb", buffering=0) as out:
        while chunk:
            try:
                out.write(b"x" * chunk)
            except OSError:
                chunk //= 2


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk(undisturbed, tmp_path, job, quick):
    """From 32 to 64 images there is no space: what the board, the generator and checkpoints lack is made up for."""
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        filler = disk / "filler"

        def at_report(nimg):
            if nimg == 32:
                fill(filler)
            if nimg == 64:
                filler.unlink()

        settings = {"run__storage": str(disk), "evaluation__every_kimg": 0.048, "run__sample_every_kimg": 0.016}
        outside = Recorder(at_report)
        run, progress = train(job("full", **settings, **OFTEN), outside)
        assert progress.nimg == 96
        # The report at 32 images comes after its scalars: what fails first is its checkpoint, then all of 48.
        for what in ("0.032 kimg could not", "0.048 kimg could not", "generator: ", "samples: ", "tensorboard: "):
            assert any(what in w and "No space left" in w for w in outside.warnings), (what, outside.warnings)
        assert len([w for w in outside.warnings if w.startswith("warning: samples")]) == 1
        told = read_metrics(run.metrics)
        assert {row["nimg"] for row in told if "loss/generator" in row} == set(range(16, 97, 16))
        events = scalars(run.tensorboard, "loss/generator")
        assert [step for step, _ in events] == list(range(16, 97, 16))
        assert_same(end_state(run.path), end_state(undisturbed))
        saved = json.loads((run.generator / "config.json").read_text())["provenance"]["nimg"]
        assert saved == progress.best_nimg
        assert not list(run.checkpoints.glob(".*")), "half-written files were left"


@pytest.mark.parametrize("how", [h if h == "cut" else pytest.param(h, marks=FAULTS) for h in HOW])
def test_uploads_that_fail(how, undisturbed, job, quick, s3):
    """All uploads of one checkpoint fail: it is not there, training goes on, the next one is."""
    server, where = s3
    failing = server.fails(r"PUT .*/nimg-000000000032/generator", how)
    outside = Recorder(lambda nimg: failing.__enter__() if nimg == 32 else None)
    run, _ = train(job("flaky", run__storage=where, run__keep_checkpoints=6, **OFTEN), outside)
    failing.__exit__(None, None, None)
    assert len(server.failed) == 6, "three attempts of two tries each"
    assert [w for w in outside.warnings if "0.032 kimg could not be written" in w and where in w]
    assert [int(name[5:]) for name in reversed(complete_names(run.depot))] == [16, 48, 64, 80, 96]
    assert_undisturbed(run, undisturbed)
    assert not list(run.checkpoints.glob(".*.partial"))


@FAULTS
def test_a_marker_that_fails(undisturbed, job, quick, s3):
    server, where = s3
    with server.fails(rf"PUT .*/nimg-000000000048/{MARKER}", "503"):
        outside = Recorder()
        run, _ = train(job("marker", run__storage=where, run__keep_checkpoints=6, **OFTEN), outside)
    assert server.failed and [int(name[5:]) for name in reversed(complete_names(run.depot))] == [16, 32, 64, 80, 96]
    assert_undisturbed(run, undisturbed)


def test_storage_that_is_gone_and_comes_back(undisturbed, told, job, quick, s3, monkeypatch):
    """S3 fails from 64 images on: the run stops after its limit; the same command ends bitwise the same."""
    server, where = s3
    config = job("gone", run__storage=where, run__max_checkpoint_failures=2, **OFTEN)
    failing = server.fails(".", "500")
    outside = Recorder(lambda nimg: failing.__enter__() if nimg == 64 else None)
    with pytest.raises(TrainingStopped, match=r"0\.08 kimg could not be written: s3://"):
        train(config, outside)
    failing.__exit__(None, None, None)
    monkeypatch.setenv("SID_RAY_CACHE", os.environ["SID_RAY_CACHE"] + "-of-another-machine")
    outside = Recorder()
    run, _ = train(config, outside)
    assert outside.reports[0]["nimg"] == 64, "more was lost than what followed the last checkpoint"
    assert_undisturbed(run, undisturbed)
    assert {k: v for k, v in figures(run.path).items() if k[0] in (0, 96)}.items() >= {
        k: v for k, v in told.items() if k[0] == 0
    }.items()
    assert {nimg for nimg, _ in figures(run.path)} == set(range(0, 97, 16))


@FAULTS
def test_one_failure_is_retried_without_a_word(undisturbed, job, s3):
    server, where = s3
    seen = []

    class Once:
        def search(self, request):
            fails = "nimg-000000000048/fake_score" in request and not seen
            seen.extend([request] if fails else [])
            return fails

    server.failing = Once()
    outside = Recorder()
    run, _ = train(job("retried", run__storage=where), outside)
    assert seen and not outside.warnings
    assert_undisturbed(run, undisturbed)


@pytest.mark.parametrize("storage", ["local", pytest.param("s3", marks=FAULTS)])
def test_who_has_lost_the_run_writes_nothing_more(storage, job, quick, request):
    """Another process takes the lease over at 48 images: no checkpoint of this one follows."""
    where = str(job.runs) if storage == "local" else request.getfixturevalue("s3")[1]
    config = job("taken", run__storage=where, run__keep_checkpoints=6, **OFTEN)
    from sid_ray.config import load_config
    from sid_ray.training.run_directory import RunDirectory

    run = RunDirectory.of(load_config(config))

    def take_over(nimg):
        while nimg == 48:
            text, tag = run.lease.read()
            if run.lease.swap(
                Record.model_validate_json(text).model_copy(update={"owner": "x"}).model_dump_json(), tag
            ):
                return

    with pytest.raises(Taken, match="taken was taken over by another process"):
        train(config, Recorder(take_over))
    assert [int(name[5:]) for name in complete_names(run.depot)] == [32, 16]
    assert '"x"' in run.lease.read()[0]
