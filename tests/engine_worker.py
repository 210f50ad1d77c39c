"""Run under torchrun (or alone): replays a golden trajectory through the engines and saves the end state."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sid_ray.config import Config, parse_config
from sid_ray.diffusion.noise import lognormal_sigma
from sid_ray.methods.sid import generator_sigma
from sid_ray.training.distributed import join_world
from sid_ray.training.networks import build_networks
from sid_ray.training.slots import Draws, Phase, slots_of_rank
from sid_ray.training.step import Iteration
from tests.golden_numbers import golden_denoiser, load_golden, under


class GoldenDraws:
    """A `DrawSource` that replays recorded draws."""

    def __init__(self, numbers, meta, micro_batch):
        self.numbers, self.meta, self.micro_batch = numbers, meta, micro_batch

    def _draw(self, nimg, role, slot, key, to_sigma):
        part = slice(slot * self.micro_batch, (slot + 1) * self.micro_batch)
        draw = under(self.numbers, f"iter{nimg // self.meta['batch_size']}.{role}.")
        labels = draw["labels"][part] if "labels" in draw else None
        return Draws(draw["z"][part], labels, to_sigma(draw[key][part]), draw["noise"][part])

    def fake_score(self, nimg, slot):
        return self._draw(nimg, "fake", slot, "normal_for_sigma", lognormal_sigma)

    def generator(self, nimg, slot):
        tmax = self.meta["tmax"]
        return self._draw(nimg, "generator", slot, "uniform_for_t", lambda u: generator_sigma(u, tmax))

    def reseed(self, nimg: int, phase: Phase, slot: int) -> None:
        pass


def golden_config(meta, **engine) -> Config:
    tree = {
        "teacher": {"path": "unused"},
        "method": {"alpha": meta["alpha"], "tmax": meta["tmax"], "sigma_init": meta["sigma_init"]},
        "optimizer": {
            "generator_lr": meta["lr"],
            "fake_score_lr": meta["lr"],
            "generator_beta1": meta["betas_generator"][0],
            "eps": meta["eps"],
            "ema_halflife_kimg": meta["ema_halflife_kimg"],
            "ema_rampup_ratio": meta["ema_rampup_ratio"],
        },
        "engine": {"precision": "fp32"} | {k: v for k, v in engine.items() if k != "memory"},
        "batch": {"size": meta["batch_size"]},
    }
    if "memory" in engine:
        tree["method"]["memory"] = engine["memory"]
    return parse_config(tree)


def replay(name: str, out: Path, **engine) -> None:
    torch.set_num_threads(1)
    world = join_world()
    numbers, meta = load_golden(f"sid/{name}")
    numbers = {key: tensor.to(world.device) for key, tensor in numbers.items()}
    config = golden_config(meta, **engine)
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    three = [golden_denoiser(numbers, meta["init_kwargs"], "teacher.") for _ in range(3)]
    networks = build_networks(config, world, len(slots), *three)
    iteration = Iteration(config, networks, GoldenDraws(numbers, meta, config.engine.micro_batch), slots)
    losses = []
    for step in range(meta["iterations"]):
        losses.append(world.sum(torch.stack(iteration(step * meta["batch_size"]))))
    state = {"losses": torch.stack(losses).cpu()}
    for role, network in (("generator", networks.generator), ("fake_score", networks.fake_score)):
        for key, tensors in network.gather():
            state[f"{role}.{key}"] = tensors["weight"].cpu().clone()
            if "ema" in tensors:
                state[f"ema.{key}"] = tensors["ema"].cpu().clone()
    networks.generator.destroy()
    networks.fake_score.destroy()
    if world.is_first:
        save_file(state, out)


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        replay(**{**job, "out": Path(job["out"])})
