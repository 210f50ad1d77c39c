"""Whether this machine, and what a configuration names, are fit for a run: facts, and what to do where they are not."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import torch

from sid_ray.config import Config
from sid_ray.errors import UserError
from sid_ray.storage import cache_folder, s3_client, split_s3
from sid_ray.storage.s3 import S3Folder
from sid_ray.training.opening import check_inputs

GIB = 2**30
LEAST_PYTHON = (3, 11)
LEAST = {"torch": "2.6", "ray": "2.60", "deepspeed": "0.19.8"}
"""Versions that sid-ray needs at least (those of pyproject.toml)."""
LEAST_SHARED_MEMORY, LEAST_DISK = 1 * GIB, 10 * GIB
MOST_CLOCK_SECONDS = 60.0
"""How far clocks may be apart. S3 refuses requests that are off by 15 minutes."""
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """A word or two: `GPU`, `storage`."""
    text: str
    """What was found."""
    remedy: str | None = None
    """What to do about it; None: it is well."""


def check_machine() -> list[Finding]:
    """Everything that can be said of this machine alone, in the order in which problems are worth mending."""
    return [*_versions(), *_gpus(), _bf16(), _nccl(), _shared_memory(), _disk(), _ports()]


def check_run(config: Config) -> list[Finding]:
    """Whether the storage takes files, what the run reads is there, and the clock agrees with the storage's."""
    storage = config.run.storage.rstrip("/")
    found = [check_storage(storage)]
    if storage.startswith("s3://") and found[0].remedy is None:
        found.append(_clock(storage))
    try:
        check_inputs(config)
        e = config.evaluation
        measured = f"features {e.features}, reference {e.reference}" if e.num_images else "FID is not measured"
        found += [Finding("teacher", config.teacher.path), Finding("measuring", measured)]
    except UserError as error:
        field = str(error).partition(":")[0]
        what = "measuring" if field.startswith("evaluation.") else "teacher"
        found.append(Finding(what, str(error), f"correct {field}, or bring the file to where this machine can read it"))
    return found


def check_storage(storage: str) -> Finding:
    """Write a small file where the runs will lie, read it and delete it; on S3 also as the lease is written."""
    name, content = f".sid-ray-doctor-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    try:
        if storage.startswith("s3://"):
            folder = S3Folder(storage)
            created = folder.swap(name, content, None)
            again = folder.swap(name, content, None)
            found = folder.read(name)
            folder.delete([name])
            if not created or again:
                advice = "use S3, or a server that knows If-None-Match; without it two jobs could write to one run"
                return Finding("storage", f"{storage} does not keep to conditional writes", advice)
            back = found[0] if found else b""
        else:
            path = Path(storage).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
            back = (path / name).read_bytes()
            (path / name).unlink()
    except OSError as error:
        where = "the rights of the instance profile or the credentials" if storage.startswith("s3://") else "its rights"
        return Finding("storage", f"{storage} cannot be used: {error}", f"look at run.storage and at {where}")
    if back != content:
        return Finding("storage", f"{storage} gave back other bytes than were written", "use another storage")
    return Finding("storage", f"{storage}: written, read, deleted")


def _versions() -> list[Finding]:
    python = sys.version_info[:3]
    text = f"Python {'.'.join(map(str, python))}"
    wanted = ".".join(map(str, LEAST_PYTHON))
    found = [Finding("versions", text, None if python >= LEAST_PYTHON else f"use Python {wanted} or newer")]
    for package, least in LEAST.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("versions", f"{package} is not installed", f"pip install '{package}>={least}'"))
            continue
        old = _numbers(version) < _numbers(least)
        remedy = f"pip install '{package}>={least}' (or what constraints.txt pins)" if old else None
        found.append(Finding("versions", f"{package} {version}", remedy))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _gpus() -> list[Finding]:
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            text = f"{index}: {torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, {free / GIB:.0f} GiB free"
            taken = "end what else uses it (nvidia-smi shows it)" if free < total * 0.9 else None
            found.append(Finding("GPU", text, taken))
        return found
    if (driver := _driver()) is None:
        return [Finding("GPU", "none; runs go on the CPU")]
    if torch.version.cuda is None:
        advice = "install the build of torch with CUDA (pip install torch, without the CPU index)"
    else:
        advice = (
            f"this torch needs a driver for CUDA {torch.version.cuda}; in a container, give it the GPUs (--gpus=all)"
        )
    return [Finding("GPU", f"the driver ({driver}) shows GPUs that torch {torch.__version__} does not see", advice)]


