"""What a run would be, found out without starting it: where its inputs come from, what it costs, what it needs."""

from __future__ import annotations

import torch

from sid_ray.config import TEACHER_REFERENCE, Config
from sid_ray.diffusion.flops import network_cost
from sid_ray.errors import UserError
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.statistics import load_reference
from sid_ray.storage import cached, is_remote
from sid_ray.teachers.model_directory import ModelConfig
from sid_ray.teachers.public import public_teacher
from sid_ray.teachers.sources import read_any_config
from sid_ray.teachers.start import check_warm_start
from sid_ray.teachers.untrained import WARNING
from sid_ray.training.memory import memory_per_worker, on_gpus
from sid_ray.training.opening import check_measure, check_method
from sid_ray.training.planner import NetworkSize, parse_machine, plan_lines
from sid_ray.training.rehearsal import bytes_per_image
from sid_ray.training.run_directory import RunDirectory, start_of

GIGA = 1e9


def describe_run(config: Config) -> list[tuple[str, str]]:
    """(what, text) lines about a run. Works without network: what would be fetched is said to be, and not checked.

    UserError, as at the start of the run, for what can be known to be wrong.
    """
    teacher, lines = _teacher(config)
    lines += _measure(config, teacher)
    if teacher is not None:
        check_method(config, teacher.skeleton())
        lines += _warm_starts(config, teacher) + _cost(config, teacher)
    run = RunDirectory.of(config)
    fixed = config.engine.micro_batch != "auto"
    slots = f"{config.num_slots} micro-batches of {config.micro_batch}" if fixed else "micro-batches as large as fit"
    lines += [
        ("run directory", run.address(run.path)),
        ("iterations", f"{-(-config.total_nimg // config.batch.size):,} of {config.batch.size} images, {slots}"),
        ("workers", f"{config.cluster.workers} ({config.cluster.cpus_per_worker} CPU each)"),
    ]
    return lines


def describe_machine(config: Config, machine: str, price: float | None, utilisation: float) -> list[str]:
    """Lines about a run on GPUs such as `8xH100-80GB`; `price` is that of one GPU for one hour.

    UserError if they are not known, or the network is not before its file is fetched.
    """
    gpus = parse_machine(machine)
    teacher, _ = _teacher(config)
    if teacher is None:
        raise UserError(f"--plan: the architecture of {config.teacher.path} is not known before it is fetched")
    config = on_gpus(config)
    with torch.device("meta"):
        denoiser = teacher.build().eval()
        size = NetworkSize(*network_cost(denoiser), bytes_per_image(config, denoiser))
    return ["", *plan_lines(config, size, gpus, price, utilisation)]


def _teacher(config: Config) -> tuple[ModelConfig | None, list[tuple[str, str]]]:
    """Configuration of the teacher, None if it cannot be known before the file is fetched, and what to say of it."""
    path, run = config.teacher.path, RunDirectory.of(config)
    if config.teacher.random:
        return start_of(config, run).models()[0], [("caution", WARNING), ("architecture", f"that of {path}")]
    if not is_remote(path) or run.teacher.is_dir():
        return start_of(config, run).models()[0], [("teacher", path)]
    if (copy := cached(path)) is not None:
        return read_any_config(str(copy), "teacher.path"), [("teacher", _where(path))]
    if (public := public_teacher(path)) is None:
        return None, [("teacher", f"{_where(path)}; its architecture is not known before")]
    known = ModelConfig(kind="teacher", network=public.network, licence=public.licence)
    return known, [("teacher", f"{_where(path)} (licence: {public.licence})")]


def _warm_starts(config: Config, teacher: ModelConfig) -> list[tuple[str, str]]:
    lines = []
    for role, path in (("generator", config.init.generator), ("fake_score", config.init.fake_score)):
        if path is None:
            continue
        here = cached(path) if is_remote(path) else path
        if here is not None and config.init.student is None:
            check_warm_start(role, str(here), teacher)
        lines.append((f"init.{role}", path if here is not None else f"{path}, fetched at the start"))
    return lines


def _measure(config: Config, teacher: ModelConfig | None) -> list[tuple[str, str]]:
    """Where feature network and reference come from; checked together as far as they are here."""
    e = config.evaluation
    if not e.num_images:
        return [("FID", "not measured (evaluation.num_images 0)")]
    network = e.detector if e.features == "inception" else e.features
    shape = None if teacher is None or is_remote(network) else teacher.image_shape("teacher.path")
    if shape and not is_remote(e.reference):
        check_measure(config, shape)
    elif shape:
        load_features(e.features, shape, e.detector)
    elif not is_remote(e.reference) and e.reference != TEACHER_REFERENCE:
        load_reference(e.reference)
    features = f"{e.features}: {_where(network)}" if e.features == "inception" else _where(network)
    reference = "made of the teacher's samples" if e.reference == TEACHER_REFERENCE else _where(e.reference)
    return [("features", features), ("reference", reference)]


def _where(path: str) -> str:
    """A path, and whether it must be fetched."""
    here = cached(path) if is_remote(path) else None
    return f"{path}, fetched before to {here}" if here else f"{path}, fetched at the start" if is_remote(path) else path


def _cost(config: Config, teacher: ModelConfig) -> list[tuple[str, str]]:
    with torch.device("meta"):
        parameters, flops = network_cost(teacher.build().eval())
    per_image = config.forwards * flops
    workers = sorted(set(config.cluster.worker_range or (1, 8)))
    return [
        ("network", f"{parameters:,} parameters, {flops / GIGA:.4g} GFLOP per forward pass of an image"),
        (
            "cost",
            f"{config.forwards} forward passes for each image, {per_image / GIGA:,.4g} GFLOP; "
            f"{per_image * config.total_nimg / 1e15:,.0f} PFLOP in all",
        ),
        *(("memory", f"{n} worker(s): {_memory(config, parameters, n)}") for n in workers),
    ]


def _memory(config: Config, parameters: int, workers: int) -> str:
    parts = memory_per_worker(on_gpus(config), parameters, workers)
    shown = ", ".join(f"{name} {amount / GIGA:.3g}" for name, amount in parts.items())
    return f"{sum(parts.values()) / GIGA:.3g} GB each and activations ({shown})"
