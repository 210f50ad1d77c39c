"""A sweep that has been read and checked, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sid_ray.config import Config, differences, load_config, parse_config
from sid_ray.errors import UserError
from sid_ray.launch.sweeps.journal import Journal, SweepDirectory
from sid_ray.launch.sweeps.search import Proposals, Unit, units
from sid_ray.launch.sweeps.space import Space, Values, load_space
from sid_ray.launch.sweeps.table import short
from sid_ray.training.opening import absolute_paths
from sid_ray.training.plan import describe_run

MAY_CHANGE = ("description", "trials", "trials_at_once", "repeats")
"""Fields of a space that a repeated command may give differently: more trials, another pace."""

OF_A_TRIAL = ("teacher", "features", "reference", "network", "cost", "memory")
"""What a dry run of a sweep tells of each trial, of all that one of a run tells."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that has been checked and not begun."""

    space: Space
    base: Config
    """The configuration of all trials, before their values; its run is the sweep's storage and name."""
    overrides: dict[str, Any]

    @property
    def directory(self) -> SweepDirectory:
        """Where it lies."""
        return SweepDirectory.of(self.base)

    def config(self, unit: Unit, values: Values, shared: Mapping[str, Any]) -> Config:
        """The configuration of a run. UserError if its values are impossible."""
        own = {
            "run.name": unit.name,
            "run.storage": self.directory.trials,
            "run.seed": self.base.run.seed + unit.repeat,
        }
        return absolute_paths(self.space.config(values, self.overrides | dict(shared) | own))

    def preset(self, values: Values) -> Config:
        """The preset with a trial's values and what the space settles about training, for runs of their own.

        How the sweep measured and was run (evaluation, guard, run, cluster) stays out of it.
        """
        training = ("teacher.", "method.", "optimizer.", "engine.", "batch.", "init.")
        named = {k: v for k, v in {**self.space.settings, **self.overrides}.items() if k.startswith(training)}
        return load_config(self.space.preset, {**named, **values, "run.name": f"{self.directory.path.name}-best"})

    def recorded(self) -> str:
        """What `sweep.yaml` says of it."""
        space = self.space.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump({"space": space, "base": self.base.model_dump(mode="json")}, sort_keys=False)


def plan_sweep(space: str, overrides: Mapping[str, Any] | None = None) -> SweepPlan:
    """Read and check a space. UserError names the file, the line, the field, and what is allowed.

    `overrides`: dotted fields shared by all trials; `run.storage` and `run.name` are where the sweep lies (default:
    `runs/sweep-<name of the file>`).
    """
    loaded, named = load_space(space), dict(overrides or {})
    for field in named.keys() & loaded.fields.keys():
        raise UserError(f"{field}: is searched by this space and cannot be given; allowed: other fields")
    named.setdefault("run.name", f"sweep-{Path(space).stem}")
    return SweepPlan(loaded, absolute_paths(loaded.config({}, named)), named)


def describe_sweep(plan: SweepPlan) -> str:
    """What a sweep would run, as text; nothing is started."""
    space, directory = plan.space, plan.directory
    runs = units(space)
    proposals = Proposals(space, Journal(directory))
    lines = [
        plan.recorded(),
        f"# sweep        {directory.address}",
        f"# runs         {len(runs)} of {space.budget_kimg:g} kimg each",
        f"# images       {len(runs) * space.budget_kimg:g} kimg in all, less what stopping early saves",
        f"# at once      {space.trials_at_once}, each with {plan.base.cluster.workers} worker(s)",
    ]
    if space.search == "tpe":
        lines.append("# trials       are chosen one after the other (tpe)")
    else:
        trials = [proposals.values(unit.number) for unit in runs if unit.repeat == 0]
        fields = ["  ".join(f"{name} {short(value)}" for name, value in trial.items()) for trial in trials]
        lines += [f"# trial {number:<6} {text}" for number, text in enumerate(fields)]
    lines += [f"# {what:12} {text}" for what, text in describe_run(plan.base) if what in OF_A_TRIAL]
    return "\n".join([*lines, "# dry run: nothing was started or fetched"])


def check_same(plan: SweepPlan, directory: SweepDirectory) -> None:
    """UserError if another sweep, or something else, lies there."""
    recorded = directory.path / "sweep.yaml"
    if not recorded.is_file():
        if not directory.is_empty():
            raise UserError(f"run.name: {directory.address} is not empty and holds no sweep; choose another --run.name")
        return
    old = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    before, now = Space.model_validate(old["space"]).model_dump(), plan.space.model_dump()
    settings = {"settings", "preset"}  # told by the configuration that they make
    refused = [
        f"{name}: {before[name]!r} -> {now[name]!r}"
        for name in now
        if name not in MAY_CHANGE and name not in settings and before[name] != now[name]
    ]
    refused += differences(parse_config(old["base"]), plan.base)[1]
    if refused:
        raise UserError(
            f"run.name: {directory.address} holds another sweep; these fields differ and may not change:\n  "
            + "\n  ".join(refused)
            + "\nChoose another --run.name, or give the old values."
        )
