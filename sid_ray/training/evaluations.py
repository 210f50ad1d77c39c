"""When an average is measured: by the workers at once, or beside the training (`evaluation.mode`).

Beside the training, the average goes to another process and training goes on. What comes back is taken up in the order
of images, so that the guard and the best generator follow the same rules; what is still out when the run ends, or has
failed, the workers measure themselves. Each average lies in the run's directory until no checkpoint waits for its FID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from sid_ray.config import Config
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.checkpoints import complete_names
from sid_ray.training.distributed import World
from sid_ray.training.evaluator import Evaluator
from sid_ray.training.outside import Outside
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory

MOST_WAITING = 4
"""Averages that wait for their FID; beyond that the workers measure the oldest themselves."""

Average = dict[str, Tensor]


class Found(NamedTuple):
    """What is known of an average."""

    nimg: int
    fid: float | None
    """None if FID is not measured in this run."""
    average: Callable[[], Average]
    """The average itself; for the first worker."""


class Evaluations(Protocol):
    """Who measures averages, and when. All methods are collective, and return what is newly known, oldest first."""

    beside: bool
    """Whether the FID of an average may be known only after training has gone on."""

    def resume(self) -> list[Found]:
        """Take up what a checkpoint left unmeasured."""
        ...

    def evaluate(self, average: Average, now: bool) -> list[Found]:
        """Measure the average at the present image count; if it has to be `now`, nothing is left unmeasured."""
        ...

    def arrived(self) -> list[Found]:
        """What has come in meanwhile; asked at each report."""
        ...

    def tidy(self) -> None:
        """Let go of averages that no checkpoint waits for."""
        ...


def evaluations(
    config: Config,
    run: RunDirectory,
    world: World,
    evaluator: Evaluator,
    progress: Progress,
    outside: Outside,
    attempt: BestEffort,
) -> Evaluations:
    """What `evaluation.mode` asks for."""
    store = Averages(run, world, progress)
    if config.evaluation.mode == "async" and config.evaluation.num_images:
        return Beside(store, evaluator, outside, attempt)
    return AtOnce(store, evaluator, bool(config.evaluation.num_images))


@dataclass
class Averages:
    """The averages that wait for their FID: their image counts in the counters, their weights in files."""

    run: RunDirectory
    world: World
    progress: Progress

    @property
    def waiting(self) -> list[int]:
        """Their image counts, in order."""
        return self.progress.waiting_for_fid

    def file(self, nimg: int) -> Path:
        """Where the weights of one lie."""
        return self.run.averages / f"nimg-{nimg:012d}.safetensors"

    def load(self, nimg: int) -> Average:
        """The weights of one; by the first worker."""
        return load_file(self.file(nimg))

    def everywhere(self, nimg: int) -> Average:
        """The weights of one, on every worker. Collective."""
        return self.world.once(lambda: self.load(nimg))

    def save(self, average: Average) -> None:
        """Write the present one; by the first worker."""
        path = self.file(self.progress.nimg)
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in average.items()}, aside)
        aside.replace(path)

    def tidy(self) -> None:
        """Remove the files of those that no checkpoint waits for; by the first worker."""
        depot = self.run.depot
        counters = [Progress.model_validate_json(depot.text(n, "progress.json")) for n in complete_names(depot)]
        wanted = {self.file(nimg) for p in (self.progress, *counters) for nimg in p.waiting_for_fid}
        for path in self.run.averages.glob("*.safetensors"):
            if path not in wanted:
                path.unlink()


@dataclass
class AtOnce:
    """The workers measure each average together, while training waits."""

    averages: Averages
    evaluator: Evaluator
    measured: bool
    """Whether there is an FID at all."""
    beside = False

    def resume(self) -> list[Found]:
        """Measure what an earlier start in another mode left."""
        waiting, self.averages.progress.waiting_for_fid = self.averages.waiting, []
        return [measure_stored(self.averages, self.evaluator, nimg) for nimg in waiting]

    def evaluate(self, average: Average, now: bool) -> list[Found]:
        """Measure it."""
        fid = self.evaluator.generator_fid(average) if self.measured else None
        return [Found(self.averages.progress.nimg, fid, lambda: average)]

    def arrived(self) -> list[Found]:
        """Nothing."""
        return []

    def tidy(self) -> None:
        """Remove what an earlier start in another mode left."""
        if self.averages.world.is_first and self.averages.run.averages.is_dir():
            self.averages.tidy()


@dataclass
class Beside:
    """Another process measures each average while training goes on."""

    averages: Averages
    evaluator: Evaluator
    outside: Outside
    attempt: BestEffort
    results: dict[int, float | None] = field(default_factory=dict)
    """FIDs that have come in, by image count; None for one that failed. On the first worker."""
    beside = True

    def resume(self) -> list[Found]:
        """Ask again for what was out when the checkpoint was written."""
        if self.averages.world.is_first:
            self.outside.forget()
            for nimg in self.averages.waiting:
                self._ask(nimg, self.averages.load(nimg))
        return []

    def evaluate(self, average: Average, now: bool) -> list[Found]:
        """Give it to another process; else measure it here, after all that are still out."""
        world, progress = self.averages.world, self.averages.progress
        stored = not now and world.any(world.is_first and self.attempt("averages", lambda: self.averages.save(average)))
        if not stored:
            found = self._take_up(most=0)
            if world.is_first:
                self.outside.forget()
            return [*found, Found(progress.nimg, self.evaluator.generator_fid(average), lambda: average)]
        if world.is_first:
            self._ask(progress.nimg, average)
        progress.waiting_for_fid = [*self.averages.waiting, progress.nimg]
        return self.arrived()

    def arrived(self) -> list[Found]:
        """What has come in, as far as nothing before it is out."""
        return self._take_up(most=MOST_WAITING)

    def tidy(self) -> None:
        """Let go of averages that no checkpoint waits for."""
        if self.averages.world.is_first:
            self.attempt("averages", self.averages.tidy)

    def _ask(self, nimg: int, average: Average) -> None:
        self.outside.begin(str(nimg), self.evaluator.job(average))

    def _take_up(self, most: int) -> list[Found]:
        """FIDs in order; where more than `most` would still be out, the workers measure the oldest."""
        if self.averages.world.is_first:
            self.results |= {int(name): fid for name, fid in self.outside.results().items()}
        known, found = self.averages.world.once(lambda: self.results), list[Found]()
        while waiting := self.averages.waiting:
            nimg, *later = waiting
            if nimg in known and known[nimg] is not None:
                found.append(Found(nimg, known[nimg], lambda nimg=nimg: self.averages.load(nimg)))  # type: ignore[misc]
            elif nimg in known or len(waiting) > most:
                found.append(measure_stored(self.averages, self.evaluator, nimg))
            else:
                break
            self.averages.progress.waiting_for_fid = later
            self.results.pop(nimg, None)
        return found


def measure_stored(averages: Averages, evaluator: Evaluator, nimg: int) -> Found:
    """The workers' own measurement of an average that lies in its file. Collective."""
    average = averages.everywhere(nimg)
    return Found(nimg, evaluator.generator_fid(average), lambda: average)
