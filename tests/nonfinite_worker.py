"""On ranks: poison one slot's draws for one network, and record who stepped."""

from __future__ import annotations

import json
import math
import sys

import torch

from sid_ray.config import parse_config
from sid_ray.teachers.sources import load_denoiser
from sid_ray.training.distributed import join_world
from sid_ray.training.networks import build_networks
from sid_ray.training.slots import SeededDraws, slots_of_rank
from sid_ray.training.step import Iteration


class PoisonedDraws(SeededDraws):
    """NaN noise for one image of slot 0, in one network's phase, at 16 images."""

    role = ""

    def fake_score(self, nimg, slot):
        return self._poison(super().fake_score(nimg, slot), nimg, slot, "fake_score")

    def generator(self, nimg, slot):
        return self._poison(super().generator(nimg, slot), nimg, slot, "generator")

    def _poison(self, draws, nimg, slot, role):
        if nimg == 16 and slot == 0 and role == self.role:
            draws.noise[0] = math.nan
        return draws


def state_of(network):
    return {f"{n}/{k}": t.clone() for n, tensors in network.gather() for k, t in tensors.items()}


def main(teacher_path: str, out: str, variants: str) -> None:
    torch.set_num_threads(1)
    world, results = join_world(), {}
    for stage, precision in json.loads(variants):
        for role in ("generator", "fake_score"):
            config = parse_config(
                {
                    "teacher": {"path": teacher_path},
                    "engine": {"zero_stage": stage, "precision": precision, "micro_batch": 4},
                    "batch": {"size": 16},
                }
            )
            slots = slots_of_rank(4, world.rank, world.size)
            networks = build_networks(config, world, len(slots), *(load_denoiser(teacher_path)[0] for _ in range(3)))
            draws = PoisonedDraws(networks.plain, 4, 0, 0, -1.2, 1.2, 800, world.device)
            object.__setattr__(draws, "role", role)
            iteration = Iteration(config, networks, draws, slots)
            both = {"generator": networks.generator, "fake_score": networks.fake_score}
            start, teacher = state_of(both[role]), load_denoiser(teacher_path)[0]
            exact_start = all(torch.equal(start[f"{n}/weight"], p) for n, p in teacher.named_parameters())
            iteration(0)
            before = {name: state_of(n) for name, n in both.items()}
            skipped = {name: n.skipped for name, n in both.items()}
            iteration(16)
            after = {name: state_of(n) for name, n in both.items()}
            skipped = {name: n.skipped - skipped[name] for name, n in both.items()}
            changed = {
                name: any(not torch.equal(before[name][k], after[name][k]) for k in before[name]) for name in both
            }
            iteration(32)
            later = state_of(both[role])
            finite = all(bool(t.isfinite().all()) for t in later.values())
            moved = any(not torch.equal(later[k], after[role][k]) for k in later)
            total = world.sum(torch.tensor([float(skipped[role])])).item()
            results[f"stage {stage} {precision} {role}"] = {
                "poisoned": role,
                "exact_start": exact_start,
                "skipped": skipped,
                "changed": changed,
                "steps_after": finite and moved,
                "same_on_all_ranks": total == world.size * skipped[role],
            }
            for network in both.values():
                network.destroy()
    if world.is_first:
        torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
