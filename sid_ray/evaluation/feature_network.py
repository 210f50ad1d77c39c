"""What a feature network is."""

from __future__ import annotations

from torch import Tensor, nn

ImageShape = tuple[int, int, int]
"""(channels, height, width) of one image."""


class FeatureNetwork(nn.Module):
    """uint8 images (N, C, H, W) in 0..255 -> float32 features (N, num_features)."""

    name: str
    """What reference statistics record: networks of one name give the same features."""
    num_features: int

    def probabilities(self, features: Tensor) -> Tensor | None:
        """Class probabilities (N, classes) of the images with these features (N, num_features); None if the
        network knows no classes. The inception score needs them."""
        return None
