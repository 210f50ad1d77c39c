"""Ranks of a process group, forked from a process that has torch and DeepSpeed imported: a second instead of six."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing import forkserver
from unittest import mock

from tests.launching import ROOT, free_port

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@functools.cache
def _start_server() -> None:
    """Start the process that ranks are forked from; libraries read how many threads they may use as they load."""
    forkserver.set_forkserver_preload(["tests.preloaded"])
    with mock.patch.dict(os.environ, ONE_THREAD):
        forkserver.ensure_running()


def on_ranks(ranks: int, module: str, *arguments: str, timeout: float = 300) -> str:
    """Run `python -m module` on gloo ranks as torchrun does and return their output; fails with it."""
    _start_server()
    context, port = multiprocessing.get_context("forkserver"), free_port()
    processes = []
    with tempfile.NamedTemporaryFile("r") as output:
        try:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                environment = dict(os.environ) | ONE_THREAD | place | meeting
                process = context.Process(target=_rank, args=(module, arguments, environment, output.name))
                process.start()
                processes.append(process)
            give_up = time.monotonic() + timeout
            while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
                if time.monotonic() > give_up:
                    break
                time.sleep(0.02)
            codes = [p.exitcode for p in processes]
        finally:
            for p in processes:  # one that fails leaves the others waiting for it
                p.kill()
                p.join()
        said = output.read()
    assert codes == [0] * ranks, f"exit codes {codes}; None: still running, after {timeout} s at most\n{said[-30_000:]}"
    return said


def _rank(module: str, arguments: tuple[str, ...], environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
