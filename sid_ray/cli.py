"""The command line. Thin: each command calls one function of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sid_ray.config import Config, fields, load_config, preset_names
from sid_ray.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a one-step generator (Score identity Distillation) on Ray and DeepSpeed.",
)
presets_app = typer.Typer(help="The presets: what is there, and what is in them.", invoke_without_command=True)
teach_app = typer.Typer(no_args_is_help=True, help="Train a built-in teacher again from scratch.")
app.add_typer(presets_app, name="presets")
app.add_typer(teach_app, name="teach")

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Entry point: errors meant for the user end with exit code 2 and no traceback."""
    try:
        app()
    except UserError as error:
        print(f"sid-ray: {error}", file=sys.stderr)
        sys.exit(2)


def field_help() -> str:
    """One paragraph for each configuration field: name, type, default, meaning."""
    lines = ["Every field of the configuration can be overridden as --section.field value:"]
    for name, info in fields():
        default = "required" if info.is_required() else f"default {info.default!r}"
        lines.append(
            f"--{name}  ({_type_name(info.annotation)}; {default})\n    {' '.join((info.description or '').split())}"
        )
    return "\n\n".join(lines)


def _type_name(annotation: Any) -> str:
    """A type as a user would say it: `float`, `fp32 or bf16`, `int or auto`."""
    if isinstance(annotation, type):
        return "unset" if annotation is type(None) else annotation.__name__
    names = [str(a) if get_origin(annotation) is Literal else _type_name(a) for a in get_args(annotation)]
    return " or ".join(names)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` as a mapping. UserError for anything else."""
    overrides: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise UserError(f"{argument!r} is not an option; overrides are written --section.field value")
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            missing = object()
            following = next(rest, missing)
            if following is missing or str(following).startswith("--"):
                raise UserError(f"--{name}: a value is missing; overrides are written --section.field value")
            value = str(following)
        overrides[name] = value
    return overrides


@app.command(context_settings=OVERRIDES, epilog=field_help())
def distill(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="A preset (see `sid-ray presets`) or a YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; start nothing.")] = False,
) -> None:
    """Distil a teacher into a one-step generator. The same command again resumes."""
    config = load_config(preset, parse_overrides(context.args))
    if dry_run:
        _print_plan(config)
        return
    from sid_ray.launch.console import print_summary
    from sid_ray.launch.trainer import DistillationFailed
    from sid_ray.launch.trainer import distill as run_distillation
    from sid_ray.training.guard import TrainingStopped
    from sid_ray.training.progress import Progress
    from sid_ray.training.run_directory import RunDirectory

    try:
        result = run_distillation(config)
    except (DistillationFailed, TrainingStopped) as error:
        print(f"sid-ray: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("sid-ray: aborted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    print_summary(RunDirectory(Path(result.path)), Progress.model_validate(result.metrics), config.run.total_kimg)


def _print_plan(config: Config) -> None:
    from sid_ray.training.run_directory import RunDirectory, check_inputs

    check_inputs(config)
    print(config.to_yaml(), end="")
    steps = -(-config.total_nimg // config.batch.size)
    print(
        f"\n# run directory  {RunDirectory.of(config).path}\n"
        f"# iterations     {steps} of {config.batch.size} images, {config.num_slots} micro-batches each\n"
        f"# workers        {config.cluster.workers} ({config.cluster.cpus_per_worker} CPU each)\n"
        "# dry run: nothing was started"
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Model directory of a generator, e.g. runs/digits/generator.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    out: Annotated[Path, typer.Option(help="A .png grid, an .npz of uint8 images, or a folder of PNGs.")] = Path(
        "grid.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed; the same seed gives the same images.")] = 0,
    label: Annotated[
        list[int] | None,
        typer.Option("--label", help="Class index; repeat for several, taken in turn. Default: drawn."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Sample a one-step generator."""
    from sid_ray.evaluation.export_images import write_images
    from sid_ray.teachers.sources import load_generator

    generator = load_generator(model)
    labels = [label[i % len(label)] for i in range(num)] if label else None
    try:
        images = generator.sample(num, seed=seed, class_labels=labels)
    except ValueError as error:
        raise UserError(f"--label: {error}") from error
    print(f"{num} images in {write_images(out, images, overwrite)}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="An EDM, SiD or SiDA checkpoint (.pkl). It is never executed.")],
    out: Annotated[Path, typer.Argument(help="Model directory to write.")],
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights; it is inherited by what is distilled from them.")
    ] = None,
) -> None:
    """Convert a teacher of another format to a model directory (safetensors, config.json, model card)."""
    from sid_ray.teachers.sources import UNKNOWN_LICENCE, describe
    from sid_ray.teachers.sources import convert as write_model

    config = write_model(source, out, licence)
    print("\n".join(f"{key:9} {value}" for key, value in describe(config).items()))
    if config.licence == UNKNOWN_LICENCE:
        print("The licence is not recorded in the file; state it with --licence.")
    print(f"model directory in {out}; distil it with: sid-ray distill PRESET --teacher.path {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A generator or a teacher: model directory, .pkl or builtin:digits.")],
    num: Annotated[int, typer.Option(min=5, help="Images per trial.")] = 2000,
    metrics: Annotated[str, typer.Option(help="What to measure, with commas: fid, is, kid, pr.")] = "fid",
    features: Annotated[str, typer.Option(help="Feature network.")] = "digits",
    reference: Annotated[str, typer.Option(help="Reference statistics (.npz), or builtin:digits.")] = "builtin:digits",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first trial's latents.")] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Measurements, each with latents of its own.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Heun steps of a teacher (18 steps are 35 evaluations).")] = 18,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
) -> None:
    """Measure a generator or a teacher: all metrics from one pass of images."""
    from sid_ray.evaluation.measure import prepare, too_few
    from sid_ray.launch.console import measure_trials

    setup = prepare(model, metrics, features, reference, steps)
    if warning := too_few(setup, num):
        print(f"warning: {warning}", file=sys.stderr)
    measure_trials(setup, num, range(seed, seed + trials), batch)


@teach_app.command("digits")
def teach_digits(
    out: Annotated[Path, typer.Option(help="Folder to write: model directory, feature network, reference.")] = Path(
        "digits-teacher"
    ),
    kimg: Annotated[float, typer.Option(min=0.1, help="Thousands of images shown to the teacher.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """Train the digits teacher and its feature network from scikit-learn's data (minutes on two cores)."""
    from sid_ray.training.teach import teach_digits as teach

    measured = teach(out, kimg=kimg, seed=seed, overwrite=overwrite, progress=lambda line: print(line, flush=True))
    print("\n".join(f"{key}: {value}" for key, value in measured.items()))
    print(f"teacher in {out}; distil it with: sid-ray distill digits --teacher.path {out}")


@presets_app.callback()
def presets(context: typer.Context) -> None:
    """List the presets."""
    if context.invoked_subcommand is None:
        for name in preset_names():
            print(f"{name:16} {load_config(name).description}")


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(help="Name of a preset.")]) -> None:
    """Print a preset with every default filled in."""
    print(load_config(name).to_yaml(), end="")
