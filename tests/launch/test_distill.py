"""The main job as a user runs it: the command line, on a real Ray cluster, with real signals."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.launching import SHORT, command, start
from tests.training.test_worker import assert_same, end_state

pytestmark = pytest.mark.ray


def wait_for_checkpoint(run, process):
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/nimg-*/complete.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dashboard_addresses(process):
    """Where the dashboards of a job's cluster listen."""
    children = psutil.Process(process.pid).children(recursive=True)
    dashboards = [child for child in children if any("dashboard.py" in word for word in child.cmdline())]
    return {c.laddr.ip for child in dashboards for c in child.net_connections() if c.status == psutil.CONN_LISTEN}


def test_a_run_says_what_it_does_and_leaves_what_it_promises(whole):
    folder, output = whole
    for word in ("2 worker(s) on CPU", "kimg", "images/s", "ETA", "FID", "FID of the teacher", "sid-ray generate"):
        assert word in output, word
    run = folder / "runs" / "digits"
    for name in ("config.yaml", "metrics.jsonl", "fid.png", "generator/model.safetensors", "generator/README.md"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*")) and list((run / "samples").glob("*.png"))
    assert not list(run.rglob("*.pt")) and not list((run / "checkpoints").rglob("*.pkl"))


def test_the_generator_can_be_used(whole, tmp_path):
    from sid_ray import load_generator

    model = str(whole[0] / "runs" / "digits" / "generator")
    images = load_generator(model).sample(4, seed=1, class_labels=[0, 1, 2, 3])
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all() and images.abs().max() < 2
    for out in ("grid.png", "images.npz", "folder"):
        done = command("generate", model, "--num", "9", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = command("generate", model, "--num", "9", "--out", out, cwd=tmp_path)
        assert again.returncode == 2 and "exists already" in again.stderr
    assert len(list((tmp_path / "folder").glob("*.png"))) == 9
    done = command("evaluate", model, "--num", "200", "--trials", "2", cwd=tmp_path)
    assert done.returncode == 0 and "FID" in done.stdout and "mean" in done.stdout and "±" in done.stdout


def test_sigkill_of_the_driver_then_the_same_command_is_bitwise(whole, tmp_path):
    process = start(*SHORT, cwd=tmp_path)
    run = tmp_path / "runs" / "digits"
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # Ray's processes notice that their driver is gone
    assert not (run / "summary.json").exists(), "the run was over before it was killed"
    done = command(*SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming" in done.stdout
    assert_same(end_state(run), end_state(whole[0] / "runs" / "digits"))


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(whole, tmp_path):
    process = start(*SHORT, cwd=tmp_path)
    run = tmp_path / "runs" / "digits"
    wait_for_checkpoint(run, process)
    assert dashboard_addresses(process) <= {"127.0.0.1", "::1"}
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopping" in output and "(resumes)" in output, output
    assert not (run / "summary.json").exists()
    done = command(*SHORT, cwd=tmp_path)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    assert_same(end_state(run), end_state(whole[0] / "runs" / "digits"))
    once_more = command(*SHORT, cwd=tmp_path)
    assert once_more.returncode == 0 and "resuming" not in once_more.stdout  # nothing left to do: only the summary


def test_a_failing_worker_is_one_readable_message(tmp_path, job):
    """The teacher's weights vanish between the driver's checks and the workers' start."""
    from sid_ray.errors import UserError
    from sid_ray.launch import trainer
    from sid_ray.training.opening import open_run

    source = Path(trainer.load_config(job("x")).teacher.path)
    copy = tmp_path / "teacher"
    shutil.copytree(source, copy)
    config = trainer.load_config(job("fails", teacher__path=str(copy)))
    open_run(config)
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"teacher\.path: .*does not hold the weights"):
        trainer.distill(config, quiet=True)
    import ray

    ray.shutdown()


BAD = [
    (["distill", "digit"], "did you mean 'digits'"),
    (["distill", "digits", "--method.alpha", "abc"], "method.alpha: 'abc' is not allowed"),
    (["distill", "digits", "--teacher.path", "nowhere"], "nowhere' is not a model directory"),
    (["distill", "digits", "--run.storage", "/proc/none"], "run.storage: '/proc/none' cannot be written"),
    (["distill", "digits", "--run.storage", "gs://bucket/x"], "allowed: a folder, or s3://bucket/prefix"),
    (["distill", "digits", "--evaluation.reference", "none.npz"], "none.npz' is not a file"),
    (["distill", "digits", "--evaluation.features", "vgg"], "allowed: digits"),
    (["distill", "digits", "--method.augment", "2"], "method.augment: 2 is not allowed"),
    (["generate", "nowhere"], "nowhere' is not a model directory"),
    (["generate", "builtin:digits"], "holds a teacher, not a one-step generator"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_ends_with_code_2_and_starts_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    from sid_ray.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sid-ray", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == []


def test_another_configuration_is_refused_and_nothing_is_overwritten(whole, monkeypatch, capsys):
    from sid_ray.cli import main

    run = whole[0] / "runs" / "digits"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    monkeypatch.chdir(whole[0])
    monkeypatch.setattr(sys, "argv", ["sid-ray", *SHORT, "--method.alpha", "1.0"])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "method.alpha: 1.2 -> 1.0" in error and "--run.name" in error
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_dry_run_and_presets_start_nothing(tmp_path):
    done = command("distill", "digits", "--dry-run", "--batch.size", "256", cwd=tmp_path)
    assert done.returncode == 0 and "size: 256" in done.stdout and "nothing was started" in done.stdout
    assert "digits" in command("presets", cwd=tmp_path).stdout
    assert "alpha: 1.2" in command("presets", "show", "digits", cwd=tmp_path).stdout
    assert os.listdir(tmp_path) == []


def test_checkpoints_hold_only_safetensors_and_json(whole):
    checkpoint = next((whole[0] / "runs" / "digits" / "checkpoints").glob("nimg-*"))
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json"}
    assert all(t.dtype == torch.float32 for t in end_state(whole[0] / "runs" / "digits").values())
