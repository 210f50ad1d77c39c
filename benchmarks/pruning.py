"""Which rule gives trials up best? `python benchmarks/pruning.py CURVES.csv ... [--orders 200] [--at-once 2]`.

Recorded FID curves of whole runs (columns `run, nimg, fid`) are replayed as a sweep: so many trials at once, in random
orders, each image taking equally long. Every rule sees what it would have seen then, Ray Tune's schedulers being the
real ones. For each rule: the share of the images that it saves, how often it gives up the true winner (the run with
the lowest best FID), and how much worse the best FID that is left is. All rules also stop what diverges, as sweeps do.

`python benchmarks/pruning.py --record SWEEP_FOLDER OUT.csv` writes the curves of a sweep's finished runs.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.experiment.trial import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from sid_ray.config import Guard
from sid_ray.launch.sweeps.journal import Journal, SweepDirectory
from sid_ray.launch.sweeps.stoppers import DivergenceStopper, PowerLawStopper

Curve = list[tuple[int, float]]
GRACE = 0.25
"""Share of the budget before which nothing lags behind; the same for all rules."""


class FakeTrial:
    """What the schedulers ask of a trial."""

    status = Trial.RUNNING

    def __init__(self, name: str):
        self.trial_id = name


class FakeController:
    """What they ask of Tune: trials are made when there is room for them, so none waits."""

    def get_live_trials(self) -> list[Any]:
        """Trials that wait."""
        return []


def power_law(budget: int) -> Callable[[str, dict[str, Any]], bool]:
    """The sweep's own rule."""
    return PowerLawStopper(budget, GRACE * budget)


def tunes(scheduler: Any) -> Callable[[str, dict[str, Any]], bool]:
    """A scheduler of Ray Tune's as a function of (trial, result)."""
    trials, controller = dict[str, FakeTrial](), FakeController()

    def stop(name: str, result: dict[str, Any]) -> bool:
        if name not in trials:
            trials[name] = FakeTrial(name)
            scheduler.on_trial_add(controller, trials[name])
        answer = scheduler.on_trial_result(controller, trials[name], result)
        return bool(answer == TrialScheduler.STOP)

    return stop


def rules(budget: int) -> dict[str, Callable[[str, dict[str, Any]], bool]]:
    """Fresh rules, by name."""
    common: dict[str, Any] = {
        "time_attr": "nimg", "metric": "fid", "mode": "min", "grace_period": max(1, round(GRACE * budget)),
    }  # fmt: skip
    return {
        "divergence only": lambda name, result: False,
        "power law": power_law(budget),
        "ASHA, factor 2": tunes(AsyncHyperBandScheduler(**common, max_t=2 * budget, reduction_factor=2)),
        "ASHA, factor 3": tunes(AsyncHyperBandScheduler(**common, max_t=2 * budget, reduction_factor=3)),
        "median": tunes(MedianStoppingRule(**common, min_samples_required=3)),
    }


def replay(curves: dict[str, Curve], order: list[str], at_once: int, rule: Callable[..., bool]) -> dict[str, int]:
    """Images that each run gets when the sweep runs in this order."""
    diverges, waiting, used = DivergenceStopper(Guard()), list(order), dict.fromkeys(order, 0)
    clock: list[tuple[float, str, int]] = []
    for name in waiting[:at_once]:
        heapq.heappush(clock, (curves[name][0][0], name, 0))
    del waiting[:at_once]
    while clock:
        now, name, i = heapq.heappop(clock)
        nimg, fid = curves[name][i]
        used[name] = nimg
        result = {"nimg": nimg, "fid": fid, "training_iteration": i + 1, "time_total_s": now}
        stopped = [diverges(name, result), rule(name, result)]
        if i + 1 < len(curves[name]) and not any(stopped):
            heapq.heappush(clock, (now + curves[name][i + 1][0] - nimg, name, i + 1))
        elif waiting:
            following = waiting.pop(0)
            heapq.heappush(clock, (now + curves[following][0][0], following, 0))
    return used


def best(curve: Curve, until: int) -> float:
    """The lowest FID in the first `until` images."""
    return min((fid for nimg, fid in curve if 0 < nimg <= until and math.isfinite(fid)), default=math.inf)


def study(curves: dict[str, Curve], orders: int, at_once: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """For each rule: share saved, share of orders in which the winner was given up, mean ratio of best FIDs."""
    budget = max(curve[-1][0] for curve in curves.values())
    winner = min(curves, key=lambda name: best(curves[name], budget))
    truth, dice = best(curves[winner], budget), random.Random(seed)
    shuffles = [dice.sample(list(curves), len(curves)) for _ in range(orders)]
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for order in shuffles:
        for name, rule in rules(budget).items():
            used = replay(curves, order, at_once, rule)
            found = min(best(curves[run], used[run]) for run in curves)
            table[name]["saved"].append(1 - sum(used.values()) / (budget * len(curves)))
            table[name]["winner lost"].append(float(used[winner] < budget))
            table[name]["best FID / winner's"].append(found / truth)
    return {name: {k: statistics.fmean(v) for k, v in columns.items()} for name, columns in table.items()}


def read(path: Path) -> dict[str, Curve]:
    """The curves of a CSV file."""
    curves: dict[str, Curve] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves[f"{path.stem}/{row['run']}"].append((int(row["nimg"]), float(row["fid"])))
    return dict(curves)


def record(folder: Path, out: Path) -> None:
    """Write the curves of a sweep's runs that were not stopped."""
    journal = Journal(SweepDirectory(folder.absolute()))
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "nimg", "fid", *next(iter(journal.records.values())).values])
        for r in journal.records.values():
            if r.state == "finished":
                writer.writerows(
                    [r.name, n, f"{fid:.6g}", *(f"{v:.6g}" for v in r.values.values())] for n, fid in r.curve
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path, nargs="*")
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--record", type=Path, nargs=2, metavar=("SWEEP_FOLDER", "OUT.csv"))
    chosen = parser.parse_args()
    if chosen.record:
        record(*chosen.record)
        return
    for path in chosen.curves:
        curves = read(path)
        print(f"\n{path.name}: {len(curves)} runs, {chosen.orders} orders, {chosen.at_once} at once\n")
        print("| rule | images saved | winner given up | best FID / winner's |\n|---|---|---|---|")
        for name, row in study(curves, chosen.orders, chosen.at_once).items():
            ratio = row["best FID / winner's"]
            print(f"| {name} | {100 * row['saved']:.0f} % | {100 * row['winner lost']:.0f} % | {ratio:.3f} |")


if __name__ == "__main__":
    main()
