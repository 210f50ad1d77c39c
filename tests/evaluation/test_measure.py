"""One pass of images feeds every metric, and what does not fit is refused before it starts."""

import math

import numpy as np
import pytest

from sid_ray.errors import UserError
from sid_ray.evaluation.fid import image_features, quantise
from sid_ray.evaluation.measure import measure, prepare, scores, too_few
from sid_ray.evaluation.statistics import ReferenceStatistics, load_reference, save_reference
from sid_ray.teachers.digits import digits_images

DIGITS = "builtin:digits"


def test_all_metrics_from_one_pass():
    setup = prepare(DIGITS, "fid,is,kid,pr", "digits", DIGITS, steps=4)
    seen = []
    values = measure(setup, 120, seed=0, batch=50, progress=seen.append)
    assert list(values) == ["FID", "IS", "KID", "precision", "recall"] and seen == [50, 50, 20]
    assert 1 < values["IS"] <= 10 and 0 <= values["precision"] <= 1 and values["FID"] > 0
    images = quantise(setup.sampler(0)(range(120)))
    again = scores(image_features(images, setup.features), setup)
    assert again == pytest.approx(values, rel=1e-4)


def test_real_digits_are_perfect():
    setup = prepare(DIGITS, "fid,is,kid,pr", "digits", DIGITS)
    values = scores(image_features(digits_images()[0], setup.features), setup)
    assert values["FID"] == pytest.approx(0, abs=1e-4)
    # Subsets of the same images share some, which the unbiased estimate takes for more than equal.
    assert values["KID"] < 0
    assert values["precision"] == 1 == values["recall"] and values["IS"] > 8


def test_half_of_the_digits_lose_recall_and_nothing_else():
    setup = prepare(DIGITS, "pr,is", "digits", DIGITS)
    images, labels = digits_images()
    values = scores(image_features(images[labels < 5], setup.features), setup)
    assert values["precision"] == 1 and values["recall"] < 0.75 and values["IS"] < 6


def test_the_packaged_reference_is_that_of_the_data():
    reference = load_reference(DIGITS)
    setup = prepare(DIGITS, "fid", "digits", DIGITS)
    features = image_features(digits_images()[0], setup.features).numpy()
    np.testing.assert_allclose(reference.sample, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.mu, features.mean(0), rtol=1e-4, atol=1e-5)


def test_an_image_that_is_not_finite_spoils_every_number():
    setup = prepare(DIGITS, "fid,kid", "digits", DIGITS)
    features = image_features(digits_images()[0][:50], setup.features)
    features[3] = math.nan
    assert all(math.isnan(v) for v in scores(features, setup).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((DIGITS, "fid,fud", "digits", DIGITS), "'fud' is not allowed; allowed: fid, is, kid, pr"),
        ((DIGITS, "", "digits", DIGITS), "--metrics: '' is not allowed"),
        ((DIGITS, "fid", "digits", "OTHER-DETECTOR"), "has 64 features of inception"),
        ((DIGITS, "fid", "digits", "OTHER-DIMENSION"), "has 5 features"),
        ((DIGITS, "fid,kid", "digits", "MOMENTS"), "'kid' needs a reference with features"),
        (("nowhere", "fid", "digits", DIGITS), "not a model directory"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words, tmp_path):
    moments = {"OTHER-DETECTOR": (64, "inception"), "OTHER-DIMENSION": (5, ""), "MOMENTS": (64, "")}
    for name, (d, network) in moments.items():
        save_reference(tmp_path / name, ReferenceStatistics(np.zeros(d), np.eye(d), 100, network))
    *rest, reference = arguments
    with pytest.raises(UserError, match=words):
        prepare(*rest, str(tmp_path / reference) if reference in moments else reference)


def test_too_few_images_for_a_covariance_are_warned_of():
    setup = prepare(DIGITS, "fid", "digits", DIGITS)
    assert "singular" in (too_few(setup, 64) or "") and too_few(setup, 65) is None
