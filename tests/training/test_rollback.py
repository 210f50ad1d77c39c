"""Runs that diverge, in real workers: what each policy does, what stays on disk, and that going back is resuming."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training import worker
from sid_ray.training.board import read_metrics, split_at_rollbacks
from sid_ray.training.checkpoints import complete_checkpoints, complete_names, nimg_of, read_progress
from sid_ray.training.rollback import best_before, read_rollbacks, slowed
from sid_ray.training.run_directory import RunDirectory
from tests.alone import Recorder, train
from tests.poisoned_worker import PoisonedDraws
from tests.ranks import on_ranks
from tests.training.test_worker import assert_same, end_state

distributed = pytest.mark.distributed
POISON = {
    "evaluation__every_kimg": 0.032, "run__report_every_kimg": 0.016, "run__checkpoint_every_kimg": 0.016,
    "run__keep_checkpoints": 20, "guard__max_skipped_in_a_row": 2,
}  # fmt: skip
"""Six iterations, of which those from 64 images on are poisoned: divergence at 96, begun at 64."""
TOO_FAST = {
    "teacher__path": "builtin:digits", "batch__size": 32, "engine__micro_batch": 32, "run__report_every_kimg": 0.064,
    "run__checkpoint_every_kimg": 0.032, "evaluation__every_kimg": 0.32, "evaluation__num_images": 100,
    "evaluation__teacher_steps": 0, "optimizer__generator_lr": 3e-2, "optimizer__fake_score_lr": 3e-2,
    "guard__fid_factor": 1.5, "run__total_kimg": 0.192, "run__keep_checkpoints": 20,
}  # fmt: skip
"""A learning rate 300 times the preset's: evaluations at 0, 64, 96 and 160 images, the last three far too high."""


