"""The outcome of a sweep: report.md and its pictures, best.yaml, the best generator, TensorBoard's HParams."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence

from sid_ray.launch.sweeps.journal import Journal, SweepDirectory, TrialRecord
from sid_ray.launch.sweeps.pictures import (
    OUTCOMES,
    map_fields,
    plot_compute,
    plot_curves,
    plot_fields,
    plot_map,
    trial_means,
)
from sid_ray.launch.sweeps.plan import SweepPlan
from sid_ray.launch.sweeps.search import Unit, units
from sid_ray.launch.sweeps.space import Space
from sid_ray.launch.sweeps.table import short
from sid_ray.training.outside import duration
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.teach import library_versions


def write_report(plan: SweepPlan, journal: Journal) -> str | None:
    """Write what is known so far into the sweep's folder; returns the address of best.yaml, None without any FID."""
    directory, space = plan.directory, plan.space
    records = [journal.records[name] for name in sorted(journal.records)]
    for record in records:
        if record.state in ("diverged", "behind", "failed"):
            tell_tensorboard(plan, record)
    measured = [r for r in records if math.isfinite(r.best_fid)]
    if not measured:
        return None
    pictures = ["curves.png", "fields.png", "compute.png"]
    plot_curves(directory.path / "curves.png", records, f"{directory.path.name}: FID of each run")
    plot_fields(directory.path / "fields.png", space, records)
    plot_compute(directory.path / "compute.png", space, records)
    if axes := map_fields(space):
        pictures.append("map.png")
        plot_map(directory.path / "map.png", space, records, *axes)
    best = best_run(records)
    text = f"# The best settings of {directory.path.name} (FID {best.best_fid:.4g} at its best after "
    text += f"{best.nimg / 1000:g} kimg, trial {best.number}): sid-ray distill best.yaml\n"
    directory.write("best.yaml", text + plan.preset(best.values).to_yaml())
    for name in pictures:
        directory.publish(name)
    has_samples = keep_best_generator(plan, best)
    directory.write("report.md", report(space, directory, records, best, has_samples))
    return f"{directory.shown}/best.yaml"


def best_run(records: Sequence[TrialRecord]) -> TrialRecord:
    """The best run of the trial with the lowest mean FID, if one has been measured with all its seeds."""
    runs, mean, _ = trial_means(records)[0]
    candidates = runs if math.isfinite(mean) else records
    return min(candidates, key=lambda r: r.best_fid)


def tell_tensorboard(plan: SweepPlan, record: TrialRecord) -> None:
    """HParams of a run that was stopped before it could write its own; once."""
    from torch.utils.tensorboard import SummaryWriter

    from sid_ray.training.board import add_hyper_parameters

    config = plan.config(Unit(record.name, record.number, record.repeat), record.values, {})
    run = RunDirectory.of(config)
    if list(run.tensorboard.glob("*.hparams")) or not record.curve:
        return
    fids = {"result/best_fid": record.best_fid, "result/final_fid": record.last_fid}
    results = {"result/nimg": float(record.nimg)} | {k: fid for k, fid in fids.items() if math.isfinite(fid)}
    writer = SummaryWriter(str(run.tensorboard), filename_suffix=".hparams")
    add_hyper_parameters(writer, config, results)
    writer.close()
    if run.remote is not None:
        for file in run.tensorboard.glob("*.hparams"):
            run.remote.upload(file, f"tensorboard/{file.name}")


def keep_best_generator(plan: SweepPlan, best: TrialRecord) -> bool:
    """Copy the best run's generator to `best/` and draw its samples; False if it has none."""
    from sid_ray.errors import UserError
    from sid_ray.evaluation.export_generator import export_generator
    from sid_ray.storage.mirror import push

    target, aside = plan.directory.path / "best", plan.directory.path / ".best"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        export_generator(f"{plan.directory.trials}/{best.name}", str(aside))
    except UserError:
        return False
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    if plan.directory.remote is not None:
        push(target, plan.directory.remote / "best")
    return True


