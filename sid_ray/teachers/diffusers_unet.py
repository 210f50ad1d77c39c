"""diffusers' UNet2DModel as a denoiser D(x, sigma).

Such networks were trained on a discrete variance-preserving (VP) schedule: at timestep t they see sqrt(abar) x0 +
sqrt(1 - abar) eps. Divided by sqrt(abar) that is x0 + sigma eps with sigma = sqrt((1 - abar) / abar), the noisy image
of this project (Karras et al. 2022, arXiv 2206.00364, appendix C.1).
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.networks.layers import recomputed
from sid_ray.errors import UserError

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
Size = Annotated[int, Field(ge=1, le=65_536)]
Beta = Annotated[float, Field(gt=0, lt=1)]


def import_diffusers() -> Any:
    """The package, which is an optional extra, told to keep to itself. UserError if it is not installed."""
    try:
        import diffusers
        from diffusers.utils import logging
    except ImportError as error:
        raise UserError("a UNet2DModel needs diffusers, which is missing: pip install 'sid-ray[diffusers]'") from error
    logging.set_verbosity_error()
    return diffusers


class UNetArguments(BaseModel):
    """Arguments of diffusers' UNet2DModel, by its names; what is not declared here is passed on as it is."""

    model_config = ConfigDict(extra="allow")

    sample_size: Size | tuple[Size, Size]
    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: list[Size] = Field([224, 448, 672, 896], min_length=1, max_length=16)
    layers_per_block: int = Field(2, ge=1, le=64)
    down_block_types: list[DownBlock] = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    up_block_types: list[UpBlock] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    time_embedding_type: Literal["positional"] = "positional"
    class_embed_type: None = None
    num_class_embeds: Size | None = None

    @model_validator(mode="after")
    def _predicts_an_image(self) -> UNetArguments:
        if self.out_channels != self.in_channels:
            raise ValueError(
                f"out_channels: {self.out_channels} is not supported; allowed: in_channels ({self.in_channels}), "
                "without channels for a learned variance"
            )
        step = 2 ** (len(self.block_out_channels) - 1)
        if any(side % step for side in self.image_shape[1:]):
            raise ValueError(f"sample_size: {self.sample_size} is not supported; allowed: multiples of {step}")
        return self

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        height, width = (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size
        return self.in_channels, height, width


class Schedule(BaseModel):
    """What a network was trained on, by the names of diffusers' DDPMScheduler."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train_timesteps: int = Field(1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    trained_betas: tuple[Beta, ...] | None = Field(None, min_length=2, max_length=100_000)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    @model_validator(mode="after")
    def _is_finite(self) -> Schedule:
        levels = log_noise_levels(self, torch.device("cpu"))
        if not bool(levels.isfinite().all() & (levels.diff() > 0).all()):
            raise ValueError("the schedule's noise levels are not finite and increasing")
        return self


@cache
def log_noise_levels(schedule: Schedule, device: torch.device) -> Tensor:
    """ln sigma of each timestep, float64 (T,), increasing.

    Kept per device, so that no step waits for a copy, and not as a buffer, which would lose its precision with
    the weights'.
    """
    with torch.device("cpu"):  # also where a network is built without memory
        abar = import_diffusers().DDPMScheduler(**schedule.model_dump()).alphas_cumprod.double()
    return (((1 - abar) / abar).log() / 2).to(device)


def timestep(schedule: Schedule, sigma: Tensor) -> Tensor:
    """Timestep of each noise level, float32 (N,): linear in ln sigma between the schedule's, clamped at its ends."""
    levels, wanted = log_noise_levels(schedule, sigma.device), sigma.double().log()
    above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return (above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)).float()


class OneHotEmbedding(nn.Module):
    """What nn.Embedding computes, from one-hot rows (N, num) instead of indices; a row of zeros gives zeros."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num, dim))

    def forward(self, one_hot: Tensor) -> Tensor:
        """Embeddings (N, dim) in the precision of the weights."""
        return one_hot.to(self.weight.dtype) @ self.weight


class DiffusersDenoiser(Denoiser):
    """D(x; sigma) from a UNet2DModel that predicts eps, v or x0 at the scaled input and the timestep of sigma.

    With a = 1 / sqrt(1 + sigma^2) and F = F(a x; t(sigma)): x - sigma F (epsilon), a^2 x - sigma a F (v_prediction,
    Salimans & Ho 2022, arXiv 2202.00512), F (sample). Scaling and output are float32 whatever the precision of F.
    Beyond the schedule's noise levels F is asked at its nearest timestep.

    `unet`: arguments of UNet2DModel; `schedule`: fields of `Schedule`. Impossible or unsupported ones raise ValueError
    or TypeError, a missing diffusers UserError.
    """

    def __init__(
        self, unet: dict[str, Any], schedule: dict[str, Any], sigma_data: float = 0.5, model_type: str = "UNet2DModel"
    ):
        super().__init__()
        if model_type != "UNet2DModel":
            raise ValueError(f"unknown network {model_type!r}; allowed: UNet2DModel")
        arguments, self.schedule = UNetArguments.model_validate(unet), Schedule.model_validate(schedule)
        self.image_shape, self.label_dim = arguments.image_shape, arguments.num_class_embeds or 0
        self.sigma_data = sigma_data
        self.model = import_diffusers().UNet2DModel(**unet)
        if self.label_dim:
            self.model.class_embedding = OneHotEmbedding(*self.model.class_embedding.weight.shape)

    def set_dropout(self, probability: float) -> None:
        """What the argument `dropout` sets: the residual blocks', not the attention's."""
        from diffusers.models.resnet import ResnetBlock2D

        for module in self.model.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = probability

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether backward passes compute the activations inside of blocks again."""
        if on:
            self.model.enable_gradient_checkpointing(recomputed)
        else:
            self.model.disable_gradient_checkpointing()

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Denoised images, float32 in about [-1, 1], of the shape of `x` (N, C, H, W).

        `sigma`: noise level, a number or (N,), in the units of `x`. `class_labels`: one-hot (N, label_dim), or None
        for no class's embedding. `augment_labels` are not known to these networks.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        scale = (1 + sigma.square()).rsqrt()
        t = timestep(self.schedule, sigma.flatten()).expand(len(x))
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(len(x), self.label_dim)
        scaled = (scale * x).to(self.model.conv_in.weight.dtype)
        output = self.model(scaled, t, class_labels if self.label_dim else None).sample.float()
        match self.schedule.prediction_type:
            case "epsilon":
                return x - sigma * output
            case "v_prediction":
                return scale * (scale * x - sigma * output)
            case "sample":
                return output
