"""`sid-ray sweep` as a user runs it, on a real Ray cluster: stopped trials, a failing one, SIGKILL, and going on."""

import json
import time

import pytest

from sid_ray.config import load_config
from tests.launching import command, start

pytestmark = pytest.mark.ray
SPACE = """\
description: Learning rates of the tests.
preset: {preset}
budget_kimg: 0.192
search: grid
settings:
  cluster.workers: 1
  evaluation.every_kimg: 0.024
  evaluation.num_images: 20
  guard.fid_patience: 1
  guard.fid_factor: 1.3
  run.sample_every_kimg: 10
  run.checkpoint_every_kimg: 0.048
power_law: false
fields:
  optimizer.generator_lr: [1.0e-4, 0.9, 2.0e-4]
"""


def states(sweep):
    return {p.stem: json.loads(p.read_text())["state"] for p in sweep.glob("journal/*.json")}


def curves(sweep):
    return {p.stem: json.loads(p.read_text())["curve"] for p in sweep.glob("journal/*.json")}


@pytest.fixture
def space(tmp_path, job):
    """A space of three trials of a tiny teacher, whose second diverges."""
    (tmp_path / "rates.yaml").write_text(SPACE.format(preset=job("base")))
    return tmp_path / "rates.yaml"


def test_a_sweep_killed_half_way_ends_with_the_same_trials(space, tmp_path):
    sweep = tmp_path / "runs" / "sweep-rates"
    process = start("sweep", "rates.yaml", cwd=tmp_path)
    deadline = time.monotonic() + 400
    while "running" not in states(sweep).values() or not any(len(c) > 2 for c in curves(sweep).values()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    known = curves(sweep)

    done = command("sweep", "rates.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming sweep in runs/sweep-rates" in done.stdout and "goes on: generator_lr" in done.stdout
    assert states(sweep) == {"t000": "finished", "t001": "diverged", "t002": "finished"}
    now = curves(sweep)
    for name, curve in known.items():  # what had been measured is measured again as it was, or stands
        assert [point for point in now[name] if point[0] <= curve[-1][0]] == curve, name
    assert now["t000"][-1][0] == now["t002"][-1][0] == 192 > now["t001"][-1][0]
    for name in ("report.md", "curves.png", "fields.png", "compute.png", "best/samples.png", "best/model.safetensors"):
        assert (sweep / name).is_file(), name
    best = load_config(str(sweep / "best.yaml"))
    assert best.optimizer.generator_lr in (1e-4, 2e-4) and best.run.total_kimg == 0.096
    for name in states(sweep):
        assert list((sweep / "trials" / name / "tensorboard").glob("events*")), name
    assert list((sweep / "trials" / "t001" / "tensorboard").glob("*.hparams"))

    again = command("sweep", "rates.yaml", cwd=tmp_path)
    assert again.returncode == 0 and "3 of 3 runs ended" in again.stdout and "starts" not in again.stdout
    changed = command("sweep", "rates.yaml", "--method.alpha", "0.5", cwd=tmp_path)
    assert changed.returncode == 2 and "method.alpha: 1.2 -> 0.5" in changed.stderr


@pytest.mark.slow
def test_a_failing_trial_does_not_end_the_sweep_and_ctrl_c_leaves_a_checkpoint(space, tmp_path):
    import signal

    text = space.read_text().replace("  optimizer.generator_lr: [1.0e-4, 0.9, 2.0e-4]", "  batch.size: [16, 6, 32]")
    text = text.replace("budget_kimg: 0.192", "budget_kimg: 1.92")
    space.write_text(text)
    refused = command("sweep", "rates.yaml", cwd=tmp_path)
    assert refused.returncode == 2 and "rates.yaml:15: fields.batch.size: batch.size: 6" in refused.stderr
    space.write_text(text.replace("[16, 6, 32]", "[16, 32]"))
    sweep = tmp_path / "runs" / "sweep-rates"
    process = start("sweep", "rates.yaml", "--cluster.max_failures", "0", cwd=tmp_path)
    deadline = time.monotonic() + 400
    while not any(len(c) > 3 for c in curves(sweep).values()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "the same command again" in output and set(states(sweep).values()) == {"running"}
    for run in (sweep / "trials").iterdir():
        newest = max(int(p.parent.name.removeprefix("nimg-")) for p in run.glob("checkpoints/*/complete.json"))
        assert newest >= curves(sweep)[run.name][-1][0] - 32
    (sweep / "trials" / "t000" / "config.yaml").write_text("teacher: {path: gone}\n")  # damage one trial's run
    done = command("sweep", "rates.yaml", "--cluster.max_failures", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(sweep) == {"t000": "failed", "t001": "finished"} and "t000 failed: " in done.stdout


@pytest.mark.slow
def test_a_sweep_on_s3(space, bucket, tmp_path):
    from sid_ray import load_generator
    from sid_ray.storage.s3 import S3Folder

    storage = f"s3://{bucket}/sweeps"
    done = command("sweep", "rates.yaml", "--run.storage", storage, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    there = S3Folder(f"{storage}/sweep-rates").objects()
    for name in ("sweep.yaml", "report.md", "best.yaml", "curves.png", "best/model.safetensors", "journal/t001.json"):
        assert name in there, name
    assert any(name.startswith("trials/t001/tensorboard/") and name.endswith(".hparams") for name in there)
    assert load_generator(f"{storage}/sweep-rates/best").sample(1).shape == (1, 1, 8, 8)
    assert "lease.json" not in there and not (tmp_path / "runs").exists()
