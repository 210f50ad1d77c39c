"""Weights, moments and averages out of the shares that DeepSpeed's ZeRO keeps on each worker, and back into them.

`key` is `weight` for the float32 weights, else the name of an optimizer state. Stages 1 and 2 lay all parameters end to
end and cut that into one piece a worker: a worker has some part of a parameter, or none. Stage 3 cuts each parameter
into equal shares, the last one padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sid_ray.training.distributed import World

GATHERED_AT_ONCE = 2**23
"""Elements (32 MiB) that are gathered in one collective, or one parameter's if they are more."""


def gather_full(
    parameters: Mapping[str, nn.Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    keys: Sequence[str],
    stage: int,
    world: World,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield for each parameter, in order, its name and the full float32 tensor of each key; `stage` is 1, 2 or 3.

    `shapes`: the full ones, of which stage 3 leaves nothing in the parameters.
    Collective: every worker must consume it to the end. The tensors are valid until the next item.
    """
    sizes = {name: len(keys) * math.prod(shape) for name, shape in shapes.items()}
    # Few collectives: one for each tensor would cost a network of a thousand small tensors far more than its bytes.
    for names in consecutive(sizes, GATHERED_AT_ONCE):
        wanted = [(parameters[name], key) for name in names for key in keys]
        tensors = _from_shares(wanted, world) if stage == 3 else _from_fragments(wanted, world)
        for name in names:
            yield name, {key: next(tensors).view(shapes[name]) for key in keys}


def set_share(p: nn.Parameter, key: str, value: Tensor, stage: int, world: World) -> None:
    """Set this worker's share of a parameter's weight or state from the full tensor; `stage` is 1, 2 or 3."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if stage == 3:
        # The setters of full values fail where a parameter does not divide evenly, so cut the share here.
        share = p.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, share * world.size - value.numel()))
        local = padded[share * world.rank :][:share].clone()
        if key == "weight":
            safe_set_local_fp32_param(p, local)
        else:
            safe_set_local_optimizer_state(p, local, key)
    elif key == "weight":
        safe_set_full_fp32_param(p, value)
    else:
        safe_set_full_optimizer_state(p, value, key)


def consecutive(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most `limit` in all; what is larger by itself is a group of its own."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


@torch.no_grad()
def _from_fragments(wanted: list[tuple[nn.Parameter, str]], world: World) -> Iterator[Tensor]:
    """Flat full tensors at stages 1 and 2: each worker adds its part to zeros."""
    sizes = [p.numel() for p, _ in wanted]
    flat = torch.zeros(sum(sizes), device=world.device)
    for (p, key), whole in zip(wanted, flat.split(sizes), strict=True):
        part = p._hp_mapping  # type: ignore[attr-defined]
        if part is not None:
            address = part.lp_fragment_address
            whole[address.start :][: address.numel].copy_(part.get_hp_fragment(None if key == "weight" else key))
    world.sum(flat)
    yield from flat.split(sizes)


@torch.no_grad()
def _from_shares(wanted: list[tuple[nn.Parameter, str]], world: World) -> Iterator[Tensor]:
    """Flat full tensors at stage 3: the workers' shares one after the other, without the padding."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    sizes = [p.ds_tensor.ds_numel for p, _ in wanted]  # type: ignore[attr-defined]
    ranks = torch.empty(world.size, sum(sizes), device=world.device)
    for (p, key), own in zip(wanted, ranks[world.rank].split(sizes), strict=True):
        own.copy_(safe_get_local_fp32_param(p) if key == "weight" else safe_get_local_optimizer_state(p, key))
    world.gather_rows(ranks)
    for (p, _), parts in zip(wanted, ranks.split(sizes, dim=1), strict=True):
        yield parts.flatten()[: p.ds_numel]  # type: ignore[attr-defined]
