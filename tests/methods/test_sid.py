"""SiD's formulas against plain autograd and against the reference implementation's trajectories."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sid_ray.diffusion.generator import generate
from sid_ray.diffusion.noise import lognormal_sigma
from sid_ray.methods.sid import _loss_gradients, fake_score_loss, generator_gradient, generator_sigma
from tests.golden_numbers import TRAJECTORIES, golden_denoiser, load_golden, under

MODES = ["fast", "lean", "minimal"]


def autograd_generator_loss(images, sigma, noise, teacher, fake_score, alpha, scale):
    """The generator's loss as the paper writes it, differentiable through both networks: the reference."""
    noised = images + sigma.reshape(-1, 1, 1, 1) * noise
    phi, psi = teacher(noised, sigma), fake_score(noised, sigma)
    weight = (images - phi).abs().mean(dim=(1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
    return ((phi - psi) * ((phi - images) - alpha * (phi - psi)) / weight).sum() * scale


@pytest.fixture(scope="module")
def networks():
    """Teacher and a fake score that differs from it, frozen; images with their noise."""
    numbers, meta = load_golden("sid/cond_alpha1.2")
    teacher = golden_denoiser(numbers, meta["init_kwargs"], "teacher.").eval().requires_grad_(False)
    fake_score = golden_denoiser(numbers, meta["init_kwargs"], "final.fake_score.").eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(3)
    images = torch.randn(6, 1, 8, 8, generator=rng) * 0.5
    sigma = generator_sigma(torch.rand(6, generator=rng))
    return images, sigma, torch.randn(6, 1, 8, 8, generator=rng), teacher, fake_score


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("alpha", [-0.25, 0.5, 1.0, 1.2])
def test_closed_form_equals_autograd(networks, alpha, memory):
    images, sigma, noise, teacher, fake_score = networks
    leaf = images.clone().requires_grad_()
    loss = autograd_generator_loss(leaf, sigma, noise, teacher, fake_score, alpha, scale=12.5)
    (expected,) = torch.autograd.grad(loss, leaf)
    actual = generator_gradient(images, sigma, noise, teacher, fake_score, alpha=alpha, scale=12.5, memory=memory)
    torch.testing.assert_close(actual.gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(actual.loss, loss.detach(), rtol=1e-5, atol=0.0)


def test_no_network_parameter_receives_gradient(networks):
    images, sigma, noise, teacher, fake_score = networks
    generator_gradient(images, sigma, noise, teacher, fake_score, alpha=1.2)
    assert all(p.grad is None for net in (teacher, fake_score) for p in net.parameters())


def test_fake_score_loss_gives_no_gradient_to_the_images_network(networks):
    _, sigma, noise, teacher, fake_score = networks
    generator = copy.deepcopy(teacher).requires_grad_(True)
    learner = copy.deepcopy(fake_score).requires_grad_(True)
    with torch.no_grad():
        images = generate(generator, noise, 2.5)
    fake_score_loss(images, sigma, noise, learner).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is not None for p in learner.parameters())


def test_fake_score_loss_value():
    """With a denoiser that returns zeros the loss is sum[lambda(sigma) x^2] scale."""
    images, sigma = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0.5, 1.0])
    loss = fake_score_loss(images, sigma, torch.zeros_like(images), lambda x, s: torch.zeros_like(x), scale=3.0)
    weights = [(s**2 + 0.25) / (s * 0.5) ** 2 for s in (0.5, 1.0)]
    assert loss.item() == pytest.approx(3.0 * sum(w * 4 * 0.25 for w in weights))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), alpha=st.floats(-1, 2), scale=st.floats(0.01, 100))
