"""`sid-ray teach digits`: make the built-in teacher, feature network and reference statistics again."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.errors import UserError
from sid_ray.evaluation.features import FeatureNetwork, save_digits_features, train_digits_features
from sid_ray.evaluation.fid import (
    Sampler,
    frechet_distance,
    generator_statistics,
    heun_sampler,
    one_step_sampler,
)
from sid_ray.evaluation.reference_images import reference_from_images
from sid_ray.evaluation.statistics import ReferenceStatistics, load_reference, save_reference
from sid_ray.teachers.digits import NETWORK, NUM_CLASSES, digits_images, train_teacher
from sid_ray.teachers.model_directory import ModelConfig, save_model

LICENCE = (
    "Weights: Apache-2.0. Data: the digits of scikit-learn's load_digits, i.e. the test set of 'Optical Recognition "
    "of Handwritten Digits' (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository 1998, doi 10.24432/C50P49), "
    "CC BY 4.0"
)
SIGMA_INIT = 2.5
"""Noise level at which a SiD generator starts from the teacher (SiD, arXiv 2404.04057)."""
Progress = Callable[[str], None]
LIBRARIES = ("sid-ray", "torch", "numpy", "scikit-learn")


def teach_digits(
    out: Path,
    *,
    kimg: float = 600.0,
    seed: int = 0,
    batch: int = 128,
    lr: float = 2e-3,
    fid_seeds: int = 5,
    fid_images: int = 2000,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Make the digits teacher and everything that measures it, from scikit-learn's data, into the directory `out`.

    Writes a teacher's model directory (`model.safetensors`, `config.json`, `README.md`), `features.safetensors` and
    `reference.npz`, and returns what it measured. `kimg`: thousands of images shown to the teacher. `progress` gets
    lines for a human. The weights are a function of the arguments and the number of threads. UserError if `out` holds
    files already (unless `overwrite`) or scikit-learn is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise UserError(f"out: {str(out)!r} is not an empty directory; choose another, or allow overwriting it")
    images, labels = digits_images()
    out.mkdir(parents=True, exist_ok=True)

    features, accuracy = train_digits_features(images, labels, seed)
    progress(f"feature network: {accuracy:.2%} of the held-out digits recognised")
    save_digits_features(out / "features.safetensors", features)
    save_reference(out / "reference.npz", reference_from_images(images, features))
    reference = load_reference(out / "reference.npz")

    started = time.monotonic()
    teacher = train_teacher(
        images,
        labels,
        kimg=kimg,
        batch=batch,
        lr=lr,
        seed=seed,
        report=lambda nimg, loss: progress(f"teacher: {nimg / 1000:6.1f} of {kimg:g} kimg, loss {loss:.4f}"),
    )
    seconds = time.monotonic() - started
    measured = {
        "feature_accuracy_held_out": accuracy,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        **measure(teacher, features, reference, len(images), fid_seeds, fid_images, progress),
    }
    config = ModelConfig(
        kind="teacher",
        network=NETWORK,
        sigma_data=teacher.sigma_data,
        label_names=[str(digit) for digit in range(NUM_CLASSES)],
        licence=LICENCE,
        provenance={
            "source": "scikit-learn load_digits (1797 images, 8x8, grey)",
            "made_by": "sid-ray teach digits",
            "settings": {"kimg": kimg, "seed": seed, "batch": batch, "lr": lr},
            "threads": torch.get_num_threads(),
            "training_seconds": round(seconds),
            "libraries": library_versions(),
            "measured": measured,
        },
    )
    save_model(out, teacher.state_dict(), config, model_card(config))
    return measured | {"training_seconds": seconds}


def measure(
    teacher: EDMDenoiser,
    features: FeatureNetwork,
    reference: ReferenceStatistics,
    num_real: int,
    fid_seeds: int,
    fid_images: int,
    progress: Progress,
) -> dict[str, Any]:
    """FID of the teacher in 35 evaluations and of the untrained generator, which is the teacher in one evaluation.

    The teacher is measured with `fid_seeds` sets of `num_real` images (mean and standard deviation: FID's bias
    depends on the number of images, and this one is the reference's) and once with `fid_images`, the digits preset's.
    """

    def fid(sampler: Sampler, num: int) -> float:
        return frechet_distance(generator_statistics(sampler, num, features, batch=512), reference)

    sets = [fid(heun_sampler(teacher, seed), num_real) for seed in range(fid_seeds)]
    measured = {
        "teacher_fid_mean": fmean(sets),
        "teacher_fid_deviation": stdev(sets) if len(sets) > 1 else 0.0,
        "teacher_fid_sets": f"{fid_seeds} x {num_real} images, 35 evaluations each",
        f"teacher_fid_{fid_images}_images": fid(heun_sampler(teacher, 0), fid_images),
        f"untrained_generator_fid_{fid_images}_images": fid(one_step_sampler(teacher, SIGMA_INIT, 0), fid_images),
    }
    progress("\n".join(f"{name}: {value}" for name, value in measured.items()))
    return measured


def library_versions() -> dict[str, str]:
    """Versions of what the weights depend on; a library that is not installed as a package is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a source checkout of sid-ray itself
    return found


def model_card(config: ModelConfig) -> str:
    """The README of the teacher's model directory."""
    made, settings = config.provenance["measured"], config.provenance["settings"]
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in made.items())
    libraries = ", ".join(f"{name} {number}" for name, number in config.provenance["libraries"].items())
    command = f"sid-ray teach digits --kimg {settings['kimg']:g} --seed {settings['seed']}"
    return f"""# Digits teacher

A class-conditional EDM denoiser (DDPM++, {made["teacher_parameters"]:,} parameters) of handwritten digits, 8x8 pixels,
grey. It comes with sid-ray as `builtin:digits`, so that distillation can be tried without downloads, on a CPU.

- `model.safetensors`, `config.json`: averaged (EMA) weights and architecture, by EDM's parameter names.
- `features.safetensors`: a small classifier whose 64 penultimate activations take Inception's place in FID.
- `reference.npz`: mean and covariance of those features over all 1,797 real images.

FIDs measured with these features compare with each other only, never with Inception FIDs. The teacher and 80 % of the
feature network have seen the images that the reference is made of: this is a demonstration, not a benchmark.

| measured | |
|---|---|
{rows}

`untrained_generator` is this denoiser evaluated once, on noise of level {SIGMA_INIT}: where distillation starts.

## Made again with

    {command}

batch {settings["batch"]}, learning rate {settings["lr"]:g}, {config.provenance["threads"]} threads, {libraries}.
Another number of threads or another torch gives slightly different weights.

## Licence

{config.licence}.
"""


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
