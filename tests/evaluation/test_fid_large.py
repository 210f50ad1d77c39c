"""FID at Inception's dimension, where covariances may be singular, against three other implementations."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from sid_ray.evaluation.fid import frechet_distance
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics


def features(n, d, seed):
    """Correlated features, as a network's are."""
    rng = np.random.default_rng(seed)
    spectrum = np.linspace(1, 0.1, d)
    return rng.standard_normal((n, d)) * spectrum + rng.standard_normal((n, 8)) @ rng.standard_normal((8, d)) + seed


def ours(a, b):
    reference = ReferenceStatistics(b.mean(0), np.cov(b, rowvar=False), len(b), "")
    return frechet_distance(FeatureStatistics.of(torch.from_numpy(a)), reference)


def from_the_images(a, b):
    """The trace of the square root is the nuclear norm of the product of the centred images: no covariance at all."""
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * overlap


def by_torchmetrics(a, b):
    class Given(nn.Module):
        num_features = a.shape[1]

        def forward(self, x):
            return x

    metric = FrechetInceptionDistance(feature=Given(), input_img_size=(1, 1, 1)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(b), real=True)
    metric.update(torch.from_numpy(a), real=False)
    return float(metric.compute())


def by_scipy(a, b):
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root.real)


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 32), (40, 300, 64), (20, 30, 256)])
def test_all_agree_also_where_covariances_are_singular(n, m, d):
    a, b = features(n, d, 0), features(m, d, 1)
    expected = from_the_images(a, b)
    assert ours(a, b) == pytest.approx(expected, rel=1e-6)
    assert ours(b, a) == pytest.approx(expected, rel=1e-6)
    assert by_torchmetrics(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n", [20, 300])
def test_identical_sets_are_at_0_and_scale_is_squared(n, scale):
    a, b = features(n, 64, 0), features(300, 64, 1)
    size = np.trace(np.cov(a, rowvar=False))
    assert 0 <= ours(scale * a, scale * a) < 1e-7 * scale**2 * size
    assert ours(scale * a, scale * b) == pytest.approx(scale**2 * ours(a, b), rel=1e-6)


def test_inceptions_dimension_with_fewer_images_than_features():
    a, b = features(200, 2048, 0), features(250, 2048, 1)
    assert ours(a, b) == pytest.approx(from_the_images(a, b), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 4000])
def test_inceptions_dimension_against_scipy_and_torchmetrics(n):
    a, b = features(n, 2048, 0), features(3000, 2048, 1)
    fid = ours(a, b)
    assert fid == pytest.approx(from_the_images(a, b), rel=1e-6)
    assert by_torchmetrics(a, b) == pytest.approx(fid, rel=1e-5)
    assert by_scipy(a, b) == pytest.approx(fid, rel=1e-4)
