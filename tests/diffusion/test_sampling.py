"""Sampler and generator: closed forms and reproducibility."""

import pytest
import torch

from sid_ray.diffusion.generator import OneStepGenerator, draw_classes, draw_latents
from sid_ray.diffusion.noise import karras_sigma, karras_steps
from sid_ray.diffusion.sampler import heun_sample
from sid_ray.teachers.sources import load_teacher


def test_steps_are_karras():
    steps = karras_steps(18)
    assert len(steps) == 19 and steps[0] == pytest.approx(80) and steps[-2] == pytest.approx(0.002) and steps[-1] == 0
    torch.testing.assert_close(karras_sigma(torch.tensor([0.0, 1.0])), torch.tensor([0.002, 80.0]))


def test_heun_solves_a_gaussian_in_35_evaluations():
    """For data N(0, s^2) the denoiser is x s^2 / (s^2 + sigma^2), and the flow only rescales the latents."""
    s, calls = 0.5, []

    def denoiser(x, sigma):
        calls.append(float(sigma))
        return x * s**2 / (s**2 + sigma**2)

    latents = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = latents * 80 * s / (s**2 + 80**2) ** 0.5
    heun_sample(denoiser, latents)
    assert len(calls) == 35
    coarse, fine = ((heun_sample(denoiser, latents, n) - expected).abs().max() for n in (64, 128))
    assert fine < 2e-3 and 3 < coarse / fine < 5  # second order


def test_generator_sampling_is_reproducible():
    generator = OneStepGenerator(load_teacher("builtin:digits"), 2.5)
    whole = generator.sample(10, seed=3)
    torch.testing.assert_close(generator.sample(10, seed=3, batch=3), whole, rtol=1e-5, atol=1e-5)
    assert whole.shape == (10, 1, 8, 8) and not torch.equal(generator.sample(10, seed=4), whole)
    assert generator.sample(0).shape == (0, 1, 8, 8)
    for labels, word in (([1], "expected 2 class"), ([0, 10], r"0\.\.9"), ([0.5, 1.0], "indices")):
        with pytest.raises(ValueError, match=word):
            generator.sample(2, class_labels=labels)


def test_classes_are_drawn_as_often_as_their_weights_say():
    weights = [1.0, 0.0, 3.0, 4.0, 0.0]
    num = 80_000
    drawn = draw_classes((num,), 5, weights, rng=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == counts[4] == 0
    expected = torch.tensor(weights) / 8 * num
    deviations = (counts - expected)[[0, 2, 3]] / expected[[0, 2, 3]].sqrt()
    assert deviations.abs().max() < 4
    scaled = draw_classes((num,), 5, [w * 1e300 for w in weights], rng=torch.Generator().manual_seed(0))
    assert torch.equal(scaled, drawn)  # in any unit


def test_without_weights_classes_are_drawn_as_ever():
    """Labels of earlier runs and evaluations: plain `randint`, after the latents."""
    denoiser = load_teacher("builtin:digits")
    _, labels = draw_latents(denoiser, 5, range(3, 9))
    for row, index in zip(labels, range(3, 9), strict=True):
        rng = torch.Generator().manual_seed(5 * 1_000_003 + index)
        torch.randn(1, 8, 8, generator=rng)
        assert row.argmax() == torch.randint(10, (), generator=rng)


def test_a_generator_draws_labels_as_in_training():
    denoiser = load_teacher("builtin:digits")
    threes = OneStepGenerator(denoiser, 2.5, class_weights=[0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    plain = OneStepGenerator(denoiser, 2.5)
    assert torch.equal(threes.sample(5), plain.sample(5, class_labels=[3] * 5))
    assert torch.equal(threes.sample(5, class_labels=[7] * 5), plain.sample(5, class_labels=[7] * 5))
