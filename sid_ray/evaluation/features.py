"""Feature networks: what FID and its relatives look at instead of pixels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sid_ray.config import INCEPTION_ADDRESS
from sid_ray.errors import UserError
from sid_ray.evaluation.detectors import TORCHSCRIPT, load_inception, load_python, load_torchscript
from sid_ray.evaluation.feature_network import FeatureNetwork, ImageShape
from sid_ray.teachers.model_directory import ASSETS, absolute
from sid_ray.teachers.user_code import PYTHON, is_python


class DigitsFeatures(FeatureNetwork):
    """A small classifier of 8x8 grey digits; its features are the last convolution's, averaged over the image.

    Averaged convolutional features are what Inception's FID looks at too. They see strokes and blur, where the
    activations of a dense layer before the classes see little but the class: on those, blurred digits pass.
    """

    name = "digits"
    image_shape: ImageShape = (1, 8, 8)

    def __init__(self, num_features: int = 64, num_classes: int = 10):
        super().__init__()
        self.num_features = num_features
        self.conv0 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(64, num_features, 3, padding=1)
        self.classes = nn.Linear(num_features, num_classes)

    def from_unit_range(self, x: Tensor) -> Tensor:
        """Features of float images (N, 1, 8, 8) in [-1, 1]."""
        x = F.silu(self.conv2(F.silu(self.conv1(F.silu(self.conv0(x))))))
        return x.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (N, num_features) of uint8 images (N, 1, 8, 8)."""
        return self.from_unit_range(images.float() / 127.5 - 1)

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities of the ten digits, float32 (N, 10)."""
        return self.classes(features).softmax(dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the classes, float32 (N, 10), of uint8 images (N, 1, 8, 8)."""
        return self.classes(self(images))


@torch.no_grad()
def accuracy(network: DigitsFeatures, images: Tensor, labels: Tensor) -> float:
    """Fraction of uint8 `images` (N, 1, 8, 8) whose most likely class is their label (N,)."""
    return float((network.logits(images).argmax(1) == labels).float().mean())


