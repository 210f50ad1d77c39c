"""Whole runs of `run_worker` without Ray: resume, world size, ZeRO stage, precision, modes."""

import json
import shutil

import pytest
import torch

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import read_model_config
from sid_ray.training.board import read_metrics
from sid_ray.training.checkpoints import ROLES, complete_checkpoints, read_network, read_progress
from sid_ray.training.opening import open_run
from tests.golden_numbers import GOLDEN
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed


def end_state(run):
    """All tensors of a run's newest checkpoint, by role, parameter and key."""
    newest = complete_checkpoints(run / "checkpoints")[0]
    return {
        f"{role}.{name}.{key}": tensor
        for role in ROLES
        for name, tensors in read_network(newest, role).items()
        for key, tensor in tensors.items()
    }


def assert_same(actual, expected, tolerance=0.0):
    """Equal bitwise, or weights within a tolerance for all but 0.2 % of the entries (Adam amplifies rounding)."""
    assert actual.keys() == expected.keys()
    if tolerance == 0.0:
        different = [k for k in actual if not torch.equal(actual[k], expected[k])]
        assert not different, f"{len(different)} of {len(actual)} tensors differ, e.g. {different[0]}"
    else:
        weights = [k for k in actual if k.endswith((".weight", ".ema"))]
        errors = torch.cat([(actual[k] - expected[k]).abs().flatten() for k in weights])
        assert (errors <= tolerance).float().mean() >= 0.998, errors.max()


