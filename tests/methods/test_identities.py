"""The score identities that SiD rests on, where teacher and fake score are both exact (arXiv 2404.04057, section 3).

Generated images x_g come from one Gaussian mixture q, the teacher is another one, p; x_t = x_g + sigma eps. phi and psi
are the exact denoisers of p and q. Means over many draws are compared within four standard errors.
"""

import pytest
import torch

from sid_ray.methods.sid import generator_gradient
from sid_ray.teachers.mixture import GaussianMixture

TEACHER = GaussianMixture([[-0.6, 0.0], [0.6, 0.2], [0.0, -0.7]], stds=[0.15, 0.1, 0.2], weights=[2.0, 1.0, 1.0])
GENERATED = GaussianMixture([[-0.4, 0.3], [0.5, -0.3]], stds=[0.25, 0.3])
SIGMAS = [0.1, 0.5, 2.5]


class Draw:
    """Generated points with noise, and what both exact networks make of them, in float64."""

    def __init__(self, sigma, num=200_000, seed=0):
        rng = torch.Generator().manual_seed(seed + 1)  # not that of the sample, whose noise it would repeat
        self.sigma = sigma
        self.x = GENERATED.sample(num, seed=seed).double()
        self.noise = torch.randn(self.x.shape, generator=rng, dtype=torch.float64)
        self.x_t = self.x + sigma * self.noise
        self.phi = TEACHER.posterior_mean(self.x_t, sigma)
        self.psi = GENERATED.posterior_mean(self.x_t, sigma)

    def tests(self):
        """Vector fields u(x_t) that know x_t only."""
        return {
            "constant": torch.ones_like(self.x_t),
            "x_t": self.x_t,
            "wave": (4 * self.x_t).sin(),
            "teacher": self.phi,
            "teacher - fake score": self.phi - self.psi,
        }


def inner(u, v):
    return (u * v).flatten(1).sum(1)


def mean_and_error(values):
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def assert_zero_mean(values, scale):
    """The mean is 0 within four standard errors, and these are small: at most 3 % of the scale."""
    mean, error = mean_and_error(values)
    assert error < 0.03 * scale, (error, scale)
    assert abs(mean) < 4 * error, (mean, error)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_identity_2_the_generators_score_is_its_posterior_mean(sigma):
    """Semi-implicit: x_t + sigma^2 grad log q(x_t) = E[x_g | x_t], so no function of x_t correlates with the rest."""
    draw = Draw(sigma)
    leaf = draw.x_t[:100].clone().requires_grad_()
    (score,) = torch.autograd.grad(GENERATED.log_density(leaf, sigma).sum(), leaf)
    torch.testing.assert_close(draw.psi[:100], leaf.detach() + sigma**2 * score, rtol=1e-9, atol=1e-9)
    for u in draw.tests().values():
        products = inner(u, draw.x - draw.psi)
        assert_zero_mean(products, scale=float((inner(u, u).mean() * inner(draw.x, draw.x).mean()).sqrt()))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_identity_3_projected_score(sigma):
    """E[<u(x_t), grad log q(x_t)>] = E[<u(x_t), grad log q(x_t | x_g)>], the conditional score being -eps / sigma."""
    draw = Draw(sigma)
    score, conditional = (draw.psi - draw.x_t) / sigma**2, -draw.noise / sigma
    for name, u in draw.tests().items():
        size = float((inner(u, u).mean() * inner(conditional, conditional).mean()).sqrt())
        assert_zero_mean(inner(u, score - conditional), scale=size)
        if name == "x_t":  # the two sides are something: E<x_t, score> = -dimensions
            mean, error = mean_and_error(inner(u, conditional))
            assert abs(mean + 2) < 4 * error and error < 0.05


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sids_loss_is_a_multiple_of_the_fisher_divergence(sigma, alpha):
    """E[<phi - psi, phi - x_g>] = E|phi - psi|^2, so without its weight E[L] = (1 - alpha) sigma^4 times the
    divergence; with a fake score that is not exact it is something else."""
    draw = Draw(sigma)

    def loss(psi):
        gap = draw.phi - psi
        return inner(gap, (draw.phi - draw.x) - alpha * gap)

    divergence = float(inner(draw.phi - draw.psi, draw.phi - draw.psi).mean())
    mean, error = mean_and_error(loss(draw.psi))
    assert abs(mean - (1 - alpha) * divergence) < 4 * error and error < 0.03 * divergence
    wrong = draw.psi + 0.1
    other, error = mean_and_error(loss(wrong))
    divergence = float(inner(draw.phi - wrong, draw.phi - wrong).mean())
    assert abs(other - (1 - alpha) * divergence) > 10 * error


