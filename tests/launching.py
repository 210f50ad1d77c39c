"""Starting real worker processes from tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SID_RAY = str(Path(sys.executable).parent / "sid-ray")
FEW = [
    "--run.total_kimg", "1.92", "--run.report_every_kimg", "0.256", "--run.checkpoint_every_kimg", "0.64",
    "--run.keep_checkpoints", "20", "--evaluation.num_images", "100", "--evaluation.teacher_steps", "3",
    "--evaluation.confirmations", "1",
]  # fmt: skip
"""What makes a run of the digits preset short: 15 iterations."""
SHORT = ["distill", "digits", *FEW]


def environment() -> dict[str, str]:
    """That of a command: Ray's workers are as nice as the tests, or a busy machine would starve them."""
    return os.environ | {"RAY_worker_niceness": "0"}


def command(*arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run sid-ray to its end."""
    return subprocess.run(
        [SID_RAY, *arguments], cwd=cwd, text=True, capture_output=True, timeout=timeout, env=environment()
    )


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start sid-ray; its output and errors come in one pipe."""
    return subprocess.Popen(
        [SID_RAY, *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=1,
        env=environment(),
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int, module: str, *arguments: str, timeout: float = 300) -> str:
    """Run `python -m module` on gloo ranks and return its output; fails with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-30_000:]  # all ranks' tracebacks, not only the last one's
    return done.stdout


def s3_settings(endpoint: str) -> dict[str, str]:
    """The environment in which boto3 and pyarrow go to an S3 server of the tests."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def upload(folder: Path, bucket: str, prefix: str) -> str:
    """Put a folder on S3 and return its address."""
    from sid_ray.storage import s3_client

    for file in folder.rglob("*"):
        if file.is_file():
            s3_client().upload_file(str(file), bucket, f"{prefix}/{file.relative_to(folder)}")
    return f"s3://{bucket}/{prefix}"
