"""Geometric augmentation: what the labels say is what was done, and the filters are the wavelet's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sid_ray.diffusion.augment import (
    LABELS,
    SYM6,
    Transforms,
    apply_transforms,
    augment,
    draw_transforms,
    resample,
    warp,
)


def blob(size=32, x=0.0, y=0.0, width=0.15, tall=None):
    """A Gaussian spot at (x, y) of [-1, 1]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    vertical = (-((axis - y) ** 2) / (2 * (tall or width) ** 2)).exp()
    return (vertical[:, None] * (-((axis - x) ** 2) / (2 * width**2)).exp()[None])[None, None]


def moments(image):
    """Centre (x, y) and standard deviations of an image of one spot."""
    size = image.shape[-1]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    mass = image[0, 0] / image.sum()
    x, y = (mass.sum(0) * axis).sum(), (mass.sum(1) * axis).sum()
    return (
        x.item(),
        y.item(),
        *((m * (axis - c) ** 2).sum().sqrt().item() for m, c in ((mass.sum(0), x), (mass.sum(1), y))),
    )


def test_probability_zero_is_the_identity():
    images = torch.randn(5, 3, 8, 8)
    out, labels = augment(images, 0.0)
    assert out is images and labels.shape == (5, 9) and not labels.any()


def test_the_filter_is_an_orthonormal_wavelet_with_six_vanishing_moments():
    h = torch.tensor(SYM6, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-10)
    for shift in range(6):
        overlap = (h[2 * shift :] * h[: len(h) - 2 * shift]).sum().item()
        assert overlap == pytest.approx(float(shift == 0), abs=1e-10)
    k = torch.arange(12, dtype=torch.float64)
    for power in range(6):
        assert abs(((-1) ** k * k**power * h).sum().item()) < 1e-5 * max(1, 11**power)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_down_undoes_up(size):
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    fine = resample(images, up=True)
    assert fine.shape == (2, 3, 2 * size, 2 * size)
    back = resample(fine, up=False)
    assert back.shape == images.shape
    if size == 32:
        torch.testing.assert_close(back[..., 8:-8, 8:-8], images[..., 8:-8, 8:-8], rtol=0, atol=1e-10)
    constant = torch.full((1, 1, size, size), 0.7, dtype=torch.float64)
    torch.testing.assert_close(resample(resample(constant, True), False), constant)


def test_the_identity_warp_keeps_a_smooth_image_where_it_is():
    image = blob(x=0.2, y=-0.3)
    torch.testing.assert_close(warp(image, torch.eye(2, 3)[None]), image, rtol=0, atol=2e-3)


def one_transform(**values):
    """The transformation with these labels, by drawing until chance provides each kind alone."""
    name, value = next(iter(values.items()))
    zero = torch.zeros(1)
    from sid_ray.diffusion.augment import _rotate, _shift, _stretch

    inverse = {
        "scale": lambda: _stretch(zero.add(value).exp2(), zero.add(value).exp2()),
        "rotate": lambda: _rotate(zero + value),
        "shift_x": lambda: _shift(zero - 2 * value, zero),
    }[name]()
    return Transforms(zero > 0, zero > 0, inverse[:, :2], torch.ones(1, 9))


def test_scale_grows_shift_goes_right_and_rotation_turns():
    start = blob(width=0.15)
    assert moments(apply_transforms(start, one_transform(scale=1.0)))[2] == pytest.approx(0.30, rel=0.03)
    assert moments(apply_transforms(start, one_transform(shift_x=0.125)))[0] == pytest.approx(0.25, abs=0.01)
    x, y, *_ = moments(apply_transforms(blob(x=0.4), one_transform(rotate=math.pi / 2)))
    assert abs(x) < 0.02 and abs(y) == pytest.approx(0.4, abs=0.02)


def test_labels_say_what_was_done():
    torch.manual_seed(0)
    t = draw_transforms(4000, 0.12)
    labels = dict(zip(LABELS, t.labels.T, strict=True))
    assert torch.equal(labels["xflip"] > 0, t.xflip) and torch.equal(labels["yflip"] > 0, t.yflip)
    assert t.xflip.float().mean() == pytest.approx(0.5, abs=0.03)
    assert t.yflip.float().mean() == pytest.approx(0.06, abs=0.015)
    for name in ("scale", "rotate_sin", "aniso_cos", "shift_x", "shift_y"):
        assert (labels[name] != 0).float().mean() == pytest.approx(0.12, abs=0.02), name
    for name in ("scale", "shift_x"):
        assert labels[name][labels[name] != 0].std() == pytest.approx(1, rel=0.1), name
    # area of the inverse map: scaling by 2^(w / 5) makes it 4^-(w / 5); nothing else changes areas
    area = torch.det(t.inverse[:, :, :2])
    torch.testing.assert_close(area, 4.0 ** -(0.2 * labels["scale"]), rtol=1e-4, atol=1e-5)
    plain = (t.labels[:, 2:] == 0).all(dim=1)
    torch.testing.assert_close(t.inverse[plain], torch.eye(2, 3).expand(int(plain.sum()), 2, 3))


def test_an_image_that_only_flips_is_flipped_exactly():
    torch.manual_seed(1)
    images = torch.randn(200, 1, 8, 8)
    t = draw_transforms(200, 0.12)
    out = apply_transforms(images, t)
    only = (t.labels[:, 1:] == 0).all(dim=1)
    assert 0 < (only & t.xflip).sum() < 200
    assert torch.equal(out[only & t.xflip], images[only & t.xflip].flip(3))
    assert torch.equal(out[only & ~t.xflip], images[only & ~t.xflip])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.sampled_from([3, 4, 8, 17, 32]))
def test_any_draw_gives_finite_images_of_the_same_range(seed, probability, size):
    torch.manual_seed(seed)
    images = torch.rand(4, 1, size, size) * 2 - 1
    out, labels = augment(images, probability)
    assert out.shape == images.shape and out.isfinite().all() and labels.isfinite().all()
    assert out.abs().max() < 3  # the filters overshoot a little


def test_images_must_be_square():
    with pytest.raises(ValueError, match="square"):
        augment(torch.zeros(1, 1, 4, 6), 0.1)
