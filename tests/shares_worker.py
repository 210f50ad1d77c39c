"""Run on gloo ranks: what is gathered in a few collectives against DeepSpeed's own getters, tensor by tensor."""

from __future__ import annotations

import itertools
import sys
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from sid_ray.config import load_config
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training import shares
from sid_ray.training.checkpoints import NamedState
from sid_ray.training.distributed import World, join_world
from sid_ray.training.engines import TrainedNetwork


def stepped(teacher: str, stage: int, precision: str, world: World) -> TrainedNetwork:
    """A network after a step with a learning rate, so that no two of its states are the same."""
    settings = {"engine.zero_stage": stage, "engine.precision": precision}
    config = load_config("digits", settings | {"engine.micro_batch": 2, "batch.size": 2 * world.size})
    network = TrainedNetwork(load_denoiser(teacher)[0].eval(), config, world, 1, beta1=0.9, ema=True)
    network.set_rates(1e-3, ema_beta=0.5)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    network.backward(network.module(images, torch.ones(2), torch.eye(10)[:2]).square().sum())
    network.step()
    return network


def deepspeeds(network: TrainedNetwork) -> NamedState:
    """The same as DeepSpeed gives it: one collective for each tensor."""
    keys = [key for key in network.keys if key != "weight"]
    return {
        name: {"weight": safe_get_full_fp32_param(p)} | {key: safe_get_full_optimizer_state(p, key) for key in keys}
        for name, p in network.module.named_parameters()
    }


def check(network: TrainedNetwork, expected: NamedState) -> None:
    """Bitwise the same values in float32; and of the averages alone."""
    gathered = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in network.gather()}
    averages = {name: tensors["ema"].clone() for name, tensors in network.gather(["ema"])}
    assert list(gathered) == list(averages) == list(network.shapes)
    for name, tensors in expected.items():
        assert gathered[name].keys() == tensors.keys(), name
        for key, value in tensors.items():
            assert gathered[name][key].dtype == torch.float32, (name, key)
            assert torch.equal(gathered[name][key], value), (name, key)
        assert torch.equal(averages[name], tensors["ema"]), name


def main() -> None:
    torch.set_num_threads(1)
    world = join_world()
    # Stage 2 lays parameters out as stage 1 does.
    for stage, precision in itertools.product((1, 3), ("fp32", "bf16")):
        network = stepped(sys.argv[1], stage, precision, world)
        expected = deepspeeds(network)
        flat = {key: torch.cat([t[key].flatten() for t in expected.values()]) for key in network.keys}
        assert all(not torch.equal(flat[a], flat[b]) for a, b in itertools.combinations(flat, 2))
        for limit in (1, 5000, shares.GATHERED_AT_ONCE):  # one by one, in groups, all together
            with mock.patch.object(shares, "GATHERED_AT_ONCE", limit):
                check(network, expected)
        network.destroy()


if __name__ == "__main__":
    main()
