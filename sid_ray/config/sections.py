"""The sections of the configuration: every field, documented where it stands, and its bounds."""

from __future__ import annotations

import math
import re
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TEACHER_REFERENCE = "teacher"
"""`evaluation.reference` that is made from the teacher's own samples."""
INCEPTION_ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
"""Where the detector of published FIDs is published."""


class Section(BaseModel):
    """A part of the configuration: immutable, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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


class Evaluation(Section):
    """FID of the averaged generator, on a schedule in images."""

    every_kimg: float = Field(500, gt=0)
    """Interval of evaluations, in thousands of images; early on it is shorter (1/8, 1/4, 1/2 of it)."""
    num_images: int = Field(50_000, ge=0)
    """Images per evaluation, the same for the whole run: FID's bias depends on it. 0: FID is never measured, no
    feature network and no reference are needed, and the latest average is kept instead of the best."""
    features: str = "digits"
    """Feature network of FID: `digits`, `inception` (published FIDs), `pixels` (the pixels themselves), `points`
    (coordinates of points, and waves that see modes), a TorchScript file (.pt) or `python:package.module:factory`,
    which runs your own code; see docs/metrics.md."""
    detector: str = INCEPTION_ADDRESS
    """Where Inception's TorchScript file lies: a path or an address; its sha256 is checked."""
    reference: str = "builtin:digits"
    """Reference statistics (.npz, also at https:// or s3://), `builtin:digits`, or `teacher`: made once per run, from
    evaluation.num_images many-step samples of the teacher itself."""
    batch: int = Field(250, ge=1)
    """Images per forward pass while sampling."""
    seed: int = Field(0, ge=0)
    """Seed of the evaluation's latents, the same for the whole run."""
    mode: Literal["inline", "async"] = "inline"
    """inline: the workers measure, and training waits. async: training goes on while a Ray task measures on resources
    like a worker's that are free beside the run; without any, the workers measure later. Both give the same FID. The
    first measurements and the last are always the workers' own."""
    confirmations: int = Field(3, ge=0, le=100)
    """At the end the best generator is measured again this often, with fresh latents each time."""
    teacher_steps: int = Field(18, ge=0, le=1000)
    """Heun steps of the teacher's own FID, measured once (18 steps are 35 evaluations); 0: not measured."""

    @field_validator("num_images")
    @classmethod
    def _a_covariance_needs_two(cls, num_images: int) -> int:
        if num_images == 1:
            raise ValueError("allowed: 2 or more, or 0 for no evaluation")
        return num_images

    @model_validator(mode="after")
    def _a_teacher_as_reference_is_sampled(self) -> Evaluation:
        if self.reference == TEACHER_REFERENCE and not self.teacher_steps:
            raise ValueError(
                "evaluation.teacher_steps: 0 makes no samples for evaluation.reference 'teacher'; allowed: 1 on"
            )
        return self


class Guard(Section):
    """What counts as divergence, and what is done about it."""

    policy: Literal["warn", "stop", "rollback"] = "rollback"
    """What is done when a run diverges: warn and go on; stop, leaving the earlier checkpoints; or roll back to the
    checkpoint of the best FID and go on from there with lower learning rates and other random draws."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks of a run; the next divergence stops it."""
    rollback_lr_factor: float = Field(0.3, gt=0, le=1)
    """Both learning rates are multiplied by this at each rollback."""
    fid_factor: float = Field(3.0, gt=1)
    """An FID above this factor of the best so far is too high: a spike if it recovers, else a divergence. An FID
    that is not finite is a divergence at once."""
    fid_patience: int = Field(3, ge=1)
    """Evaluations in a row whose FID is too high that make a divergence."""
    explosion_factor: float = Field(10.0, gt=1)
    """The fake score's loss or a gradient norm above this factor of its median over the last 20 reports is too high."""
    explosion_patience: int = Field(3, ge=1)
    """Reports in a row with one of them too high that make a divergence."""
    max_skipped_in_a_row: int = Field(20, ge=1)
    """Iterations in a row whose gradients were not finite that make a divergence."""


