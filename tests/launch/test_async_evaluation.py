"""FID as a Ray task beside the run: the same figures as a plain process measures inline."""

import pytest
import yaml

from sid_ray.config import load_config
from sid_ray.training.board import read_metrics
from tests.launching import FEW, command
from tests.ranks import on_ranks

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def fids(run):
    return {row["nimg"]: row["fid/generator"] for row in read_metrics(run / "metrics.jsonl") if "fid/generator" in row}


def test_a_task_of_its_own_measures_the_same(tmp_path):
    """One worker and room for one more; and two workers on two CPUs, which have to measure themselves in the end."""
    often = {"evaluation.every_kimg": 0.64, "run.report_every_kimg": 0.128}
    options = [word for name, value in often.items() for word in (f"--{name}", str(value))]
    beside = ["distill", "digits", *FEW, *options, "--evaluation.mode", "async", "--cluster.use_gpu", "false"]
    one = command(*beside, "--cluster.workers", "1", "--run.name", "beside", cwd=tmp_path)
    assert one.returncode == 0, one.stdout + one.stderr
    two = command(*beside, "--cluster.workers", "2", "--run.name", "crowded", cwd=tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    overrides = {name.removeprefix("--"): value for name, value in zip(FEW[::2], FEW[1::2], strict=True)}
    inline = load_config("digits", overrides | often | {"run.name": "inline", "run.storage": str(tmp_path / "runs")})
    (tmp_path / "inline.yaml").write_text(yaml.safe_dump(inline.model_dump(mode="json")))
    on_ranks(1, "tests.job_worker", str(tmp_path / "inline.yaml"))
    expected = fids(tmp_path / "runs" / "inline")
    assert len(expected) > 4
    assert fids(tmp_path / "runs" / "beside") == pytest.approx(expected, rel=1e-6)
    assert fids(tmp_path / "runs" / "crowded") == pytest.approx(expected, rel=0.05)  # two workers round differently
    assert "no room for one more beside the workers" in two.stdout and "no room" not in one.stdout