def _driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, text=True, capture_output=True, timeout=60)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _bf16() -> Finding:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("bf16", "the GPU computes in it")
        return Finding("bf16", "the GPU has no bf16", "use --engine.precision fp32, or GPUs of 2020 (A100) or later")
    ones = torch.ones(8, 8, dtype=torch.bfloat16)
    return Finding("bf16", f"works on the CPU (8 x 1 x 1 = {float((ones @ ones)[0, 0]):g}), slowly")


def _nccl() -> Finding:
    """An all-reduce over all GPUs of this machine."""
    if not torch.cuda.is_available():
        return Finding("NCCL", "not needed without GPUs (gloo serves)")
    count = torch.cuda.device_count()
    try:
        from torch.cuda import nccl

        values = [torch.ones(1024, device=f"cuda:{i}") for i in range(count)]
        nccl.all_reduce(values)
        torch.cuda.synchronize()
        version = ".".join(map(str, nccl.version()))
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0]
        return Finding("NCCL", f"an all-reduce over {count} GPU(s) failed: {line}", "run again with NCCL_DEBUG=INFO")
    if any(float(v[0]) != count for v in values):
        return Finding("NCCL", f"an all-reduce over {count} GPU(s) gave wrong sums", "try with NCCL_P2P_DISABLE=1")
    return Finding("NCCL", f"{version}: all-reduce over {count} GPU(s)")


def _shared_memory(folder: str = "/dev/shm") -> Finding:
    if not os.path.isdir(folder):
        return Finding("shared memory", f"there is no {folder}; Ray uses /tmp instead")
    size = shutil.disk_usage(folder).total
    text = f"{size / GIB:.2g} GiB in {folder}"
    advice = "give the container more: docker run --shm-size=8g; Kubernetes: an emptyDir with medium Memory on /dev/shm"
    return Finding("shared memory", text, advice if size < LEAST_SHARED_MEMORY else None)


def _disk() -> Finding:
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    advice = "make room, or set SID_RAY_CACHE to a folder on a larger disk" if free < LEAST_DISK else None
    return Finding("disk", f"{free / GIB:.0f} GiB free for {folder}", advice)


def _ports() -> Finding:
    """A process connects to another by the address that this machine's name has, as workers do."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with Listener() as listener:
            listener.reach(address)
    except OSError as error:
        advice = f"give {name} an address in /etc/hosts, and let processes of this machine connect to each other"
        return Finding("ports", f"no process can reach another one by this machine's name, {name}: {error}", advice)
    return Finding("ports", f"processes reach each other at {address} ({name})")


def check_name(address: str) -> Finding:
    """Whether this machine's name means the address at which others know it, as gloo assumes."""
    name = socket.gethostname()
    try:
        meant = socket.gethostbyname(name)
    except OSError as error:
        meant = f"nothing ({error})"
    advice = f"let {name} mean {address} in its /etc/hosts; workers without GPUs (gloo) look for it there"
    wrong = meant.startswith("127.") or not meant[0].isdigit()
    return Finding("name", f"{name} is {meant} for itself", advice if wrong else None)


class Listener:
    """A port that takes connections while it is open; OSError if it cannot be had."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("", 0))
        self.port: int = self.socket.getsockname()[1]

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def reach(self, address: str) -> None:
        """Connect to it at this address; OSError if that fails."""
        socket.create_connection((address, self.port), timeout=CONNECT_SECONDS).close()


def _clock(storage: str) -> Finding:
    """This machine's clock against the storage's."""
    bucket, prefix = split_s3(storage)
    answer = s3_client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)
    theirs = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
    return compare_clocks("the storage's", time.time() - theirs)


def compare_clocks(whose: str, seconds: float) -> Finding:
    """Whether a clock that is so many seconds ahead of another will do."""
    off = abs(seconds) > MOST_CLOCK_SECONDS
    ahead = "ahead of" if seconds > 0 else "behind"
    text = f"{abs(seconds):.0f} s {ahead} {whose}" if off else f"agrees with {whose}"
    return Finding("clock", text, "set it, and keep it right with NTP (chronyd, systemd-timesyncd)" if off else None)
