"""`sid-ray bench`: phases, figures, and that it needs no Ray and writes nothing."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from sid_ray.cli import app
from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training import phases
from sid_ray.training.bench import PHASES, BenchReport, Spread, bench, describe, matrix_peak
from sid_ray.training.communication import Communication
from sid_ray.training.distributed import join_world
from sid_ray.training.phases import Stopwatch, phase
from tests.launching import ROOT

SMALL = {"batch.size": 4, "engine.micro_batch": 2}


def test_a_phase_counts_without_those_within_it(monkeypatch):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    with Stopwatch() as stopwatch:
        sleep(100)  # in no phase
        with phase("outer"):
            sleep(1)
            with phase("inner"):
                sleep(10)
            sleep(2)
            with phase("inner"):
                sleep(20)
        with phase("outer"):
            sleep(4)
    with phase("outer"):
        sleep(1000)  # the stopwatch has stopped
    assert stopwatch.seconds == {"outer": 7, "inner": 30}


def test_a_phase_ends_with_an_error():
    with Stopwatch() as stopwatch:
        with pytest.raises(ZeroDivisionError), phase("broken"):
            raise ZeroDivisionError
        with phase("after"):
            pass
    assert set(stopwatch.seconds) == {"broken", "after"}


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7]) == Spread(median=7, low=7, high=7)


def test_collectives_are_counted_by_the_whole_tensor():
    join_world()
    with Communication() as communication:
        dist.all_reduce(torch.zeros(10))
        dist.all_reduce(torch.zeros(5, dtype=torch.bfloat16))
        dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(8))
    assert communication.calls == {"allreduce_": 2, "_allgather_base_": 1}
    assert communication.bytes == {"allreduce_": 50, "_allgather_base_": 32}
    assert communication.sent(2) == (2 * 50 + 32) / 2 and communication.sent(1) == 0


def test_a_report_adds_up(tiny_teacher):
    config = load_config("digits", SMALL | {"teacher.path": str(tiny_teacher), "engine.precision": "bf16"})
    report = bench(config, repetitions=3, warm_up=1)
    assert report is not None
    assert set(report.phases) == {*PHASES, "communication"}
    phases = sum(report.phases[name].median for name in PHASES)
    assert phases == pytest.approx(report.seconds.median, rel=0.5)
    assert all(report.phases[name].median > 0 for name in PHASES)
    assert report.images_per_second == pytest.approx(4 / report.seconds.median)
    assert report.flops_per_second == pytest.approx(report.flops / report.seconds.median)
    assert report.settings["precision"] == "bf16" and report.settings["micro_batch"] == 2
    assert report.communication["allreduce_"] > 0 and report.peak_memory > 1e8
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    text = describe(report)
    assert "score gradients" in text and "images/s" in text and "peak memory" in text


def test_recomputing_counts_as_work(tiny_teacher):
    config = load_config("digits", {"engine.activation_checkpointing": True, "method.memory": "minimal"})
    assert config.forwards == 13 + 4
    assert 1e8 < matrix_peak(torch.device("cpu"), torch.float32, 1) < 1e14


def test_the_command_needs_no_ray_and_writes_only_what_it_is_asked_to(tmp_path):
    """A random teacher is drawn, not written; a file that is there is not overwritten."""
    code = "import sys; sys.modules['ray'] = None; from sid_ray.cli import main; main()"
    sizes = ["--batch.size", "2", "--engine.micro_batch", "2", "--teacher.random", "true"]
    options = [*sizes, "--repeat", "1", "--warm-up", "0", "--json", "report.json", "--engine.precision", "bf16"]
    command = [sys.executable, "-c", code, "bench", "digits", *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "bf16_optimizer" not in done.stdout, "DeepSpeed's own lines"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["preset"] == "digits" and report["repetitions"] == 1
    with pytest.raises(UserError, match=r"--json: .* exists already"):
        app(["bench", "digits", "--json", str(tmp_path / "report.json")], standalone_mode=False)
