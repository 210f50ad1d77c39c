"""What depends on the image count alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sid_ray.config import load_config, override
from sid_ray.training.schedules import crossed, ema_beta, evaluation_due, learning_rate, learning_rates


def test_learning_rates():
    assert learning_rate(1e-4, "constant", 999, 1000) == 1e-4
    assert learning_rate(1e-4, "cosine", 0, 1000) == 1e-4
    assert learning_rate(1e-4, "cosine", 500, 1000) == pytest.approx(5e-5)
    assert learning_rate(1e-4, "cosine", 2000, 1000) == pytest.approx(0.0)


def test_the_fake_score_may_have_a_schedule_of_its_own():
    both = load_config("digits", {"optimizer.schedule": "cosine", "run.total_kimg": 2, "optimizer.fake_score_lr": 2e-4})
    assert learning_rates(both, 1000) == (pytest.approx(5e-5), pytest.approx(1e-4))
    one = override(both, {"optimizer.fake_score_schedule": "constant"})
    assert learning_rates(one, 1000) == (pytest.approx(5e-5), 2e-4)


def test_ema_beta():
    assert ema_beta(256, 0, 500, 0.05) == 0.0  # the first step copies the generator
    assert ema_beta(256, 1_000_000, 500, 0.05) == pytest.approx(0.5 ** (256 / 50_000))
    assert ema_beta(256, 10**9, 500, 0.05) == pytest.approx(0.5 ** (256 / 500_000))
    assert ema_beta(500_000, 0, 500, None) == pytest.approx(0.5)


@given(st.integers(1, 5000), st.floats(0.01, 50), st.integers(1, 300))
def test_each_interval_is_crossed_once(batch, every_kimg, steps):
    times = sum(crossed(every_kimg, i * batch, (i + 1) * batch) for i in range(steps))
    assert times <= steps
    if batch <= every_kimg * 1000:
        assert abs(times - steps * batch / (every_kimg * 1000)) <= 1


def test_evaluations_are_closer_early():
    due = [n for n in range(0, 40_000, 128) if evaluation_due(12.8, n, n + 128)]
    assert [n + 128 for n in due] == [1664, 3200, 6400, 12_800, 25_600, 38_400]
