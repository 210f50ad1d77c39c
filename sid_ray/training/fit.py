"""The denoising fit: before a run, a student of its own learns the teacher's denoiser.

SiD's generator starts as the teacher's denoiser at one noise level, and its fake score as the teacher's score. A
student with other weights has to come near both first, without data: it regresses on D(x_t, sigma) where x_t are the
teacher's own samples with noise. All workers share the work; slots and seeds are those of the training itself, so the
number of workers does not change the result.
"""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import draw_latents
from sid_ray.diffusion.noise import edm_weight, lognormal_sigma
from sid_ray.errors import UserError
from sid_ray.evaluation.fid import heun_sampler
from sid_ray.methods.sid import generator_sigma
from sid_ray.training.distributed import World
from sid_ray.training.outside import Outside
from sid_ray.training.run_directory import RunDirectory
from sid_ray.training.schedules import learning_rate
from sid_ray.training.slots import Phase, reseed, slots_of_rank

POOL = 4096
"""Samples of the teacher that the noisy images are made from."""
REPORTS = 10
"""Notes for a person while it goes on; a wish to stop is noticed there."""


def fitted_student(
    config: Config, run: RunDirectory, teacher: Denoiser, student: Denoiser, world: World, outside: Outside
) -> bool:
    """Give the student the weights of the fit, which is done once per run and kept there. Collective.

    Returns whether that is done; False if somebody asked to stop before. The networks are left on the CPU.
    """
    if not world.once(run.student.is_file):
        if not _fit(config, teacher.to(world.device), student.to(world.device), world, outside):
            return False
        teacher.cpu()
        student.cpu()
        if world.is_first:
            aside = run.student.with_name(f".{run.student.name}")
            save_file({k: v.contiguous() for k, v in student.state_dict().items()}, aside)
            aside.replace(run.student)
    state = world.once(lambda: load_file(run.student))
    student.load_state_dict(state, strict=True)
    return True


def _fit(config: Config, teacher: Denoiser, student: Denoiser, world: World, outside: Outside) -> bool:
    """Adam on lambda(sigma) (student - teacher)^2 at noisy samples of the teacher; False if asked to stop."""
    init, batch = config.init, config.batch.size
    total = max(round(init.fit_kimg * 1000 / batch), 1)
    samples, labels = _teacher_samples(config, teacher, world)
    parameters = list(student.train().requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(parameters, lr=init.fit_lr)
    slots = slots_of_rank(config.num_slots, world.rank, world.size)
    for step in range(total):
        losses = []
        optimizer.zero_grad(set_to_none=True)
        for slot in slots:
            reseed(config.run.seed, 0, step * batch, Phase.FIT, slot.number)
            loss = _loss(config, teacher, student, samples, labels) * slot.weight / batch
            loss.backward()
            losses.append(loss.detach())
        _add_up(parameters, world)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(init.fit_lr, "cosine", step, total)
        optimizer.step()
        if (step + 1) % max(total // REPORTS, 1) == 0 or step + 1 == total:
            mean = float(world.sum(torch.stack(losses).sum()))
            if not math.isfinite(mean):
                raise UserError(f"init.fit_lr: the student's fit went astray (loss {mean}); lower than {init.fit_lr}")
            if world.is_first:
                kimg = (step + 1) * batch / 1000
                outside.note(f"student: {kimg:.1f} of {total * batch / 1000:g} kimg of its fit, loss {mean:.4f}")
            if world.any(outside.should_stop()):
                return False
    return True


def _loss(config: Config, teacher: Denoiser, student: Denoiser, samples: Tensor, labels: Tensor | None) -> Tensor:
    """One slot's loss, at the noise levels of both steps of the training: half of them the fake score's, half the
    generator's."""
    n, device = config.micro_batch, samples.device
    chosen = torch.randint(len(samples), (n,), device=device)
    low = lognormal_sigma(torch.randn(n, device=device), config.method.p_mean, config.method.p_std)
    sigma = torch.where(
        torch.rand(n, device=device) < 0.5,
        low,
        generator_sigma(torch.rand(n, device=device), config.method.tmax),
    )
    noised = samples[chosen] + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(samples[chosen])
    classes = None if labels is None else labels[chosen]
    with torch.no_grad():
        target = teacher(noised, sigma, classes)
    weight = edm_weight(sigma, student.sigma_data).reshape(-1, 1, 1, 1)
    return (weight * (student(noised, sigma, classes) - target).square()).sum()


@torch.no_grad()
def _teacher_samples(config: Config, teacher: Denoiser, world: World) -> tuple[Tensor, Tensor | None]:
    """POOL many-step samples (POOL, C, H, W) and their one-hot labels, made by all workers together, on each."""
    seed, shape, shares = config.run.seed, teacher.image_shape, config.method.class_weights
    sample = heun_sampler(teacher.eval(), seed, device=world.device, class_weights=shares)
    pool = torch.zeros(POOL, *shape, device=world.device)
    own = range(world.rank, POOL, world.size)
    for start in range(0, len(own), config.evaluation.batch):
        part = own[start : start + config.evaluation.batch]
        pool[part.start : part.stop : part.step] = sample(part)
    labels = draw_latents(teacher, seed, range(POOL), class_weights=shares)[1] if teacher.label_dim else None
    return world.sum(pool), None if labels is None else labels.to(world.device)


def _add_up(parameters: list[torch.nn.Parameter], world: World) -> None:
    """Sum the gradients over the workers."""
    if world.size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = world.sum(torch.cat([g.flatten() for g in gradients]))
    parts = flat.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p)
