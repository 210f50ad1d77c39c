"""IS, KID, precision and recall against torchmetrics and brute force."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from sid_ray.evaluation.metrics import inception_score, kernel_distance, precision_recall


class Given(nn.Module):
    """Stands where torchmetrics expects a network: its input is the features."""

    num_features = 2048

    def forward(self, x):
        return x


def features(n, d=2048, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_is_torchmetrics():
    """On one subset of everything, where no choice is random."""
    a, b = features(60), features(60, seed=1, shift=0.3)
    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=60)
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    ours = kernel_distance(a, b, subsets=1, subset_size=1000)
    assert ours.mean == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


@pytest.mark.parametrize("d", [3, 2048])
def test_kid_is_a_loop_over_pairs(d):
    """The unbiased estimate as it is defined, pair by pair."""
    x, y = features(12, d).double(), features(12, d, seed=1, shift=0.3).double()

    def kernel(a, b):
        return float((a @ b / d + 1) ** 3)

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 144
    assert kernel_distance(x.float(), y.float(), subsets=3).mean == pytest.approx(expected, rel=1e-6)


def test_kid_of_equal_distributions_is_about_zero_and_otherwise_not():
    a, b, c = features(400, 16), features(400, 16, seed=1), features(400, 16, seed=2, shift=0.5)
    same, other = kernel_distance(a, b, subset_size=200), kernel_distance(a, c, subset_size=200)
    assert abs(same.mean) < 0.05 < 0.2 < other.mean
    assert kernel_distance(a, c, subset_size=200) == other  # the subsets are seeded


def test_inception_score_is_torchmetrics():
    logits = features(90, 10) * 2
    theirs = InceptionScore(feature=Given(), splits=1)
    theirs.update(logits)
    assert inception_score(logits.softmax(1), splits=1).mean == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_inception_score_of_ten_parts_is_a_loop():
    p = (features(103, 7) * 2).softmax(1).double()
    parts = [p[i * 103 // 10 : (i + 1) * 103 // 10] for i in range(10)]
    scores = [
        math.exp(sum(float((row * (row / part.mean(0)).log()).sum()) for row in part) / len(part)) for part in parts
    ]
    ours = inception_score(p)
    assert ours.mean == pytest.approx(sum(scores) / 10)
    assert ours.deviation == pytest.approx(float(torch.tensor(scores).std(unbiased=False)), rel=1e-4)


def test_inception_score_at_its_ends():
    assert inception_score(torch.full((50, 10), 0.1)).mean == pytest.approx(1)
    assert inception_score(torch.eye(10).repeat(10, 1)).mean == pytest.approx(10)
    parts = inception_score(features(103, 7).softmax(1), splits=10)  # parts of unequal size
    assert 1 < parts.mean < 7 and parts.deviation > 0


def brute_force(generated, real, k):
    def radius(points):
        return torch.stack([(points - p).norm(dim=1).sort().values[k] for p in points])

    def share(points, others, radii):
        return sum(bool(((others - p).norm(dim=1) <= radii).any()) for p in points) / len(points)

    return share(generated, real, radius(real)), share(real, generated, radius(generated))


@pytest.mark.parametrize("d", [2, 2048])
@pytest.mark.parametrize("block", [7, 40, 10_000])
def test_precision_and_recall_are_brute_force(d, block):
    a, b = features(80, d) * 0.7, features(60, d, seed=1, shift=0.2)
    precision, recall = brute_force(a, b, 3)
    ours = precision_recall(a, b, k=3, block=block)
    assert (ours.precision, ours.recall) == (pytest.approx(precision), pytest.approx(recall))
    if d == 2:
        assert 0 < ours.recall < 1 and ours.precision > 0


def test_equal_points_far_from_the_origin_are_equal():
    """Where the expanded square cancels: every real image is generated once, among others that are near."""
    real = features(50, 2048) + 1000
    both = torch.cat([real, features(50, 2048, seed=1) + 1000])
    assert precision_recall(both, real, k=1, block=16).recall == 1.0
    copies = real[:5].repeat(4, 1)  # three neighbours at distance 0, so the radius is 0 as well
    assert precision_recall(copies, copies, block=7) == (1.0, 1.0)
    assert precision_recall(copies + 0.1, copies) == (0.0, 0.0)


def test_precision_and_recall_see_what_is_missing():
    """A generator of one of two modes is precise and forgets half."""
    real = torch.cat([features(200, 4), features(200, 4, seed=1, shift=20.0)])
    ours = precision_recall(features(200, 4, seed=2), real)
    assert ours.precision > 0.8 and 0.35 < ours.recall < 0.5


def test_repeated_images_count_as_neighbours():
    real = torch.zeros(10, 3)
    assert precision_recall(torch.zeros(5, 3), real) == (1.0, 1.0)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(features(3, 4), features(10, 4))
    with pytest.raises(ValueError, match="two images"):
        kernel_distance(features(1, 4), features(10, 4))
    with pytest.raises(ValueError, match="per split"):
        inception_score(torch.full((5, 2), 0.5), splits=10)
    assert math.isfinite(kernel_distance(features(2, 4), features(2, 4, seed=1), subsets=2).mean)
