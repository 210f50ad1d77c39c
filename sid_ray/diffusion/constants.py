"""Constants as tensors, copied to a device once: no step waits for the copy of one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The values as a tensor (n,), the same one at every call: do not change it in place."""
    with torch.inference_mode(False):  # else one that evaluation asks for first could not take part in training
        return torch.tensor(values, dtype=dtype, device=device)
