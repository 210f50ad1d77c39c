"""The rules of divergence, on made-up and on recorded curves."""

import csv
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sid_ray.config import Guard, load_config
from sid_ray.training.guard import (
    WARM_UP,
    FidHistory,
    GuardState,
    TickHistory,
    judge_fid,
    judge_fids,
    judge_tick,
    watch,
    watch_skips,
)

RULES = Guard()
RESULTS = Path(__file__).parents[2] / "docs" / "results"
fids = st.floats(1e-3, 1e4)
curves = st.lists(fids, min_size=1, max_size=40)


def numbered(values):
    return list(enumerate(values))


def names(events):
    return [event for _, event in events]


@given(curves)
def test_a_falling_fid_is_never_remarked_on(values):
    assert judge_fids(numbered(sorted(values, reverse=True)), RULES) == []


@given(curves, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(1, 5))
def test_a_fid_that_is_not_finite_is_a_divergence_at_once(values, bad, patience):
    rules = Guard(fid_patience=patience)
    falling = sorted(values, reverse=True)
    events = judge_fids(numbered([*falling, bad, falling[-1]]), rules)
    assert events == [(len(values), "divergence"), (len(values) + 1, "recovery")]


@given(st.lists(st.tuples(st.integers(0, 3), fids), min_size=1, max_size=10), st.floats(1.01, 1e6))
def test_spikes_shorter_than_the_patience_never_diverge(bursts, height):
    """A falling curve, interrupted by bursts of up to patience - 1 evaluations however high."""
    rules, best, values, spikes = Guard(fid_patience=4), math.inf, [], 0
    for length, fid in bursts:
        best = min(best, fid)
        values += [best] + [rules.fid_factor * best * height] * length
        spikes += length > 0
    values.append(best)
    assert names(judge_fids(numbered(values), rules)) == ["spike", "recovery"] * spikes


@given(curves, fids, st.integers(1, 6), st.floats(1.01, 100))
def test_the_patience_is_what_makes_a_divergence(before, best, patience, height):
    rules = Guard(fid_patience=patience)
    start = [*sorted(before, reverse=True), min(best, *before)]
    high = [rules.fid_factor * start[-1] * height] * patience
    events = judge_fids(numbered(start + high), rules)
    expected = [] if patience == 1 else [(len(start), "spike")]
    assert events == [*expected, (len(start) + patience - 1, "divergence")]


@given(st.lists(st.one_of(fids, st.just(math.nan)), max_size=40), st.integers(-20, 20))
def test_the_unit_of_fid_does_not_matter(values, exponent):
    assert judge_fids(numbered(values), RULES) == judge_fids(numbered([v * 2.0**exponent for v in values]), RULES)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6, allow_subnormal=False), st.just(math.nan)), max_size=60), st.data())
def test_judging_goes_on_from_a_checkpoint(values, data):
    """What is remembered survives JSON anywhere on the way, and neither sign nor unit of a loss matters."""
    cut = data.draw(st.integers(0, len(values)))
    states = [GuardState(), GuardState(), GuardState()]
    for i, value in enumerate(values):
        if i == cut:
            states[1] = GuardState.model_validate_json(states[1].model_dump_json())
        outcomes = []
        for j, v in enumerate((value, value, -4 * value)):
            watched = watch(states[j], i, {"loss/fake_score": v, "loss/generator": 1.0}, abs(v), RULES)
            states[j] = watched.state
            outcomes.append([(n.event, n.since) for n in watched.notices])
        assert outcomes[0] == outcomes[1] == outcomes[2]
    assert states[0] == states[1]


def tick_events(values, rules=RULES):
    history, events = TickHistory(), []
    for i, value in enumerate(values):
        history, event = judge_tick(history, i, {"gradient_norm/generator": value, "loss/fake_score": 1.0}, rules)
        events += [(i, event)] if event else []
    return events


