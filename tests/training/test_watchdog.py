"""The watchdog, on processes that really hang."""

import os
import subprocess
import sys
import time

from sid_ray.training.watchdog import EXIT_CODE, Watchdog
from tests.launching import ROOT

HANGS = """
import sys, threading, time
from pathlib import Path
from sid_ray.training.watchdog import Watchdog

def inner_ear():
    threading.Event().wait()

dog = Watchdog(0.5, Path(sys.argv[1]), "worker 1 of 2")
with dog.watching():
    pass
time.sleep(1.5)  # not watched: starting up, evaluating
print("still here", flush=True)
with dog.watching():
    inner_ear()
"""


def test_a_hanging_process_is_ended_and_says_where_it_hung(tmp_path):
    log = tmp_path / "error.log"
    done = subprocess.run([sys.executable, "-c", HANGS, str(log)], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == EXIT_CODE and done.stdout == "still here\n", done.stderr
    text = log.read_text()
    assert "worker 1 of 2: no progress for 0.5 s" in text and "inner_ear" in text


def test_a_log_that_cannot_be_written_does_not_keep_it_alive(tmp_path):
    """A pipe that nobody reads: opening it blocks, as a storage that hangs does."""
    fifo = tmp_path / "error.log"
    os.mkfifo(fifo)
    quick = "from sid_ray.training import watchdog\nwatchdog.LAST_WORDS_SECONDS = 1.0\n"
    done = subprocess.run(
        [sys.executable, "-c", quick + HANGS, str(fifo)], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert done.returncode != 0 and "inner_ear" in done.stderr


def test_progress_and_a_closed_watchdog_end_nothing(tmp_path):
    dog = Watchdog(0.4, tmp_path / "error.log", "worker 0 of 1")
    for _ in range(8):
        with dog.watching():
            time.sleep(0.1)
    dog.close()
    with dog.watching():
        time.sleep(1.0)
    with Watchdog(None, tmp_path / "error.log", "worker 0 of 1").watching():
        time.sleep(0.1)
    assert not (tmp_path / "error.log").exists()
