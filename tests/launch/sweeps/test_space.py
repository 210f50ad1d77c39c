"""Tune spaces: what is shipped is valid, what is wrong is named with its line, and draws belong to (seed, number)."""

import math
from pathlib import Path

import pytest

from sid_ray.errors import UserError
from sid_ray.launch.sweeps.space import Space, load_space
from tests.launching import ROOT

SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
GOOD = """\
preset: digits
budget_kimg: 5
trials: 4
fields:
  method.alpha: {uniform: [0.5, 1.5]}
  optimizer.generator_lr: {loguniform: [1.0e-5, 1.0e-2]}
  batch.size: [64, 128]
  optimizer.fake_score_lr: {follows: batch.size, at: [128, 1.0e-4], power: 0.5}
  method.p_mean: {quantised: [-2, 0, 0.5]}
"""


def write(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("path", SPACES, ids=[p.stem for p in SPACES])
def test_shipped_spaces_are_valid(path):
    space = load_space(str(path))
    for values in space.grid() if space.search == "grid" else [space.draw(n) for n in range(5)]:
        space.config(values, {})


def test_what_is_shipped():
    assert {p.stem for p in SPACES} == {"cifar10", "digits", "digits_alpha", "digits_latents", "imagenet64_batch"}
    alphas = [v["method.alpha"] for v in load_space(str(ROOT / "tune_spaces" / "digits_alpha.yaml")).grid()]
    assert alphas[0] == -0.25 and alphas[-1] == 1.5
    rates = [
        v["optimizer.generator_lr"] for v in load_space(str(ROOT / "tune_spaces" / "imagenet64_batch.yaml")).grid()
    ]
    assert rates == pytest.approx([1e-6, 2e-6, 4e-6, 8e-6])


def test_draws_are_in_range_and_belong_to_the_number(tmp_path):
    space = load_space(write(tmp_path, GOOD))
    draws = [space.draw(n) for n in range(200)]
    assert draws == [space.draw(n) for n in range(200)] and draws[0] != draws[1]
    for v in draws:
        assert 0.5 <= v["method.alpha"] <= 1.5 and 1e-5 <= v["optimizer.generator_lr"] <= 1e-2
        assert v["batch.size"] in (64, 128) and v["method.p_mean"] in (-2, -1.5, -1, -0.5, 0)
        assert v["optimizer.fake_score_lr"] == pytest.approx(1e-4 * math.sqrt(v["batch.size"] / 128))
    decades = [math.log10(v["optimizer.generator_lr"]) for v in draws]
    assert sum(d < -3.5 for d in decades) == pytest.approx(100, abs=30)  # half of them in the lower half of the decades
    assert {v["method.p_mean"] for v in draws} == {-2, -1.5, -1, -0.5, 0}


BAD = [
    ("uniform: [0.5, 1.5]", "uniform: [1.5, 0.5]", r"space.yaml:5: fields.method.alpha: .*lower end"),
    ("uniform: [0.5, 1.5]", "uniform: [0.5, 1.5], choice: [1]", r"space.yaml:5: fields.method.alpha: .*one of uniform"),
    ("uniform: [0.5, 1.5]", "unifrom: [0.5, 1.5]", r"space.yaml:5: fields.method.alpha.unifrom: there is no such"),
    ("method.alpha", "method.alhpa", r"space.yaml:5: fields.method.alhpa: .*did you mean 'method.alpha'"),
    ("[64, 128]", "[64, 100]", r"space.yaml:7: fields.batch.size: .*100 is not divisible"),
    ("[1.0e-5, 1.0e-2]", "[1.0e-5, 2.0]", r"space.yaml:6: fields.optimizer.generator_lr: .*2.0 is not allowed"),
    ("[1.0e-5, 1.0e-2]", "[0, 1.0e-2]", r"space.yaml:6: .*positive ends"),
    ("follows: batch.size", "follows: batch.sise", r"fields.optimizer.fake_score_lr: follows 'batch.sise'"),
    ("budget_kimg: 5", "budget_kimg: 0", r"space.yaml:2: budget_kimg: 0 is not allowed"),
    ("preset: digits", "preset: digit", r"space.yaml:1: preset: .*did you mean 'digits'"),
    ("trials: 4", "trails: 4", r"space.yaml:3: trails: there is no such field"),
    ("trials: 4", "search: grid", r"fields.method.alpha: a grid search needs choice"),
    ("trials: 4", "settings: {run.seed: x}", r"space.yaml:3: settings.run.seed: .*'x' is not allowed"),
    ("fields:", "fields: [", r"not readable as YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[new for _, new, _ in BAD])
def test_errors_name_line_and_field(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError, match=message):
        load_space(write(tmp_path, GOOD.replace(old, new, 1)))


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"'none.yaml' is not a file; there are: .*digits.yaml"):
        load_space("none.yaml")
    assert isinstance(load_space(str(Path("tune_spaces/digits.yaml"))), Space)
