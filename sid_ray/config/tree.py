"""The whole configuration: its sections, how they must agree, and which fields may change later."""

from __future__ import annotations

import yaml
from pydantic import model_validator

from sid_ray.config.learning import Batch, Engine, Init, Method, Optimizer, Teacher
from sid_ray.config.running import Cluster, Evaluation, Guard, Run
from sid_ray.config.section import Section


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
