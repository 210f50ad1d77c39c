"""What says how a network is computed does not change what is computed: checkpointing, layout, compilation; `auto`."""

import pytest
import torch
import yaml

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training.run_directory import open_run
from sid_ray.training.settling import computes_in_bf16
from tests.launching import torchrun
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
    torchrun(1, "tests.job_worker", *(job(name, **(SMALL | settings)) for name, settings in variants.items()))
    plain = end_state(job.runs / "plain")
    for name in variants:
        assert_same(end_state(job.runs / name), plain, tolerance=1e-5)


@pytest.mark.slow
def test_compiled_networks_follow_the_others(job):
    """The same masks as without, and the same again in a rebuilt forward pass (memory minimal)."""
    torchrun(1, "tests.job_worker", job("plain", **SMALL))
    for name, settings in {"compiled": {}, "compiled-minimal": {"method__memory": "minimal"}}.items():
        torchrun(1, "tests.job_worker", job(name, engine__compile=True, **(SMALL | settings)), timeout=1200)
        assert_same(end_state(job.runs / name), end_state(job.runs / "plain"), tolerance=1e-5)


def test_auto_is_settled_once_per_run(job):
    """What a run began with it keeps, on two workers as on one, whatever memory there is then."""
    settings = SMALL | {"engine__micro_batch": "auto", "engine__precision": "auto"}
    said = torchrun(1, "tests.job_worker", job("auto", **settings))
    recorded = job.runs / "auto" / "config.yaml"
    engine = yaml.safe_load(recorded.read_text())["engine"]
    expected = "bf16" if computes_in_bf16(torch.device("cpu")) else "fp32"
    assert (engine["micro_batch"], engine["precision"]) == (8, expected)
    assert "engine.micro_batch auto is 8" in said and f"engine.precision auto is {expected}" in said
    longer = settings | {"run__total_kimg": 0.048, "engine__memory_gb": 1e-9}
    said = torchrun(2, "tests.job_worker", job("auto", **longer))
    assert yaml.safe_load(recorded.read_text())["engine"]["micro_batch"] == 8 and "auto is" not in said
    with pytest.raises(UserError, match=r"engine\.micro_batch: 8 -> 4"):
        open_run(load_config(job("auto", **(longer | {"engine__micro_batch": 4}))))
    open_run(load_config(job("auto", **(longer | {"engine__micro_batch": 8}))))


def test_too_little_memory_is_said(job):
    with pytest.raises(AssertionError, match=r"engine\.micro_batch: auto: not one image fits into 1e-09 GB"):
        torchrun(
            1, "tests.job_worker", job("little", **(SMALL | {"engine__micro_batch": "auto", "engine__memory_gb": 1e-9}))
        )


def test_networks_without_blocks_cannot_be_checkpointed(job):
    own = {"teacher__path": "python:tests.own_networks:teacher", "init__student": "python:tests.own_networks:student"}
    measured = {"evaluation__features": "pixels", "evaluation__reference": "teacher"}
    with pytest.raises(UserError, match=r"engine\.activation_checkpointing: true: .* has no blocks"):
        open_run(load_config(job("own", engine__activation_checkpointing=True, **own, **measured)))
    assert not (job.runs / "own").exists()
