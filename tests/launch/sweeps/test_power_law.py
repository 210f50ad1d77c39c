"""The power law: exact on exact curves, unmoved by a spike, and never pruning what can still win."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sid_ray.launch.sweeps.power_law import cannot_reach, fit_power_law

NIMG = [400, 800, 1600, 3200, 6400, 9600, 12_800]


def curve(amplitude, exponent, nimg=NIMG):
    return [(n, amplitude * (n / 1000) ** -exponent) for n in nimg]


@given(st.floats(1, 500), st.floats(0.05, 2))
def test_an_exact_law_is_found_and_extended(amplitude, exponent):
    law = fit_power_law(curve(amplitude, exponent))
    assert law.slope == pytest.approx(-exponent, rel=1e-6)
    forecast = law.forecast(100_000)
    truth = amplitude * 100**-exponent
    assert (forecast.low, forecast.middle, forecast.high) == pytest.approx((truth, truth, truth), rel=1e-6)


def test_a_spike_does_not_move_the_line():
    spiked = [(n, fid * (8 if n == 6400 else 1)) for n, fid in curve(50, 0.8)]
    law = fit_power_law(spiked)
    assert law.slope == pytest.approx(-0.8, abs=0.02)
    assert law.forecast(25_600).middle == pytest.approx(50 * 25.6**-0.8, rel=0.05)


def test_too_few_points_say_nothing():
    assert fit_power_law(curve(50, 1, [400, 800, 1600])) is None
    assert fit_power_law([(0, 80.0), (400, math.nan), *curve(50, 1, [800, 1600, 3200])]) is None
    assert not cannot_reach(curve(50, 1, [400, 800, 1600]), 25_600, 1e-6)


def test_only_recent_points_count():
    """The first points follow another law; those more than eight times behind the last are left out."""
    early = [(200, 90.0), (400, 89.0), (800, 88.0)]
    law = fit_power_law(early + curve(50, 0.8, [1600, 3200, 6400, 9600, 12_800]))
    assert law.slope == pytest.approx(-0.8, rel=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.3, 1.2))
def test_the_interval_holds_the_truth_and_the_winner_lives(seed, exponent):
    """10 % of noise on log FID: a trial is not given up for a target that its own law reaches."""
    rng = np.random.default_rng(seed)
    noisy = [(n, fid * math.exp(0.1 * rng.standard_normal())) for n, fid in curve(50, exponent)]
    truth = 50 * 25.6**-exponent
    assert not cannot_reach(noisy, 25_600, truth * 1.5)


def test_a_hopeless_trial_is_given_up_and_one_that_leads_is_not():
    slow = curve(60, 0.1)
    assert cannot_reach(slow, 25_600, target=5.0)
    assert not cannot_reach(slow, 25_600, target=math.inf)
    assert not cannot_reach(slow, 25_600, target=slow[-1][1])
