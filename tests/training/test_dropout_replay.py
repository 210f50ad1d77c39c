"""A rebuilt generator forward draws the same dropout masks: the same image, bit for bit."""

import torch

from sid_ray.diffusion.generator import generate
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.slots import Phase, SeededDraws


def test_rebuilt_forward_is_bitwise_the_same(tiny_teacher):
    generator = load_denoiser(str(tiny_teacher))[0].train()
    draws = SeededDraws(generator, 4, 0, 0, -1.2, 1.2, 800, torch.device("cpu"))

    def images(nimg, slot):
        draw = draws.generator(nimg, slot)
        draws.reseed(nimg, Phase.GENERATOR_DROPOUT, slot)
        return generate(generator, draw.z, 2.5, draw.class_labels)

    first = images(16, 1)
    torch.randn(1000)  # whatever happens in between
    with torch.no_grad():
        assert torch.equal(images(16, 1), first)
    assert not torch.equal(images(16, 2), first)
    assert not torch.equal(images(32, 1), first)
    draw = draws.generator(16, 1)
    with torch.no_grad():  # and dropout really was on
        assert not torch.equal(generate(generator.eval(), draw.z, 2.5, draw.class_labels), first)
