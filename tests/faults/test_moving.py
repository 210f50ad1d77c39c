"""Machines that come and go: the run grows, shrinks and moves, and the result is that of the run that stayed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import (
    checkpoints,
    cluster,
    environment,
    finish,
    job,
    launch,
    newest_told,
    undisturbed,
    wait_until,
)
from tests.training.test_worker import assert_same, end_state

pytestmark = [pytest.mark.ray, pytest.mark.faults]
LONG = [*job(1), "--run.total_kimg", "25.6", "--run.checkpoint_every_kimg", "2.56", "--evaluation.every_kimg", "25.6"]
"""200 iterations: long enough to come and go in."""
TWO = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}


@pytest.fixture(scope="module")
def stayed(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("stayed"), LONG)


def drain(address: str, node_id: str, seconds: int) -> None:
    """What a cloud does when it wants its spot machine back."""
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run(
        [ray, "drain-node", "--address", address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)],
        check=True, timeout=120, env=environment(**TWO),
    )  # fmt: skip


def test_a_range_of_workers_grows_without_loss_and_shrinks_to_the_last_checkpoint(stayed, tmp_path):
    run = tmp_path / "runs" / "digits"
    with cluster(cpus=1) as nodes:
        elastic = ["--cluster.workers", "1-2", "--cluster.resize_seconds", "2"]
        process = launch(tmp_path, [*LONG, *elastic], RAY_ADDRESS=nodes.address, **TWO)
        wait_until(lambda: bool(checkpoints(run)), process, "the first checkpoint")
        second = nodes.add_node(num_cpus=1)
        wait_until(lambda: worker_counts(run)[-1:] == [2], process, "two workers at work")
        at_two = checkpoints(run)[-1]
        wait_until(lambda: checkpoints(run)[-1] > at_two, process, "a checkpoint of two workers")
        nodes.remove_node(second, allow_graceful=False)
        told = newest_told(run)
        output = finish(process)
    assert "1 worker(s) at work of up to 2" in output and "\n2 worker(s) at work\n" in output, output
    assert "there is room for more workers: the workers left with a checkpoint" in output
    assert "restarting from nimg-" in output and worker_counts(run) == [1, 2, 1]
    assert told - at_two <= 2560 + 2560
    # Sums over two workers round differently; Adam amplifies that over 200 iterations.
    assert_same(end_state(run), end_state(stayed), tolerance=2e-3)


def test_a_drained_node_is_left_with_a_checkpoint_and_nothing_is_repeated(stayed, tmp_path):
    run = tmp_path / "runs" / "digits"
    with cluster(cpus=1) as nodes:
        spot = nodes.add_node(num_cpus=1)
        process = launch(tmp_path, LONG, RAY_ADDRESS=nodes.address, **TWO)
        wait_until(lambda: bool(checkpoints(run)), process, "the first checkpoint")
        nodes.add_node(num_cpus=1)
        drain(nodes.address, spot.node_id, 120)
        output = finish(process)
    assert "a machine is being taken away: the workers left with a checkpoint at" in output, output
    assert "failure" not in output
    assert_same(end_state(run), end_state(stayed))


def worker_counts(run: Path) -> list[int]:
    """How many workers wrote each checkpoint, without repetitions, oldest first."""
    counts = [
        len(list(p.glob("generator-*.safetensors")))
        for p in sorted(run.glob("checkpoints/nimg-*"))
        if (p / "complete.json").exists()
    ]
    return [count for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]
