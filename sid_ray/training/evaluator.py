"""Measuring the averaged generator while it is trained, and keeping the best.

There are no collectives inside sampling: the average is gathered once into a plain network on every rank, the
image numbers are divided over the ranks, and the feature sums are added up at the end.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sid_ray.config import TEACHER_REFERENCE, Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.fid import (
    Sampler,
    frechet_distance,
    generator_statistics,
    heun_sampler,
    one_step_sampler,
)
from sid_ray.evaluation.parts import local_device
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics, load_reference, save_reference
from sid_ray.teachers.model_directory import ModelConfig, load_model, save_model
from sid_ray.teachers.start import Start
from sid_ray.teachers.untrained import WARNING
from sid_ray.training.distributed import World
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory

REFERENCE_SEEDS = 1_000
"""How far the seed of a reference from the teacher's samples lies from `evaluation.seed`, beyond all confirmations."""
POINTS = 1_000
"""Points of a picture."""


@dataclass(frozen=True)
class FidJob:
    """The FID of one average, to be measured by any process: it carries all that is particular to the run."""

    network: Denoiser
    """With the average's weights, on the CPU."""
    config: Config
    reference: ReferenceStatistics

    def __call__(self) -> float:
        """Measure it on this process's device, as the workers of the run would."""
        torch.set_num_threads(self.config.cluster.cpus_per_worker)
        e, method, device = self.config.evaluation, self.config.method, local_device()
        features = load_features(e.features, self.network.image_shape, e.detector).to(device)
        network = self.network.to(device).eval()
        sample = one_step_sampler(network, method.sigma_init, e.seed, device, method.class_weights)
        return frechet_distance(generator_statistics(sample, e.num_images, features, e.batch), self.reference)


