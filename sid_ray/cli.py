"""The command line. Thin: each command calls one function of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sid_ray.config import INCEPTION_ADDRESS, Config, fields, load_config
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

FEATURES = "Feature network: digits, inception, a TorchScript file (.pt), or python:package.module:factory (runs it)."
DETECTOR = "Where Inception's TorchScript file lies: a path or an address; its sha256 is checked."
NETWORK = "Network that takes the weights, python:package.module:factory; needed if it is code of your own (runs it)."
WORKERS = (
    "Processes that share the images, one GPU (or CPU) each; auto: all GPUs of this machine or of the cluster at "
    "RAY_ADDRESS, else one. The result does not depend on it."
)
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
    if get_origin(annotation) is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
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
    plan: Annotated[
        str | None, typer.Option(help="With --dry-run: memory, speed and time on these GPUs, e.g. 8xH100-80GB.")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="With --plan: what it costs, too.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="With --plan: the share of the GPUs' peak that is reached.")
    ] = 0.25,
) -> None:
    """Distil a teacher into a one-step generator. The same command again resumes."""
    config = load_config(preset, parse_overrides(context.args))
    if plan is not None and not dry_run:
        raise UserError("--plan: needs --dry-run")
    if dry_run:
        _print_plan(config, plan, price_per_gpu_hour, utilisation)
        return
    from sid_ray.launch.console import print_summary
    from sid_ray.launch.following import DistillationFailed
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
    print_summary(RunDirectory.of(config), Progress.model_validate(result.metrics), config)


@app.command(context_settings=OVERRIDES)
def sweep(
    context: typer.Context,
    space: Annotated[str, typer.Argument(help="A YAML file such as those in tune_spaces/, which explain themselves.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; start nothing.")] = False,
) -> None:
    """Search alpha, learning rates, batch size or any other field; stop early what diverges or cannot win.

    Ends with report.md and pictures, best.yaml (a preset of the best settings) and the best generator, in
    runs/sweep-SPACE or where --run.storage and --run.name say. Any --section.field value is shared by all trials.
    The same command again goes on with the trials that have not ended.
    """
    from sid_ray.launch.following import DistillationFailed
    from sid_ray.launch.sweeps.plan import describe_sweep, plan_sweep
    from sid_ray.launch.sweeps.sweep import sweep as run_sweep
    from sid_ray.launch.sweeps.table import print_outcome

    overrides = parse_overrides(context.args)
    if dry_run:
        print(describe_sweep(plan_sweep(space, overrides)))
        return
    try:
        result = run_sweep(space, overrides)
    except DistillationFailed as error:
        print(f"sid-ray: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        print("sid-ray: aborted; the same command goes on from the trials' last checkpoints", file=sys.stderr)
        raise typer.Exit(130) from None
    print_outcome(result.path, result.trials, result.best, result.finished)
    if result.finished and result.best is None:
        raise typer.Exit(1)


def _print_plan(config: Config, machine: str | None, price: float | None, utilisation: float) -> None:
    """The resolved configuration and, as comments, what it means: the whole is a YAML file that can be run."""
    from sid_ray.training.plan import describe_machine, describe_run

    lines = describe_run(config)
    planned = [] if machine is None else describe_machine(config, machine, price, utilisation)
    print(config.to_yaml())
    print("\n".join(f"# {what:14} {text}" for what, text in lines))
    print("".join(f"# {line}\n" for line in planned), end="")
    print("# dry run: nothing was started or fetched")


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="Model directory of a generator, e.g. runs/digits/generator, or its s3:// address.")
    ],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    out: Annotated[Path, typer.Option(help="A .png grid, an .npz of uint8 images, or a folder of PNGs.")] = Path(
        "grid.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed; the same seed gives the same images.")] = 0,
    label: Annotated[
        list[int] | None,
        typer.Option("--label", help="Class index; repeat for several, taken in turn. Default: drawn."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
    workers: Annotated[str, typer.Option(help=WORKERS)] = "auto",
    network: Annotated[str | None, typer.Option(help=NETWORK)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Sample a one-step generator."""
    from sid_ray.launch.measuring import generate_images

    print(f"{num} images in {generate_images(model, num, out, seed, label, batch, workers, overwrite, network)}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's directory, or a generator's, local or at s3://.")],
    to: Annotated[str, typer.Option(help="A folder that is not there yet, or s3://bucket/prefix.")],
    network: Annotated[str | None, typer.Option(help=NETWORK)] = None,
) -> None:
    """Copy a run's generator for others: weights, configuration, model card, a picture of samples."""
    from sid_ray.evaluation.export_generator import export_generator
    from sid_ray.teachers.modules import named_network

    print(f"generator in {export_generator(run, to, named_network(network))}")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="An EDM, SiD or SiDA checkpoint (.pkl), which is never executed, or a diffusers folder; local, "
            "s3:// or https://."
        ),
    ],
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
    model: Annotated[str, typer.Argument(help="A generator or a teacher: whatever teacher.path may be.")],
    num: Annotated[int, typer.Option(min=5, help="Images per trial.")] = 2000,
    metrics: Annotated[str, typer.Option(help="What to measure, with commas: fid, is, kid, pr.")] = "fid",
    features: Annotated[str, typer.Option(help=FEATURES)] = "digits",
    detector: Annotated[str, typer.Option(help=DETECTOR)] = INCEPTION_ADDRESS,
    reference: Annotated[
        str, typer.Option(help="Reference statistics: an .npz file or its address, or builtin:digits.")
    ] = "builtin:digits",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first trial's latents.")] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Measurements, each with latents of its own.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Heun steps of a teacher (18 steps are 35 evaluations).")] = 18,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
    workers: Annotated[str, typer.Option(help=WORKERS)] = "auto",
    network: Annotated[str | None, typer.Option(help=NETWORK)] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this new file.")] = None,
) -> None:
    """Measure a generator or a teacher: all metrics from one pass of images."""
    from sid_ray.evaluation.measure import prepare, warnings
    from sid_ray.launch.measuring import check_new, measure_trials, write_trials

    check_new("--json", json)
    setup = prepare(model, metrics, features, reference, steps, detector, network)
    seeds = range(seed, seed + trials)
    for warning in warnings(setup, num):
        print(f"warning: {warning}", file=sys.stderr)
    measured = measure_trials(setup, num, seeds, batch, workers)
    if json:
        write_trials(json, setup, reference, num, seeds, measured)


