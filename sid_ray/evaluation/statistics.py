"""First and second moments of features: accumulated in float64, summed over ranks, kept as references."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.evaluation.feature_network import FeatureNetwork
from sid_ray.storage import fetch
from sid_ray.teachers.model_directory import ASSETS, BUILTIN

FIELD = "evaluation.reference"
KEYS = {"mu", "sigma", "num", "features", "sample"}
"""Arrays of a reference file; EDM's own hold the first two only."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Running sums over `num` feature vectors of dimension d, float64."""

    num: int
    sum: Tensor
    """Sum of the features, (d,)."""
    outer: Tensor
    """Sum of the features' outer products, (d, d)."""

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | str = "cpu") -> FeatureStatistics:
        """The statistics of no features at all: the neutral element of `+`."""
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.outer(zeros))

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features (n, d), on their device. ValueError for another shape."""
        if features.dim() != 2:
            raise ValueError(f"features: expected shape (n, d), got {tuple(features.shape)}")
        features = features.detach().double()
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets of features together. ValueError if their dimensions differ."""
        if self.sum.shape != other.sum.shape:
            raise ValueError(f"feature dimensions differ: {len(self.sum)} and {len(other.sum)}")
        return FeatureStatistics(self.num + other.num, self.sum + other.sum, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """Mean of the features, float64 (d,)."""
        return self.sum / self.num

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divided by num - 1) of the features, float64 (d, d). ValueError if num < 2."""
        if self.num < 2:
            raise ValueError(f"a covariance needs two features or more, got {self.num}")
        return (self.outer - self.num * self.mean.outer(self.mean)) / (self.num - 1)

    def all_reduce(self) -> FeatureStatistics:
        """The sum over all ranks, on the device of the sums; itself outside torch.distributed or on one rank.

        One collective on one flat float64 tensor (1 + d + d^2 numbers), on the GPU for NCCL and on the CPU otherwise.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        d, home = len(self.sum), self.sum.device
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        flat = torch.cat([self.sum.new_tensor([self.num]), self.sum, self.outer.flatten()]).to(device)
        dist.all_reduce(flat)
        flat = flat.to(home)
        return FeatureStatistics(int(flat[0]), flat[1 : 1 + d], flat[1 + d :].reshape(d, d))


@dataclass(frozen=True)
class ReferenceStatistics:
    """What generated images are measured against."""

    mu: NDArray[np.float64]
    """Mean of the features, (d,)."""
    sigma: NDArray[np.float64]
    """Unbiased covariance of the features, (d, d)."""
    num: int
    """Number of images; 0 if the file does not say (EDM's files do not)."""
    features: str
    """Name of the feature network; empty if the file does not say."""
    sample: NDArray[np.float32] | None = None
    """Features (m, d) of m of the images, which KID, precision and recall need; None if the file has none."""


def save_reference(path: Path, reference: ReferenceStatistics) -> None:
    """Write reference statistics as `.npz` without pickle; the file is replaced in one step."""
    arrays: dict[str, Any] = {
        "mu": np.asarray(reference.mu, np.float64),
        "sigma": np.asarray(reference.sigma, np.float64),
        "num": np.asarray(reference.num, np.int64),
        "features": np.asarray(reference.features, np.str_),
    }
    if reference.sample is not None:
        arrays["sample"] = np.asarray(reference.sample, np.float32)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.savez_compressed(file, **arrays)
    aside.replace(path)


def load_reference(path: str | Path) -> ReferenceStatistics:
    """Read reference statistics: an `.npz` file, also at `https://` or `s3://`, or `builtin:digits`.

    Keys `mu` (d,) and `sigma` (d, d) as in EDM's files, and `num` and `features` where present. Pickled arrays
    are never loaded. UserError naming `evaluation.reference` if the file is missing or malformed.
    """
    file = _resolve(str(path))
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an .npz archive")
        found: dict[str, NDArray[np.generic]] = {}
        with np.load(file, allow_pickle=False) as arrays:
            for key in KEYS & set(arrays.files):
                found[key] = arrays[key]
        return _checked(found)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{FIELD}: {file} does not hold reference statistics (an .npz of mu (d,), sigma (d, d), num and "
            f"features, without pickled objects): {error}"
        ) from error


def check_fits(reference: ReferenceStatistics, network: FeatureNetwork, what: str) -> None:
    """UserError, calling the reference `what`, unless it is of this feature network, as far as it says."""
    if len(reference.mu) != network.num_features or reference.features not in ("", network.name):
        raise UserError(
            f"{what} has {len(reference.mu)} features of {reference.features or 'an unnamed network'}, the feature "
            f"network {network.name} has {network.num_features}"
        )


def _resolve(path: str) -> Path:
    builtin = sorted(p.parent.name for p in ASSETS.glob("*/reference.npz"))
    allowed = f"allowed: an .npz file or its address, or one of {', '.join(BUILTIN + name for name in builtin)}"
    if path.startswith(BUILTIN):
        if path.removeprefix(BUILTIN) not in builtin:
            raise UserError(f"{FIELD}: there is no built-in reference {path!r}; {allowed}")
        return ASSETS / path.removeprefix(BUILTIN) / "reference.npz"
    file = fetch(path, FIELD)
    if not file.is_file():
        raise UserError(f"{FIELD}: {path!r} is not a file; {allowed}")
    return file


def _checked(arrays: dict[str, NDArray[np.generic]]) -> ReferenceStatistics:
    """ValueError unless the arrays are finite moments of one dimension."""
    if missing := {"mu", "sigma"} - arrays.keys():
        raise ValueError(f"{' and '.join(sorted(missing))} missing")
    mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu has shape {mu.shape} and sigma {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma is not finite")
    if not np.allclose(sigma, sigma.T, rtol=1e-6, atol=1e-6 * float(np.abs(sigma).max(initial=0.0))):
        raise ValueError("sigma is not symmetric")
    sample = arrays["sample"].astype(np.float32) if "sample" in arrays else None
    if sample is not None and (sample.ndim != 2 or sample.shape[1] != len(mu) or not np.isfinite(sample).all()):
        raise ValueError(f"sample has shape {sample.shape}, or is not finite")
    return ReferenceStatistics(mu, sigma, int(arrays.get("num", np.int64(0))), str(arrays.get("features", "")), sample)
