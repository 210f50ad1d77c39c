"""`sid-ray doctor` as a user runs it, and its verdicts on what this machine cannot show."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch

from sid_ray.cli import main
from sid_ray.config import load_config
from sid_ray.training import checkup
from sid_ray.training.checkup import Finding, check_run, check_storage, compare_clocks
from tests.launching import ROOT


def doctor(*arguments, cwd, **env):
    """(exit code, output) of the command."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [sys.executable, "-m", "sid_ray", "doctor", *arguments],
        cwd=cwd, env=environment, text=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def lines(output):
    """What was found well, and what not: two lists of the things looked at."""
    rows = [re.match(r"(ok|problem) +(\S+(?: memory)?)", line) for line in output.splitlines()]
    return [[row[2] for row in rows if row and row[1] == state] for state in ("ok", "problem")]


def test_a_run_that_can_be_had_and_one_that_cannot(bucket, tmp_path):
    code, output = doctor("digits", "--run.storage", f"s3://{bucket}/runs", cwd=tmp_path)
    well, problems = lines(output)
    wanted = {"versions", "GPU", "bf16", "NCCL", "shared memory", "disk", "ports", "storage", "clock", "teacher"}
    assert wanted | {"measuring"} <= {*well, *problems}, output
    assert not {"versions", "bf16", "ports", "storage", "clock", "teacher", "measuring"} & {*problems}, output
    assert code == bool(problems) and (f"{len(problems)} problem(s)" in output) == bool(problems)

    bad = ["--run.storage", "s3://no-such-bucket/runs", "--teacher.path", "nowhere"]
    code, output = doctor("digits", *bad, cwd=tmp_path)
    assert code == 1 and {"storage", "teacher"} <= {*lines(output)[1]}, output
    after = output.splitlines()
    for i, line in enumerate(after):
        if line.startswith("problem"):
            assert after[i + 1].strip().startswith("-> "), f"nothing says what to do about {line!r}"


def test_arguments_without_a_configuration_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sid-ray", "doctor", "--run.storage=x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "PRESET_OR_YAML: is missing before" in capsys.readouterr().err


def test_storage_is_left_as_it_was(tmp_path, bucket):
    from sid_ray.storage.s3 import S3Folder

    assert check_storage(str(tmp_path / "runs")).remedy is None and list((tmp_path / "runs").iterdir()) == []
    assert check_storage(f"s3://{bucket}/runs").remedy is None and not S3Folder(f"s3://{bucket}").objects()
    (tmp_path / "file").write_text("")
    assert "cannot be used" in check_storage(str(tmp_path / "file" / "runs")).text


def test_what_a_run_reads_is_named(tmp_path):
    config = load_config("digits", {"evaluation.reference": "none.npz", "run.storage": str(tmp_path / "runs")})
    by_name = {finding.what: finding for finding in check_run(config)}
    assert by_name["storage"].remedy is None
    assert "none.npz" in by_name["measuring"].text and "evaluation.reference" in by_name["measuring"].remedy


def test_versions_are_those_of_the_project(monkeypatch):
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    least = dict(re.match(r"(\w+)(?:\[.*\])?>=(\S+)", text).groups() for text in project["dependencies"])
    assert checkup.LEAST.items() <= least.items()
    assert project["requires-python"] == f">={'.'.join(map(str, checkup.LEAST_PYTHON))}"
    assert all(f.remedy is None for f in checkup._versions())
    monkeypatch.setattr(checkup, "LEAST", {"torch": "99.1", "no-such-package": "1.0"})
    python, old, absent = checkup._versions()
    assert python.remedy is None and "torch>=99.1" in old.remedy and absent.text.endswith("is not installed")


def test_little_shared_memory_and_clocks_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup, "LEAST_SHARED_MEMORY", 2**60)
    assert "--shm-size" in checkup._shared_memory(str(tmp_path)).remedy
    assert compare_clocks("the storage's", 3.0) == Finding("clock", "agrees with the storage's")
    slow = compare_clocks("the storage's", -900.0)
    assert slow.text == "900 s behind the storage's" and "NTP" in slow.remedy


def test_a_name_that_means_the_machine_itself_is_no_name_for_others(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert "/etc/hosts" in checkup.check_name("10.0.0.5").remedy
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.5")
    assert checkup.check_name("10.0.0.5").remedy is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPUs")
def test_a_driver_whose_gpus_torch_does_not_see(monkeypatch, tmp_path):
    assert checkup._gpus() == [Finding("GPU", "none; runs go on the CPU")] or "driver" in checkup._gpus()[0].text
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = checkup._gpus()
    assert "580.1" in finding.text and "install" in finding.remedy