def test_an_explosion_is_told_once_and_the_level_is_learned_anew():
    calm, rules = [1.0, -2.0, 3.0, -2.0, 2.0] * 2, Guard(explosion_factor=10, explosion_patience=3)
    assert tick_events(calm * 20, rules) == []
    assert tick_events([*calm, 100.0, 100.0, *calm], rules) == [(10, "spike"), (12, "recovery")]
    assert tick_events([*calm, 19.0, 21.0, 2.0], rules) == [(11, "spike"), (12, "recovery")]
    assert tick_events(calm + [100.0] * 50, rules) == [(10, "spike"), (12, "divergence")]
    # A slow rise is followed; the early phase is not judged; nor is the norm of a skipped step.
    assert tick_events([1.2**i for i in range(100)], rules) == []
    assert tick_events([1e-6] * (WARM_UP // 2 - 1) + [1e6] * 50, rules) == []
    assert tick_events([*calm, math.inf, math.nan, math.inf, math.nan], rules) == []


def test_skipped_steps():
    rules = Guard(max_skipped_in_a_row=20)
    assert [n for n in range(50) if watch_skips(n, 10_000, 100, rules)] == [20, 40]
    (notice,) = watch_skips(20, 10_000, 100, rules)
    assert (notice.event, notice.since) == ("divergence", 8_000)


def test_notices_say_what_where_and_since_when():
    state = watch(GuardState(), 0, {}, 20.0, RULES).state
    state, (notice,), scalars = watch(state, 1000, {}, 100.0, RULES)
    assert notice.text == "spike: FID 100, 5 times the best" and scalars["guard/fid_ratio"] == 5.0
    state, (notice,), _ = watch(state, 2000, {}, math.nan, RULES)
    assert (notice.text, notice.since) == ("divergence: FID nan, since 1 kimg", 1000)
    state, (notice,), scalars = watch(state, 3000, {}, 10.0, RULES)
    assert notice.text == "recovery: FID 10, 0.5 times the best, after trouble since 1 kimg"
    assert state.fid == FidHistory(best=10.0) and scalars["guard/recovered"] == 1.0


def test_an_fid_without_a_best_before_it():
    history, event = judge_fid(FidHistory(), 0, math.nan, RULES)
    assert (history.best, event) == (None, "divergence")
    assert judge_fid(history, 1, 50.0, RULES) == (FidHistory(best=50.0), "recovery")


def test_the_recorded_curves_of_digits_raise_no_alarm():
    rows = re.findall(r"^\| FID.*$", (RESULTS / "digits.md").read_text(), re.MULTILINE)
    curves = [[float(v.strip(" *")) for v in row.split("|")[2:-1]] for row in rows if row.count("|") > 8]
    assert len(curves) == 3 and all(len(curve) >= 10 for curve in curves)
    for curve in curves:
        assert judge_fids(numbered(curve), RULES) == []


def recorded():
    """docs/results/divergence.csv as run -> list of (images, FID or None, losses and gradient norms)."""
    runs = defaultdict(list)
    with (RESULTS / "divergence.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name, nimg, fid = row.pop("run"), int(row.pop("nimg")), row.pop("fid")
            values = {k: float(v) for k, v in row.items() if v}
            runs[name].append((nimg, float(fid) if fid else None, values))
    return runs


@pytest.mark.parametrize("name", recorded())
def test_recorded_runs_are_judged_as_a_person_would(name):
    """Real runs on digits (docs/results/divergence.md): no alarm in healthy ones, each broken one is noticed."""
    state, notices = GuardState(), []
    for nimg, fid, values in recorded()[name]:
        state, new, _ = watch(state, nimg, values, fid, RULES)
        notices += new
    events = {notice.event for notice in notices}
    if name in ("lr 1e-2", "lr 3e-2", "lr 1e-2 from 12.8 kimg", "batch 1024, lr 8e-3"):
        assert "divergence" in events
    elif name == "lr 3e-3":
        assert [n.event for n in notices] == ["spike", "recovery"]
    else:
        assert notices == []


def test_a_sweep_can_use_the_rules_without_torch_or_ray():
    program = "import sys, sid_ray.training.guard; print({'torch', 'ray', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_preset_rolls_back():
    assert load_config("digits").guard == RULES and RULES.policy == "rollback"