class Evaluator:
    """FID with the same latents and the same number of images throughout a run. All methods are collective."""

    def __init__(self, config: Config, run: RunDirectory, start: Start, world: World, plain: Denoiser):
        self.config, self.run, self.start, self.world, self.plain = config, run, start, world, plain
        e = config.evaluation
        if e.num_images:
            self.features = load_features(e.features, plain.image_shape, e.detector).to(world.device)
            own = e.reference == TEACHER_REFERENCE
            self.reference = self._teacher_reference() if own else load_reference(e.reference)

    def teacher_fid(self) -> float:
        """FID of the teacher's own many-step samples."""
        return self._fid(self._teacher_sampler(self.config.evaluation.seed))

    @cached_property
    def teacher_points(self) -> Tensor:
        """Many-step samples of a teacher of points, to be drawn beside the generator's; no collective."""
        return self._teacher_sampler(self.config.evaluation.seed)(range(POINTS)).cpu()

    def generator_fid(self, average: dict[str, Tensor], seed: int | None = None) -> float:
        """FID of a one-step generator with these weights; `seed` gives it other latents than the run's."""
        self.plain.load_state_dict(average, strict=True)
        seed, method = self.config.evaluation.seed if seed is None else seed, self.config.method
        return self._fid(one_step_sampler(self.plain, method.sigma_init, seed, self.world.device, method.class_weights))

    def job(self, average: dict[str, Tensor]) -> FidJob:
        """What `generator_fid` measures, for another process; no collective."""
        network = copy.deepcopy(self.plain).cpu()
        network.load_state_dict(average, strict=True)
        return FidJob(network, self.config, self.reference)

    def generator(self, average: dict[str, Tensor]) -> OneStepGenerator:
        """The generator with these weights, to sample from."""
        self.plain.load_state_dict(average, strict=True)
        return OneStepGenerator(self.plain, self.config.method.sigma_init, self.config.method.class_weights)

    def save_best(self, average: dict[str, Tensor], progress: Progress) -> None:
        """Write the model directory of the best average; the first worker only, no collective."""
        config = self._model_config(progress)
        save_model(self.run.generator, average, config, model_card(config))

    def confirm_best(self, progress: Progress) -> list[float]:
        """Measure the saved best generator with fresh latents, and record it with the model.

        Having been chosen for its FID, the best one's FID is flattered; fresh latents are honest.
        """
        # The first worker wrote it, and perhaps only its machine has it.
        network = copy.deepcopy(self.plain).cpu()
        best = self.world.once(lambda: load_model(str(self.run.generator), network=network)[0].state_dict())
        repeats = self.config.evaluation.confirmations
        fresh = range(self.config.evaluation.seed + 1, self.config.evaluation.seed + 1 + repeats)
        fids = [self.generator_fid(best, seed) for seed in fresh]
        if self.world.is_first:
            progress = progress.model_copy(update={"confirmed_fids": fids})
            self.save_best(best, progress)
        return fids

    def _fid(self, sample: Sampler) -> float:
        return self.world.from_first(frechet_distance(self._statistics(sample), self.reference))

    def _statistics(self, sample: Sampler) -> FeatureStatistics:
        e = self.config.evaluation
        own = generator_statistics(sample, e.num_images, self.features, e.batch, self.world.rank, self.world.size)
        return own.all_reduce()

    def _teacher_sampler(self, seed: int) -> Sampler:
        """Many-step samples of the teacher, which is loaded for it."""
        teacher = self.start.teacher()[0].to(self.world.device).requires_grad_(False)
        steps, weights = self.config.evaluation.teacher_steps or 18, self.config.method.class_weights
        return heun_sampler(teacher, seed, steps, self.world.device, weights)

    def _teacher_reference(self) -> ReferenceStatistics:
        """The run's own reference; made once, with latents that no evaluation uses."""
        path = self.run.reference
        if not self.world.once(path.is_file):
            s = self._statistics(self._teacher_sampler(self.config.evaluation.seed + REFERENCE_SEEDS))
            if self.world.is_first:
                made = ReferenceStatistics(s.mean.numpy(), s.covariance.numpy(), s.num, self.features.name)
                save_reference(path, made)
        return self.world.once(lambda: load_reference(path))

    @cached_property
    def _origin(self) -> tuple[ModelConfig, ModelConfig, str]:
        return *self.start.models(), self.start.teacher_digest()

    def _model_config(self, progress: Progress) -> ModelConfig:
        teacher, student, teacher_digest = self._origin
        measured: dict[str, Any] = {
            "fid": progress.best_fid,
            "num_images": self.config.evaluation.num_images,
            "features": self.config.evaluation.features,
            "teacher_fid": progress.teacher_fid,
        }
        if progress.confirmed_fids:
            measured["fid_fresh_latents"] = progress.confirmed_fids
        source = self.config.teacher.path
        return ModelConfig(
            kind="generator",
            network=student.network,
            sigma_data=student.sigma_data,
            sigma_init=self.config.method.sigma_init,
            label_names=teacher.label_names,
            class_weights=self.config.method.class_weights,
            licence=teacher.licence,
            provenance={
                "method": "SiD (arXiv 2404.04057)",
                "teacher": source if source.startswith("builtin:") else source.rstrip("/").rsplit("/", 1)[-1],
                "teacher_sha256": teacher_digest,
                "student": self.config.init.student,
                "nimg": progress.best_nimg,
                "alpha": self.config.method.alpha,
                "batch_size": self.config.batch.size,
                "seed": self.config.run.seed,
                "measured": measured,
            }
            | ({"random_teacher": True} if self.config.teacher.random else {}),
        )


def mean_and_deviation(values: list[float]) -> str:
    """Values as "mean ± deviation (n=...)"."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f} (n={len(values)})"


def model_card(config: ModelConfig) -> str:
    """README.md of a distilled generator."""
    p = config.provenance
    warning = f"\n**{WARNING}.**\n" if p.get("random_teacher") else ""
    classes = "" if not config.label_names else f"\nClasses: {', '.join(config.label_names)}.\n"
    network = f", network={config.network['class_name']}(...)" if config.is_python else ""
    return f"""# One-step generator
{warning}
Distilled from `{p["teacher"]}` by {p["method"]} in {p["nimg"] / 1000:g} thousand images
(alpha {p["alpha"]}, batch {p["batch_size"]}). It makes an image in one network evaluation.
{classes}
{_quality(p["measured"])}

```python
from sid_ray import load_generator
images = load_generator("PATH"{network}).sample(64)  # float, [-1, 1], NCHW
```

Licence: {config.licence}
"""


def _quality(measured: dict[str, Any]) -> str:
    if measured["fid"] is None:
        return "FID was not measured."
    lines = [
        f"FID on the feature network `{measured['features']}`:\n",
        f"- {measured['fid']:.3f} with the latents by which it was chosen ({measured['num_images']} images)",
    ]
    if measured.get("fid_fresh_latents"):
        lines.append(f"- {mean_and_deviation(measured['fid_fresh_latents'])} with fresh latents")
    if measured["teacher_fid"] is not None:
        lines.append(f"- {measured['teacher_fid']:.3f}: its teacher, many steps, measured in the same way")
    return "\n".join(lines)
