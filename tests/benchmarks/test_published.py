"""The rendering of the published iteration and ours make the same iterations, on the same draws."""

import copy

import torch

from benchmarks.published import Published
from sid_ray.config import load_config
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.distributed import join_world
from sid_ray.training.networks import build_networks
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration

SETTINGS = {
    "batch.size": 8,
    "engine.micro_batch": 4,
    "engine.zero_stage": 0,
    "method.alpha": 1.2,
    "method.dropout": 0.13,
    "optimizer.ema_halflife_kimg": 0.1,
}


def ours(config, network):
    world = join_world()
    slots = slots_of_rank(config.num_slots, 0, 1)
    three = [copy.deepcopy(network) for _ in range(3)]
    networks = build_networks(config, world, len(slots), *three)
    draws = SeededDraws.of(config, networks.plain, 0, world.device)
    return Iteration(config, networks, draws, slots), networks


def published(config, network):
    three = [copy.deepcopy(network) for _ in range(3)]
    return Published(config, SeededDraws.of(config, network, 0, torch.device("cpu")), *three)


def test_both_make_the_same_iteration(tiny_teacher):
    """Losses and gradients of the first iteration, then weights and average over three, with dropout on."""
    config = load_config("digits", SETTINGS)
    network = load_denoiser(str(tiny_teacher))[0]
    theirs = published(config, network)
    iteration, networks = ours(config, network)
    for step in range(3):
        expected = torch.stack(theirs(step * config.batch.size))
        actual = torch.stack(iteration(step * config.batch.size))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        if step == 0:
            gradients = {name: p.grad for name, p in theirs.generator.named_parameters()}
            for name, tensors in networks.generator.gather():
                # With beta1 = 0 Adam's first moment is the gradient.
                scale = gradients[name].abs().max().clamp(min=1e-6)
                assert (tensors["exp_avg"] - gradients[name]).abs().max() / scale < 1e-3, name
    for role, weights in (("generator", theirs.generator), ("fake_score", theirs.fake_score)):
        close(getattr(networks, role), "weight", weights, config)
    close(networks.generator, "ema", theirs.average, config)
    networks.destroy()


def close(network, key, expected, config):
    """All but a few entries agree: Adam turns rounding in a vanishing gradient into a step of either sign."""
    expected = dict(expected.named_parameters())
    errors = torch.cat([(tensors[key] - expected[name]).abs().flatten() for name, tensors in network.gather()])
    assert (errors <= 1e-6).float().mean() > 0.99
    assert errors.max() <= 3 * 2 * config.optimizer.generator_lr
