"""Sections that decide how a run is measured, guarded, stored and given machines."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sid_ray.config.section import Section

TEACHER_REFERENCE = "teacher"
"""`evaluation.reference` that is made from the teacher's own samples."""
INCEPTION_ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
"""Where the detector of published FIDs is published."""


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
