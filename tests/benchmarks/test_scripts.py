"""The benchmark scripts run, and what they count is what theory says."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.compare import configuration
from benchmarks.modes import count_published
from benchmarks.plain import plain_iteration
from benchmarks.sharding import configuration as sharded
from benchmarks.sharding import on_ranks
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.bench import one_worker
from sid_ray.training.rehearsal import rehearse
from tests.launching import ROOT


def test_the_published_iteration_keeps_three_graphs_and_most_of_forty_bytes_a_parameter(tiny_teacher):
    """Four networks, two gradients, two moments each, all float32; an image adds the graphs of our mode `fast`."""
    network = load_denoiser(str(tiny_teacher))[0]
    parameters = sum(p.numel() for p in network.parameters())
    one, two = (count_published(configuration("digits", images, {}), network) for images in (64, 128))
    ours = rehearse(configuration("digits", 64, {}), network)
    assert (two - one) == pytest.approx(ours, rel=0.05)
    assert one - ours == pytest.approx(36 * parameters, abs=4 * parameters)


def test_the_step_without_engines_is_ours(tiny_teacher):
    """What engines are measured against computes the same."""
    config = configuration("digits", 4, {"teacher.path": str(tiny_teacher)})
    plain, (ours, networks, _) = plain_iteration(config), one_worker(config)
    for nimg in (0, 4):
        torch.testing.assert_close(torch.stack(plain(nimg)), torch.stack(ours(nimg)), rtol=1e-4, atol=1e-5)
    networks.destroy()


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_are_as_large_as_the_formula_says_and_volumes_as_theory_says():
    """Two ranks. Beside the formula there are DeepSpeed's buckets: at most some bytes a parameter of both networks."""
    rows = on_ranks(2, [sharded("digits", 2, 1, stage, "fp32") for stage in (0, 1, 2, 3)])
    for row in rows:
        assert row["formula"] <= row["kept"] * 1.02, row
    both = [2 * row["parameters"] * 4 for row in rows]
    assert rows[0]["bytes"]["allreduce_"] == pytest.approx(both[0], rel=0.05)
    sent = [row["sent"] for row in rows]
    assert sent[1] == pytest.approx(sent[0], rel=0.6)
    assert sent[3] > sent[2]


@pytest.mark.slow
def test_everything_for_a_gpu_runs_without_one(tmp_path):
    command = ["benchmarks/gpu.sh", str(tmp_path), "--device", "cpu", "--quick"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert all(isinstance(rows, list) and rows for rows in results.values())
    assert all("failed" not in row for rows in results.values() for row in rows)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in page for title in results) and "images/s" in page