@app.command()
def stats(
    images: Annotated[str, typer.Argument(help="Folder (searched recursively) or zip of images, or an .npz of them.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    features: Annotated[str, typer.Option(help=FEATURES)] = "inception",
    detector: Annotated[str, typer.Option(help=DETECTOR)] = INCEPTION_ADDRESS,
    sample: Annotated[
        int, typer.Option(min=0, help="Images whose features are kept, for KID, precision and recall.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed that chooses them.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Make reference statistics of images: all of one size, all grey or all RGB."""
    from sid_ray.launch.measuring import make_reference

    made = make_reference(images, out, features, detector, sample, seed, batch, overwrite)
    print(f"{made.num} images, {len(made.mu)} features of {made.features}: reference statistics in {out}")


@app.command()
def board(
    where: Annotated[
        str, typer.Argument(metavar="RUN_OR_STORAGE", help="A run, a sweep, or a folder of them; local or s3://.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 6006,
    every: Annotated[float, typer.Option(min=1, help="Seconds between looks for what is new.")] = 15,
) -> None:
    """Show runs in TensorBoard, while they are written; of s3:// storage only what is new is fetched."""
    from sid_ray.launch.board import serve_board

    raise typer.Exit(serve_board(where, host, port, every))


@app.command(context_settings=OVERRIDES)
def doctor(
    context: typer.Context,
    preset: Annotated[
        str | None, typer.Argument(help="A preset or a YAML file: also look at what its run would read and write.")
    ] = None,
) -> None:
    """Look for what is wrong with this machine, or with the cluster at RAY_ADDRESS, and say what to do.

    Takes the arguments of `distill`. Ends with code 1 if there is a problem.
    """
    from sid_ray.launch.doctor import examine

    if preset is not None and preset.startswith("--"):
        raise UserError(f"PRESET_OR_YAML: is missing before {preset}; overrides belong to a configuration")
    config = None if preset is None else load_config(preset, parse_overrides(context.args))
    if examine(config, print):
        raise typer.Exit(1)


@app.command(context_settings=OVERRIDES)
def bench(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="A preset (see `sid-ray presets`) or a YAML file.")],
    repeat: Annotated[int, typer.Option(min=1, help="Iterations that are measured.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Iterations before them.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this new file.")] = None,
) -> None:
    """Time and memory of one iteration on one worker, phase by phase; no Ray, and nothing is trained.

    Every field of the configuration can be overridden, as in `distill`. What matters here: --batch.size and
    --engine.micro_batch (a preset's whole batch takes minutes on a CPU), --engine.precision, --engine.zero_stage,
    --engine.activation_checkpointing, --engine.channels_last, --engine.compile, --method.memory, --method.latents,
    --cluster.cpus_per_worker (threads); --teacher.random true needs no file of the teacher.
    """
    from sid_ray.launch.measuring import check_new
    from sid_ray.training.bench import bench as measure
    from sid_ray.training.bench import describe

    config = load_config(preset, parse_overrides(context.args))
    check_new("--json", json)
    report = measure(config, repeat, warm_up)
    if report is None:
        return
    if json:
        json.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(describe(report))


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
    """List the presets: what they distil, what was published about it, and what it costs."""
    from sid_ray.launch.presets import print_presets

    if context.invoked_subcommand is None:
        print_presets()


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(help="Name of a preset, or a YAML file.")]) -> None:
    """Print a preset with every default filled in, and what is known of its teacher: a YAML file to start from."""
    from sid_ray.launch.presets import explain

    config = load_config(name)
    print("".join(f"# {line}\n" for line in explain(config)) + config.to_yaml(), end="")
