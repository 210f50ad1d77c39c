"""Runs whose teacher and student are the user's own modules: the fit, resume, workers, stages, and the 2-D mixture."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.evaluation.statistics import load_reference
from sid_ray.teachers.model_directory import read_model_config
from sid_ray.teachers.sources import load_generator
from sid_ray.training.opening import open_run
from tests.launching import ROOT
from tests.own_networks import LabelledMLP, teacher
from tests.ranks import on_ranks
from tests.training.test_worker import assert_same, end_state

pytestmark = pytest.mark.distributed

OWN = {
    "teacher__path": "python:tests.own_networks:teacher",
    "init__student": "python:tests.own_networks:student",
    "init__fit_kimg": 0.32,
    "evaluation__features": "pixels",
    "evaluation__reference": "teacher",
}
EXAMPLE = ROOT / "docs" / "examples"


@pytest.mark.parametrize(
    "variants",
    [
        [(1, "fp32"), (3, "bf16")],
        pytest.param([(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")], marks=pytest.mark.slow),
    ],
    ids=["corners", "matrix"],
)
def test_resume_is_bitwise_and_fits_once(job, variants):
    """6 iterations in one go, and as 3 + 3 in two processes that share one fit; on two workers, with dropout."""
    names = {f"{precision}-stage{stage}": {"engine__zero_stage": stage, "engine__precision": precision} | OWN
             for stage, precision in variants}  # fmt: skip
    whole = [job(f"whole-{n}", **o) for n, o in names.items()]
    parts = [job(f"parts-{n}", run__total_kimg=0.048, **o) for n, o in names.items()]
    first = on_ranks(2, "tests.job_worker", *whole, *parts)
    assert "student: 0.3 of 0.32 kimg of its fit" in first
    fitted = {n: (job.runs / f"parts-{n}" / "student.safetensors").read_bytes() for n in names}
    references = {n: (job.runs / f"parts-{n}" / "reference.npz").read_bytes() for n in names}
    again = on_ranks(2, "tests.job_worker", *(job(f"parts-{n}", **o) for n, o in names.items()))
    assert "student:" not in again
    for name in names:
        assert (job.runs / f"parts-{name}" / "student.safetensors").read_bytes() == fitted[name]
        assert (job.runs / f"parts-{name}" / "reference.npz").read_bytes() == references[name]
        assert_same(end_state(job.runs / f"parts-{name}"), end_state(job.runs / f"whole-{name}"))


def test_workers_share_the_fit_the_reference_and_the_images(job):
    """One and two workers: the same student, the same reference statistics, the same run."""
    for ranks in (1, 2):
        on_ranks(ranks, "tests.job_worker", job(f"on{ranks}", **OWN))
    one, two = job.runs / "on1", job.runs / "on2"
    alone, shared = load_file(one / "student.safetensors"), load_file(two / "student.safetensors")
    assert alone.keys() == shared.keys() == LabelledMLP().state_dict().keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=0, atol=1e-5)
    first, second = load_reference(one / "reference.npz"), load_reference(two / "reference.npz")
    assert first.num == second.num == 20 and first.features == "pixels"
    torch.testing.assert_close(torch.from_numpy(second.sigma), torch.from_numpy(first.sigma), rtol=1e-4, atol=1e-6)
    assert_same(end_state(two), end_state(one), tolerance=1e-4)


def test_the_fit_approaches_the_teacher_and_the_run_tells_where_its_generator_comes_from(job):
    on_ranks(1, "tests.job_worker", job("fit", **(OWN | {"init__fit_kimg": 8, "teacher__licence": "mine"})))
    run = job.runs / "fit"
    fitted, untrained = LabelledMLP().eval(), LabelledMLP().eval()
    fitted.load_state_dict(load_file(run / "student.safetensors"))
    clean = teacher().sample(500, class_labels=[0, 1] * 250)
    labels = torch.eye(2)[[0, 1] * 250]
    noised = clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target, levels = teacher()(noised, 0.5, labels), torch.full((500,), 0.5)
        errors = [(net(noised, levels, labels) - target).square().mean() for net in (untrained, fitted)]
    assert errors[1] < 0.5 * errors[0]
    config = read_model_config(str(run / "generator"))
    assert config.licence == "mine" and config.provenance["teacher"] == OWN["teacher__path"]
    assert config.network["factory"] == OWN["init__student"] and config.network["class_name"] == "LabelledMLP"
    assert "network=LabelledMLP(...)" in (run / "generator" / "README.md").read_text()
    with pytest.raises(UserError, match="code of yours"):
        load_generator(str(run / "generator"))
    assert load_generator(str(run / "generator"), LabelledMLP()).sample(2).shape == (2, 1, 2, 2)


def test_a_warm_start_from_a_former_run_of_own_networks(job):
    """Both networks warm: nothing is fitted, and the generator starts as the former run's best one."""
    on_ranks(1, "tests.job_worker", job("former", **OWN))
    former = str(job.runs / "former" / "generator")
    warm = {"init__generator": former, "init__fake_score": former, "optimizer__generator_lr": 1e-9}
    output = on_ranks(1, "tests.job_worker", job("warm", **(OWN | warm)))
    assert "student:" not in output and not (job.runs / "warm" / "student.safetensors").exists()
    expected = load_file(job.runs / "former" / "generator" / "model.safetensors")
    for name, tensor in load_file(job.runs / "warm" / "generator" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_another_student_or_teacher_is_another_run(job):
    on_ranks(1, "tests.job_worker", job("own", run__total_kimg=0.016, **OWN))
    for change in ({"init__student": None}, {"init__fit_kimg": 1}, {"evaluation__reference": "builtin:digits"}):
        with pytest.raises(UserError):
            open_run(load_config(job("own", **(OWN | change))))


def example(tmp_path, **overrides):
    """The documented example's configuration, with runs in a folder of the test's; returns it and its file."""
    config = load_config(str(EXAMPLE / "mixture.yaml"), {"run.storage": str(tmp_path), **overrides})
    path = tmp_path / "mixture.yaml"
    path.write_text(config.to_yaml())
    return config, path


def test_sid_distils_the_mixture_with_all_its_modes(tmp_path):
    """The science test of the method: eight modes, one step, a plain process on one core, nothing but the teacher."""
    sys.path.append(str(EXAMPLE))
    import mixture

    config, path = example(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "sid_ray.training.worker", str(path)],
        cwd=EXAMPLE, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}, text=True, capture_output=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "mixture"
    exact, generator = mixture.teacher(), load_generator(str(run / "generator"), network=mixture.PointMLP())
    points = generator.sample(4000, seed=123).flatten(1).double()
    distance, nearest = torch.cdist(points, exact.means).min(1)
    inside = distance < 3 * 0.1
    shares = 8 * torch.bincount(nearest[inside], minlength=8) / 4000
    assert float(inside.double().mean()) >= 0.9, done.stdout
    assert ((shares > 0.5) & (shares < 2)).all(), shares
    start = mixture.PointMLP()
    start.load_state_dict(load_file(run / "student.safetensors"))
    with torch.no_grad():
        z = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        before = start(z * config.method.sigma_init, torch.full((4000,), config.method.sigma_init)).flatten(1)
    assert float((torch.cdist(before.double(), exact.means).min(1).values < 0.3).double().mean()) < 0.5
    assert math.isfinite(load_reference(run / "reference.npz").mu.sum())
    assert (run / "samples" / f"nimg-{config.total_nimg:012d}.png").read_bytes().startswith(b"\x89PNG")
