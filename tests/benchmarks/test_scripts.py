"""The benchmark scripts run, and what they count is what theory says."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import checkpoints, fid
from benchmarks.compare import configuration
from benchmarks.modes import count_published
from benchmarks.plain import plain_iteration
from benchmarks.ranks import on_ranks
from benchmarks.sharding import configuration as sharded
from benchmarks.sharding import measure
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


def test_the_fid_of_the_untrained_generator_is_that_of_its_record():
    """2,000 images, as `sid-ray teach` measured it; the batch and bf16 change little."""
    row = fid.measure("builtin:digits", 2000, batch=500)
    assert row["FID fp32"] == pytest.approx(86.030, abs=0.01)
    assert row["FID bf16"] == pytest.approx(row["FID fp32"], rel=0.02)
    assert row["FID bf16"] != row["FID fp32"]


def test_checkpoints_are_written_and_timed_both_ways():
    row = checkpoints.measure(1, sharded("digits", 1, 1, 1, "fp32"), 1)
    ways = {f"{what} {how}" for what in ("checkpoint", "average") for how in ("together", "apart")}
    assert row["seconds"].keys() == ways and min(row["seconds"].values()) > 0
    assert f"| 1 | {row['parameters'] / 1e6:.2f} M | 1 |" in checkpoints.table([row])[-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_are_as_large_as_the_formula_says_and_volumes_as_theory_says():
    """Two ranks, float32. The formula is of the peak, and so somewhat above what is kept after a step."""
    jobs = [sharded("digits", 2, 1, stage, "fp32") for stage in range(4)]
    rows = {row["stage"]: row for row in on_ranks(2, measure, jobs)}
    for row in rows.values():
        assert 0 <= (row["formula"] - row["kept"]) / row["parameters"] <= 16, row
    whole = 2 * 4 * rows[0]["parameters"]
    assert rows[0]["bytes"]["allreduce_"] == pytest.approx(whole, rel=0.05)
    assert rows[0]["sent"] == pytest.approx(whole, rel=0.05)  # there and back, half of it each
    assert rows[3]["sent"] > rows[1]["sent"] >= 0.95 * whole


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
