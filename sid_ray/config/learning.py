"""Sections that decide what a run learns: teacher, method, optimizer, engine, batch, and where it starts."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sid_ray.config.section import Section


class Teacher(Section):
    """The pretrained diffusion model to distil."""

    path: str
    """Model directory of the teacher, an EDM checkpoint (.pkl), a diffusers folder (UNet2DModel), the s3:// or https://
    address of one, `builtin:digits`, or `python:package.module:factory`, which runs your own code."""
    random: bool = False
    """Smoke tests only: a teacher of this architecture with fresh random weights instead of its own; the path
    is a model directory, or names a public teacher, and nothing is fetched."""
    licence: str | None = None
    """Licence of a teacher that comes in another format; unset: what is known of the file."""


class Method(Section):
    """How the generator learns from the teacher (Score identity Distillation)."""

    name: Literal["sid"] = "sid"
    """Distillation method."""
    alpha: float = Field(1.2, ge=-10, le=10)
    """Weight of the paper's second loss term; the most sensitive setting. The paper uses 1.0 and 1.2."""
    sigma_init: float = Field(2.5, gt=0)
    """Noise level at which the generator reads its latents."""
    tmax: float = Field(800, gt=0, le=1000)
    """Largest time of the generator step's noise levels, of 1000 on Karras' schedule (800 is sigma 24.4)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of generator and fake score while training; unset: the teacher's own."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of each geometric augmentation of the images that the fake score learns from (EDM's, with
    conditioning labels); needs a teacher with 9 augmentation labels."""
    loss_scale_generator: float = Field(100.0, gt=0)
    """Factor of the generator's loss (lsg)."""
    loss_scale_fake_score: float = Field(1.0, gt=0)
    """Factor of the fake score's loss (ls)."""
    class_weights: list[float] | None = None
    """How often each class is drawn, in training and evaluation, in any unit (one number per class of the
    teacher); unset: all alike."""
    p_mean: float = -1.2
    """Mean of ln(sigma) in the fake-score step."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of ln(sigma) in the fake-score step."""
    latents: Literal["fresh", "shared"] = "fresh"
    """Draw new latents for the generator step (as published), or share one batch of images between both steps
    (one generator forward saved; needs memory 'fast' and one micro-batch per worker)."""
    memory: Literal["fast", "lean", "minimal"] = "fast"
    """Graphs alive in the generator step: all (11 forward equivalents per image), one frozen network's at a
    time (12), or one graph in all, the generator's being rebuilt (13)."""

    @field_validator("class_weights")
    @classmethod
    def _weights_of_something(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise ValueError("allowed: numbers of 0 or more, not all 0")
        return weights

    @property
    def forwards(self) -> int:
        """Cost of an iteration, in forward passes per image; a backward pass counts as two (an input's only, as one).

        `fast`: generator 1, fake-score step 3, generator step 3, and 2 for each frozen network.
        """
        return {"fast": 11, "lean": 12, "minimal": 13}[self.memory] - (self.latents == "shared")


class Optimizer(Section):
    """Adam for both networks, and the generator's moving average."""

    generator_lr: float = Field(1e-5, gt=0, lt=1)
    """Learning rate of the generator."""
    fake_score_lr: float = Field(1e-5, gt=0, lt=1)
    """Learning rate of the fake score."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rates stay (as published) or fall to 0 as a half cosine over run.total_kimg."""
    fake_score_schedule: Literal["constant", "cosine"] | None = None
    """The same for the fake score alone, which has to keep up with a generator that slows down; unset: as schedule."""
    generator_beta1: float = Field(0.0, ge=0, lt=1)
    """Adam's first momentum for the generator; the fake score's is 0."""
    eps: float | None = Field(None, gt=0)
    """Adam's epsilon; unset: 1e-8 in fp32, 1e-6 in bf16."""
    ema_halflife_kimg: float = Field(500, ge=0)
    """Half-life of the generator's moving average, in thousands of images."""
    ema_rampup_ratio: float | None = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far; unset: no ramp."""
    gradient_clip: float | None = Field(None, gt=0)
    """Largest global gradient norm of either network; unset: no clipping."""


class Engine(Section):
    """DeepSpeed: how the two trained networks are sharded and in which precision they run."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: shard nothing (0), optimizer state and EMA (1), also gradients (2), also weights (3)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the networks; masters, accumulation, reduction and preconditioning are float32 always. auto: bf16
    where the workers' devices compute in it and zero_stage is not 0, else fp32; settled when the run begins."""
    micro_batch: int | Literal["auto"] = 64
    """Images of one forward pass (a slot). Fixed for a run: random draws belong to slots. auto: as many as fit into
    the memory of a worker, settled when the run begins and written into its config.yaml."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory of a worker (1e9 bytes) that micro_batch auto may fill; unset: what is free on its device."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the networks' blocks for the backward passes and compute the rest again: less memory,
    four more forward equivalents per image (15 with method.memory 'fast')."""
    channels_last: bool = False
    """Lay images and features out pixel by pixel instead of channel by channel."""
    compile: bool = False
    """Compile the networks with torch.compile; the first iterations take minutes. Not at zero_stage 3."""

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if isinstance(value, str) and re.fullmatch(r"[0-9]+", value):
            value = int(value)
        number = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (number and value >= 1):  # type: ignore[operator]
            raise ValueError("allowed: 'auto' or a whole number of at least 1")
        return value

    @property
    def bf16(self) -> bool:
        """Whether the networks are bf16. ValueError while that is not settled."""
        if self.precision == "auto":
            raise ValueError("engine.precision is not settled yet")
        return self.precision == "bf16"

    @model_validator(mode="after")
    def _compiled_networks_are_whole(self) -> Engine:
        if self.compile and self.zero_stage == 3:
            raise ValueError("engine.compile: true does not work at engine.zero_stage 3; allowed there: false")
        return self

    @model_validator(mode="after")
    def _bf16_needs_sharding(self) -> Engine:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "engine.zero_stage: 0 runs in fp32 only (it keeps no fp32 masters); for bf16 use 1 (or 2, 3)"
            )
        return self


class Batch(Section):
    """The global batch."""

    size: int = Field(256, ge=1)
    """Images per iteration over all workers; accumulation is derived from it."""


class Init(Section):
    """Where the trained networks start."""

    student: str | None = None
    """Network of another architecture for generator and fake score, given as teacher.path is; unset: the teacher's."""
    fit_kimg: float = Field(100, ge=0)
    """Thousands of images with which a student learns the teacher's denoiser before the run; 0: not at all."""
    fit_lr: float = Field(1e-3, gt=0, lt=1)
    """Learning rate of that fit at its beginning; it falls to 0 as a half cosine."""
    generator: str | None = None
    """What to start the generator from, given as teacher.path is; unset: the student, or the teacher."""
    fake_score: str | None = None
    """What to start the fake score from, given as teacher.path is; unset: the student, or the teacher."""
