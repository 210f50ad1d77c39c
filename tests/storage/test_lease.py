"""One owner at a time, with real processes: a live one is respected, a dead one replaced, an unknown one waited for."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sid_ray.errors import UserError
from sid_ray.storage import lease as lease_module
from sid_ray.storage.lease import FilePlace, Record, S3Place, holds, take_lease
from sid_ray.storage.s3 import S3Folder
from tests.launching import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from sid_ray.storage.lease import FilePlace, S3Place, take_lease
from sid_ray.storage.s3 import S3Folder
where = sys.argv[1]
place = S3Place(S3Folder(where), "lease.json") if where.startswith("s3://") else FilePlace(Path(where))
take_lease(place, "the run", print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def where(request, tmp_path):
    return str(tmp_path / "lease.json") if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}/x"


def at(where):
    return S3Place(S3Folder(where), "lease.json") if where.startswith("s3://") else FilePlace(Path(where))


@pytest.fixture
def holder(where):
    """A process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, where],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "held\n":
        assert process.poll() is None
    yield process
    process.kill()
    process.wait()


def change(place, **fields):
    text, tag = place.read()
    assert place.swap(Record.model_validate_json(text).model_copy(update=fields).model_dump_json(), tag)


def test_a_live_owner_is_named_and_a_killed_one_replaced_at_once(where, holder):
    with pytest.raises(UserError, match=rf"the run is in use by process {holder.pid} on .* since 20"):
        take_lease(at(where), "the run", print)
    holder.send_signal(signal.SIGKILL)
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:  # not waited for: a zombie is dead too
        time.sleep(0.01)
    said = []
    with take_lease(at(where), "the run", said.append) as lease:
        assert "has ended; it is taken over" in said[0]
        assert holds(at(where), lease.owner) and not holds(at(where), "another")
    assert at(where).read() is None


def test_a_pid_that_was_used_again_is_not_the_owner(where, holder):
    change(at(where), started=0.0)
    take_lease(at(where), "the run", print).release()


def test_a_process_refuses_itself_while_it_holds_the_lease(where):
    lease = take_lease(at(where), "the run", print)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        take_lease(at(where), "the run", print)
    text, _ = at(where).read()
    lease.release()
    assert at(where).swap(text, None)  # as if storage had failed when it was given back
    take_lease(at(where), "the run", print).release()


def test_an_owner_elsewhere_is_waited_for_until_it_expires(where):
    take_lease(at(where), "the run", print)._end.set()
    change(at(where), host="elsewhere", seconds=0.5)
    said = []
    take_lease(at(where), "the run", said.append).release()
    assert "in use by process" in said[0] and "on elsewhere" in said[0] and "waiting at most" in said[0]


def test_an_owner_elsewhere_that_renews_is_respected(where, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.1)
    lease = take_lease(at(where), "the run", print)
    lease.record = lease.record.model_copy(update={"host": "elsewhere"})
    while '"elsewhere"' not in at(where).read()[0]:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"in use by process .* on elsewhere"):
        take_lease(at(where), "the run", print)
    lease.release()
    take_lease(at(where), "the run", print).release()


def test_a_loss_is_told(where, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    lost = []
    lease = take_lease(at(where), "the run", print, lost.append)
    while True:  # the renewing thread may come between reading and swapping
        text, tag = at(where).read()
        thief = Record.model_validate_json(text).model_copy(update={"owner": "thief", "host": "elsewhere"})
        if at(where).swap(thief.model_dump_json(), tag):
            break
    lease._thread.join(30)
    assert lost and "on elsewhere" in lost[0] and "has taken it over" in lost[0]
    lease.release()
    assert '"thief"' in at(where).read()[0], "what another holds is not released"


def test_a_vanished_record_is_written_again(where, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    with take_lease(at(where), "the run", print) as lease:
        while not at(where).swap(None, at(where).read()[1]):
            pass
        deadline = time.monotonic() + 30
        while at(where).read() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert holds(at(where), lease.owner)


def race(path, start, results):
    place = FilePlace(path)
    found = place.read()
    start.wait()
    results.put(place.swap(f"process {os.getpid()}", found and found[1]))


@pytest.mark.parametrize("stale", [None, "left by another"], ids=["free", "stale"])
def test_of_processes_that_race_one_wins(tmp_path, stale):
    if stale is not None:
        assert FilePlace(tmp_path / "lease.json").swap(stale, None)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(tmp_path / "lease.json", start, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(outcomes) == [False, False, False, True]


def test_of_those_that_saw_the_same_record_one_replaces_it(where):
    assert at(where).swap("first", None) and not at(where).swap("also first", None)
    _, tag = at(where).read()
    assert at(where).swap("second", tag) and not at(where).swap("also second", tag)
    assert not at(where).swap(None, tag) and at(where).read()[0] == "second"
