"""One pass of images feeds every metric, and what does not fit is refused before it starts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sid_ray.errors import UserError
from sid_ray.evaluation.features import DigitsFeatures
from sid_ray.evaluation.fid import image_features, quantise
from sid_ray.evaluation.measure import load_sampler, measure, measure_seeds, prepare, scores, warnings
from sid_ray.evaluation.parts import cut, in_order, run_here
from sid_ray.evaluation.statistics import ReferenceStatistics, load_reference, save_reference
from sid_ray.teachers.digits import digits_images

DIGITS = "builtin:digits"


def test_all_metrics_from_one_pass():
    setup = prepare(DIGITS, "fid,is,kid,pr", "digits", DIGITS, steps=4)
    seen = []
    values = measure(setup, 120, seed=0, batch=50, progress=seen.append)
    assert list(values) == ["FID", "IS", "KID", "precision", "recall"] and seen == [50, 50, 20]
    assert 1 < values["IS"] <= 10 and 0 <= values["precision"] <= 1 and values["FID"] > 0
    images = quantise(load_sampler(DIGITS, 4, "cpu")[0](0)(range(120)))
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


def test_seeds_are_scored_when_complete_in_whatever_order_parts_come():
    setup = prepare(DIGITS, "fid,is", "digits", DIGITS, steps=2)
    parts = cut([3, 4], 30, batch=8)
    results = list(run_here(setup.work, parts))
    assert [len(features) for _, features in results] == [8, 8, 8, 6] * 2
    ordered = dict(measure_seeds(results, setup, 30))
    shuffled = [results[i] for i in (7, 0, 5, 2, 4, 1, 6, 3)]
    assert dict(measure_seeds(shuffled, setup, 30)) == ordered
    assert [seed for seed, _ in measure_seeds(shuffled, setup, 30)] == [4, 3]
    assert ordered[3] == pytest.approx(measure(setup, 30, seed=3, batch=8)) != ordered[4]
    assert [len(f) for f in in_order(parts, shuffled)] == [8, 8, 8, 6] * 2
    assert all(torch.equal(a, b) for a, (_, b) in zip(in_order(parts, shuffled), results, strict=True))


def test_what_spoils_a_number_is_said():
    setup = prepare(DIGITS, "fid", "digits", DIGITS)

    def said(num, *, network="digits", known=1797):
        features = DigitsFeatures()
        features.name = network
        return warnings(setup._replace(features=features, reference=replace(setup.reference, num=known)), num)

    assert said(65) == [] == said(10_000, network="inception")
    (singular,) = said(64)
    assert "64 images for 64 features: their covariance is singular, and FID comes out far too high" in singular
    (biased,) = said(9999, network="inception")
    assert "FID of 9999 images is biased upwards" in biased
    (few,) = said(1000, known=64)
    assert "reference was made of 64 images" in few and "raises FID" in few
    (unknown,) = said(1000, known=0)
    assert "the reference does not say of how many images" in unknown
    assert warnings(prepare(DIGITS, "pr", "digits", DIGITS), 20) == []
    assert "IS is 1" in warnings(prepare(DIGITS, "is", "digits", DIGITS), 9)[0]


def test_fid_of_too_few_images_is_too_high_as_the_warning_says():
    """Real digits against all real digits: FID should be 0 and is not."""
    setup = prepare(DIGITS, "fid", "digits", DIGITS)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    features = image_features(digits_images()[0], setup.features)[order]
    few, some, many = (scores(features[:n], setup)["FID"] for n in (50, 400, 1797))
    assert few > 5 * some > 100 * many
