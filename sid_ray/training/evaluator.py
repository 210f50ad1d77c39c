"""Measuring the averaged generator while it is trained, and keeping the best.

There are no collectives inside sampling: the average is gathered once into a plain network on every rank, the
image numbers are divided over the ranks, and the feature sums are added up at the end.
"""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.diffusion.generator import OneStepGenerator
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.fid import (
    Sampler,
    frechet_distance,
    generator_statistics,
    heun_sampler,
    one_step_sampler,
)
from sid_ray.evaluation.statistics import load_reference
from sid_ray.storage import digest
from sid_ray.teachers.model_directory import (
    ModelConfig,
    load_model,
    read_model_config,
    resolve_model,
    save_model,
)
from sid_ray.training.distributed import World
from sid_ray.training.progress import Progress
from sid_ray.training.run_directory import RunDirectory, teacher_directory


class Evaluator:
    """FID with the same latents and the same number of images throughout a run. All methods are collective."""

    def __init__(self, config: Config, run: RunDirectory, world: World, plain: EDMDenoiser):
        self.config, self.run, self.world, self.plain = config, run, world, plain
        self.features = load_features(config.evaluation.features).to(world.device)
        self.reference = load_reference(config.evaluation.reference)

    def teacher_fid(self) -> float:
        """FID of the teacher's own samples; call it while `plain` still holds the teacher's weights."""
        e = self.config.evaluation
        return self._fid(heun_sampler(self.plain, e.seed, e.teacher_steps, self.world.device))

    def generator_fid(self, average: dict[str, Tensor], seed: int | None = None) -> float:
        """FID of a one-step generator with these weights; `seed` gives it other latents than the run's."""
        self.plain.load_state_dict(average, strict=True)
        seed = self.config.evaluation.seed if seed is None else seed
        return self._fid(one_step_sampler(self.plain, self.config.method.sigma_init, seed, self.world.device))

    def generator(self, average: dict[str, Tensor]) -> OneStepGenerator:
        """The generator with these weights, to sample from."""
        self.plain.load_state_dict(average, strict=True)
        return OneStepGenerator(self.plain, self.config.method.sigma_init)

    def save_best(self, average: dict[str, Tensor], progress: Progress) -> None:
        """Write the model directory of the best average; the first worker only, no collective."""
        config = self._model_config(progress)
        save_model(self.run.generator, average, config, model_card(config))

    def confirm_best(self, progress: Progress) -> list[float]:
        """Measure the saved best generator with fresh latents, and record it with the model.

        Having been chosen for its FID, the best one's FID is flattered; fresh latents are honest.
        """
        self.world.barrier()
        best, _ = load_model(str(self.run.generator))
        repeats = self.config.evaluation.confirmations
        fresh = range(self.config.evaluation.seed + 1, self.config.evaluation.seed + 1 + repeats)
        fids = [self.generator_fid(best.state_dict(), seed) for seed in fresh]
        if self.world.is_first:
            progress = progress.model_copy(update={"confirmed_fids": fids})
            self.save_best(best.state_dict(), progress)
        return fids

    def _fid(self, sample: Sampler) -> float:
        e = self.config.evaluation
        own = generator_statistics(sample, e.num_images, self.features, e.batch, self.world.rank, self.world.size)
        return self.world.from_first(frechet_distance(own.all_reduce(), self.reference))

    def _model_config(self, progress: Progress) -> ModelConfig:
        directory = teacher_directory(self.config, self.run)
        teacher = read_model_config(directory, "teacher.path")
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
            network=teacher.network,
            sigma_data=teacher.sigma_data,
            sigma_init=self.config.method.sigma_init,
            label_names=teacher.label_names,
            licence=teacher.licence,
            provenance={
                "method": "SiD (arXiv 2404.04057)",
                "teacher": source if source.startswith("builtin:") else source.rsplit("/", 1)[-1],
                "teacher_sha256": digest(resolve_model(directory, "teacher.path") / "model.safetensors"),
                "nimg": progress.best_nimg,
                "alpha": self.config.method.alpha,
                "batch_size": self.config.batch.size,
                "seed": self.config.run.seed,
                "measured": measured,
            },
        )


def mean_and_deviation(values: list[float]) -> str:
    """Values as "mean ± deviation (n=...)"."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f} (n={len(values)})"


def model_card(config: ModelConfig) -> str:
    """README.md of a distilled generator."""
    p, m = config.provenance, config.provenance["measured"]
    classes = "" if not config.label_names else f"\nClasses: {', '.join(config.label_names)}.\n"
    lines = [f"- {m['fid']:.3f} with the latents by which it was chosen ({m['num_images']} images)"]
    if m.get("fid_fresh_latents"):
        lines.append(f"- {mean_and_deviation(m['fid_fresh_latents'])} with fresh latents")
    if m["teacher_fid"] is not None:
        lines.append(f"- {m['teacher_fid']:.3f}: its teacher, many steps, measured in the same way")
    return f"""# One-step generator

Distilled from `{p["teacher"]}` by {p["method"]} in {p["nimg"] / 1000:g} thousand images
(alpha {p["alpha"]}, batch {p["batch_size"]}). It makes an image in one network evaluation.
{classes}
FID on the feature network `{m["features"]}`:

{chr(10).join(lines)}

```python
from sid_ray import load_generator
images = load_generator("PATH").sample(64)  # float, [-1, 1], NCHW
```

Licence: {config.licence}
"""