def test_gradients_of_the_three_arguments_cancel(seed, alpha, scale):
    """L depends on differences only, so a + b + c = 0: moving x, phi and psi together changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    x, phi, psi = torch.randn(3, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    a, b, c, _ = _loss_gradients(x, phi, psi, alpha, scale)
    torch.testing.assert_close(a + b + c, torch.zeros_like(a), rtol=0.0, atol=1e-9 * float(a.abs().max()) + 1e-12)


def test_generator_noise_levels():
    expected = torch.tensor([0.002, 0.085, 0.965, 5.84, 24.41])
    levels = generator_sigma(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), tmax=800)
    torch.testing.assert_close(levels, expected, rtol=7e-3, atol=0.0)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_golden_trajectory(name, memory):
    """The whole algorithm in plain torch reproduces the reference's losses, gradient and final weights."""
    numbers, meta = load_golden(f"sid/{name}")
    batch = meta["batch_size"]
    teacher, fake, gen = (golden_denoiser(numbers, meta["init_kwargs"], "teacher.").eval() for _ in range(3))
    teacher.requires_grad_(False)
    ema = copy.deepcopy(gen)
    adam = {"lr": meta["lr"], "eps": meta["eps"]}
    adam_fake = torch.optim.Adam(fake.parameters(), betas=meta["betas_fake_score"], **adam)
    adam_gen = torch.optim.Adam(gen.parameters(), betas=meta["betas_generator"], **adam)
    for step in range(meta["iterations"]):
        draw = under(numbers, f"iter{step}.fake.")
        with torch.no_grad():
            images = generate(gen, draw["z"], meta["sigma_init"], draw.get("labels"))
        fake.requires_grad_(True)
        loss = fake_score_loss(
            images,
            lognormal_sigma(draw["normal_for_sigma"]),
            draw["noise"],
            lambda x, s, draw=draw: fake(x, s, draw.get("labels")),
            scale=meta["fake_score_loss_scale"] / batch,
        )
        adam_fake.zero_grad()
        loss.backward()
        adam_fake.step()
        torch.testing.assert_close(loss.detach(), draw["loss"][0], rtol=1e-4, atol=0.0)

        draw = under(numbers, f"iter{step}.generator.")
        fake.requires_grad_(False)
        images = generate(gen, draw["z"], meta["sigma_init"], draw.get("labels"))
        field = generator_gradient(
            images,
            generator_sigma(draw["uniform_for_t"], meta["tmax"]),
            draw["noise"],
            lambda x, s, draw=draw: teacher(x, s, draw.get("labels")),
            lambda x, s, draw=draw: fake(x, s, draw.get("labels")),
            alpha=meta["alpha"],
            scale=meta["generator_loss_scale"] / batch,
            memory=memory,
        )
        adam_gen.zero_grad()
        (images * field.gradient).sum().backward()
        torch.testing.assert_close(field.loss, draw["loss"][0], rtol=1e-4, atol=1e-6)
        if step == 0:
            for key, parameter in gen.named_parameters():
                expected = draw[f"grad.{key}"]
                tolerance = 1e-4 * float(expected.abs().max())
                torch.testing.assert_close(parameter.grad, expected, rtol=0.0, atol=tolerance)
        adam_gen.step()
        nimg = step * batch
        beta = 0.5 ** (batch / max(min(meta["ema_halflife_kimg"] * 1000, meta["ema_rampup_ratio"] * nimg), 1e-8))
        for average, parameter in zip(ema.parameters(), gen.parameters(), strict=True):
            average.data.copy_(parameter.detach().lerp(average, beta))
    for role, network in (("generator", gen), ("fake_score", fake), ("ema", ema)):
        expected = under(numbers, f"final.{role}.")
        errors = torch.cat(
            [(v - expected[k]).abs().flatten() for k, v in network.state_dict().items() if k in expected]
        )
        assert errors.numel() > 10_000
        assert (errors <= 1e-5).float().mean() >= 0.999, (role, float((errors <= 1e-5).float().mean()))
        # Adam turns rounding in a vanishing gradient into steps of up to lr sqrt(t), of either sign.
        assert errors.max() <= 2 * meta["lr"] * sum(t**0.5 for t in range(1, meta["iterations"] + 1))
