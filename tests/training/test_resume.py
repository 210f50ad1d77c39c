"""Checkpoints move: to another world size, ZeRO stage and precision; what is not theirs is refused."""

import json
import shutil

import pytest
import torch

from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import ASSETS
from sid_ray.training.checkpoints import complete_checkpoints, read_progress
from tests.alone import Recorder, train
from tests.ranks import on_ranks
from tests.training.test_worker import assert_same, end_state

WHOLE = {"run__total_kimg": 0.384, "run__checkpoint_every_kimg": 1, "run__report_every_kimg": 0.192}
"""24 iterations of 16 images: 4, and 20 after the move."""
PARTS = WHOLE | {"run__total_kimg": 0.064}
STAGES = (0, 1, 2, 3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2000)
@pytest.mark.parametrize(
    ("before", "after", "stages"),
    [(w, v, [(s, t) for t in STAGES]) for w, v in ((1, 2), (2, 1), (2, 2)) for s in STAGES],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_a_checkpoint_goes_on_at_another_stage_and_world_size(job, before, after, stages):
    """20 steps after the move, weights and average are within 1e-5 of those of the run that stayed.

    A corner of this matrix is among the ordinary tests: test_worker.py.
    """
    stayed = stages[0][0]
    on_ranks(
        before,
        "tests.job_worker",
        job("stayed", engine__zero_stage=stayed, **WHOLE),
        *(job(f"to{t}", engine__zero_stage=s, **PARTS) for s, t in stages),
        timeout=900,
    )
    on_ranks(after, "tests.job_worker", *(job(f"to{t}", engine__zero_stage=t, **WHOLE) for _, t in stages), timeout=900)
    expected = end_state(job.runs / "stayed")
    for _, target in stages:
        tolerance = 0.0 if before == after and target == stayed else 1e-5
        assert_same(end_state(job.runs / f"to{target}"), expected, tolerance)


def test_precision_may_change_and_it_is_said(job):
    """fp32, then bf16, then fp32 again: it is said each time, and the result stays near that of fp32 alone."""
    train(job("plain", run__total_kimg=0.096))
    for kimg, precision in ((0.032, "fp32"), (0.064, "bf16"), (0.096, "fp32")):
        outside = Recorder()
        _, progress = train(job("mixed", run__total_kimg=kimg, engine__precision=precision), outside)
        said = [note for note in outside.notes if note.startswith("changed since: engine.precision")]
        assert len(said) == (kimg > 0.032) and all(f"-> '{precision}'" in note for note in said), outside.notes
        assert progress.nimg == kimg * 1000 and progress.generator_steps == progress.nimg / 16
    plain, mixed = end_state(job.runs / "plain"), end_state(job.runs / "mixed")
    start = start_weights(job)
    error, moved = (torch.cat([(plain[k] - x[k]).abs().flatten() for k in start]).mean() for x in (mixed, start))
    assert 0 < error < 0.2 * moved, (error, moved)
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in mixed.values())


def start_weights(job):
    train(job("start", run__total_kimg=0.016, optimizer__generator_lr=1e-12, optimizer__fake_score_lr=1e-12))
    return {k: v for k, v in end_state(job.runs / "start").items() if k.endswith(".weight")}


def test_all_counters_are_in_the_checkpoint_and_another_format_or_architecture_is_refused(job, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(load(job("x")).teacher.path, teacher)
    config = job("own", teacher__path=str(teacher))
    run, progress = train(config)
    newest = complete_checkpoints(run.checkpoints)[0]
    assert read_progress(newest) == progress and progress.best_fid is not None and progress.seconds > 0

    marker = newest / "complete.json"
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match=r"nimg-000000000096 has format 99; this version reads format 2"):
        train(config)
    marker.write_text(json.dumps(content))

    shutil.copy(ASSETS / "digits" / "model.safetensors", teacher)
    shutil.copy(ASSETS / "digits" / "config.json", teacher)
    with pytest.raises(UserError, match=r"nimg-000000000096 belongs to another architecture: "):
        train(config)
    assert read_progress(newest) == progress


def load(path):
    from sid_ray.config import load_config

    return load_config(path)


def test_the_newest_and_the_best_are_kept(job):
    """The best FID is at the start of a run whose generator is spoilt later; its checkpoint stays beside the newest."""
    settings = {
        "evaluation__every_kimg": 0.016,
        "evaluation__num_images": 100,
        "run__checkpoint_every_kimg": 0.016,
        "run__keep_checkpoints": 1,
        "optimizer__generator_lr": 3e-2,
        "optimizer__ema_halflife_kimg": 0,
    }
    run, progress = train(job("best", **settings))
    kept = [read_progress(c).nimg for c in complete_checkpoints(run.checkpoints)]
    fids = {row: fid for row, fid in ((r["nimg"], r.get("fid/generator")) for r in rows(run)) if fid is not None}
    best = min(fids, key=fids.get)
    assert progress.best_nimg == best and set(fids) == set(range(0, 97, 16))
    assert kept == sorted({96, best} - {0}, reverse=True)
    run, _ = train(job("newest", run__keep_best=False, **settings))
    assert [read_progress(c).nimg for c in complete_checkpoints(run.checkpoints)] == [96]


def rows(run):
    from sid_ray.training.board import read_metrics

    return read_metrics(run.metrics)


def test_best_name_is_at_or_before_the_best_fid():
    from sid_ray.training.checkpoints import best_name

    names = ["nimg-000000000096", "nimg-000000000048", "nimg-000000000016"]
    assert best_name(names, 48) == names[1] and best_name(names, 64) == names[1] and best_name(names, 200) == names[0]
    assert best_name(names, 0) is None and best_name(names, None) is None
