"""When the workers ask whether to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sid_ray.training.checkpoints import complete_checkpoints, read_progress
from sid_ray.training.distributed import World
from sid_ray.training.stops import StopChecks, next_interval
from tests.launching import ROOT


class Ranks(World):
    """A world whose sum is what all of `size` equal ranks would make, and that counts its collectives."""

    collectives = 0

    def sum(self, values):
        type(self).collectives += 1
        return values * self.size


class Wish:
    def __init__(self):
        self.asked, self.wish = 0, False

    def should_stop(self):
        self.asked += 1
        return self.wish


def test_the_interval_follows_the_speed_within_bounds():
    assert next_interval(1, 0.5, 5.0) == 10
    assert next_interval(1, 0.001, 5.0) == 10  # no leap on one measurement
    assert next_interval(100, 0.1, 5.0) == 1000
    assert next_interval(100, 10.0, 5.0) == 50
    assert next_interval(4, 600.0, 5.0) == 1  # an evaluation lay in between: the next measurement is right again


@given(st.floats(1e-5, 100))
def test_checks_settle_at_about_the_wanted_seconds(seconds_per_iteration):
    interval = 1
    for _ in range(10):
        interval = next_interval(interval, interval * seconds_per_iteration, 5.0)
    assert interval == 1 or 2.5 <= interval * seconds_per_iteration <= 5.01


def test_asked_rarely_and_heard_at_the_next_check():
    outside = Wish()
    checks = StopChecks(Ranks(0, 4, torch.device("cpu")), outside, seconds=1e6)
    assert not any(checks.stop() for _ in range(111))
    assert outside.asked == Ranks.collectives == 3  # after 1, 10 and 100 iterations more
    outside.wish = True
    heard = [checks.stop() for _ in range(1000)]
    assert heard.index(True) == 999


@pytest.mark.distributed
def test_a_signal_is_heard_long_before_the_next_report(job):
    """SIGTERM to a worker that reports every thousand kimg: a checkpoint and a clean end, and it resumes there."""
    endless = job("told", run__total_kimg=1e6, run__report_every_kimg=1e6, run__checkpoint_every_kimg=0.8)
    process = subprocess.Popen(
        [sys.executable, "-m", "sid_ray.training.worker", endless],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    run = job.runs / "told"
    while not complete_checkpoints(run / "checkpoints"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "FID" in output
    newest = complete_checkpoints(run / "checkpoints")[0]
    stopped = read_progress(newest)
    assert stopped.nimg >= 800 and stopped.nimg % 16 == 0 and not (run / "summary.json").exists()