def report(
    space: Space, directory: SweepDirectory, records: Sequence[TrialRecord], best: TrialRecord, has_samples: bool
) -> str:
    """report.md."""
    ended = sum(r.ended for r in records)
    fresh = ""
    if best.fresh_fids:
        fresh = f", {', '.join(f'{fid:.3f}' for fid in best.fresh_fids)} with fresh latents"
    settings = ", ".join(f"`{name}` {short(value)}" for name, value in best.values.items())
    parts = [
        f"# {directory.path.name}",
        space.description,
        f"**Best: {best.name}**, FID {best.best_fid:.3f}{fresh}: {settings}." + against_preset(space, records),
        f"{ended} of {len(units(space))} runs have ended; budget {space.budget_kimg:g} kimg each, search "
        f"`{space.search}`, scheduler `{space.scheduler}`, power law {'on' if space.power_law else 'off'}.",
        "The best settings are a preset (`sid-ray distill best.yaml`), the best generator lies in `best/` "
        "(`sid-ray generate best --out grid.png`), every run in `trials/` (`sid-ray board .`, "
        "with its HParams tab).",
        "![FID curves](curves.png)",
        "## Where the compute went",
        compute_table(space, records),
        "![Images per outcome](compute.png)",
        "## What mattered",
        correlations(space, records),
        "![FID against each field](fields.png)",
        *(["![Two fields and FID](map.png)"] if map_fields(space) else []),
        "## All trials",
        trials_table(space, records),
        *(["## Samples of the best generator", "![Samples](best/samples.png)"] if has_samples else []),
        f"Written {time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
        + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def against_preset(space: Space, records: Sequence[TrialRecord]) -> str:
    """What the preset's own values reached, if they were tried."""
    own = [r.best_fid for r in records if r.number == 0 and math.isfinite(r.best_fid)]
    if not own or not space.has_preset_first:
        return ""
    return f" The preset's own values (trial 0) reached {statistics.fmean(own):.3f}."


def compute_table(space: Space, records: Sequence[TrialRecord]) -> str:
    """Runs, images and time by outcome, and what stopping early has saved."""
    rows = ["| outcome | runs | kimg | time | kimg not spent |", "|---|---|---|---|---|"]
    for state in OUTCOMES:
        of_it = [r for r in records if r.state == state]
        if of_it:
            used = sum(r.nimg for r in of_it) / 1000
            saved = len(of_it) * space.budget_kimg - used if state in ("behind", "diverged") else 0.0
            seconds = sum(r.seconds for r in of_it)
            rows.append(f"| {state} | {len(of_it)} | {used:.1f} | {duration(seconds)} | {saved:.1f} |")
    full = len(records) * space.budget_kimg
    saved = sum(space.budget_kimg - r.nimg / 1000 for r in records if r.state in ("behind", "diverged"))
    return "\n".join(rows) + f"\n\nStopping early saved {100 * saved / full:.0f} % of {full:g} kimg."


def correlations(space: Space, records: Sequence[TrialRecord]) -> str:
    """Rank correlation of each numeric field with FID, where all runs that did not diverge had been measured."""
    from scipy.stats import spearmanr

    alive = [r for r in records if math.isfinite(r.best_fid) and r.state != "diverged"]
    if not alive:
        return ""
    reached = min(r.nimg for r in alive)
    fids = [r.fid_at(reached) for r in alive]
    lines = []
    for name, range_ in space.searched.items():
        numeric = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in range_.ends)
        values = [r.values[name] for r in alive]
        if numeric and len(set(values)) > 2:
            rank = float(spearmanr(values, fids).statistic)
            lines.append(f"- `{name}`: rank correlation {rank:+.2f} (n={len(values)})")
    explained = (
        f"With the FID at {reached / 1000:g} kimg, which all runs but the diverged ones have reached. Positive: larger "
        "values, worse FID. A field whose best value lies inside its range shows near 0 here."
    )
    return "\n".join([*lines, "", explained]) if lines else ""


def trials_table(space: Space, records: Sequence[TrialRecord]) -> str:
    """A row per trial, best first; with repeats, mean and deviation over seeds."""
    heads = ["trial", "outcome", "kimg", "best FID", *(f"`{name}`" for name in space.fields), "why"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for runs, mean, deviation in trial_means(records):
        fid = short(mean) if len(runs) == 1 else f"{short(mean)} ± {short(deviation)} (n={len(runs)})"
        outcomes = ", ".join(dict.fromkeys(r.state for r in runs))
        reasons = "; ".join(dict.fromkeys(_line(r.reason) for r in runs if r.reason))
        images = "/".join(dict.fromkeys(f"{r.nimg / 1000:.1f}" for r in runs))
        cells = [f"{runs[0].number}", outcomes, images, fid, *(short(runs[0].values[n]) for n in space.fields), reasons]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _line(text: str) -> str:
    return text.splitlines()[0].replace("|", "/") if text else ""
