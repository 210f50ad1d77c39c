"""The golden trajectories through DeepSpeed engines: every stage, 1 and 2 ranks, accumulation 1 and 2."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.golden_numbers import TRAJECTORIES, load_golden, under
from tests.launching import torchrun

STAGES = (0, 1, 2, 3)


def combinations(ranks):
    """(trajectory, stage, micro_batch): accumulation 1 and 2 per rank for one trajectory, 1 for the others."""
    for name, stage in itertools.product(TRAJECTORIES, STAGES):
        batch = 16 if "gbeta" in name else 8
        for accumulation in (1, 2) if name == "cond_alpha1.2" else (1,):
            yield name, stage, batch // (accumulation * ranks)


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["1rank", "2ranks"])
def replays(request, tmp_path_factory):
    """End states of all combinations, made in one process group (starting one costs more than the work)."""
    folder = tmp_path_factory.mktemp("golden")
    jobs = {c: folder / f"{i}.safetensors" for i, c in enumerate(combinations(request.param))}
    arguments = [
        {"name": name, "out": str(out), "zero_stage": stage, "micro_batch": micro}
        for (name, stage, micro), out in jobs.items()
    ]
    torchrun(request.param, "tests.engine_worker", json.dumps(arguments))
    return {c: load_file(out) for c, out in jobs.items()}


@pytest.mark.distributed
def test_trajectories_through_engines(replays):
    for (name, stage, micro), state in replays.items():
        where = f"{name}, stage {stage}, micro batch {micro}"
        numbers, meta = load_golden(f"sid/{name}")
        for step in range(meta["iterations"]):
            for i, role in enumerate(("fake", "generator")):
                expected = numbers[f"iter{step}.{role}.loss"][0]
                torch.testing.assert_close(
                    state["losses"][step, i], expected, rtol=1e-4, atol=2e-6, msg=lambda m, w=where: f"{w}: {m}"
                )
        for role in ("generator", "fake_score", "ema"):
            expected, actual = under(numbers, f"final.{role}."), under(state, f"{role}.")
            errors = torch.cat([(v - expected[k]).abs().flatten() for k, v in actual.items()])
            share = (errors <= 1e-5).float().mean().item()
            assert share >= 0.999, f"{where}: {role}: {share:.5f} of the parameters agree"
            # Adam turns rounding in a vanishing gradient into steps of up to lr sqrt(t), of either sign.
            assert errors.max() <= 2 * meta["lr"] * sum(t**0.5 for t in range(1, meta["iterations"] + 1)), where