@pytest.mark.parametrize(
    "variants",
    [
        [(1, "fp32"), (3, "bf16")],
        pytest.param([(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")], marks=pytest.mark.slow),
        pytest.param([(1, "bf16"), (2, "bf16"), (3, "bf16")], marks=pytest.mark.slow),
    ],
    ids=["corners", "fp32", "bf16"],
)
def test_resume_is_bitwise_and_tells_nothing_twice(job, variants):
    """6 iterations in one go, and as 3 + 3 in two processes."""
    names = {f"{precision}-stage{stage}": (stage, precision) for stage, precision in variants}
    settings = {n: {"engine__zero_stage": s, "engine__precision": p} for n, (s, p) in names.items()}
    whole = [job(f"whole-{n}", **o) for n, o in settings.items()]
    parts = [job(f"parts-{n}", run__total_kimg=0.048, **o) for n, o in settings.items()]
    on_ranks(2, "tests.job_worker", *whole, *parts)
    on_ranks(2, "tests.job_worker", *(job(f"parts-{n}", **o) for n, o in settings.items()))
    for name, (_, precision) in names.items():
        whole, parts = end_state(job.runs / f"whole-{name}"), end_state(job.runs / f"parts-{name}")
        assert any(not torch.equal(whole[k], whole[k.replace(".ema", ".weight")]) for k in whole if k.endswith(".ema"))
        assert_same(parts, whole)
        told = [(row["nimg"], *sorted(row)) for row in read_metrics(job.runs / f"parts-{name}" / "metrics.jsonl")]
        assert len(told) == len(set(told)), f"{name}: told twice"
        first = next(n for n in names if n.startswith(precision))
        if precision == "fp32":  # all stages compute the same
            assert_same(whole, end_state(job.runs / f"whole-{first}"), tolerance=1e-5)


@pytest.mark.parametrize(
    "variants",
    [[(16, 1), (12, 3)], pytest.param([(16, 0), (16, 2), (16, 3), (12, 0), (12, 2)], marks=pytest.mark.slow)],
    ids=["corners", "matrix"],
)
def test_world_size_never_changes_the_maths(job, variants):
    """Dropout on: 4 slots on 1 and 2 workers, and 3 slots on 2 workers (one surplus), give the same weights."""
    jobs = {f"{size}-{stage}": (size, stage) for size, stage in variants}
    for ranks in (1, 2):
        paths = [
            job(f"on{ranks}-{name}", batch__size=size, engine__zero_stage=stage, run__total_kimg=3 * size / 1000)
            for name, (size, stage) in jobs.items()
        ]
        on_ranks(ranks, "tests.job_worker", *paths)
    for name in jobs:
        assert_same(end_state(job.runs / f"on2-{name}"), end_state(job.runs / f"on1-{name}"), tolerance=1e-5)


def test_a_checkpoint_continues_at_another_stage_and_world_size(job):
    on_ranks(2, "tests.job_worker", job("moved", run__total_kimg=0.048), job("stayed", run__total_kimg=0.048))
    on_ranks(2, "tests.job_worker", job("stayed"))
    on_ranks(1, "tests.job_worker", job("moved", engine__zero_stage=3))
    assert_same(end_state(job.runs / "moved"), end_state(job.runs / "stayed"), tolerance=1e-5)


def test_memory_modes_and_shared_latents(job):
    """`lean` and `minimal` follow `fast` to rounding with dropout on; shared latents are another, working, run."""
    modes = [job(mode, method__memory=mode, batch__size=4) for mode in ("fast", "lean", "minimal")]
    on_ranks(1, "tests.job_worker", *modes, job("shared", method__latents="shared", batch__size=4))
    fast = end_state(job.runs / "fast")
    assert_same(end_state(job.runs / "lean"), fast, tolerance=1e-5)
    assert_same(end_state(job.runs / "minimal"), fast, tolerance=1e-5)
    shared = end_state(job.runs / "shared")
    assert any(not torch.equal(shared[k], fast[k]) for k in fast)


def test_augmented_images_do_not_depend_on_the_workers(job):
    """The packaged digits teacher takes the labels: 1 and 2 workers agree, and it is not the run without."""
    settings = {"teacher__path": "builtin:digits", "method__augment": 0.3, "run__total_kimg": 0.048}
    on_ranks(1, "tests.job_worker", job("aug1", **settings), job("plain", **(settings | {"method__augment": 0.0})))
    on_ranks(2, "tests.job_worker", job("aug2", **settings))
    augmented = end_state(job.runs / "aug1")
    assert_same(end_state(job.runs / "aug2"), augmented, tolerance=1e-5)
    plain = end_state(job.runs / "plain")
    assert any(not torch.equal(plain[k], augmented[k]) for k in plain if k.startswith("fake_score"))


def test_a_pickle_is_converted_once_and_its_licence_travels(job, tmp_path):
    """A run from an EDM checkpoint keeps its own copy of the teacher, and goes on without the file."""
    source = tmp_path / "edm-tiny.pkl"
    shutil.copy(GOLDEN / "networks" / "ddpmpp_cond.pkl", source)
    measured = {"evaluation__features": "pixels", "evaluation__reference": "teacher"}  # its images are 16x16
    settings = {"teacher__path": str(source), "batch__size": 8, "method__augment": 0.12, **measured}
    on_ranks(1, "tests.job_worker", job("pickle", run__total_kimg=0.024, **settings))
    run = job.runs / "pickle"
    generator = read_model_config(str(run / "generator"))
    assert generator.licence == "CC BY-NC-SA 4.0" and generator.provenance["teacher"] == "edm-tiny.pkl"
    assert "CC BY-NC-SA 4.0" in (run / "generator" / "README.md").read_text()
    assert read_model_config(str(run / "teacher")).provenance["source"] == "edm-tiny.pkl"
    source.write_bytes(source.read_bytes() + b"x")
    with pytest.raises(UserError, match="not the file that this run began with"):
        open_run(load_config(job("pickle", run__total_kimg=0.048, **settings)))
    source.unlink()
    on_ranks(1, "tests.job_worker", job("pickle", run__total_kimg=0.048, **settings))
    assert read_progress(complete_checkpoints(run / "checkpoints")[0]).nimg == 48


def test_half_written_and_damaged_checkpoints_are_passed_over(job):
    on_ranks(1, "tests.job_worker", job("damaged"))
    folder = job.runs / "damaged" / "checkpoints"
    newest, older = complete_checkpoints(folder)
    next(newest.glob("generator-*")).write_bytes(b"cut short")
    assert complete_checkpoints(folder) == [older]
    (older / "complete.json").unlink()
    assert complete_checkpoints(folder) == []
    on_ranks(1, "tests.job_worker", job("damaged"))
    assert read_progress(complete_checkpoints(folder)[0]).nimg == 96


def test_tensorboard_and_samples(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    on_ranks(1, "tests.job_worker", job("board", run__total_kimg=0.048, evaluation__every_kimg=0.064))
    on_ranks(1, "tests.job_worker", job("board", evaluation__every_kimg=0.064))
    run = job.runs / "board"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    expected = {"loss/generator", "loss/fake_score", "fid/generator", "fid/teacher", "gradient_norm/generator"}
    assert expected | {"learning_rate/generator", "skipped/generator"} <= set(tags["scalars"])
    assert "samples" in tags["images"]
    steps = [e.step for e in events.Scalars("loss/generator")]
    assert steps == sorted(set(steps)) and steps[-1] == 96
    assert (run / "fid.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples" / "nimg-000000000096.png").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["nimg"] == 96 and summary["best_fid"] <= summary["initial_fid"]
