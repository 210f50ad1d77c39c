"""The stoppers of a sweep, alone: what Ray Tune would hand them, result by result."""

import math

from sid_ray.config import Guard
from sid_ray.launch.sweeps.stoppers import DivergenceStopper, PowerLawStopper


def feed(stopper, trial, points):
    """How many results it takes until the trial is stopped; None if it is not."""
    verdicts = [stopper(trial, {"nimg": nimg, "fid": fid}) for nimg, fid in points]
    return verdicts.index(True) if True in verdicts else None


def falling(amplitude, exponent):
    return [(n, amplitude * (n / 1000) ** -exponent) for n in (800, 1600, 3200, 6400, 9600, 12_800)]


def test_a_fid_that_is_not_finite_stops_its_own_trial_at_once():
    stopper = DivergenceStopper()
    assert feed(stopper, "bad", [(100, 50.0), (200, math.nan)]) == 1
    assert feed(stopper, "good", falling(50, 0.5)) is None and not stopper.stop_all()


def test_a_spike_that_recovers_is_no_divergence_and_one_that_stays_is():
    rules = Guard(fid_factor=3, fid_patience=3)
    spike = [(100, 10.0), (200, 90.0), (300, 80.0), (400, 9.0), (500, 8.0)]
    assert feed(DivergenceStopper(rules), "t", spike) is None
    stays = [(100, 10.0), (200, 90.0), (300, 80.0), (400, 85.0)]
    assert feed(DivergenceStopper(rules), "t", stays) == 3


def test_a_repeated_report_of_one_evaluation_counts_once():
    stopper = DivergenceStopper(Guard(fid_factor=3, fid_patience=3))
    assert feed(stopper, "t", [(100, 10.0), (200, 90.0), (200, 90.0), (200, 90.0)]) is None


def test_a_hopeless_trial_is_given_up_after_the_grace_and_the_leader_never():
    stopper = PowerLawStopper(budget=25_600, grace=6400)
    assert feed(stopper, "leader", falling(30, 1.0)) is None
    assert feed(stopper, "hopeless", falling(60, 0.1)) == 3
    assert feed(stopper, "close", falling(32, 1.0)) is None
    assert stopper.target("leader") < stopper.target("close") * 2


def test_what_ended_before_is_remembered():
    assert feed(PowerLawStopper(25_600, 6400, best=2.0), "t", falling(60, 0.1)) == 3
    assert feed(PowerLawStopper(25_600, 6400), "t", falling(60, 0.1)) is None
