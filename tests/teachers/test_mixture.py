"""The exact teacher: closed forms against automatic differentiation, torch.distributions and its own samples."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from sid_ray.teachers.mixture import GaussianMixture

SIGMAS = torch.tensor([0.002, 0.05, 0.4, 2.5, 80.0], dtype=torch.float64)


def points_mixture(**more):
    """Three components of unequal weights and widths in the plane; one of them is a point mass."""
    means = [[-0.7, 0.2], [0.5, 0.6], [0.1, -0.8]]
    return GaussianMixture(means, stds=[0.1, 0.3, 0.0], weights=[1.0, 2.0, 5.0], **more)


def images_mixture():
    means = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(1)) * 0.5
    return GaussianMixture(means, stds=0.2, classes=[0, 1, 1, 0])


def noised(mixture, sigma, num, seed=0):
    rng = torch.Generator().manual_seed(seed)
    clean = mixture.sample(num, seed=seed).double()
    return clean, clean + sigma.reshape(-1, 1, 1, 1) * torch.randn(clean.shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("make", [points_mixture, images_mixture])
@pytest.mark.parametrize("labelled", [False, True])
def test_tweedie(make, labelled):
    """D(x) = x + sigma^2 grad log p_sigma(x), at every noise level, by automatic differentiation in float64."""
    mixture = make()
    for sigma in SIGMAS:
        _, x = noised(mixture, sigma, 64)
        x.requires_grad_()
        labels = torch.eye(2, dtype=torch.float64)[torch.arange(64) % 2] if labelled and mixture.label_dim else None
        (score,) = torch.autograd.grad(mixture.log_density(x, sigma, labels).sum(), x)
        expected = x.detach() + sigma**2 * score
        torch.testing.assert_close(mixture.posterior_mean(x, sigma, labels).detach(), expected, rtol=1e-9, atol=1e-9)


def test_density_is_that_of_torch_distributions():
    mixture = points_mixture()
    sigma = 0.3
    spread = torch.tensor([0.1, 0.3, 0.0], dtype=torch.float64).square().add(sigma**2).sqrt()
    components = Independent(Normal(mixture.means, spread[:, None].expand(3, 2)), 1)
    expected = MixtureSameFamily(Categorical(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), components)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(mixture.log_density(x[:, :, None, None], sigma), expected.log_prob(x))


def test_samples_have_the_mixtures_moments():
    mixture = points_mixture()
    drawn = mixture.sample(100_000, seed=3).flatten(1).double()
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 8
    mean = weights @ mixture.means
    within = weights @ torch.tensor([0.1, 0.3, 0.0], dtype=torch.float64).square()
    centred = mixture.means - mean
    covariance = within * torch.eye(2) + centred.T @ (weights[:, None] * centred)
    error = (covariance.diagonal() / len(drawn)).sqrt()
    assert ((drawn.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.03, atol=0.002)
    assert mixture.sigma_data == pytest.approx(float(covariance.diagonal().mean().sqrt()), rel=1e-6)
    torch.testing.assert_close(drawn, mixture.sample(100_000, seed=3).flatten(1).double(), rtol=0, atol=0)


def test_samples_of_a_class_come_from_its_components():
    mixture = images_mixture()
    drawn = mixture.sample(200, seed=0, class_labels=[0, 1] * 100).flatten(1).double()
    nearest = torch.cdist(drawn, mixture.means).argmin(1)
    classes = torch.tensor([0, 1, 1, 0])[nearest]
    assert torch.equal(classes, torch.tensor([0, 1] * 100))


def test_without_a_class_and_with_the_zero_label_it_is_the_whole_mixture():
    mixture = images_mixture()
    _, x = noised(mixture, torch.tensor(0.5), 10)
    zero = torch.zeros(10, 2)
    assert torch.equal(mixture.posterior_mean(x, 0.5, zero), mixture.posterior_mean(x, 0.5))
    first, second = (mixture.posterior_mean(x, 0.5, torch.eye(2)[[k] * 10]) for k in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


def test_it_is_a_denoiser_exact_in_any_precision():
    """A cast, such as a run in bf16 makes, leaves it as it is; output is float32 and a pair of points stays apart."""
    mixture = points_mixture()
    _, x = noised(mixture, torch.tensor(0.1), 8)
    before = mixture(x.float(), torch.full((8,), 0.1))
    after = mixture.to(torch.bfloat16)(x.float(), torch.full((8,), 0.1))
    assert before.dtype == torch.float32 and torch.equal(before, after) and not list(mixture.parameters())


@pytest.mark.parametrize("sigma", [1e-4, 0.002, 80.0, 1e4])
def test_extremes_are_finite(sigma):
    """Far from every component, where all densities underflow, the nearest one decides."""
    mixture = points_mixture()
    x = torch.tensor([[-50.0, 0.2], [0.0, 0.0], [1e4, 1e4]]).reshape(3, 2, 1, 1)
    denoised = mixture(x, sigma)
    assert denoised.isfinite().all() and denoised.abs().max() <= 1e4


def test_heun_samples_land_on_the_modes():
    """The flow of the exact denoiser, integrated in 35 evaluations, ends in the mixture: shares of the modes."""
    from sid_ray.evaluation.fid import heun_sampler

    angles = [2 * math.pi * k / 8 for k in range(8)]
    mixture = GaussianMixture([(0.7 * math.cos(a), 0.7 * math.sin(a)) for a in angles], stds=0.1).eval()
    points = heun_sampler(mixture, seed=0)(range(2000)).flatten(1).double()
    distance, nearest = torch.cdist(points, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=8) / 2000
    assert ((shares - 1 / 8).abs() < 4 * math.sqrt(1 / 8 * 7 / 8 / 2000)).all()
    # Rayleigh: 1 - exp(-4.5) of a plane Gaussian lies within 3 standard deviations.
    assert float((distance < 0.3).double().mean()) == pytest.approx(1 - math.exp(-4.5), abs=0.012)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"means": [[0.0, 1.0]], "stds": -1.0}, "stds at least 0"),
        ({"means": [[0.0, 1.0]], "stds": 0.1, "weights": [0.0]}, "weights above 0"),
        ({"means": [[0.0, math.nan]], "stds": 0.1}, "finite"),
        ({"means": [[0.0, 1.0]], "stds": 0.1, "weights": [1.0, 1.0]}, "no mixture"),
        ({"means": [[0.0, 1.0]], "stds": 0.1, "image_shape": (3, 1, 1)}, "no mixture"),
        ({"means": [[0.0, 1.0], [1.0, 0.0]], "stds": 0.1, "classes": [0, 2]}, "every class"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GaussianMixture(**arguments)
