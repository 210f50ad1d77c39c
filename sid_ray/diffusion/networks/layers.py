"""Building blocks shared by the two U-Net families.

Parameter names and initial distributions follow EDM (Karras et al. 2022, arXiv 2206.00364), so weights
interchange with every EDM, SiD and SiDA checkpoint. Noise embeddings are computed in float32 whatever the
network's precision; everything behind them runs in the precision of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Initialiser = Callable[[nn.Module], None]


def xavier_uniform(scale: float = 1.0) -> Initialiser:
    """Xavier-uniform weights times `scale`, zero biases (the Song networks)."""

    def init(module: nn.Module) -> None:
        with torch.no_grad():
            nn.init.xavier_uniform_(module.weight).mul_(scale)  # type: ignore[arg-type]
            if module.bias is not None:
                module.bias.zero_()  # type: ignore[operator]

    return init


def kaiming_uniform(scale: float = 1.0, bias_scale: float = 0.0) -> Initialiser:
    """Weights and biases uniform with variance `scale`^2 / fan_in (the ADM network)."""

    def init(module: nn.Module) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        bound = math.sqrt(3.0 / weight[0].numel())
        with torch.no_grad():
            weight.uniform_(-bound, bound).mul_(scale)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound).mul_(bias_scale)  # type: ignore[operator]

    return init


def kaiming_normal(scale: float = 1.0) -> Initialiser:
    """Normal weights with variance `scale`^2 / fan_in (the ADM network's label embedding)."""

    def init(module: nn.Module) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        with torch.no_grad():
            weight.normal_(0.0, scale / math.sqrt(weight[0].numel()))

    return init


def linear(in_features: int, out_features: int, init: Initialiser, bias: bool = True) -> nn.Linear:
    """A dense layer with the given initial distribution."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    init(layer)
    return layer


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Conv2d(nn.Module):
    """Convolution, optionally with resampling by 2 through a separable low-pass filter.

    `kernel=0` resamples only. With `resample_last` the convolution comes first when down-sampling (EDM's
    "fused" order: it differs from the other at the borders only, and NCSN++ weights expect it).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Initialiser | None = None,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
        resample_last: bool = False,
    ):
        super().__init__()
        self.out_channels = out_channels
        self.up, self.down, self.resample_last = up, down, resample_last
        self.padding: int = kernel // 2
        self.weight = self.bias = None
        if kernel:
            assert init is not None
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
            init(self)
        self.box = resample_filter == (1, 1)
        lowpass = None
        if up or down:
            # In NumPy: on the meta device torch would import its whole compiler to multiply, a second of any start.
            taps = np.array(resample_filter, dtype=np.float32)
            lowpass = torch.tensor(np.outer(taps, taps)[None, None] / taps.sum() ** 2)
        self.register_buffer("resample_filter", lowpass)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        kernel = (4 * self.resample_filter).to(x.dtype).expand(channels, 1, size, size)
        return F.conv_transpose2d(x, kernel, stride=2, padding=(size - 1) // 2, groups=channels)

    def _downsample(self, x: Tensor, padding: int) -> Tensor:
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        if self.box and padding == 0:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, size, size)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        if self.down and self.resample_last:
            assert self.weight is not None and self.bias is not None
            border = (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight, padding=self.padding + border)
            return self._downsample(x, padding=0) + self.bias[:, None, None]
        if self.up:
            x = self._upsample(x)
        if self.down:
            x = self._downsample(x, padding=(self.resample_filter.shape[-1] - 1) // 2)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.padding)


class PositionalEmbedding(nn.Module):
    """cos and sin of the noise label at geometrically spaced frequencies: (N,) -> (N, channels)."""

    def __init__(self, channels: int, *, endpoint: bool = False, max_positions: int = 10_000):
        super().__init__()
        self.num_frequencies, self.endpoint, self.max_positions = channels // 2, endpoint, max_positions

    def forward(self, noise_label: Tensor) -> Tensor:
        """Noise labels (N,) -> float32 (N, channels), cosines first."""
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=noise_label.device)
        frequencies = (1 / self.max_positions) ** (index / (self.num_frequencies - int(self.endpoint)))
        angle = noise_label.float().outer(frequencies)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos and sin at fixed random frequencies: (N,) -> (N, channels)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def _apply(self, fn: Callable, recurse: bool = True) -> FourierEmbedding:
        # A cast of the network must not round the frequencies: the embedding is float32 by contract.
        exact = self.freqs
        super()._apply(fn, recurse)
        self.freqs = (
            torch.empty_like(self.freqs, dtype=torch.float32) if self.freqs.is_meta else exact.to(self.freqs.device)
        )
        return self

    def forward(self, noise_label: Tensor) -> Tensor:
        """Noise labels (N,) -> float32 (N, channels), cosines first."""
        angle = noise_label.float().outer(2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def embed_labels(layer: nn.Linear, labels: Tensor | None, batch: int, scale: float) -> Tensor:
    """Class or augmentation labels (N, dim) through `layer`; None means the all-zero label.

    A zero label goes through the layer too: every parameter then takes part in every backward pass, which
    sharded optimizers rely on.
    """
    weight = layer.weight
    if labels is None:
        labels = weight.new_zeros(batch, layer.in_features)
    return layer(labels.to(weight.dtype) * scale)


def recomputed(block: Callable[..., Tensor], *inputs: Tensor, draws: bool = True) -> Tensor:
    """`block(*inputs)`, of which only the inputs are kept: the backward pass computes the rest again.

    `draws`: whether the block draws random numbers (dropout), which are then the same again.
    """
    # At ZeRO-3 parameters have another shape when they are saved than when they are used: no check of shapes.
    output = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws, determinism_check="none")
    assert isinstance(output, Tensor)
    return output


class UNetBlock(nn.Module):
    """Residual block conditioned on an embedding, with optional resampling and self-attention.

    `adaptive_scale`: the embedding scales and shifts the normalised features (ADM); otherwise it is added
    before normalisation (Song). `resample_proj`: a resampling skip always has a 1x1 convolution (Song).
    """

    recompute = False
    """Whether the backward pass computes the activations again instead of keeping them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        init: Initialiser,
        init_last: Initialiser,
        init_attention: Initialiser,
        heads: int = 0,
        up: bool = False,
        down: bool = False,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: tuple[int, ...] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        resampling = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init, **resampling)  # type: ignore[arg-type]
        self.affine = linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init)
        self.norm1 = group_norm(out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_last)
        self.skip: Conv2d | None = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, init, **resampling)  # type: ignore[arg-type]
        if heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_attention)
            self.proj = Conv2d(out_channels, out_channels, 1, init_last)

    def _attention(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # EDM interleaves q, k, v innermost within each head's channels. Fused kernels want each apart: (n, heads,
        # h*w, c/heads) with the last dimension contiguous.
        qkv = self.qkv(self.norm2(x)).reshape(n, self.heads, c // self.heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind()
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, h, w)
        # Else the strides that come out decide the layout, and the cost, of all that follows.
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return self.proj(attended.contiguous(memory_format=memory_format))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) and embedding (N, emb_channels) -> (N, out_channels, H', W')."""
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._compute, x, emb, draws=self.training)
        return self._compute(x, emb)

    def _compute(self, x: Tensor, emb: Tensor) -> Tensor:
        residual = x if self.skip is None else self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + modulation))
        x = self.conv1(self.dropout(x))
        x = (x + residual) * self.skip_scale
        if self.heads:
            x = (self._attention(x) + x) * self.skip_scale
        return x
