"""SongUNet: the DDPM++ and NCSN++ networks of Song et al. (2021, arXiv 2011.13456) as EDM configures them."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_ray.diffusion.networks.layers import (
    Conv2d,
    FourierEmbedding,
    PositionalEmbedding,
    UNetBlock,
    embed_labels,
    group_norm,
    linear,
    xavier_uniform,
)


class SongUNet(nn.Module):
    """U-Net of (x, noise label, labels) -> image of the same size.

    DDPM++: `embedding_type="positional"`, `encoder_type="standard"`, `channel_mult_noise=1`,
    `resample_filter=(1, 1)`. NCSN++: `"fourier"`, `"residual"`, 2, `(1, 3, 3, 1)`.

    `x` is (N, in_channels, R, R), `noise_label` (N,) float, `class_labels` one-hot (N, label_dim) or None
    for the zero label, `augment_labels` (N, augment_dim) or None for no augmentation.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "residual"] = "standard",
        decoder_type: Literal["standard"] = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
    ):
        super().__init__()
        if encoder_type not in ("standard", "residual") or decoder_type != "standard":
            raise ValueError(
                f"SongUNet: encoder_type={encoder_type!r}, decoder_type={decoder_type!r} is not supported; "
                "allowed: encoder_type 'standard' or 'residual' with decoder_type 'standard'"
            )
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init, init_last = xavier_uniform(), xavier_uniform(1e-5)
        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            init=init,
            init_last=init_last,
            init_attention=xavier_uniform(math.sqrt(0.2)),
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=tuple(resample_filter),
            resample_proj=True,
            adaptive_scale=False,
        )

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = linear(label_dim, noise_channels, init) if label_dim else None
        self.map_augment = linear(augment_dim, noise_channels, init, bias=False) if augment_dim else None
        self.map_layer0 = linear(noise_channels, emb_channels, init)
        self.map_layer1 = linear(emb_channels, emb_channels, init)

        self.enc = nn.ModuleDict()
        skips: list[int] = []
        channels, pyramid = in_channels, in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels, 3, init)
                channels = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
                if encoder_type == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        pyramid,
                        channels,
                        3,
                        init,
                        down=True,
                        resample_filter=tuple(resample_filter),
                        resample_last=True,
                    )
                    pyramid = channels
            skips.append(channels)
            for index in range(num_blocks):
                heads = int(res in attn_resolutions)
                self.enc[f"{res}x{res}_block{index}"] = block(channels, model_channels * mult, heads=heads)
                channels = model_channels * mult
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, heads=1)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                heads = int(index == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{index}"] = block(
                    channels + skips.pop(), model_channels * mult, heads=heads
                )
                channels = model_channels * mult
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(channels, eps=1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv2d(channels, out_channels, 3, init_last)

    def _embed(self, noise_label: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cos, sin = self.map_noise(noise_label).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None:
            scale = math.sqrt(self.map_label.in_features)
            emb = emb + embed_labels(self.map_label, class_labels, len(emb), scale)
        if self.map_augment is not None:
            emb = emb + embed_labels(self.map_augment, augment_labels, len(emb), 1.0)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Raw output of the network, in its own precision; shapes as in the class."""
        emb = self._embed(noise_label, class_labels, augment_labels)
        pyramid, skips = x, list[Tensor]()
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):  # the input pyramid joins the features (NCSN++)
                x = pyramid = skips[-1] = (x + layer(pyramid)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, UNetBlock):
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
            else:
                x = F.silu(layer(x)) if isinstance(layer, nn.GroupNorm) else layer(x)
        return x
