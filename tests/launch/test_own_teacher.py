"""The documented example of a teacher of one's own, as a user runs it: handed over in Python, and named on the
command line, each on a real Ray cluster with fewer images."""

import shutil
import subprocess
import sys

import pytest

from sid_ray.config import load_config
from sid_ray.errors import UserError
from tests.launching import ROOT, command
from tests.own_networks import Plain, teacher

pytestmark = pytest.mark.ray
SHORT = {
    "init.fit_kimg": 2.56, "run.total_kimg": 2.56, "evaluation.num_images": 200, "evaluation.confirmations": 0,
    "run.report_every_kimg": 1.28, "run.checkpoint_every_kimg": 1.28,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A copy of the example with a short configuration."""
    for name in ("mixture.py", "mixture.yaml"):
        shutil.copy(ROOT / "docs" / "examples" / name, tmp_path)
    path = tmp_path / "mixture.yaml"
    path.write_text(load_config(str(path), SHORT).to_yaml())
    return tmp_path


def test_objects_handed_over_by_a_program(folder):
    """Its classes live in the program's own `__main__`; the workers get them by value."""
    done = subprocess.run([sys.executable, "mixture.py"], cwd=folder, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "student: 2.6 of 2.56 kimg of its fit" in done.stdout
    run = folder / "runs" / "mixture-from-python"
    config = load_config(str(run / "config.yaml"))
    assert config.teacher.path.startswith("module:GaussianMixture-") and config.init.student == "module:PointMLP"
    assert list((run / "samples").glob("*.png")) and (run / "generator" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_command_line_with_names_of_code(folder):
    """Run, resume to twice the length, sample; a network is never imported because a file names it."""
    done = command("distill", "mixture.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    done = command("distill", "mixture.yaml", "--run.total_kimg", "5.12", cwd=folder)
    assert done.returncode == 0 and "resuming" in done.stdout and "student:" not in done.stdout, done.stdout
    model = "runs/mixture/generator"
    refused = command("generate", model, cwd=folder)
    assert refused.returncode == 2 and "--network python:mixture:student" in refused.stderr
    network = ("--network", "python:mixture:student")
    done = command("generate", model, *network, "--out", "points.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    measured = ("--features", "points", "--reference", "runs/mixture/reference.npz", "--num", "200")
    done = command("evaluate", model, *network, *measured, cwd=folder)
    assert done.returncode == 0 and "FID" in done.stdout, done.stderr


def test_what_cannot_run_is_refused_before_anything_starts(folder, monkeypatch):
    from sid_ray import distill

    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"init.student: is required"):
        distill("mixture.yaml", {"init.student": None}, teacher=teacher())
    with pytest.raises(UserError, match="image_shape"):
        distill("mixture.yaml", teacher=teacher(), student=Plain())
    with pytest.raises(UserError, match=r"teacher: int is not a torch.nn.Module"):
        distill("mixture.yaml", teacher=3)
    with pytest.raises(UserError, match=r"evaluation.teacher_steps: 0 makes no samples"):
        distill("mixture.yaml", {"evaluation.teacher_steps": 0})
    with pytest.raises(UserError, match=r"evaluation.features: 'digits' looks at images"):
        distill("mixture.yaml", {"evaluation.features": "digits"})
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before
