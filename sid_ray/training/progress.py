"""The counters of a run: all that a checkpoint knows beside tensors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sid_ray.training.guard import GuardState


class Progress(BaseModel):
    """Counters and measurements so far; the same on every rank."""

    model_config = ConfigDict(extra="forbid")

    nimg: int = 0
    """Images seen; also advances when a step is skipped."""
    rollbacks: int = 0
    """How often the run went back to an earlier checkpoint; part of every seed."""
    generator_steps: int = 0
    """Updates of the generator (Adam's step count)."""
    fake_score_steps: int = 0
    """Updates of the fake score (Adam's step count)."""
    generator_skipped: int = 0
    """Generator steps skipped because a gradient was not finite."""
    fake_score_skipped: int = 0
    """Fake-score steps skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Iterations in a row in which a step was skipped."""
    seconds: float = 0.0
    """Time spent training, without evaluations and checkpoints."""
    initial_fid: float | None = None
    """FID of the generator before training."""
    teacher_fid: float | None = None
    """FID of the teacher's many-step samples."""
    fid: float | None = None
    """The latest FID."""
    best_fid: float | None = None
    """The lowest FID so far."""
    best_nimg: int | None = None
    """Where the lowest FID was measured."""
    waiting_for_fid: list[int] = []
    """Where averages were taken whose FID is not known yet (evaluation.mode async)."""
    confirmed_fids: list[float] = []
    """FIDs of the best generator with fresh latents, measured when the run had ended."""
    guard: GuardState = GuardState()
    """What the guard remembers."""

    def count_step(self, batch: int, generator_skipped: bool, fake_score_skipped: bool, seconds: float) -> None:
        """Count one iteration."""
        self.nimg += batch
        self.seconds += seconds
        self.generator_steps += not generator_skipped
        self.fake_score_steps += not fake_score_skipped
        self.generator_skipped += generator_skipped
        self.fake_score_skipped += fake_score_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if generator_skipped or fake_score_skipped else 0
