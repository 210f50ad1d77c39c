"""The main job with one fault planted in a worker: `python -m tests.faults.inject '{"kind": ...}' distill digits ...`.

The command line is the real one. Only the function that Ray's workers run is wrapped: on one rank, shortly
after a checkpoint, and once per run, the fault happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What is to go wrong, where and when."""

    kind: str
    """kill, exception, hang, freeze, terminate."""
    checkpoints: int = 1
    rank: int = -1
    """-1: the last."""
    marker: str = "fault.json"
    """File in the run directory that says that it has happened."""

    after: int = 256
    """So many images after a checkpoint, so that there is something to lose."""

    def due(self, run: Path, nimg: int) -> bool:
        complete = sorted(int(p.parent.name[5:]) for p in run.glob("checkpoints/nimg-*/complete.json"))
        enough = len(complete) >= self.checkpoints and nimg >= complete[-1] + self.after
        return enough and not (run / self.marker).exists()

    def happen(self, run: Path, nimg: int) -> None:
        (run / self.marker).write_text(json.dumps({"kind": self.kind, "nimg": nimg, "pid": os.getpid()}))
        if self.kind == "exception":
            raise RuntimeError("planted fault")
        if self.kind == "hang":
            time.sleep(3600)
        numbers = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "terminate": signal.SIGTERM}
        os.kill(os.getpid(), numbers[self.kind])


def plant(plan: Plan, original: Any) -> Any:
    """Ray's training function, with the fault."""

    def worker(settings: dict[str, Any]) -> None:
        import torch.distributed as dist

        from sid_ray.config import parse_config
        from sid_ray.training.run_directory import RunDirectory
        from sid_ray.training.step import Iteration

        run, call = RunDirectory.of(parse_config(settings["config"])).path, Iteration.__call__

        def faulty(self: Iteration, nimg: int) -> Any:
            if dist.get_rank() == plan.rank % dist.get_world_size() and plan.due(run, nimg):
                plan.happen(run, nimg)
            return call(self, nimg)

        Iteration.__call__ = faulty
        original(settings)

    return worker


def main() -> None:
    """Plant the fault, then be sid-ray."""
    from sid_ray import cli
    from sid_ray.launch import trainer

    plan = Plan(**json.loads(sys.argv.pop(1)))
    trainer._worker = plant(plan, trainer._worker)
    cli.main()


if __name__ == "__main__":
    main()
