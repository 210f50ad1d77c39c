"""What says how a network is computed does not change what is computed: checkpointing, layout, compilation; `auto`."""

import pytest
import torch

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training.checkpoints import complete_checkpoints, read_progress
from sid_ray.training.distributed import join_world
from sid_ray.training.opening import open_run
from sid_ray.training.outside import PlainOutside
from sid_ray.training.run_directory import start_of
from sid_ray.training.settling import computes_in_bf16, settle
from tests.ranks import on_ranks
from tests.training.test_worker import assert_same, end_state

pytestmark = pytest.mark.distributed
SMALL = {"batch__size": 8, "engine__micro_batch": 4, "run__total_kimg": 0.024, "evaluation__num_images": 0}


def test_checkpointing_and_layout_change_nothing(job):
    """Dropout on: a recomputed block draws the same masks, at every stage and in every memory mode."""
    variants = {
        "plain": {},
        "checkpointing": {"engine__activation_checkpointing": True},
        "checkpointing-minimal": {"engine__activation_checkpointing": True, "method__memory": "minimal"},
        "checkpointing-stage3": {"engine__activation_checkpointing": True, "engine__zero_stage": 3},
        "channels-last": {"engine__channels_last": True},
    }
    on_ranks(1, "tests.job_worker", *(job(name, **(SMALL | settings)) for name, settings in variants.items()))
    plain = end_state(job.runs / "plain")
    for name in variants:
        assert_same(end_state(job.runs / name), plain, tolerance=1e-5)


@pytest.mark.slow
def test_compiled_networks_follow_the_others(job):
    """The same masks as without, and the same again in a rebuilt forward pass (memory minimal)."""
    on_ranks(1, "tests.job_worker", job("plain", **SMALL))
    for name, settings in {"compiled": {}, "compiled-minimal": {"method__memory": "minimal"}}.items():
        on_ranks(1, "tests.job_worker", job(name, engine__compile=True, **(SMALL | settings)), timeout=1200)
        assert_same(end_state(job.runs / name), end_state(job.runs / "plain"), tolerance=1e-5)


def test_auto_is_settled_once_per_run(job):
    """What a run began with it keeps, whatever memory there is later; a person's own number must be the same."""

    def settled(name, **changes):
        config = load_config(job(name, **(auto | changes)))
        run, changed = open_run(config)
        assert changed == [text for text in changed if text.startswith("engine.memory_gb")]
        return settle(config, run, start_of(config, run), join_world(), PlainOutside()), run

    auto = SMALL | {"engine__micro_batch": "auto", "engine__precision": "auto"}
    config, run = settled("auto")
    expected = "bf16" if computes_in_bf16(torch.device("cpu")) else "fp32"
    assert (config.engine.micro_batch, config.engine.precision) == (8, expected)
    assert load_config(str(run.config_yaml)) == config
    assert settled("auto", engine__memory_gb=1e-9)[0].engine.micro_batch == 8
    assert settled("auto", engine__micro_batch=8)[0].engine.precision == expected
    with pytest.raises(UserError, match=r"engine\.micro_batch: 8 -> 4"):
        settled("auto", engine__micro_batch=4)
    with pytest.raises(UserError, match=r"engine\.micro_batch: auto: not one image fits into 1e-09 GB"):
        settled("little", engine__memory_gb=1e-9)
    assert settled("unsharded", engine__zero_stage=0)[0].engine.precision == "fp32"


@pytest.mark.slow
def test_a_run_with_auto_goes_on_with_more_workers(job):
    settings = SMALL | {"engine__micro_batch": "auto", "engine__precision": "auto"}
    said = on_ranks(1, "tests.job_worker", job("auto", **settings))
    assert "engine.micro_batch auto is 8" in said and "engine.precision auto is" in said
    said = on_ranks(2, "tests.job_worker", job("auto", **(settings | {"run__total_kimg": 0.048})))
    assert "auto is" not in said
    assert read_progress(complete_checkpoints(job.runs / "auto" / "checkpoints")[0]).nimg == 48


def test_networks_without_blocks_cannot_be_checkpointed(job):
    own = {"teacher__path": "python:tests.own_networks:teacher", "init__student": "python:tests.own_networks:student"}
    measured = {"evaluation__features": "pixels", "evaluation__reference": "teacher"}
    with pytest.raises(UserError, match=r"engine\.activation_checkpointing: true: .* has no blocks"):
        open_run(load_config(job("own", engine__activation_checkpointing=True, **own, **measured)))
    assert not (job.runs / "own").exists()
