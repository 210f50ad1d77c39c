"""What a person sees of a sweep while it runs."""

import math

import pexpect
from rich.console import Console

from sid_ray.launch.sweeps.journal import Journal, SweepDirectory, TrialRecord
from sid_ray.launch.sweeps.space import Space
from sid_ray.launch.sweeps.table import SweepDisplay, print_outcome, short, trial_table
from tests.launching import SID_RAY

SPACE = Space.model_validate(
    {"preset": "digits", "budget_kimg": 12.8, "trials": 2, "fields": {"method.alpha": {"uniform": [0.5, 1.5]}}}
)
RECORD = TrialRecord(name="t001", number=1, repeat=0, values={"method.alpha": 0.75})


def test_plain_lines_tell_starts_evaluations_and_ends(capsys):
    display = SweepDisplay(SPACE)
    display.show(RECORD)
    display.show(RECORD.after(6400, 9.8765))
    display.show(RECORD.after(6400, 9.8765))  # its clock went on, and no more
    display.show(RECORD.after(6400, 9.8765).model_copy(update={"state": "behind", "reason": "too slow"}))
    assert capsys.readouterr().out.splitlines() == [
        "t001  starts: alpha 0.75  [0 of 2 runs ended]",
        "t001       6.4 of 12.8 kimg  FID 9.88 (best 9.88)",
        "t001  behind at 6.4 kimg, best FID 9.88: too slow  [1 of 2 runs ended, best FID 9.877 (t001)]",
    ]


def test_what_goes_on_is_told_as_such_and_quiet_is_quiet(tmp_path, capsys):
    journal = Journal(SweepDirectory(tmp_path))
    journal.put(RECORD.after(6400, 9.8))
    display = SweepDisplay(SPACE)
    display.begin(journal, "here")
    display.show(RECORD.after(6400, 9.8))
    assert capsys.readouterr().out.splitlines() == [
        "resuming sweep in here: 0 of 2 runs ended, best FID 9.800 (t001)",
        "t001  goes on: alpha 0.75  [0 of 2 runs ended, best FID 9.800 (t001)]",
    ]
    quiet = SweepDisplay(SPACE, quiet=True)
    quiet.begin(journal, "here")
    quiet.show(RECORD)
    quiet.note("x")
    assert capsys.readouterr().out == ""


def test_a_row_per_run():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trial_table(SPACE, [RECORD.after(6400, 9.8765).after(9600, math.nan)]))
    heads, row = console.export_text().splitlines()
    assert heads.split() == ["run", "state", "kimg", "FID", "best", "alpha"]
    assert row.split() == ["t001", "running", "9.6", "nan", "9.88", "0.75"]


def test_numbers_are_short():
    assert [short(v) for v in (0.000123456, 128, None, math.inf, math.nan, "a", True)] == [
        "0.000123", "128", "-", "-", "nan", "a", "True",
    ]  # fmt: skip


def test_the_end_names_what_failed_and_what_to_do_next(capsys):
    failed = RECORD.model_copy(update={"state": "failed", "reason": "teacher.path: gone"})
    print_outcome("runs/s", [failed], None, True)
    assert capsys.readouterr().out.splitlines() == [
        "1 failed", "t001 failed: teacher.path: gone", "no run has an FID; the runs are in runs/s/trials",
    ]  # fmt: skip
    print_outcome("runs/s", [RECORD], "runs/s/best.yaml", False)
    assert "the same command again" in (out := capsys.readouterr().out) and "sid-ray distill runs/s/best.yaml" in out


def test_a_terminal_shows_a_table(tmp_path):
    """A sweep that has ended is shown as it stands, and its report is written again; nothing is started."""
    (tmp_path / "mine.yaml").write_text(
        "preset: digits\nbudget_kimg: 1\ntrials: 1\nfields: {method.alpha: [1.2, 1.0]}\n"
    )
    from sid_ray.launch.sweeps.plan import plan_sweep

    plan = plan_sweep(str(tmp_path / "mine.yaml"), {"run.storage": str(tmp_path / "runs")})
    plan.directory.write("sweep.yaml", plan.recorded())
    done = TrialRecord(name="t000", number=0, repeat=0, values={"method.alpha": 1.2}, state="finished")
    Journal(plan.directory).put(done.after(1000, 7.5))
    output, code = pexpect.run(
        f"{SID_RAY} sweep mine.yaml", withexitstatus=True, cwd=tmp_path, timeout=120, encoding="utf-8"
    )
    assert code == 0 and "1 of 1 runs ended" in output and "finished" in output and "\x1b[" in output, output
    assert (tmp_path / "runs" / "sweep-mine" / "report.md").is_file()
