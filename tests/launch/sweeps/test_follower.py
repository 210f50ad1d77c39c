"""What a sweep makes of the results that Ray Tune hands it: states, reasons, and what a resumed one remembers."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.launch.sweeps.follower import Follower, Proposer
from sid_ray.launch.sweeps.journal import Journal, SweepDirectory
from sid_ray.launch.sweeps.space import Space
from sid_ray.launch.sweeps.tuning import _scheduler

SPACE = Space.model_validate(
    {"preset": "digits", "budget_kimg": 12.8, "trials": 4, "fields": {"method.alpha": {"uniform": [0.5, 1.5]}}}
)
EVALUATIONS = (400, 800, 1600, 3200, 6400, 9600, 12_800)


class Tune:
    """The calls that Ray Tune makes, in its order."""

    def __init__(self, folder, space=SPACE):
        self.journal = Journal(SweepDirectory(folder))
        self.shown = []
        base = load_config("digits")
        self.proposer = Proposer(space, self.journal, lambda unit, values: base, self.shown.append)
        self.asked_to_leave = []
        self.follower = Follower(space, base, self.journal, self.shown.append, self.asked_to_leave.append)

    def start(self, trial_id):
        config = self.proposer.suggest(trial_id)
        if config == "FINISHED":
            return None
        self.follower.on_trial_start(0, [], SimpleNamespace(config=config))
        return config

    def report(self, config, nimg, fid, **more):
        return self.follower(config["name"], {"nimg": nimg, "fid": fid, "config": config, **more})

    def complete(self, config):
        self.follower.on_trial_complete(0, [], SimpleNamespace(config=config))

    def state(self, name):
        return self.journal.records[name].state


@pytest.fixture
def tune(tmp_path):
    return Tune(tmp_path)


def test_a_whole_trial_finishes_with_its_last_report(tune):
    config = tune.start("a")
    assert not any(tune.report(config, n, 50 * (n / 400) ** -0.7) for n in EVALUATIONS)
    assert tune.state("t000") == "running"
    assert not tune.report(config, 12_800, 4.4, finished=True, fresh_fids=[4.6])
    tune.complete(config)
    record = tune.journal.records["t000"]
    assert record.state == "finished" and record.fresh_fids == [4.6] and len(record.curve) == 7 and record.seconds > 0


def test_divergence_and_hopelessness_are_told_apart_and_remembered(tune, tmp_path):
    good, bad, slow = tune.start("a"), tune.start("b"), tune.start("c")
    for n in EVALUATIONS:
        tune.report(good, n, 50 * (n / 400) ** -0.7)
    assert not tune.report(bad, 400, 90.0) and not tune.report(bad, 800, math.nan)
    assert tune.asked_to_leave == ["t001"]
    tune.report(bad, 1000, 3.0)  # on its way out
    tune.report(bad, 1000, 3.0, finished=False, fresh_fids=[])
    tune.complete(bad)
    assert len(tune.journal.records["t001"].curve) == 2
    for n in EVALUATIONS:
        tune.report(slow, n, 80 * (n / 400) ** -0.05)
    assert tune.asked_to_leave == ["t001", "t002"] and tune.journal.records["t002"].nimg < 12_800
    assert "power law" in tune.journal.records["t002"].reason
    assert tune.state("t001") == "diverged" and tune.state("t002") == "behind"

    resumed = Tune(tmp_path)
    assert [unit.name for unit in resumed.proposer.left] == ["t000", "t003"]
    assert resumed.follower.power_law.target("t003") == pytest.approx(50 * 32**-0.7)


def test_one_that_fails_does_not_end_the_sweep_and_is_tried_again(tune, tmp_path):
    config = tune.start("a")
    assert not tune.report(config, 0, math.nan, failed="teacher.path: nothing there")
    tune.complete(config)
    assert tune.state("t000") == "failed" and "teacher.path" in tune.journal.records["t000"].reason
    died = tune.start("b")
    tune.follower.on_trial_error(0, [], SimpleNamespace(config=died, get_error=lambda: "SIGKILL"))
    assert tune.state("t001") == "failed" and tune.start("c")["name"] == "t002"
    assert [unit.name for unit in Tune(tmp_path).proposer.left] == ["t000", "t001", "t002", "t003"]


def test_impossible_values_are_recorded_and_passed_over(tmp_path):
    tune = Tune(tmp_path)

    def configure(unit, values):
        if unit.number == 0:
            raise UserError("batch.size: 3 is not divisible")
        return load_config("digits")

    tune.proposer.configure = configure
    assert tune.start("a")["name"] == "t001" and tune.state("t000") == "failed"


def test_a_stop_leaves_trials_running_and_starts_none(tune):
    config = tune.start("a")
    tune.report(config, 400, 40.0)
    tune.proposer.stopping = True
    tune.report(config, 600, 40.0, finished=False, fresh_fids=[])
    tune.complete(config)
    assert tune.state("t000") == "running" and tune.start("b") is None


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_tunes_schedulers_give_up_gently(scheduler, tmp_path):
    tune = Tune(tmp_path, SPACE.model_copy(update={"scheduler": scheduler, "power_law": False}))
    rule = _scheduler(tune.follower.space, tune.follower.give_up)
    controller = SimpleNamespace(get_live_trials=list)
    trials = [Trial(trial_id=str(i), status="RUNNING", config=tune.start(str(i))) for i in range(4)]
    for trial in trials:
        rule.on_trial_add(controller, trial)
    for n in EVALUATIONS:
        for i, trial in enumerate(trials):
            fid = (10 + 20 * i) * (n / 400) ** -0.3
            tune.report(trial.config, n, fid)
            result = {"nimg": n, "fid": fid, "training_iteration": n, "time_total_s": n}
            assert rule.on_trial_result(controller, trial, result) == "CONTINUE"
    assert "t003" in tune.asked_to_leave and "t000" not in tune.asked_to_leave
    assert tune.state("t003") == "behind" and scheduler in tune.journal.records["t003"].reason


@dataclass(eq=False)
class Trial:
    """What the schedulers ask of one."""

    trial_id: str
    status: str
    config: dict


def test_pickles_of_them_are_empty(tune):
    assert tune.follower.__getstate__() == {} == tune.proposer.__getstate__()
