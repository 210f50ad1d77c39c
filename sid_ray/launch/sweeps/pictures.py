"""Pictures of a sweep: curves, what mattered, and where the compute went. Colours tell outcomes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sid_ray.evaluation.pictures import draw, plain_log
from sid_ray.launch.sweeps.journal import State, TrialRecord
from sid_ray.launch.sweeps.space import Range, Space

OUTCOMES: dict[State, str] = {
    "finished": "tab:green",
    "behind": "tab:orange",
    "diverged": "tab:red",
    "failed": "tab:purple",
    "running": "tab:blue",
}


def plot_curves(path: Path, records: Sequence[TrialRecord], title: str) -> None:
    """FID against images of every run, both logarithmic; the best run is drawn bold."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        best = min(records, key=lambda r: r.best_fid)
        for r in sorted(records, key=lambda r: r is best):
            points = [(n / 1000, fid) for n, fid in r.curve if n > 0 and math.isfinite(fid)]
            style: dict[str, Any] = {"linewidth": 3, "alpha": 1} if r is best else {"linewidth": 1, "alpha": 0.6}
            axes.loglog([n for n, _ in points], [f for _, f in points], ".-", color=OUTCOMES[r.state], **style)
        _legend(axes, records)
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.set(xlabel="thousands of images", ylabel="FID", title=title)
        axes.grid(True, which="both", alpha=0.3)

    draw(path, 8, 5, paint)


def plot_fields(path: Path, space: Space, records: Sequence[TrialRecord]) -> None:
    """Best FID against each searched field; repeats of a trial are joined by a line with their mean."""

    def paint(figure: Any) -> None:
        names = list(space.searched)
        axes_row = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(axes_row, names, strict=True):
            for r in records:
                if math.isfinite(r.best_fid):
                    axes.plot(r.values[name], r.best_fid, "o", color=OUTCOMES[r.state], alpha=0.8)
            if space.repeats > 1:
                means = trial_means(records)
                spots = sorted((runs[0].values[name], mean) for runs, mean, _ in means if math.isfinite(mean))
                if len(space.searched) == 1:
                    axes.plot([x for x, _ in spots], [y for _, y in spots], "-", color="grey", zorder=0)
            axes.set(xlabel=name, yscale="log")
            _scale(axes, "x", space.searched[name])
            axes.grid(True, which="both", alpha=0.3)
        axes_row[0].set_ylabel("best FID")
        plain_log(axes_row[0].yaxis)
        _legend(axes_row[-1], records)

    draw(path, 1 + 3.6 * len(space.searched), 4, paint)


def plot_map(path: Path, space: Space, records: Sequence[TrialRecord], x: str, y: str) -> None:
    """Trials in the plane of two fields, coloured by their best FID; crosses diverged."""
    from matplotlib.colors import LogNorm

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        good = [r for r in records if math.isfinite(r.best_fid) and r.state != "diverged"]
        bad = [r for r in records if r.state == "diverged"]
        if good:
            dots = axes.scatter(
                [r.values[x] for r in good], [r.values[y] for r in good], c=[r.best_fid for r in good],
                norm=LogNorm(), cmap="viridis_r", s=90,
            )  # fmt: skip
            figure.colorbar(dots, label="best FID")
        axes.plot([r.values[x] for r in bad], [r.values[y] for r in bad], "x", color="tab:red", ms=9, label="diverged")
        axes.set(xlabel=x, ylabel=y)
        _scale(axes, "x", space.fields[x])
        _scale(axes, "y", space.fields[y])
        if bad:
            axes.legend()
        axes.grid(True, which="both", alpha=0.3)

    draw(path, 6.5, 5, paint)


def plot_compute(path: Path, space: Space, records: Sequence[TrialRecord]) -> None:
    """Images trained per outcome, and those that were saved by stopping early."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        present = [state for state in OUTCOMES if any(r.state == state for r in records)]
        for row, state in enumerate(present):
            of_it = [r for r in records if r.state == state]
            used = sum(r.nimg for r in of_it) / 1000
            saved = len(of_it) * space.budget_kimg - used if state in ("behind", "diverged") else 0.0
            axes.barh(row, used, color=OUTCOMES[state])
            axes.barh(row, saved, left=used, color=OUTCOMES[state], alpha=0.25, hatch="//")
            axes.text(used + saved, row, f"  {len(of_it)} runs, {used:.0f} kimg" + f", {saved:.0f} saved" * (saved > 0))
        axes.set_yticks(range(len(present)), present)
        axes.set(xlabel="thousands of images (hatched: not spent)")
        axes.margins(x=0.5)
        axes.invert_yaxis()

    draw(path, 7, 3, paint)


def map_fields(space: Space) -> tuple[str, str] | None:
    """The two numeric fields that a map shows: alpha and the generator's rate if they are searched."""
    numeric = [n for n, r in space.searched.items() if all(isinstance(e, (int, float)) for e in r.ends)]
    preferred = [n for n in ("method.alpha", "optimizer.generator_lr") if n in numeric]
    both = [*preferred, *(n for n in numeric if n not in preferred)][:2]
    return (both[0], both[1]) if len(both) == 2 else None


def trial_means(records: Sequence[TrialRecord]) -> list[tuple[list[TrialRecord], float, float]]:
    """(runs of a trial, mean of their best FIDs, deviation), best first; a mean with a run without FID is inf."""
    trials = []
    for number in sorted({r.number for r in records}):
        runs = sorted((r for r in records if r.number == number), key=lambda r: r.repeat)
        fids = [r.best_fid for r in runs]
        deviation = statistics.stdev(fids) if len(fids) > 1 and all(map(math.isfinite, fids)) else 0.0
        trials.append((runs, statistics.fmean(fids), deviation))
    return sorted(trials, key=lambda trial: trial[1])


def _scale(axes: Any, axis: str, range_: Range) -> None:
    ends = range_.ends
    numbers = all(isinstance(e, (int, float)) and not isinstance(e, bool) for e in ends)
    if range_.loguniform or (numbers and range_.choice and min(ends) > 0 and max(ends) / min(ends) >= 8):
        axes.set(**{f"{axis}scale": "log"})
        plain_log(axes.xaxis if axis == "x" else axes.yaxis)


def _legend(axes: Any, records: Sequence[TrialRecord]) -> None:
    from matplotlib.lines import Line2D

    present = [state for state in OUTCOMES if any(r.state == state for r in records)]
    handles = [Line2D([], [], color=OUTCOMES[s], marker="o", label=s) for s in present]
    axes.legend(handles=handles)
