"""What every reader of a foreign format returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Checkpoint:
    """A network taken from a checkpoint of another format."""

    network: dict[str, Any]
    """Its architecture: `ModelConfig.network`."""
    state: dict[str, Tensor]
    """Parameters and persistent buffers by the denoiser's names."""
    sigma_data: float = 0.5
    """Standard deviation of the training images."""
    licence: str | None = None
    """Licence of the weights, if it is known."""
