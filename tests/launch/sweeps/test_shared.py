"""What trials share is made once: a converted teacher, statistics of its samples."""

import pytest

from sid_ray.config import load_config, override
from sid_ray.errors import UserError
from sid_ray.evaluation.statistics import load_reference
from sid_ray.launch.sweeps.journal import SweepDirectory
from sid_ray.launch.sweeps.shared import share
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.evaluator import Evaluator
from sid_ray.training.opening import absolute_paths, open_run
from sid_ray.training.run_directory import RunDirectory, start_of
from tests.diffusers_folders import write_pipeline


def test_nothing_is_made_where_nothing_needs_to_be(tmp_path):
    config = absolute_paths(load_config("digits", {"run.storage": str(tmp_path)}))
    assert share(config, SweepDirectory.of(config), print) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_foreign_teacher_and_its_reference(place, tmp_path, request):
    write_pipeline(tmp_path / "teacher")
    storage = f"s3://{request.getfixturevalue('bucket')}/sweeps" if place == "s3" else str(tmp_path / "sweeps")
    fields = {
        "teacher.path": str(tmp_path / "teacher"),
        "evaluation.reference": "teacher",
        "evaluation.features": "pixels",
        "evaluation.num_images": 30,
        "evaluation.teacher_steps": 3,
        "run.storage": storage,
    }
    config = absolute_paths(load_config("digits", fields))
    directory, said = SweepDirectory.of(config), []
    directory.path.mkdir(parents=True)
    shared = share(config, directory, said.append)
    assert shared == {
        "teacher.path": f"{directory.address}/teacher",
        "evaluation.reference": f"{directory.address}/reference.npz",
    }
    assert len(said) == 2 and share(config, directory, said.append) == shared and len(said) == 2
    trial = override(config, {**shared, "run.storage": str(tmp_path / "trials"), "run.name": "t000"})
    run, _ = open_run(trial)
    assert not run.teacher.exists() and load_denoiser(trial.teacher.path)[0].image_shape == (1, 8, 8)
    mine = load_reference(shared["evaluation.reference"])

    class Alone:
        rank, size, is_first, device = 0, 1, True, "cpu"

        def once(self, make):
            return make()

    own = override(config, {"run.storage": str(tmp_path / "own"), "run.name": "own"})
    own_run, _ = open_run(own)
    start = start_of(own, own_run)
    theirs = Evaluator(
        own, RunDirectory.of(own), start, Alone(), start.teacher()[0]
    ).reference  # what a run makes alone
    assert abs(mine.mu - theirs.mu).max() < 1e-6 and abs(mine.sigma - theirs.sigma).max() < 1e-6


def test_what_cannot_run_is_refused_before_anything_is_made(tmp_path):
    fields = {"run.storage": str(tmp_path / "s"), "teacher.path": str(tmp_path / "nothing")}
    config = absolute_paths(load_config("digits", fields))
    with pytest.raises(UserError, match=r"teacher.path"):
        share(config, SweepDirectory.of(config), print)
    assert not (tmp_path / "s").exists()
