"""Process faults against ZeRO stages: every cell ends bitwise as the undisturbed run. `make test-faults` runs all."""

from pathlib import Path

import pytest

from tests.faults.harness import FAULTS, STAGES, job, run_cell, undisturbed

QUICK = {("worker 1 killed", 1)}
"""The driver's death is in tests/launch/test_distill.py, a hanging process in tests/training/test_watchdog.py."""

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def whole_at(whole, tmp_path_factory):
    """Function: the run directory of an undisturbed run at a stage, made once."""
    runs = {1: Path(whole[0]) / "runs" / "digits"}

    def at(stage):
        if stage not in runs:
            runs[stage] = undisturbed(tmp_path_factory.mktemp(f"whole{stage}"), job(stage))
        return runs[stage]

    return at


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        pytest.param(fault, stage, marks=() if (fault, stage) in QUICK else pytest.mark.faults)
        for stage in STAGES
        for fault in FAULTS
    ],
)
def test_a_fault_costs_no_more_than_what_came_after_the_last_checkpoint(fault, stage, whole_at, tmp_path):
    cell = run_cell(fault, stage, tmp_path, whole_at(stage))
    if fault == "hang":
        log = (tmp_path / "runs" / "digits" / "error.log").read_text()
        assert "no progress for 20 s" in log and "in happen" in log  # the stack of the rank that slept
    if fault in ("worker 1 killed", "hang", "exception"):
        assert "failure 1 of 3" in cell.output
