"""Adam that also keeps the moving average of what it optimises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sid_ray.training.phases import phase


class AdamWithEMA(torch.optim.Adam):
    """Adam whose state holds, beside its moments, an exponential moving average `ema` of the parameters.

    Inside DeepSpeed the state is sharded and addressed by key like any other, so the average is float32,
    sharded, needs no communication, and moves exactly when a step was taken. `ema_beta` of each parameter
    group is the share of the old average that is kept; None keeps no average.

    With `check_finite` a step whose gradient norm is not finite changes nothing and sets `overflow`: the
    contract that DeepSpeed's own optimizers follow at ZeRO 1-3, for stage 0, where it uses this one bare.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        ema: bool,
        check_finite: bool = False,
        clip: float | None = None,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.check_finite, self.clip = check_finite, clip
        self.overflow = False
        self._global_grad_norm = 0.0
        for group in self.param_groups:
            group["ema_beta"] = 0.0 if ema else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of parameters and average, or none if `check_finite` finds a non-finite gradient."""
        if self.check_finite:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self._global_grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            self.overflow = not math.isfinite(self._global_grad_norm)
            if self.overflow:
                return None
            if self.clip is not None and self._global_grad_norm > self.clip:
                torch._foreach_mul_(gradients, self.clip / (self._global_grad_norm + 1e-6))
        with phase("Adam"):
            result = super().step(closure)
        with phase("EMA"):
            for group in self.param_groups:
                if group["ema_beta"] is not None:
                    self._update_average(group["params"], group["ema_beta"])
        return result

    def _update_average(self, params: list[Tensor], beta: float) -> None:
        for p in params:
            if "ema" not in self.state[p]:
                self.state[p]["ema"] = p.detach().clone()
        torch._foreach_lerp_([self.state[p]["ema"] for p in params], [p.detach() for p in params], 1 - beta)
