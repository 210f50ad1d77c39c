"""Random draws of a slot."""

from dataclasses import replace

import torch

from sid_ray.teachers.sources import load_teacher
from sid_ray.training.slots import SeededDraws


def test_class_weights_change_the_labels_and_nothing_else_that_is_drawn_before():
    denoiser = load_teacher("builtin:digits")
    plain = SeededDraws(denoiser, 500, 0, 0, -1.2, 1.2, 800, torch.device("cpu"))
    weighted = replace(plain, class_weights=[0, 1, 0, 0, 0, 0, 0, 0, 0, 3])
    for phase in ("fake_score", "generator"):
        alike, drawn = getattr(plain, phase)(0, 0), getattr(weighted, phase)(0, 0)
        assert torch.equal(alike.z, drawn.z)
        counts = drawn.class_labels.sum(0)
        assert counts[1] + counts[9] == 500 and abs(counts[9] - 375) < 4 * (500 * 0.25 * 0.75) ** 0.5
        assert (alike.class_labels.sum(0) > 0).all()
        assert torch.equal(getattr(weighted, phase)(0, 0).class_labels, drawn.class_labels)
