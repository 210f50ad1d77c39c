"""FID, its statistics and its reference files."""

import functools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from sid_ray.errors import UserError
from sid_ray.evaluation.features import DigitsFeatures, FeatureNetwork, load_features
from sid_ray.evaluation.fid import frechet_distance, generator_statistics, image_statistics, one_step_sampler, quantise
from sid_ray.evaluation.statistics import FeatureStatistics, ReferenceStatistics, load_reference, save_reference
from sid_ray.teachers.digits import build_denoiser, digits_images


class Pixels(FeatureNetwork):
    """The first pixels as features: exact integers, so that sums do not depend on their order."""

    name = "pixels"
    num_features = 3

    def forward(self, images):
        return images.flatten(1)[:, :3].float()


def reference_of(statistics):
    return ReferenceStatistics(statistics.mean.numpy(), statistics.covariance.numpy(), statistics.num, "test")


def scipy_fid(a, b):
    """The formula as the FID paper's own code evaluates it, with a matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sigma_a + sigma_b - 2 * root)


@pytest.fixture(scope="module")
def digits_features():
    """A digits network with random weights: real digits, real architecture, no packaged file needed."""
    torch.manual_seed(0)
    return DigitsFeatures().eval().requires_grad_(False)


def test_fid_is_scipys_on_random_features():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(500, 24, generator=rng) @ torch.randn(24, 24, generator=rng)
    b = torch.randn(400, 24, generator=rng) @ torch.randn(24, 24, generator=rng) + 0.5
    fid = frechet_distance(FeatureStatistics.of(a), reference_of(FeatureStatistics.of(b)))
    assert fid == pytest.approx(scipy_fid(a, b), rel=1e-6)


def test_fid_is_scipys_on_digits():
    network = load_features("digits", (1, 8, 8))
    images, labels = digits_images()
    low, high = images[labels < 5], images[labels >= 5]
    fid = frechet_distance(image_statistics(low, network), reference_of(image_statistics(high, network)))
    with torch.no_grad():
        assert fid == pytest.approx(scipy_fid(network(low), network(high)), rel=1e-6)


def test_fid_of_identical_statistics_is_zero():
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    statistics = FeatureStatistics.of(features)
    assert frechet_distance(statistics, reference_of(statistics)) == pytest.approx(0.0, abs=1e-8)


def test_the_reference_needs_no_count():
    a, b = (FeatureStatistics.of(torch.randn(90, 5, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    counted = reference_of(b)
    uncounted = ReferenceStatistics(counted.mu, counted.sigma, 0, "")
    assert frechet_distance(a, uncounted) == pytest.approx(frechet_distance(a, counted), rel=1e-9)


def test_statistics_are_numpys():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    statistics = FeatureStatistics.of(features)
    assert statistics.sum.dtype == statistics.outer.dtype == torch.float64
    np.testing.assert_allclose(statistics.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_parts_sum_to_the_whole(sizes, seed):
    features = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(seed))
    total = sum((FeatureStatistics.of(part) for part in features.split(sizes)), FeatureStatistics.zeros(4))
    whole = FeatureStatistics.of(features)
    assert total.num == whole.num
    torch.testing.assert_close(total.sum, whole.sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.outer, whole.outer, rtol=1e-12, atol=1e-12)


@given(num=st.integers(1, 60), world=st.integers(1, 70), batch=st.integers(1, 17))
@settings(max_examples=40, deadline=None)
def test_any_division_over_ranks_gives_the_same_statistics(num, world, batch):
    def sample(numbers):
        return torch.stack([torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(n)) for n in numbers])

    parts = [generator_statistics(sample, num, Pixels(), batch, rank, world) for rank in range(world)]
    total = functools.reduce(lambda a, b: a + b, parts)
    whole = generator_statistics(sample, num, Pixels(), num)
    assert total.num == whole.num == num
    assert torch.equal(total.sum, whole.sum)
    assert torch.equal(total.outer, whole.outer)


def test_one_step_statistics_do_not_depend_on_batch_or_rank(digits_features):
    torch.manual_seed(0)
    sample = one_step_sampler(build_denoiser().eval(), 2.5, seed=3)
    whole = generator_statistics(sample, 40, digits_features, batch=40)
    parts = [generator_statistics(sample, 40, digits_features, 7, rank, 3) for rank in range(3)]
    total = parts[0] + parts[1] + parts[2]
    assert total.num == 40
    torch.testing.assert_close(total.outer, whole.outer, rtol=1e-3, atol=1e-3)


def test_quantisation_is_edms():
    x = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    assert quantise(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(grey.float() / 127.5 - 1), grey)


def test_non_finite_images_give_nan_and_not_a_number_that_looks_fine():
    def sample(numbers):
        images = torch.zeros(len(numbers), 1, 2, 2)
        images[0, 0, 1, 1] = math.inf
        return images

    statistics = generator_statistics(sample, 8, Pixels(), batch=8)
    assert math.isnan(frechet_distance(statistics, reference_of(FeatureStatistics.of(torch.randn(9, 3)))))


def test_train_mode_is_refused():
    with pytest.raises(ValueError, match="train mode"):
        one_step_sampler(build_denoiser().train(), 2.5, seed=0)


def test_dimensions_must_agree():
    with pytest.raises(UserError, match=r"evaluation\.reference"):
        frechet_distance(FeatureStatistics.of(torch.randn(9, 3)), reference_of(FeatureStatistics.of(torch.randn(9, 4))))
    with pytest.raises(ValueError, match="dimensions"):
        FeatureStatistics.zeros(3) + FeatureStatistics.zeros(4)
    with pytest.raises(ValueError, match="shape"):
        FeatureStatistics.of(torch.zeros(3))


def test_unknown_features_are_refused():
    with pytest.raises(UserError, match=r"evaluation\.features.*digits"):
        load_features("nonsense", (1, 8, 8))


def test_reference_round_trip(tmp_path):
    statistics = FeatureStatistics.of(torch.randn(30, 6))
    path = tmp_path / "reference.npz"
    mu, sigma = statistics.mean.numpy(), statistics.covariance.numpy()
    save_reference(path, ReferenceStatistics(mu, sigma, 30, "digits"))
    found = load_reference(path)
    assert (found.num, found.features) == (30, "digits")
    assert np.array_equal(found.mu, statistics.mean.numpy())
    assert np.array_equal(found.sigma, statistics.covariance.numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


def test_edms_reference_files_have_no_count(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(3), sigma=np.eye(3))
    found = load_reference(str(tmp_path / "edm.npz"))
    assert (found.num, found.features) == (0, "")


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.array([1.0, None], dtype=object), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.array({"a": 1}, dtype=object)},
        {"mu": np.zeros(2)},
        {"mu": np.zeros(2), "sigma": np.eye(3)},
        {"mu": np.zeros((2, 2)), "sigma": np.eye(2)},
        {"mu": np.array([0.0, np.nan]), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])},
        {"mu": np.array(["a", "b"]), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "num": np.array([1, 2])},
    ],
    ids=["pickled", "pickled name", "no sigma", "sizes", "mu 2-d", "nan", "asymmetric", "text", "num"],
)
def test_malformed_references_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=r"evaluation\.reference"):
        load_reference(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.reference"):
        load_reference(tmp_path / "bad.npz")


@pytest.mark.parametrize("path", ["missing.npz", "builtin:nothing", "builtin:../digits"])
def test_missing_references_are_refused(path):
    with pytest.raises(UserError, match=r"evaluation\.reference.*builtin:digits"):
        load_reference(path)


def _reduce_on(rank, world, store, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    features = torch.arange(20, dtype=torch.float32).reshape(10, 2)
    total = FeatureStatistics.of(features[rank::world]).all_reduce()
    torch.save({"num": total.num, "sum": total.sum, "outer": total.outer}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_reduce_over_gloo(tmp_path):
    mp.spawn(_reduce_on, (2, tmp_path / "store", tmp_path), nprocs=2)
    whole = FeatureStatistics.of(torch.arange(20, dtype=torch.float32).reshape(10, 2))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["num"] == 10
        assert torch.equal(found["sum"], whole.sum)
        assert torch.equal(found["outer"], whole.outer)


def test_all_reduce_alone_is_the_identity():
    statistics = FeatureStatistics.of(torch.randn(4, 2))
    assert statistics.all_reduce() is statistics


def test_pixels_are_the_images_themselves():
    """FID of the pixels is the Frechet distance of the images' own Gaussians, here of two with a known distance."""
    network = load_features("pixels", (2, 1, 1))
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(50_000, 2, 1, 1, generator=rng) * 0.2
    features = network(quantise(points))
    assert features.shape == (50_000, 2)
    torch.testing.assert_close(features, points.flatten(1), rtol=0, atol=0.5 / 127.5 + 1e-6)
    wide = FeatureStatistics.of(network(quantise(points * 1.5 + 0.1)))
    statistics = FeatureStatistics.of(features)
    reference = ReferenceStatistics(statistics.mean.numpy(), statistics.covariance.numpy(), 50_000, "pixels")
    # |mean difference|^2 + sum over dimensions of (difference of standard deviations)^2
    assert frechet_distance(wide, reference) == pytest.approx(2 * 0.1**2 + 2 * 0.1**2, rel=0.03)


def test_points_see_modes_where_coordinates_do_not():
    """Two modes at +-0.5 and one Gaussian with the same mean and covariance: the waves tell them apart."""
    rng = torch.Generator().manual_seed(0)
    narrow = 0.1 * torch.randn(20_000, 2, 1, 1, generator=rng)
    signs = torch.randint(2, (20_000, 2, 1, 1), generator=rng) * 2 - 1
    modes, blob = narrow + 0.5 * signs, torch.randn(20_000, 2, 1, 1, generator=rng) * (0.01 + 0.25) ** 0.5
    blob = blob.clamp(-1, 1)
    for name, apart in (("pixels", False), ("points", True)):
        network = load_features(name, (2, 1, 1))
        halves = [FeatureStatistics.of(network(quantise(x))) for x in (modes[::2], modes[1::2], blob)]
        reference = ReferenceStatistics(halves[0].mean.numpy(), halves[0].covariance.numpy(), 10_000, name)
        same, other = (frechet_distance(s, reference) for s in halves[1:])
        assert (other > 20 * same and other > 1) == apart, (name, same, other)
    with pytest.raises(UserError, match="looks at points"):
        load_features("points", (1, 8, 8))
