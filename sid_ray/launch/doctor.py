"""`doctor`: what is wrong with this machine, or with every machine of the cluster, and what to do."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sid_ray.config import Config
from sid_ray.launch.ray_start import extend_import_path, import_path, start_ray
from sid_ray.training.checkup import (
    CONNECT_SECONDS,
    Finding,
    Listener,
    check_machine,
    check_name,
    check_run,
    compare_clocks,
)
from sid_ray.training.opening import absolute_paths


def examine(config: Config | None, say: Callable[[str], None]) -> int:
    """Look at this machine, or at all machines of the cluster at RAY_ADDRESS; returns the number of problems.

    With a configuration, also at what its run would read and write.
    """
    config = None if config is None else absolute_paths(config)
    problems = 0
    findings = _cluster(config) if "RAY_ADDRESS" in os.environ else _here(config)
    for where, finding in findings:
        problems += finding.remedy is not None
        say(_line(where, finding))
    say(f"{problems} problem(s)" if problems else "no problems found")
    return problems


def _line(where: str, finding: Finding) -> str:
    state = "ok" if finding.remedy is None else "problem"
    line = f"{state:8} {where}{finding.what:14} {finding.text}"
    return line if finding.remedy is None else f"{line}\n{'':8} {'':{len(where)}}{'':14} -> {finding.remedy}"


def _here(config: Config | None) -> Iterator[tuple[str, Finding]]:
    for finding in check_machine():
        yield "", finding
    if config is not None:
        for finding in check_run(config):
            yield "", finding


class Examiner:
    """Looks at one machine of a cluster; a Ray actor."""

    def __init__(self, paths: list[str]):
        extend_import_path(paths)
        self.listener = Listener()

    def machine(self) -> list[Finding]:
        """What can be said of it alone."""
        return check_machine()

    def run(self, config: Config) -> list[Finding]:
        """What a run would read and write there."""
        return check_run(config)

    def port(self) -> int:
        """Where it takes connections."""
        return self.listener.port

    def unreachable(self, others: dict[str, int]) -> list[str]:
        """Those of (address, port) that cannot be reached from there."""
        import socket

        failed = []
        for address, port in others.items():
            try:
                socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            except OSError as error:
                failed.append(f"{address}: {error}")
        return failed

    def name(self, address: str) -> Finding:
        """Whether it finds itself where others do."""
        return check_name(address)

    def clock(self) -> float:
        """Its time."""
        return time.time()

    def sees(self, file: str) -> bool:
        """Whether a file is there."""
        return Path(file).exists()


def _cluster(config: Config | None) -> Iterator[tuple[str, Finding]]:
    """Every machine by itself, then whether they reach each other, their clocks, and whether storage is shared.

    Machines are known by their addresses.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    connected = ray.is_initialized()
    start_ray(1)
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    examiners: dict[str, Any] = {}
    for address, node in sorted(nodes.items()):
        options = {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            # Else Ray hides the GPUs from an actor that reserves none.
            "runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
        }
        examiners[address] = ray.remote(Examiner).options(**options).remote(import_path())
    width = max(map(len, examiners)) + 1
    try:
        for address, examiner in examiners.items():
            findings = ray.get(examiner.machine.remote())
            if config is not None:
                findings += ray.get(examiner.run.remote(config))
            for finding in findings:
                yield f"{address:{width}}", finding
        for address, finding in _between(ray, examiners, config):
            yield f"{address:{width}}", finding
    finally:
        for examiner in examiners.values():
            ray.kill(examiner)
        if not connected:
            ray.shutdown()


def _between(ray: Any, examiners: dict[str, Any], config: Config | None) -> Iterator[tuple[str, Finding]]:
    ports = {address: ray.get(examiner.port.remote()) for address, examiner in examiners.items()}
    token = None
    if config is not None and not config.run.storage.startswith("s3://") and len(examiners) > 1:
        token = Path(config.run.storage) / f".sid-ray-doctor-{uuid.uuid4().hex}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("")
    try:
        for address, examiner in examiners.items():
            others = {a: p for a, p in ports.items() if a != address}
            failed = ray.get(examiner.unreachable.remote(others))
            advice = "open all ports between the machines of the cluster (and to nobody else)" if failed else None
            text = f"cannot reach {'; '.join(failed)}" if failed else f"reaches {len(others)} other machine(s)"
            yield address, Finding("network", text, advice)
            if others:
                yield address, ray.get(examiner.name.remote(address))
            before = time.time()
            theirs = ray.get(examiner.clock.remote())
            yield address, compare_clocks("the driver's", theirs - (before + time.time()) / 2)
            if token is not None and not ray.get(examiner.sees.remote(str(token))):
                text = f"{token.parent} is another folder than on the driver's machine"
                yield address, Finding("storage", text, "use a file system that all machines share, or s3://")
    finally:
        if token is not None:
            token.unlink()
