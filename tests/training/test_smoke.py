"""Smoke tests of a user: a random teacher, no FID, the full size of every preset."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.launch.console import cautions, print_summary
from sid_ray.teachers.model_directory import read_model_config
from sid_ray.teachers.public import public_teacher
from sid_ray.teachers.sources import load_generator
from sid_ray.training.checkpoints import complete_checkpoints, read_network, read_progress
from sid_ray.training.opening import open_run
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
NO_FID = {"evaluation.num_images": 0, "run.sample_images": 0}


def test_random_teacher_without_fid_and_with_class_weights(job, tiny_teacher, capsys):
    """One run, resumed: labelled everywhere, measured nowhere, and its generator draws only what it learned."""
    settings = {"teacher__random": True, "evaluation__num_images": 0, "method__class_weights": [0, 0, 1] + [0] * 7}
    on_ranks(1, "tests.job_worker", job("smoke", run__total_kimg=0.048, **settings))
    run = RunDirectory(job.runs / "smoke")
    teacher = (run.teacher / "model.safetensors").read_bytes()
    path = job("smoke", **settings)
    on_ranks(1, "tests.job_worker", path)
    assert read_progress(complete_checkpoints(run.checkpoints)[0]).nimg == 96
    assert (run.teacher / "model.safetensors").read_bytes() == teacher

    for directory in (run.teacher, run.generator):
        config = read_model_config(str(directory))
        assert config.provenance["random_teacher"] is True and config.licence == "none: random weights"
        assert "RANDOM TEACHER" in (directory / "README.md").read_text()
    random, trained = load_file(run.teacher / "model.safetensors"), load_file(tiny_teacher / "model.safetensors")
    assert random.keys() == trained.keys()
    assert not torch.equal(random["model.map_layer0.weight"], trained["model.map_layer0.weight"])

    summary = Progress.model_validate_json(run.summary.read_text())
    assert summary.fid is summary.best_fid is summary.teacher_fid is None and summary.best_nimg == 96
    assert "FID was not measured" in (run.generator / "README.md").read_text()
    assert not run.fid_plot.exists() and (run.samples / "nimg-000000000096.png").is_file()
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert rows and not any("fid" in key for row in rows for key in row)

    config = load_config(path)
    assert len(cautions(config)) == 2 and cautions(load_config("digits")) == []
    print_summary(run, summary, config)
    shown = capsys.readouterr().out
    assert "RANDOM TEACHER" in shown and "FID IS NOT MEASURED" in shown and "best FID" not in shown

    generator = load_generator(str(run.generator))
    assert generator.class_weights == [0, 0, 1] + [0] * 7
    assert torch.equal(generator.sample(4), generator.sample(4, class_labels=[2] * 4))


def test_a_random_teacher_is_a_function_of_the_seed(job, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run, _ = open_run(load_config(job(name, teacher__random=True, run__seed=seed)))
        weights.append(load_file(run.teacher / "model.safetensors")["model.map_layer0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(UserError, match=r"teacher\.random: true needs a teacher\.path of known architecture"):
        open_run(load_config(job("d", teacher__random=True, teacher__path=str(tmp_path / "unknown.pkl"))))
    assert not (job.runs / "d").exists()


@pytest.mark.parametrize("weights", [[1.0] * 9, [1.0] * 11])
def test_class_weights_must_fit_the_teacher(job, weights):
    with pytest.raises(UserError, match=rf"method\.class_weights: {len(weights)} numbers .* allowed: a list of 10"):
        open_run(load_config(job("wrong", method__class_weights=weights)))
    assert not (job.runs / "wrong").exists()


def available_memory():
    """Bytes that can be had now."""
    (line,) = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


LEAN = {"engine.precision": "fp32", "engine.zero_stage": 0}
FULL_SIZE = [
    ("cifar10-uncond", {}),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("cifar10-cond", "ffhq64", "afhqv2-64")),
    pytest.param("imagenet64", LEAN, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "engine"), FULL_SIZE)
def test_a_preset_runs_at_full_size(name, engine, tmp_path):
    """One iteration of one image from a random teacher, in the preset's own precision and stage if memory allows."""
    public = public_teacher(load_config(name).teacher.path)
    needed = (67 if engine else 85) * public.parameters + 0.6e9  # at the peak; docs/results/presets.md
    if available_memory() < needed:
        pytest.skip(f"{name} needs {needed / 1e9:.1f} GB")
    shorter = {"teacher.random": True, "batch.size": 1, "engine.micro_batch": 1, "run.total_kimg": 0.001}
    config = load_config(name, NO_FID | engine | shorter | {"run.storage": str(tmp_path)})
    file = tmp_path / "job.yaml"
    file.write_text(config.to_yaml())
    on_ranks(1, "tests.job_worker", str(file), timeout=1200)
    run = RunDirectory.of(config)
    checkpoint = complete_checkpoints(run.checkpoints)[0]
    progress = read_progress(checkpoint)
    assert (progress.nimg, progress.generator_steps, progress.fake_score_steps) == (1, 1, 1)
    teacher = load_file(run.teacher / "model.safetensors")
    assert sum(t.numel() for k, t in teacher.items() if "resample_filter" not in k) == public.parameters
    for role in ("generator", "fake_score"):
        state = read_network(checkpoint, role)
        assert all(tensors["weight"].isfinite().all() for tensors in state.values())
        changed = [k for k in state if not torch.equal(state[k]["weight"], teacher[k])]
        assert any("out_conv.weight" in k or "aux_conv.weight" in k for k in changed), role
    shutil.rmtree(run.path)
