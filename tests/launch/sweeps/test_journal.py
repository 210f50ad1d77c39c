"""The journal: what a repeated command reads back."""

import math

from sid_ray.config import load_config
from sid_ray.launch.sweeps.journal import Journal, SweepDirectory, TrialRecord
from sid_ray.storage.s3 import S3Folder

RECORD = TrialRecord(name="t007", number=7, repeat=0, values={"method.alpha": 1.0, "batch.size": 128})


def test_records_survive_also_an_fid_that_is_not_finite(tmp_path):
    record = RECORD.after(0, 90.0).after(100, 40.0).after(200, math.nan).after(300, math.inf)
    Journal(SweepDirectory(tmp_path)).put(record.model_copy(update={"state": "diverged", "reason": "FID nan"}))
    again = Journal(SweepDirectory(tmp_path)).records["t007"]
    assert again.values == RECORD.values and again.state == "diverged" and again.ended and again.nimg == 300
    assert again.curve[:2] == [(0, 90.0), (100, 40.0)] and math.isnan(again.curve[2][1])
    assert again.best_fid == 40.0 and math.isinf(again.last_fid)


def test_what_is_measured_again_after_an_interruption_counts_once():
    record = RECORD.after(100, 40.0).after(200, 30.0).after(300, 20.0).after(200, 31.0)
    assert record.curve == [(100, 40.0), (200, 31.0)] and record.nimg == 200


def test_a_start_is_no_result_and_failed_trials_are_tried_again():
    assert RECORD.after(0, 5.0).best_fid == math.inf
    assert not RECORD.model_copy(update={"state": "failed"}).ended and not RECORD.ended


def test_a_sweep_on_s3_is_read_by_another_machine(bucket, monkeypatch, tmp_path):
    config = load_config("digits", {"run.storage": f"s3://{bucket}/sweeps", "run.name": "one"})
    directory = SweepDirectory.of(config)
    assert directory.address == f"s3://{bucket}/sweeps/one" and directory.trials == f"s3://{bucket}/sweeps/one/trials"
    Journal(directory).put(RECORD.after(100, 3.0))
    S3Folder(directory.trials).write("t007/config.yaml", b"a trial's own")
    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "another machine"))
    other = SweepDirectory.of(config)
    assert other.path != directory.path and other.is_empty()
    other.pull()
    assert Journal(other).records["t007"].best_fid == 3.0 and not (other.path / "trials").exists()
