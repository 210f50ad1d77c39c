"""A sweep before it starts: what is refused, where it lies, how many trials fit."""

import pytest
import yaml

from sid_ray.errors import UserError
from sid_ray.launch.sweeps.journal import SweepDirectory
from sid_ray.launch.sweeps.plan import check_same, describe_sweep, plan_sweep
from sid_ray.launch.sweeps.search import Unit
from sid_ray.launch.sweeps.tuning import trials_at_once

SPACE = """\
preset: digits
budget_kimg: 5
trials: 3
settings: {cluster.workers: 1, evaluation.num_images: 300, optimizer.ema_halflife_kimg: 7}
fields:
  method.alpha: {uniform: [0.5, 1.5]}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plans the space with text replaced and fields overridden."""
    monkeypatch.chdir(tmp_path)

    def make(*replace, **overrides):
        (tmp_path / "mine.yaml").write_text(SPACE.replace(*replace) if replace else SPACE)
        return plan_sweep("mine.yaml", {k.replace("__", "."): v for k, v in overrides.items()})

    return make


def nodes(*resources):
    return [{"Alive": True, "Resources": r} for r in resources]


def test_where_it_lies_and_what_a_trial_is(plan, tmp_path):
    config = plan().config(Unit("t002-s1", 2, 1), {"method.alpha": 0.7}, {"teacher.path": "builtin:digits"})
    assert plan().directory.path == tmp_path / "runs" / "sweep-mine"
    assert config.run.storage == str(tmp_path / "runs" / "sweep-mine" / "trials") and config.run.name == "t002-s1"
    assert (config.run.seed, config.method.alpha, config.run.total_kimg) == (1, 0.7, 5)
    assert config.guard.policy == "warn" and config.evaluation.num_images == 300
    elsewhere = plan(run__storage="s3://bucket/x", run__name="mine").directory
    assert elsewhere.address == "s3://bucket/x/mine"


def test_the_best_settings_are_a_preset_without_the_sweeps_own_measures(plan):
    preset = plan().preset({"method.alpha": 0.7})
    assert (preset.method.alpha, preset.optimizer.ema_halflife_kimg) == (0.7, 7)
    assert preset.evaluation.num_images == 2000 and preset.run.total_kimg == 51.2 and preset.guard.policy == "rollback"
    assert preset.run.name == "sweep-mine-best"


def test_a_searched_field_cannot_be_given(plan):
    with pytest.raises(UserError, match=r"method.alpha: is searched"):
        plan(method__alpha=1.0)
    with pytest.raises(UserError, match=r"method.alfa: there is no such field"):
        plan(method__alfa=1.0)


def test_another_sweep_is_not_continued(plan, tmp_path):
    first = plan()
    first.directory.write("sweep.yaml", first.recorded())
    check_same(plan(), first.directory)
    check_same(plan("trials: 3", "trials: 9\ntrials_at_once: 1\nrepeats: 2"), first.directory)
    check_same(plan(cluster__workers=2), first.directory)
    with pytest.raises(UserError, match=r"fields: .*1.5.*1.2"):
        check_same(plan("1.5]", "1.2]"), first.directory)
    with pytest.raises(UserError, match=r"optimizer.ema_halflife_kimg: 7.0 -> 8.0"):
        check_same(plan("kimg: 7", "kimg: 8"), first.directory)
    with pytest.raises(UserError, match=r"budget_kimg: 5.0 -> 6.0"):
        check_same(plan("kimg: 5", "kimg: 6"), first.directory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no sweep"):
        check_same(first, SweepDirectory(tmp_path / "other"))


def test_a_dry_run_tells_every_trial(plan):
    text = describe_sweep(plan())
    assert text.count("# trial ") == 3 and "15 kimg in all" in text and "nothing was started" in text
    told = yaml.safe_load(text)
    assert told["space"]["fields"] == {"method.alpha": {"uniform": [0.5, 1.5], "power": 1.0}}


def test_as_many_trials_as_have_room_for_all_their_workers(plan):
    assert trials_at_once(plan(), nodes({"CPU": 2})) == 2
    assert trials_at_once(plan(cluster__workers=3), nodes({"CPU": 4}, {"CPU": 4})) == 2
    assert trials_at_once(plan(cluster__cpus_per_worker=3), nodes({"CPU": 4}, {"CPU": 5})) == 2
    assert trials_at_once(plan(), nodes({"CPU": 1}, {"CPU": 16, "GPU": 4})) == 4
    assert trials_at_once(plan(cluster__use_gpu=False), nodes({"CPU": 1}, {"CPU": 16, "GPU": 4})) == 17
    assert trials_at_once(plan(cluster__workers="2-4"), nodes({"CPU": 5})) == 2
    assert trials_at_once(plan(cluster__workers="auto"), nodes({"CPU": 16, "GPU": 4})) == 1
    dead = [*nodes({"CPU": 2}), {"Alive": False, "Resources": {"CPU": 8}}]
    assert trials_at_once(plan(), dead) == 2
    with pytest.raises(UserError, match=r"cluster.workers: a trial needs 4 .* room for 2"):
        trials_at_once(plan(cluster__workers=4), nodes({"CPU": 2}))
    assert trials_at_once(plan("trials: 3", "trials: 3\ntrials_at_once: 7"), nodes({"CPU": 2})) == 7
