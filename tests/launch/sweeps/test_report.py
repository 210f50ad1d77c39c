"""The report of a sweep, from records of every outcome: text, pictures, best.yaml, HParams."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sid_ray.config import load_config
from sid_ray.launch.sweeps.journal import Journal, TrialRecord
from sid_ray.launch.sweeps.pictures import map_fields, trial_means
from sid_ray.launch.sweeps.plan import plan_sweep
from sid_ray.launch.sweeps.report import best_run, compute_table, correlations, write_report

SPACE = """\
preset: digits
description: A sweep of the tests.
budget_kimg: 10
trials: 4
repeats: 2
settings: {optimizer.ema_halflife_kimg: 7}
fields:
  method.alpha: {uniform: [0.5, 1.5]}
  optimizer.generator_lr: {loguniform: [1.0e-5, 1.0e-2]}
  batch.size: [64, 128]
"""


def record(number, repeat, state, fids, alpha=1.0, lr=1e-4, reason=""):
    curve = [(0, 90.0), *((round(10_000 * (i + 1) / 4), fid) for i, fid in enumerate(fids))]
    values = {"method.alpha": alpha, "optimizer.generator_lr": lr, "batch.size": 64}
    return TrialRecord(
        name=f"t{number:03d}-s{repeat}", number=number, repeat=repeat, values=values, state=state, reason=reason,
        curve=curve, nimg=curve[-1][0], seconds=60.0,
    )  # fmt: skip


RECORDS = [
    record(0, 0, "finished", [40, 20, 10, 5], alpha=1.2),
    record(0, 1, "finished", [40, 20, 10, 7], alpha=1.2),
    record(1, 0, "finished", [40, 20, 10, 4.5], alpha=0.7, lr=3e-4),
    record(1, 1, "finished", [40, 20, 10, 9.5], alpha=0.7, lr=3e-4),
    record(2, 0, "diverged", [900, math.nan], lr=1e-2, reason="FID nan, best 90"),
    record(2, 1, "diverged", [900, 700, 800], lr=1e-2),
    record(3, 0, "behind", [80, 70], lr=1e-5, reason="its power law cannot reach 4.5 by the end"),
    record(3, 1, "failed", [], lr=1e-5, reason="a | died"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.yaml").write_text(SPACE)
    plan = plan_sweep(str(folder / "mine.yaml"), {"run.storage": str(folder / "runs")})
    journal = Journal(plan.directory)
    for r in RECORDS:
        journal.put(r)
    best = write_report(plan, journal)
    return plan, best


def test_the_best_trial_is_best_on_average_over_its_seeds():
    assert [runs[0].number for runs, _, _ in trial_means(RECORDS)][:2] == [0, 1]
    assert best_run(RECORDS).name == "t000-s0"
    assert trial_means(RECORDS)[0][1:] == (pytest.approx(6.0), pytest.approx(math.sqrt(2)))
    assert best_run(RECORDS[-2:]).number == 3  # while no trial has all its seeds


def test_best_yaml_is_a_preset(written):
    plan, best = written
    config = load_config(best)
    assert (config.method.alpha, config.batch.size, config.optimizer.ema_halflife_kimg) == (1.2, 64, 7)
    assert config == plan.preset(RECORDS[0].values)


def test_the_report_says_what_happened(written):
    text = (written[0].directory.path / "report.md").read_text()
    assert "**Best: t000-s0**, FID 5.000" in text and "A sweep of the tests." in text
    assert "| 0 | finished | 10.0 | 6 ± 1.41 (n=2) | 1.2 | 0.0001 | 64 |" in text
    assert "its power law cannot reach 4.5" in text and "a / died" in text and "rank correlation" in text
    for name in ("curves", "fields", "compute", "map"):
        assert f"]({name}.png)" in text and (written[0].directory.path / f"{name}.png").stat().st_size > 5000


def test_correlations_compare_runs_at_equal_images(written):
    text = correlations(written[0].space, RECORDS)
    assert "With the FID at 5 kimg" in text  # where the one that was left behind ended
    # There, 20 for the four that finished and 70 for the one with the lowest rate.
    assert "`optimizer.generator_lr`: rank correlation -0.75 (n=5)" in text


def test_compute_is_counted_in_images(written):
    table = compute_table(written[0].space, RECORDS)
    assert "| finished | 4 | 40.0 | 4:00 | 0.0 |" in table and "| diverged | 2 | 12.5 | 2:00 | 7.5 |" in table
    assert "saved 16 % of 80 kimg" in table


def test_tensorboard_knows_the_settings_of_what_was_stopped(written):
    trials = written[0].directory.path / "trials"
    assert sorted(p.name for p in trials.iterdir()) == ["t002-s0", "t002-s1", "t003-s0", "t003-s1"]
    events = EventAccumulator(str(trials / "t002-s0" / "tensorboard")).Reload()
    assert any("hparams" in tag for tag in events.summary_metadata)
    (file,) = (trials / "t002-s0" / "tensorboard").glob("*.hparams")
    before = file.read_bytes()
    write_report(written[0], Journal(written[0].directory))
    assert [p.read_bytes() for p in (trials / "t002-s0" / "tensorboard").glob("*.hparams")] == [before]


def test_a_map_prefers_alpha_and_the_generators_rate(written):
    assert map_fields(written[0].space) == ("method.alpha", "optimizer.generator_lr")
