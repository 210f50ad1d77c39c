"""Feature networks that come from elsewhere: the published Inception detector, TorchScript files, the user's own code.

TorchScript is read by `torch.jit.load` alone, which runs no Python; see docs/security.md for what it can do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.config import INCEPTION_ADDRESS
from sid_ray.errors import UserError
from sid_ray.evaluation.feature_network import FeatureNetwork, ImageShape
from sid_ray.storage import digest, fetch
from sid_ray.teachers.user_code import call_factory

FEATURES_FIELD, DETECTOR_FIELD = "evaluation.features", "evaluation.detector"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
TORCHSCRIPT = ".pt"


class InceptionFeatures(FeatureNetwork):
    """The Inception-v3 of 2015-12-05 that published FIDs are measured with, as NVIDIA's TorchScript file.

    It resizes by itself, to 299 x 299; its features are the 2048 of the last pooling. The inception score's
    probabilities are the softmax of its own last layer **without bias**, as in the score's published code; computed
    from the features, so that a second pass is not needed.
    """

    name = "inception"
    classes: Tensor
    """Weight of the last layer, (1008, 2048)."""

    def __init__(self, detector: Any):
        super().__init__()
        self.detector = detector
        self.register_buffer("classes", detector.state_dict()["output.weight"].float())
        self.num_features = int(self.classes.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (N, 2048) of uint8 images (N, 1 or 3, H, W); grey becomes three equal channels."""
        return self.detector(images.expand(-1, 3, -1, -1), return_features=True).float()

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities of ImageNet's 1008 classes in this network, float32 (N, 1008)."""
        return (features @ self.classes.T).softmax(dim=1)


class ModuleFeatures(FeatureNetwork):
    """A module of somebody else: uint8 images (N, C, H, W) -> features (N, d). Tried on two black images at once.

    It has classes if it is a `FeatureNetwork` that has. UserError, calling the module by `name`, if it does not take
    images of this shape, or gives anything but one row of numbers per image.
    """

    def __init__(self, module: nn.Module, name: str, image_shape: ImageShape):
        super().__init__()
        self.module, self.name = module.eval(), name
        black = torch.zeros(2, *image_shape, dtype=torch.uint8)
        try:
            with torch.no_grad():
                features = self.module(black)
        except Exception as error:  # foreign code: there is no telling what it raises
            size = " x ".join(map(str, image_shape))
            raise UserError(f"{FEATURES_FIELD}: {name} does not take uint8 images of {size}: {error}") from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{FEATURES_FIELD}: {name} gives {found} for 2 images; allowed: features of shape (2, d)")
        self.num_features = features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (N, d) of uint8 images (N, C, H, W)."""
        return self.module(images).float()

    def probabilities(self, features: Tensor) -> Tensor | None:
        """The module's own, if it is a feature network of this project."""
        return self.module.probabilities(features) if isinstance(self.module, FeatureNetwork) else None


def load_inception(image_shape: ImageShape, detector: str, sha256: str = INCEPTION_SHA256) -> FeatureNetwork:
    """The published detector from a path or an address, opened only if its digest is right.

    UserError, which names the expected file, its digest and where it is published, otherwise.
    """
    if image_shape[0] not in (1, 3):
        raise UserError(
            f"{FEATURES_FIELD}: inception looks at grey or RGB images; these have {image_shape[0]} channels"
        )
    try:
        file = fetch(detector, DETECTOR_FIELD, sha256)
        if not file.is_file():
            raise UserError(f"{DETECTOR_FIELD}: {detector!r} is not a file")
    except UserError as error:
        raise UserError(
            f"{error}\nExpected: {INCEPTION_FILE}, sha256 {sha256}, as published at {INCEPTION_ADDRESS}; where that "
            f"cannot be reached, copy the file here and give its path as {DETECTOR_FIELD}."
        ) from error
    return InceptionFeatures(_open_script(file, DETECTOR_FIELD))


def load_torchscript(name: str, image_shape: ImageShape) -> FeatureNetwork:
    """The network of any TorchScript file, a path or an address; it is called `sha256:` and its digest.

    The published Inception file is recognised, wherever it lies. UserError if it is missing, is not TorchScript, or
    does not map such images to features.
    """
    file = fetch(name, FEATURES_FIELD)
    if not file.is_file():
        raise UserError(f"{FEATURES_FIELD}: {name!r} is not a file")
    found = digest(file)
    if found == INCEPTION_SHA256:
        return load_inception(image_shape, str(file), found)
    return ModuleFeatures(_open_script(file, FEATURES_FIELD), f"sha256:{found}", image_shape)


def load_python(name: str, image_shape: ImageShape) -> FeatureNetwork:
    """What `python:package.module:factory` returns when called without arguments: the user's own code is run.

    UserError if there is no such function, or its result is no module from such images to features.
    """
    network = call_factory(name, FEATURES_FIELD)
    if not isinstance(network, nn.Module):
        raise UserError(f"{FEATURES_FIELD}: {name!r} returns {type(network).__name__}; allowed: a torch.nn.Module")
    return ModuleFeatures(network, name, image_shape)


def _open_script(file: Path, field: str) -> Any:
    try:
        return torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: {file} is not a TorchScript module: {reason}") from error
