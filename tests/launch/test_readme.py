"""README's commands and its program, as they are written, with less to compute; and the progress bar of a terminal."""

import re
import shlex
import subprocess
import sys

import pexpect
import pytest

from tests.launching import FEW, ROOT, SID_RAY, command

pytestmark = pytest.mark.ray
README = (ROOT / "README.md").read_text()


def blocks(language):
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Arguments of every sid-ray command in the shell blocks."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0].endswith("sid-ray")]


def test_make_targets_exist():
    targets = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["run", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_commands_of_a_finished_run(whole):
    """All but the runs themselves, in the directory of a finished run."""
    known = [arguments for arguments in commands() if arguments[0] != "distill" or "--help" in arguments]
    assert len(known) >= 3
    for arguments in known:
        done = command(*arguments, cwd=whole[0])
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    assert (whole[0] / "grid.png").is_file()


def test_the_run_with_overrides_in_a_terminal(tmp_path):
    """A terminal shows one line that moves; the run gives what it says."""
    (arguments,) = [a for a in commands() if a[0] == "distill" and "--help" not in a]
    line = shlex.join([SID_RAY, *arguments, *FEW])
    output, code = pexpect.run(line, withexitstatus=True, cwd=tmp_path, timeout=300, encoding="utf-8")
    assert code == 0, output
    assert "distilling" in output and "\x1b[" in output and "━" in output
    assert re.search(r"of 1\.92 kimg .* images/s", output)
    assert (tmp_path / "runs" / "alpha1" / "generator" / "model.safetensors").is_file()


def test_the_program(tmp_path):
    """The Python block, with fewer images to go."""
    (program,) = blocks("python")
    fewer = ", ".join(f'"{k.removeprefix("--")}": {v}' for k, v in zip(FEW[::2], FEW[1::2], strict=True))
    assert '"run.total_kimg": 64' in program
    program = program.replace('"run.total_kimg": 64', fewer) + "\nassert images.shape == (10, 1, 8, 8)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
