"""The benchmark scripts run, and what they count is what theory says."""

import json
import subprocess

import pytest
import torch

from benchmarks.compare import FP32, configuration
from benchmarks.modes import count_published
from benchmarks.plain import plain_iteration
from benchmarks.sharding import configuration as sharded
from benchmarks.sharding import on_ranks
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.bench import one_worker
from tests.launching import ROOT


def test_the_published_iteration_keeps_three_graphs_and_forty_bytes_a_parameter():
    """Four networks, two gradients, two moments each, all float32; each further image adds its graphs."""
    network = load_denoiser("builtin:digits")[0]
    parameters = sum(p.numel() for p in network.parameters())
    few, more = (count_published(configuration("digits", images, {}), network) for images in (1, 3))
    assert few > 40 * parameters
    assert (more - few) / 2 > 0.5 * few - 40 * parameters


def test_the_step_without_engines_is_ours():
    """What engines are measured against computes the same."""
    config = configuration("digits", 4, FP32)
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
    import os
    import sys

    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert all(isinstance(rows, list) and rows for rows in results.values())
    assert all("failed" not in row for rows in results.values() for row in rows)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in page for title in results) and "images/s" in page
