"""DhariwalUNet: the ADM network of Dhariwal & Nichol (2021, arXiv 2105.05233) as EDM configures it."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sid_ray.diffusion.networks.layers import (
    Conv2d,
    PositionalEmbedding,
    UNetBlock,
    embed_labels,
    group_norm,
    kaiming_normal,
    kaiming_uniform,
    linear,
)

CHANNELS_PER_HEAD = 64


class DhariwalUNet(nn.Module):
    """U-Net of (x, noise label, labels) -> image of the same size; see `SongUNet` for shapes."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.10,
    ):
        super().__init__()
        emb_channels = model_channels * channel_mult_emb
        init, init_zero = kaiming_uniform(math.sqrt(1 / 3), math.sqrt(1 / 3)), kaiming_uniform(0.0)
        make = partial(
            UNetBlock, emb_channels=emb_channels, init=init, init_last=init_zero, init_attention=init, dropout=dropout
        )

        def block(cin: int, cout: int, attention: bool = False, up: bool = False, down: bool = False) -> UNetBlock:
            return make(cin, cout, heads=cout // CHANNELS_PER_HEAD if attention else 0, up=up, down=down)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            linear(augment_dim, model_channels, kaiming_uniform(0.0), bias=False) if augment_dim else None
        )
        self.map_layer0 = linear(model_channels, emb_channels, init)
        self.map_layer1 = linear(emb_channels, emb_channels, init)
        self.map_label = (
            linear(label_dim, emb_channels, kaiming_normal(math.sqrt(label_dim)), bias=False) if label_dim else None
        )

        self.enc = nn.ModuleDict()
        skips: list[int] = []
        channels = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels * mult, 3, init)
                channels = model_channels * mult
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(channels, model_channels * mult, res in attn_resolutions)
                channels = model_channels * mult
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                cin = channels + skips.pop()
                channels = model_channels * mult
                self.dec[f"{res}x{res}_block{index}"] = block(cin, channels, res in attn_resolutions)
        self.out_norm = group_norm(channels)
        self.out_conv = Conv2d(channels, out_channels, 3, init_zero)

    def _embed(self, noise_label: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_label).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None:
            emb = emb + embed_labels(self.map_augment, augment_labels, len(emb), 1.0)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + embed_labels(self.map_label, class_labels, len(emb), 1.0)
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Raw output of the network, in its own precision; shapes as in the class."""
        emb = self._embed(noise_label, class_labels, augment_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