def events_in(folder):
    """(scalars by tag, texts by tag) of the event files of one folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): [
            (e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    return scalars, texts


@distributed
@pytest.mark.parametrize(
    "variants",
    [
        [(3, "bf16")],
        pytest.param(
            [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")], marks=pytest.mark.slow
        ),
    ],
    ids=["corner", "matrix"],
)
def test_rolling_back_is_leaving_and_resuming(job, tmp_path, variants):
    """Two workers roll back within the process, or end in the middle of it and others go on: the same run."""
    settings = {f"{p}-{s}": POISON | {"engine__zero_stage": s, "engine__precision": p} for s, p in variants}
    poison = {"poison_from": 64, "lives": 1}
    jobs = [{"config": job(f"whole-{name}", **o), **poison} for name, o in settings.items()]
    jobs += [{"config": job(f"lost-{name}", **o), **poison, "leave": True} for name, o in settings.items()]
    out = tmp_path / "results.json"
    on_ranks(2, "tests.poisoned_worker", str(out), json.dumps(jobs))
    results = json.loads(out.read_text())
    assert [r["stopped"] for r in results] == [""] * len(settings) + ["left"] * len(settings)
    # The first life's networks, optimizers and graphs are gone, not only unused.
    assert all(r["left"] < 100_000 for r in results), results
    for name in settings:  # what is abandoned still lies there
        assert complete_checkpoints(job.runs / f"lost-{name}" / "checkpoints")[0].name == "nimg-000000000080"
    on_ranks(2, "tests.job_worker", *(job(f"lost-{name}", **o) for name, o in settings.items()))
    for name in settings:
        whole, again = RunDirectory(job.runs / f"whole-{name}"), RunDirectory(job.runs / f"lost-{name}")
        assert_same(end_state(again.path), end_state(whole.path))
        assert again.rollbacks.read_text() == whole.rollbacks.read_text()
        assert told(again) == told(whole)
        check_rolled_back(whole)


def told(run):
    """What metrics.jsonl says, without what takes time."""
    return [{k: v for k, v in row.items() if not k.startswith("speed")} for row in read_metrics(run.metrics)]


def check_rolled_back(run):
    (rollback,) = read_rollbacks(run)
    assert (rollback.number, rollback.from_nimg) == (1, 96) and "not finite in 2 iterations" in rollback.reason
    # Back to the best FID so far, or the nearest checkpoint before it and before the trouble.
    line, abandoned = split_at_rollbacks(read_metrics(run.metrics))
    fids = {r["nimg"]: r["fid/generator"] for r in line + abandoned if "fid/generator" in r and r["nimg"] <= 64}
    assert rollback.to_nimg == min(min(fids, key=lambda n: fids[n]), 48)
    lives = {read_progress(c).nimg: read_progress(c).rollbacks for c in complete_checkpoints(run.checkpoints)}
    assert lives == {n: int(n > rollback.to_nimg) for n in range(16, 97, 16)}
    # The abandoned stretch is still told, the other one once, with a lower learning rate.
    rates = [(r["nimg"], r["learning_rate/generator"]) for r in line if "learning_rate/generator" in r]
    assert rates == [(n, pytest.approx(1e-4 if n <= rollback.to_nimg else 0.3e-4)) for n in range(16, 97, 16)]
    assert {r["nimg"] for r in abandoned} == set(range(rollback.to_nimg + 16, 97, 16))
    first, first_texts = events_in(run.tensorboard)
    second, second_texts = events_in(run.tensorboard / "after-rollback-1")
    assert [step for step, _ in first["loss/generator"]] == [16, 32, 48, 64, 80]
    assert first_texts["guard/divergence"] == [(96, rollback.reason)]
    assert second_texts["guard/rollback"] == [(rollback.to_nimg, str(rollback))]
    assert [step for step, _ in second["loss/generator"]] == list(range(rollback.to_nimg + 16, 97, 16))
    assert {value for _, value in second["guard/rollbacks"]} == {1.0}
    assert {"guard/fid_ratio", "guard/recovered"} <= second.keys()
    assert json.loads(run.summary.read_text())["rollbacks"] == 1


@distributed
def test_policies_on_a_learning_rate_far_too_high(job, tmp_path):
    """Two workers: warn goes on, stop leaves, rollback goes back twice and then stops; none saves what diverged."""
    jobs = {
        "warn": TOO_FAST | {"guard__policy": "warn"},
        "stop": TOO_FAST | {"guard__policy": "stop"},
        "rollback": TOO_FAST
        | {"guard__policy": "rollback", "guard__max_rollbacks": 2, "guard__rollback_lr_factor": 0.9},
    }
    unpoisoned = {"poison_from": 0, "lives": 0}
    out = tmp_path / "results.json"
    todo = [{"config": job(name, **o), **unpoisoned} for name, o in jobs.items()]
    output = on_ranks(2, "tests.poisoned_worker", str(out), json.dumps(todo))
    warn, stop, rollback = (RunDirectory(job.runs / name) for name in jobs)
    went_on, stopped, gave_up = (r["stopped"] for r in json.loads(out.read_text()))
    assert went_on == "" and json.loads(warn.summary.read_text())["nimg"] == 192
    assert complete_checkpoints(warn.checkpoints)[0].name == "nimg-000000000192"
    scalars, texts = events_in(warn.tensorboard)
    assert [step for step, _ in texts["guard/spike"]] == [64]
    assert [step for step, _ in texts["guard/divergence"]] == [160, 192]
    ratios = dict(scalars["guard/fid_ratio"])
    assert ratios.keys() == {64, 96, 160, 192} and min(ratios.values()) > 1.5
    assert output.count("guard: spike: FID") == 5  # once, once, and in each of three lives: told by one worker
    assert all(word in stopped for word in ("FID", "times the best", "since 0.064 kimg", "Stopped at 0.16 kimg"))
    assert "--guard.policy rollback" in stopped and "--optimizer.generator_lr" in stopped
    assert complete_checkpoints(stop.checkpoints)[0].name == "nimg-000000000128"  # from before it was certain
    assert not stop.summary.exists() and (stop.generator / "config.json").is_file()
    assert "guard.max_rollbacks 2 are used up" in gave_up
    assert [(r.number, r.from_nimg, r.to_nimg) for r in read_rollbacks(rollback)] == [(1, 160, 0), (2, 160, 0)]
    rates = {
        row["learning_rate/generator"] for row in read_metrics(rollback.metrics) if "learning_rate/generator" in row
    }
    assert sorted(rates) == pytest.approx([2.43e-2, 2.7e-2, 3e-2])


def test_a_run_on_s3_rolls_back(job, bucket, monkeypatch):
    """The list of rollbacks is on S3 before anything relies on it, and abandoned checkpoints go from there."""
    monkeypatch.setattr(worker, "SeededDraws", PoisonedDraws)
    monkeypatch.setattr(PoisonedDraws, "poison_from", 64)
    monkeypatch.setattr(PoisonedDraws, "lives", 1)
    outside = Recorder()
    config = load_config(job("on-s3", run__storage=f"s3://{bucket}/runs", **POISON))
    run, progress = train(config, outside)
    (rollback,) = read_rollbacks(run)
    assert run.remote.read("rollbacks.json")[0] == run.rollbacks.read_bytes()
    names = complete_names(run.depot)
    assert {nimg_of(n): run.depot.marker(n)["rollbacks"] for n in names} == {
        n: int(n > rollback.to_nimg) for n in range(16, 97, 16)
    }
    assert (progress.nimg, progress.rollbacks) == (96, 1)
    assert [note for note in outside.notes if note.startswith("rollback 1")] == [f"{rollback}; learning rates x 0.3"]


def test_a_rollback_that_cannot_be_noted_down_ends_the_run(job, monkeypatch):
    """Something else lies where the list belongs: every worker stops, and the checkpoints stay."""
    monkeypatch.setattr(worker, "SeededDraws", PoisonedDraws)
    monkeypatch.setattr(PoisonedDraws, "poison_from", 16)
    monkeypatch.setattr(PoisonedDraws, "lives", 1)
    run = RunDirectory(job.runs / "in-the-way")
    outside = Recorder(at_report=lambda nimg: run.rollbacks.mkdir(exist_ok=True))
    with pytest.raises(UserError, match=r"run.storage: a rollback failed in .*in-the-way"):
        train(job("in-the-way", **POISON), outside)
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["nimg-000000000032", "nimg-000000000016"]


@pytest.mark.parametrize(
    ("checkpoints", "since", "best", "expected"),
    [
        ([40, 30, 20, 10], 40, 20, 20),
        ([40, 30, 10], 40, 20, 10),
        ([40, 30, 20, 10], 30, 35, 20),
        ([40, 30, 20, 10], 30, None, 20),
        ([40, 30], 30, 20, 0),
        ([40, 30], 50, 0, 0),
        ([], 30, None, 0),
    ],
    ids=["best FID", "before the best", "before the trouble", "without FID", "all in trouble", "never better", "none"],
)
def test_the_checkpoint_to_go_back_to(checkpoints, since, best, expected):
    assert best_before([f"nimg-{n:012d}" for n in checkpoints], since, best) == expected


def test_learning_rates_fall_with_each_rollback():
    config = load_config("digits", {"guard.rollback_lr_factor": 0.1})
    slower = slowed(config, 2)
    assert slower.optimizer.generator_lr == pytest.approx(1e-6) == pytest.approx(slower.optimizer.fake_score_lr)
    assert config.optimizer.generator_lr == 1e-4 and slowed(config, 0) == config