def split_indices(num: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random split of 0..num-1 into indices to train on and a fraction `held_out` to measure on."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    cut = round(num * held_out)
    return order[cut:], order[:cut]


def train_digits_features(
    images: Tensor,
    labels: Tensor,
    seed: int = 0,
    *,
    epochs: int = 60,
    batch: int = 64,
    lr: float = 2e-3,
    held_out: float = 0.2,
) -> tuple[DigitsFeatures, float]:
    """Train the classifier; return it frozen, in eval mode, and its accuracy on the images it never saw.

    `images`: uint8 (N, 1, 8, 8); `labels`: class indices (N,). Neither noise nor label smoothing: both make the
    features blind to blur, which is what an untrained generator makes. Deterministic in `seed`; torch's global
    generator is left as it was.
    """
    train, test = split_indices(len(images), held_out, seed)
    data, targets = images[train].float() / 127.5 - 1, labels[train]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsFeatures()
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
        steps = epochs * (len(train) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for _ in range(epochs):
            for chosen in torch.randperm(len(train)).split(batch)[: len(train) // batch]:
                loss = F.cross_entropy(network.classes(network.from_unit_range(data[chosen])), targets[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    network.eval().requires_grad_(False)
    return network, accuracy(network, images[test], labels[test])


def save_digits_features(path: Path, network: DigitsFeatures) -> None:
    """Write the weights as safetensors; the file is replaced in one step."""
    aside = path.with_name(f".{path.name}.aside")
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, aside, metadata={"format": "pt"})
    aside.replace(path)


def load_digits_features(path: Path = ASSETS / "digits" / "features.safetensors") -> DigitsFeatures:
    """The frozen classifier from its weights; the packaged ones by default. UserError if they do not match."""
    network = DigitsFeatures()
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"evaluation.features: {path} does not hold the digits feature network: {error}") from error
    return network.eval().requires_grad_(False)


def load_digits(image_shape: ImageShape, detector: str) -> FeatureNetwork:
    """The packaged classifier of digits. UserError for other images than it knows."""
    if image_shape != DigitsFeatures.image_shape:
        raise UserError(
            f"evaluation.features: 'digits' looks at images of {_size(DigitsFeatures.image_shape)} (channels, height, "
            f"width); these are {_size(image_shape)}"
        )
    return load_digits_features()


def _size(shape: ImageShape) -> str:
    return " x ".join(map(str, shape))


class PixelFeatures(FeatureNetwork):
    """No network at all: the pixels, float in [-1, 1]. FID then compares mean and covariance of the images themselves,
    and nothing beyond: for points, see `PointFeatures`.
    """

    name = "pixels"

    def __init__(self, image_shape: ImageShape):
        super().__init__()
        self.num_features = prod(image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """float32 (N, C H W) of uint8 images (N, C, H, W)."""
        return images.flatten(1).float() / 127.5 - 1


class PointFeatures(FeatureNetwork):
    """Coordinates of points (C, 1, 1) in [-1, 1], and cosines and sines of them along fixed directions.

    Means and covariances of coordinates do not see modes; those of waves do, as long as their length is that of the
    structure (random Fourier features: Rahimi & Recht 2007).
    """

    name = "points"
    waves: Tensor
    """Wave vectors (DIRECTIONS x wave numbers, C)."""
    DIRECTIONS, WAVE_NUMBERS = 8, (2.5, 5.0, 10.0)
    """A wave number of 10 has a length of 0.63."""

    def __init__(self, image_shape: ImageShape):
        super().__init__()
        if image_shape[1:] != (1, 1):
            raise UserError(f"evaluation.features: 'points' looks at points (C, 1, 1), not at images of {image_shape}")
        rng = torch.Generator().manual_seed(0)
        directions = F.normalize(torch.randn(self.DIRECTIONS, image_shape[0], generator=rng), dim=1)
        self.register_buffer("waves", torch.cat([k * directions for k in self.WAVE_NUMBERS]))
        self.num_features = image_shape[0] + 2 * len(self.waves)

    def forward(self, images: Tensor) -> Tensor:
        """float32 (N, num_features) of uint8 points (N, C, 1, 1)."""
        points = images.flatten(1).float() / 127.5 - 1
        phase = points @ self.waves.T
        return torch.cat([points, phase.cos(), phase.sin()], dim=1)


FEATURES: dict[str, Callable[[ImageShape, str], FeatureNetwork]] = {
    "digits": load_digits,
    "inception": load_inception,
    "pixels": lambda image_shape, detector: PixelFeatures(image_shape),
    "points": lambda image_shape, detector: PointFeatures(image_shape),
}
"""Loaders of the feature networks by the name that `evaluation.features` gives them; they take the shape of the
images and `evaluation.detector`."""


def absolute_features(name: str) -> str:
    """The name as it means the same from any working directory: a TorchScript file's path becomes absolute."""
    return absolute(name) if name.endswith(TORCHSCRIPT) else name


def load_features(name: str, image_shape: ImageShape, detector: str = INCEPTION_ADDRESS) -> FeatureNetwork:
    """The frozen feature network called `name` for images (C, H, W), in eval mode, on the CPU.

    `name`: one of FEATURES, a TorchScript file, or `python:package.module:factory`. `detector`: where Inception's file
    lies. UserError for another name, a missing or wrong file, or images that the network does not look at.
    """
    if is_python(name):
        network = load_python(name, image_shape)
    elif name.endswith(TORCHSCRIPT):
        network = load_torchscript(name, image_shape)
    elif name in FEATURES:
        network = FEATURES[name](image_shape, detector)
    else:
        raise UserError(
            f"evaluation.features: there is no feature network {name!r}; allowed: {', '.join(FEATURES)}, a TorchScript "
            f"file (*{TORCHSCRIPT}), or {PYTHON}package.module:factory"
        )
    return network.eval().requires_grad_(False)
