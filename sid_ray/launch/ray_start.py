"""Connecting to Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any


def import_path() -> list[str]:
    """Where this process finds modules, its working directory first: what a worker needs for the user's own code."""
    return [os.getcwd(), *sys.path]


def extend_import_path(paths: list[str]) -> None:
    """Find modules where another process finds them, too; a worker's own come first."""
    sys.path += [path for path in paths if path not in sys.path]


def set_defaults(environment: Mapping[str, str]) -> None:
    """Set what the user's environment leaves open; Ray reads it when it starts."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def start_ray(cpus: int) -> Any:
    """Connect to the cluster this runs on (RAY_ADDRESS), or start one on this machine with at least `cpus` CPUs.

    Returns the `ray` module. Does nothing more if this process is connected already.
    """
    set_defaults(
        {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }
    )
    import logging

    import ray

    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            # "local": a cluster of our own, even if another one runs on this machine.
            cpus = max(os.cpu_count() or 1, cpus)
            # Nobody takes away the only machine: one process less to start for each group of workers.
            set_defaults({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    return ray