@pytest.mark.parametrize("memory", ["fast", "lean", "minimal"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_gradient_vanishes_where_the_generator_has_the_teachers_distribution(alpha, memory):
    """phi = psi then, and every image's gradient is exactly zero, not only their mean."""
    rng = torch.Generator().manual_seed(0)
    images, noise = TEACHER.sample(500), torch.randn(500, 2, 1, 1, generator=rng)
    sigma = torch.rand(500, generator=rng) * 5 + 0.002
    field = generator_gradient(images, sigma, noise, TEACHER, TEACHER, alpha=alpha, memory=memory)
    assert torch.equal(field.gradient, torch.zeros_like(images)) and float(field.loss) == 0.0
    other = generator_gradient(images, sigma, noise, TEACHER, GENERATED, alpha=alpha, memory=memory)
    assert (other.gradient != 0).flatten(1).any(1).all()


def gaussian(mean, std):
    """N(mean, std^2) in 16 dimensions, as images of 4 x 4."""
    return GaussianMixture(torch.full((1, 1, 4, 4), mean), stds=std)


def gradient_at(generated, unit, sigma, alpha):
    """SiD's gradient at generated images, and the same times the weight W that the loss divides by."""
    teacher = gaussian(0.0, 0.5)
    noise = torch.randn(unit.shape, generator=torch.Generator().manual_seed(7))
    levels = torch.full((len(unit),), sigma)
    images = (generated.means.reshape(1, 1, 4, 4) + generated.variances.sqrt() * unit).float()
    gradient = generator_gradient(images, levels, noise, teacher, generated, alpha=alpha).gradient.double()
    phi = teacher(images + sigma * noise, levels)
    return gradient, gradient * (images - phi).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("shift", [-0.4, 0.3])
def test_a_shifted_gaussian_is_pulled_back(shift, alpha, sigma):
    """x = m + s z against N(0, s^2): with k = s^2 / (s^2 + sigma^2) the gradient times W is (1 - k)^2 m for every image
    and any alpha; the divergence falls along it, being (1 - k)^2 m^2 / sigma^4."""
    unit = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    gradient, unweighted = gradient_at(gaussian(shift, 0.5), unit, sigma, alpha)
    k = 0.25 / (0.25 + sigma**2)
    torch.testing.assert_close(unweighted, torch.full_like(unweighted, (1 - k) ** 2 * shift), rtol=2e-3, atol=1e-5)
    mean, error = mean_and_error(gradient.mean(dim=(1, 2, 3)) * shift)
    assert mean > 10 * error


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("width", [0.35, 0.75])
def test_a_gaussian_of_another_width_is_pulled_back(width, alpha, sigma):
    """x = a z against N(0, s^2), k as above and k' = a^2 / (a^2 + sigma^2): in each dimension dL/da times W is
    2 a (k - k') ((1 - alpha)(k - k') - (1 - k')), of the sign of the divergence's own slope,
    2 a (k - k') ((k - k') - 2 (1 - k')) / sigma^4."""
    unit = torch.randn(20_000, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    gradient, unweighted = gradient_at(gaussian(0.0, width), unit, sigma, alpha)
    k, own = 0.25 / (0.25 + sigma**2), width**2 / (width**2 + sigma**2)
    expected = 2 * width * (k - own) * ((1 - alpha) * (k - own) - (1 - own))
    slope = 2 * width * (k - own) * ((k - own) - 2 * (1 - own))
    mean, error = mean_and_error((unit * unweighted).mean(dim=(1, 2, 3)))
    assert abs(mean - expected) < 4 * error and error < 0.1 * abs(expected)
    mean, error = mean_and_error((unit * gradient).mean(dim=(1, 2, 3)))
    assert mean * slope > 0 and abs(mean) > 5 * error
