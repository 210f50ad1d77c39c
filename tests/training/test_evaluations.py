"""FID beside the training: the same figures as inline, in order, through stops, failures and changes of mode."""

import pytest
import torch

from sid_ray.config import load_config
from sid_ray.teachers.sources import load_generator
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.board import read_metrics
from sid_ray.training.checkpoints import complete_checkpoints, read_progress
from sid_ray.training.distributed import join_world
from sid_ray.training.evaluations import MOST_WAITING, evaluations
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory
from tests.ranks import on_ranks


class Elsewhere:
    """An outside whose jobs are done when the test says so."""

    def __init__(self):
        self.jobs, self.done, self.notes = {}, {}, []

    def begin(self, name, job):
        self.jobs[name] = job

    def results(self):
        done, self.done = self.done, {}
        return done

    def forget(self):
        self.jobs.clear()

    def note(self, text):
        self.notes.append(text)

    def finish(self, *names, fail=False):
        for name in map(str, names):
            job = self.jobs.pop(name)
            self.done[name] = None if fail else job()


class Means:
    """An evaluator whose FID is the mean of the weights; counts what the workers measure themselves."""

    def __init__(self):
        self.own = []

    def generator_fid(self, average):
        self.own.append(float(average["w"].mean()))
        return self.own[-1]

    def job(self, average):
        return lambda: float(average["w"].mean())


class Setup:
    def __init__(self, folder, mode="async", progress=None, world=None):
        config = load_config("digits", {"evaluation.mode": mode})
        self.run = RunDirectory(folder)
        self.elsewhere, self.means, self.progress = Elsewhere(), Means(), progress or Progress()
        attempt = BestEffort(self.elsewhere.note)
        self.it = evaluations(config, self.run, join_world(), self.means, self.progress, self.elsewhere, attempt)

    def evaluate(self, nimg, now=False):
        self.progress.nimg = nimg
        return self.told(self.it.evaluate({"w": torch.full((3,), float(nimg))}, now))

    def told(self, found):
        return [(f.nimg, f.fid, float(f.average()["w"][0])) for f in found]

    @property
    def files(self):
        return sorted(int(p.stem.removeprefix("nimg-")) for p in self.run.averages.glob("*.safetensors"))


def test_results_are_taken_up_in_order(tmp_path):
    s = Setup(tmp_path)
    assert s.evaluate(10) == s.evaluate(20) == s.evaluate(30) == []
    assert s.progress.waiting_for_fid == [10, 20, 30] == s.files
    s.elsewhere.finish(20)
    assert s.told(s.it.arrived()) == []
    s.elsewhere.finish(10)
    assert s.told(s.it.arrived()) == [(10, 10.0, 10.0), (20, 20.0, 20.0)]
    assert s.progress.waiting_for_fid == [30] and s.means.own == []
    s.it.tidy()
    assert s.files == [30]
    assert s.evaluate(40, now=True) == [(30, 30.0, 30.0), (40, 40.0, 40.0)]
    assert s.means.own == [30.0, 40.0] and not s.elsewhere.jobs


def test_what_fails_or_waits_too_long_is_measured_by_the_workers(tmp_path):
    s = Setup(tmp_path)
    for nimg in range(1, MOST_WAITING + 1):
        assert s.evaluate(nimg) == []
    assert s.evaluate(MOST_WAITING + 1) == [(1, 1.0, 1.0)]
    s.elsewhere.finish(1, 3)  # too late, and too early
    s.elsewhere.finish(2, fail=True)
    assert s.told(s.it.arrived()) == [(2, 2.0, 2.0), (3, 3.0, 3.0)]
    assert s.means.own == [1.0, 2.0]


@pytest.mark.parametrize("mode", ["async", "inline"])
def test_a_resumed_run_takes_up_what_was_out(tmp_path, mode):
    before = Setup(tmp_path)
    before.evaluate(10)
    before.evaluate(20)
    s = Setup(tmp_path, mode, before.progress.model_copy())
    found = s.told(s.it.resume())
    if mode == "async":
        assert found == [] and set(s.elsewhere.jobs) == {"10", "20"}
        s.elsewhere.finish(10, 20)
        found = s.told(s.it.arrived())
    assert found == [(10, 10.0, 10.0), (20, 20.0, 20.0)] and s.progress.waiting_for_fid == []
    s.it.tidy()
    assert s.files == []


def test_a_disk_that_fails_costs_no_evaluation(tmp_path):
    s = Setup(tmp_path)
    s.evaluate(10)
    (tmp_path / "averages").rename(tmp_path / "elsewhere")
    (tmp_path / "averages").write_text("no folder")
    s.elsewhere.finish(10)
    s.it.results |= {10: s.elsewhere.results()["10"]}
    found = s.it.evaluate({"w": torch.full((3,), 20.0)}, now=False)
    assert [(f.nimg, f.fid) for f in found] == [(10, 10.0), (10, 20.0)] and s.means.own == [20.0]
    assert len(s.elsewhere.notes) == 1 and s.progress.waiting_for_fid == []


OFTEN = {"evaluation__every_kimg": 0.032, "run__checkpoint_every_kimg": 0.032, "evaluation__teacher_steps": 0}


def story(run):
    """What a run tells of its FIDs: by image count, and its best."""
    rows = read_metrics(run / "metrics.jsonl")
    fids = [(row["nimg"], row["fid/generator"]) for row in rows if "fid/generator" in row]
    assert len({nimg for nimg, _ in fids}) == len(fids), "told twice"
    progress = read_progress(complete_checkpoints(run / "checkpoints")[0])
    assert progress.waiting_for_fid == []
    return dict(fids), (progress.best_fid, progress.best_nimg, progress.guard.fid.best)


@pytest.mark.distributed
def test_both_modes_tell_the_same(job):
    on_ranks(2, "tests.job_worker", job("inline", **OFTEN), job("async", evaluation__mode="async", **OFTEN))
    assert_the_same_story(job.runs / "async", job.runs / "inline")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_cut_in_half_tells_the_same(job):
    """And another whose second half is inline."""
    halves = {name: {"evaluation__mode": "async", **OFTEN} for name in ("halves", "changed")}
    first = [job(name, run__total_kimg=0.048, **settings) for name, settings in halves.items()]
    on_ranks(2, "tests.job_worker", job("inline", **OFTEN), *first)
    on_ranks(2, "tests.job_worker", job("halves", **halves["halves"]), job("changed", **OFTEN))
    for name in halves:
        assert_the_same_story(job.runs / name, job.runs / "inline", first_end=48)


def assert_the_same_story(run, expected, first_end=None):
    """`first_end`: where a run ended first, and measured its generator besides."""
    told, ours = story(expected), story(run)
    if first_end is not None:
        assert ours[0].pop(first_end) > 0
    assert len(told[0]) > 4 and list(ours[0]) == sorted(ours[0])
    assert ours[0] == pytest.approx(told[0], rel=1e-6)
    assert ours[1] == pytest.approx(told[1], rel=1e-6)
    images = [load_generator(str(path / "generator")).sample(4) for path in (run, expected)]
    assert torch.equal(*images)
    waited_for = {n for path in complete_checkpoints(run / "checkpoints") for n in read_progress(path).waiting_for_fid}
    assert {int(path.stem.removeprefix("nimg-")) for path in (run / "averages").glob("*")} == waited_for
