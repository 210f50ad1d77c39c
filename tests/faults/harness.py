"""One fault in one run, started as a user starts it, and what came of it against the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sid_ray.training.board import read_metrics
from tests.launching import ROOT, SHORT
from tests.training.test_worker import assert_same, end_state

STAGES = (1, 2, 3)
BATCH = 128
TIMEOUT = 1200
HANG_SECONDS = 20
"""The hang timeout of these runs; an iteration takes a fraction of a second, the first one a few."""
HANG = ["--cluster.hang_timeout_seconds", str(HANG_SECONDS)]
IN_WORKER = {
    "worker 1 killed": {"kind": "kill"},
    "worker 0 killed": {"kind": "kill", "rank": 0},
    "exception": {"kind": "exception"},
    "hang": {"kind": "hang"},
    "stopped process": {"kind": "freeze"},
    "SIGTERM to a worker": {"kind": "terminate"},
}
"""Faults that happen in a worker: how `tests.faults.inject` calls them."""
FAULTS = (*IN_WORKER, "driver killed", "node lost")
LOSES_NOTHING = ("SIGTERM to a worker",)


@dataclass
class Cell:
    """The result of one fault at one stage."""

    fault: str
    stage: int
    lost_images: int
    """Images whose training was repeated."""
    seconds: float
    output: str


def environment(**more: str) -> dict[str, str]:
    """The environment of a job: its own Ray cluster unless `RAY_ADDRESS` is given."""
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"} | more


def launch(
    folder: Path, arguments: list[str], plan: dict[str, Any] | None = None, log: Path | None = None, **env: str
) -> subprocess.Popen[str]:
    """Start the job in a folder; its output goes to a pipe, or to the end of `log`."""
    program = ["-m", "sid_ray"] if plan is None else ["-m", "tests.faults.inject", json.dumps(plan)]
    with open(log or os.devnull, "a") as file:
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=folder, env=environment(**env), text=True,
            stdout=file if log else subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    """Its output, when it has ended well."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output
    return output


def job(stage: int) -> list[str]:
    """The arguments of the short digits job at a ZeRO stage."""
    return [*SHORT, "--engine.zero_stage", str(stage)]


def undisturbed(folder: Path, arguments: list[str]) -> Path:
    """The run directory of an undisturbed run."""
    folder.mkdir(parents=True, exist_ok=True)
    finish(launch(folder, arguments))
    return folder / "runs" / "digits"


def run_cell(fault: str, stage: int, folder: Path, whole: Path) -> Cell:
    """Run the job with the fault; AssertionError unless it ends bitwise as the undisturbed run `whole` did."""
    folder.mkdir(parents=True, exist_ok=True)
    run, started = folder / "runs" / "digits", time.monotonic()
    if fault in IN_WORKER:
        plan = {"checkpoints": 1} | IN_WORKER[fault]
        output = finish(launch(folder, [*job(stage), *HANG], plan))
        record = json.loads((run / "fault.json").read_text())
        lost = record["nimg"] - restarted_from(output)
    elif fault == "driver killed":
        output, lost = _kill_driver(folder, run, stage)
    else:
        output, lost = _lose_node(folder, run, stage)
    assert_same(end_state(run), end_state(whole))
    rows = [row["nimg"] for row in read_metrics(run / "metrics.jsonl") if "loss/generator" in row]
    assert rows == sorted(set(rows)), "metrics.jsonl tells something twice"
    assert set(rows) == {row["nimg"] for row in read_metrics(whole / "metrics.jsonl") if "loss/generator" in row}
    checkpoint_every = 640
    limit = 0 if fault in LOSES_NOTHING else checkpoint_every + BATCH
    assert lost <= limit, f"{lost} images were lost:\n{output}"
    return Cell(fault, stage, max(lost, 0), time.monotonic() - started, output)


def restarted_from(output: str) -> int:
    """The image count from which a run went on after a loss, as its terminal says."""
    found = re.search(r"restarting from nimg-0*(\d+)", output)
    if found:
        return int(found[1])
    moved = re.search(r"left with a checkpoint at ([\d.]+) kimg", output)
    assert moved, f"the run did not say that it went on:\n{output}"
    return round(float(moved[1]) * 1000)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Poll until it is so; AssertionError if the job ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not true():
        assert process.poll() is None, (
            f"the job ended before {what}:\n{process.stdout.read() if process.stdout else ''}"
        )
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def checkpoints(run: Path) -> list[int]:
    """Image counts of the complete checkpoints, oldest first."""
    return sorted(int(p.parent.name.removeprefix("nimg-")) for p in run.glob("checkpoints/nimg-*/complete.json"))


def newest_told(run: Path) -> int:
    """The last image count in metrics.jsonl."""
    return max((row["nimg"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def _wait_past_a_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    """Until there is something to lose: a report after the first checkpoint."""
    wait_until(lambda: bool(checkpoints(run)), process, "a checkpoint")
    first = checkpoints(run)[0]
    wait_until(lambda: newest_told(run) > first, process, "a report after the first checkpoint")


def _kill_driver(folder: Path, run: Path, stage: int) -> tuple[str, int]:
    process = launch(folder, job(stage))
    _wait_past_a_checkpoint(run, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # its workers notice
    assert not (run / "summary.json").exists(), "the run was over before its driver was killed"
    lost = newest_told(run) - checkpoints(run)[-1]
    again = finish(launch(folder, job(stage)))
    assert "resuming" in again
    return again, lost


def _lose_node(folder: Path, run: Path, stage: int) -> tuple[str, int]:
    with cluster(cpus=1) as nodes:
        second = nodes.add_node(num_cpus=1)
        process = launch(folder, job(stage), RAY_ADDRESS=nodes.address)
        _wait_past_a_checkpoint(run, process)
        nodes.remove_node(second, allow_graceful=False)
        told = newest_told(run)
        nodes.add_node(num_cpus=1)
        output = finish(process)
    return output, told - restarted_from(output)


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """A Ray cluster of several nodes on this machine; the head, where the driver runs, has `cpus`."""
    from ray.cluster_utils import Cluster

    settings = environment(RAY_AUTH_MODE="disabled", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    before = dict(os.environ)
    os.environ.update(settings)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        yield nodes
    finally:
        nodes.shutdown()
        os.environ.clear()
        os.environ.update(before)