class Run(Section):
    """The run: where it lies, how long it is, how often it saves."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's directory; the same name in the same storage resumes."""
    storage: str = "runs"
    """Folder of runs (shared by all nodes, if there are several), or s3://bucket/prefix."""
    total_kimg: float = Field(500_000, gt=0)
    """Length of the run in thousands of images."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    report_every_kimg: float = Field(50, gt=0)
    """Interval of progress lines and scalars."""
    sample_every_kimg: float = Field(500, gt=0)
    """Interval of sample grids (each also comes with an evaluation)."""
    sample_images: int = Field(100, ge=0)
    """Images of a sample grid, a class per row; 0: no grids."""
    checkpoint_every_kimg: float = Field(500, gt=0)
    """Interval of checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Write a checkpoint also where the FID is the best so far, and keep it."""
    max_checkpoint_failures: int = Field(3, ge=1)
    """Stop when so many checkpoints in a row could not be written; before, training goes on with a warning."""

    @field_validator("storage")
    @classmethod
    def _a_folder_or_s3(cls, storage: str) -> str:
        scheme, separator, rest = storage.partition("://")
        if not storage or (separator and (scheme != "s3" or not rest.strip("/"))):
            raise ValueError("allowed: a folder, or s3://bucket/prefix")
        return storage


class Cluster(Section):
    """What Ray gives the run."""

    workers: int | str = "auto"
    """Number of workers; a range such as "2-8": as many as there is room for; auto: one per GPU present, or two on
    a machine without."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Whether a worker gets a GPU; auto: if there are any."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs (and threads) of a worker."""
    max_failures: int = Field(3, ge=0)
    """How often lost workers are restarted from the last checkpoint before the command gives up. Machines that are
    taken away with notice, and resizes, do not count."""
    hang_timeout_seconds: float | None = Field(1800, gt=0)
    """A worker that makes no progress in training for so long is ended, and counts as lost; unset: never. It must be
    longer than the slowest iteration, the first one included; evaluations and checkpoints may take longer."""
    resize_seconds: float = Field(600, ge=1)
    """With a range of workers: room for more must have been there for so long before the run grows into it (which
    costs a checkpoint and a restart)."""

    @field_validator("workers", mode="before")
    @classmethod
    def _number_range_or_auto(cls, workers: object) -> object:
        if isinstance(workers, str) and re.fullmatch(r"[0-9]+", workers):
            workers = int(workers)
        low, high = 0, 0
        if isinstance(workers, int) and not isinstance(workers, bool):
            low = high = workers
        elif isinstance(workers, str) and (bounds := re.fullmatch(r"([0-9]+)-([0-9]+)", workers)):
            low, high = int(bounds[1]), int(bounds[2])
        if workers != "auto" and not 1 <= low <= high:
            raise ValueError("allowed: 'auto', a number of at least 1, or a range such as '2-8'")
        return workers

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """(fewest, most) workers; None if it is for the cluster to say."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        if self.workers == "auto":
            return None
        low, high = self.workers.split("-")
        return int(low), int(high)


class Config(Section):
    """A complete, valid run."""

    description: str = ""
    """What this preset is, in a sentence."""
    teacher: Teacher
    method: Method = Method()
    optimizer: Optimizer = Optimizer()
    engine: Engine = Engine()
    batch: Batch = Batch()
    init: Init = Init()
    evaluation: Evaluation = Evaluation()
    guard: Guard = Guard()
    run: Run = Run()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _fields_agree(self) -> Config:
        if self.engine.micro_batch != "auto" and self.batch.size % self.engine.micro_batch:
            raise ValueError(
                f"batch.size: {self.batch.size} is not divisible by engine.micro_batch {self.engine.micro_batch}; "
                f"allowed: multiples of {self.engine.micro_batch} (or another engine.micro_batch)"
            )
        if self.method.latents == "shared" and self.method.memory != "fast":
            raise ValueError(f"method.latents: 'shared' needs method.memory 'fast', not {self.method.memory!r}")
        return self

    @property
    def micro_batch(self) -> int:
        """Images of a slot. ValueError while that is not settled."""
        if self.engine.micro_batch == "auto":
            raise ValueError("engine.micro_batch is not settled yet")
        return self.engine.micro_batch

    @property
    def num_slots(self) -> int:
        """Slots (forward passes of one micro-batch) that make up the global batch."""
        return self.batch.size // self.micro_batch

    @property
    def forwards(self) -> int:
        """Forward passes per image that an iteration costs, recomputed activations included."""
        return self.method.forwards + 4 * self.engine.activation_checkpointing

    @property
    def total_nimg(self) -> int:
        """Length of the run in images."""
        return round(self.run.total_kimg * 1000)

    @property
    def adam_eps(self) -> float:
        """Adam's epsilon with its default by precision."""
        return self.optimizer.eps or (1e-6 if self.engine.bf16 else 1e-8)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


MAY_CHANGE_ON_RESUME = (
    "description", "teacher.licence", "cluster", "guard", "engine.zero_stage", "engine.precision", "method.memory",
    "engine.memory_gb", "engine.activation_checkpointing", "engine.channels_last", "engine.compile",
    "run.total_kimg", "run.report_every_kimg", "run.sample_every_kimg", "run.sample_images",
    "run.checkpoint_every_kimg", "run.keep_checkpoints", "run.keep_best", "run.max_checkpoint_failures", "run.storage",
    "evaluation.every_kimg", "evaluation.batch", "evaluation.confirmations",
    "evaluation.detector", "evaluation.mode",
)  # fmt: skip
"""Sections and fields with which a run may be continued differently; all others make another run."""
SETTLED = ("engine.precision", "engine.micro_batch")
"""Fields whose `auto` is settled when a run begins, and then kept."""
