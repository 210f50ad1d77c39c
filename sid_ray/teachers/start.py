"""What a run starts from: its teacher, and the network from which generator and fake score start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.errors import UserError
from sid_ray.storage import digest
from sid_ray.teachers.model_directory import ModelConfig
from sid_ray.teachers.modules import Handed, check_trainable, config_of, fingerprint, handed_over
from sid_ray.teachers.sources import find_source, load_denoiser, read_any_config
from sid_ray.teachers.untrained import draw_untrained
from sid_ray.teachers.user_code import HANDED, PYTHON

Role = Literal["generator", "fake_score"]


@dataclass(frozen=True)
class Start:
    """The networks that a configuration names, or that a Python program handed over. Every call loads them anew."""

    config: Config
    teacher_path: str
    """Where the teacher is read: `teacher.path`, or the run's converted copy."""
    handed: Handed = field(default_factory=Handed)
    untrained: ModelConfig | None = None
    """Of a teacher with random weights that are not drawn yet."""

    def teacher(self) -> tuple[Denoiser, ModelConfig]:
        """The teacher in eval mode and its configuration."""
        if self.untrained is not None:
            return draw_untrained(self.untrained), self.untrained
        denoiser, model = self._load(self.teacher_path, "teacher.path", self.handed.teacher)
        return denoiser, self._with_licence(model)

    def student(self) -> tuple[Denoiser, ModelConfig]:
        """The network that generator and fake score are copies of, before any fit: `init.student`, or the teacher."""
        path = self.config.init.student
        return self.teacher() if path is None else self._load(path, "init.student", self.handed.student)

    def role(self, role: Role, student: Denoiser) -> Denoiser:
        """Where a role starts: at its warm start if there is one, else at `student`, which is taken over."""
        path = {"generator": self.config.init.generator, "fake_score": self.config.init.fake_score}[role]
        return student if path is None else load_denoiser(path, f"init.{role}", student)[0]

    @property
    def needs_fit(self) -> bool:
        """Whether a student of its own has to learn the teacher's denoiser before the run begins."""
        i = self.config.init
        return i.student is not None and i.fit_kimg > 0 and (i.generator is None or i.fake_score is None)

    def models(self) -> tuple[ModelConfig, ModelConfig]:
        """Configurations of teacher and student, without their weights where a file describes them."""
        _, teacher = self._teacher_outline()
        teacher, path = self._with_licence(teacher), self.config.init.student
        student = teacher if path is None else self._outline(path, "init.student", self.handed.student)[1]
        return teacher, student

    def teacher_digest(self) -> str:
        """Hex sha256 of the teacher's weights: of its file, or of the state of a module."""
        if self.teacher_path.startswith((HANDED, PYTHON)):
            return fingerprint(self.teacher()[0])
        return digest(find_source(self.teacher_path, "teacher.path").path / "model.safetensors")

    def check(self) -> Denoiser:
        """Try everything without loading weights of known formats; returns the student, perhaps without weights.

        UserError if something is missing, is no denoiser, cannot be trained or does not fit together.
        """
        init, precision = self.config.init, self.config.engine.precision
        teacher, model = self._teacher_outline()
        student, named = teacher, "teacher.path"
        if init.student is not None:
            student, model = self._outline(init.student, "init.student", self.handed.student)
            named = "init.student"
            for what, of_student, of_teacher in (
                ("image_shape", tuple(student.image_shape), tuple(teacher.image_shape)),
                ("label_dim", student.label_dim, teacher.label_dim),
            ):
                if of_student != of_teacher:
                    raise UserError(f"init.student: its {what} is {of_student}, the teacher's {of_teacher}")
        if model.is_python:
            if not list(student.parameters()) and init.student is None:
                raise UserError(
                    f"init.student: is required, because the teacher {self.teacher_path!r} has no parameters of its own"
                )
            check_trainable(student, named, precision)
        for role, path in (("generator", init.generator), ("fake_score", init.fake_score)):
            if path is not None:
                check_warm_start(role, path, model, "teacher" if init.student is None else "student")
        if self.config.method.dropout is not None and not isinstance(student, Denoiser):
            raise UserError(
                "method.dropout: can be set only for a network that derives from sid_ray.Denoiser; unset it"
            )
        return student

    def _with_licence(self, teacher: ModelConfig) -> ModelConfig:
        """A user's own code does not say its licence; the configuration may."""
        licence = self.config.teacher.licence
        return teacher.model_copy(update={"licence": licence}) if teacher.is_python and licence else teacher

    def _load(self, path: str, field: str, module: Denoiser | None) -> tuple[Denoiser, ModelConfig]:
        if path.startswith(HANDED):
            denoiser = handed_over(module, path, field)
            return denoiser, config_of(denoiser)
        return load_denoiser(path, field)

    def _teacher_outline(self) -> tuple[Denoiser, ModelConfig]:
        if self.untrained is not None:
            return self.untrained.skeleton(), self.untrained
        return self._outline(self.teacher_path, "teacher.path", self.handed.teacher)

    def _outline(self, path: str, field: str, module: Denoiser | None) -> tuple[Denoiser, ModelConfig]:
        if path.startswith((HANDED, PYTHON)):
            return self._load(path, field, module)
        model = read_any_config(path, field)
        return model.skeleton(), model


def check_warm_start(role: str, path: str, model: ModelConfig, whose: str = "teacher") -> None:
    """UserError unless the network at `path` is of a model's architecture."""
    if read_any_config(path, f"init.{role}").architecture != model.architecture:
        raise UserError(f"init.{role}: {path!r} is not of the {whose}'s architecture")
