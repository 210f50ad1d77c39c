"""Which trials a sweep runs: names, order, and what TPE makes of the journal."""

import math

import numpy as np
import pytest

from sid_ray.launch.sweeps.journal import Journal, SweepDirectory, TrialRecord
from sid_ray.launch.sweeps.search import Proposals, outcomes, suggest, units
from sid_ray.launch.sweeps.space import Space


def space(**fields):
    base = {
        "preset": "digits",
        "budget_kimg": 10,
        "trials": 4,
        "fields": {
            "method.alpha": {"uniform": [0.0, 2.0]},
            "optimizer.generator_lr": {"loguniform": [1e-5, 1e-1]},
            "batch.size": {"choice": [64, 128]},
            "optimizer.fake_score_lr": {"follows": "batch.size", "at": [128, 1e-4]},
        },
    }
    return Space.model_validate(base | fields)


def record(number, values, fid, state="finished", repeat=0):
    return TrialRecord(
        name=f"t{number:03d}", number=number, repeat=repeat, values=values, state=state, curve=[(0, 90.0), (1000, fid)]
    )


def test_every_trial_once_before_any_second_seed():
    assert [u.name for u in units(space())] == ["t000", "t001", "t002", "t003"]
    assert [u.name for u in units(space(repeats=2))][3:6] == ["t003-s0", "t000-s1", "t001-s1"]
    grid = space(search="grid", fields={"batch.size": {"choice": [64, 128, 256]}}, trials=99)
    assert len(units(grid)) == 3


def test_a_journal_keeps_what_was_proposed(tmp_path):
    journal = Journal(SweepDirectory(tmp_path))
    proposals = Proposals(space(), journal)
    drawn = proposals.values(2)
    assert drawn == Proposals(space(), journal).values(2) != proposals.values(1)
    journal.put(record(2, drawn | {"method.alpha": 1.5}, 5.0))
    assert Proposals(space(seed=7), Journal(SweepDirectory(tmp_path))).values(2)["method.alpha"] == 1.5


def test_tpe_is_a_function_of_what_is_known_and_goes_where_fid_is_low():
    tpe = space(search="tpe", trials=20)
    rng = np.random.default_rng(0)
    known = []
    for number in range(30):
        values = tpe.draw(number)
        distance = (values["method.alpha"] - 1.2) ** 2 + (math.log10(values["optimizer.generator_lr"]) + 4) ** 2
        diverged = values["optimizer.generator_lr"] > 1e-2
        known.append(
            record(number, values, math.exp(distance) + 0.01 * rng.random(), "diverged" if diverged else "finished")
        )
    suggested = [suggest(tpe, known, number) for number in range(30, 50)]
    assert suggested[0] == suggest(tpe, known, 30) and suggested[0] != suggested[1]
    rates = [math.log10(values["optimizer.generator_lr"]) for values in suggested]
    assert abs(np.median(rates) + 4) < 0.7 and max(rates) < -1.5
    assert abs(np.median([values["method.alpha"] for values in suggested]) - 1.2) < 0.4
    assert set(suggested[0]) == set(tpe.searched)


def test_outcomes_are_means_over_seeds_and_divergence_is_infinitely_bad():
    values = space().draw(0)
    runs = [record(0, values, 4.0), record(0, values, 9.0, repeat=1), record(1, values, 2.0, "running")]
    assert list(outcomes(runs)) == [(values, pytest.approx(math.log(6.0)))]
    assert next(iter(outcomes([record(0, values, 4.0, "diverged")])))[1] == math.inf


def test_the_preset_itself_comes_first_also_when_it_lies_outside(tmp_path):
    proposals = Proposals(space(), Journal(SweepDirectory(tmp_path)))
    own = {"method.alpha": 1.2, "optimizer.generator_lr": 1e-4, "batch.size": 128, "optimizer.fake_score_lr": 1e-4}
    assert proposals.values(0) == own and Proposals(space(preset_first=False), proposals.journal).values(0) != own
    high = {"method.alpha": {"uniform": [1.5, 2.0]}}
    assert Proposals(space(fields=high), proposals.journal).values(0) == {"method.alpha": 1.2}
    suggested = suggest(space(fields=high, search="tpe"), [record(0, {"method.alpha": 1.2}, 5.0)], 1)
    assert 1.5 <= suggested["method.alpha"] <= 2.0


def test_what_a_range_contains():
    ranges = space(fields={"method.p_mean": {"quantised": [-2, 0, 0.1]}, "batch.size": {"choice": [64, 128]}}).fields
    assert ranges["method.p_mean"].contains(-1.2) and not ranges["method.p_mean"].contains(-1.25)
    assert not ranges["method.p_mean"].contains(0.1) and not ranges["method.p_mean"].contains(None)
    assert ranges["batch.size"].contains(64) and not ranges["batch.size"].contains(96)
