"""The built-in teacher: its data, its training and the packaged files."""

import json

import pytest
import torch

from sid_ray.diffusion.generator import one_hot
from sid_ray.errors import UserError
from sid_ray.evaluation.features import accuracy, load_features, split_indices, train_digits_features
from sid_ray.evaluation.fid import (
    frechet_distance,
    generator_statistics,
    heun_sampler,
    image_statistics,
    one_step_sampler,
    quantise,
)
from sid_ray.evaluation.statistics import load_reference
from sid_ray.teachers.digits import build_denoiser, digits_images, learning_rate, to_unit_range, train_teacher
from sid_ray.teachers.model_directory import ASSETS, read_model_config
from sid_ray.teachers.sources import load_teacher
from sid_ray.training.teach import teach_digits


@pytest.fixture(scope="module")
def data():
    return digits_images()


def test_data(data):
    images, labels = data
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    levels = images.unique()
    assert len(levels) == 17
    assert (int(levels[0]), int(levels[-1])) == (0, 255)
    assert torch.equal(quantise(to_unit_range(images)), images)


def test_packaged_teacher():
    config, teacher = read_model_config("builtin:digits"), load_teacher("builtin:digits")
    assert config.kind == "teacher"
    assert config.label_names == [str(digit) for digit in range(10)]
    assert "CC BY 4.0" in config.licence
    assert config.provenance["made_by"] == "sid-ray teach digits"
    assert (teacher.image_shape, teacher.label_dim, teacher.augment_dim) == ((1, 8, 8), 10, 9)
    assert sum(p.numel() for p in teacher.parameters()) == 260_497
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.model.map_augment.weight.any()
    assert all(p.isfinite().all() for p in teacher.parameters())


def test_packaged_files_are_small_and_complete():
    files = {file.name: file.stat().st_size for file in (ASSETS / "digits").iterdir()}
    assert set(files) == {"model.safetensors", "config.json", "README.md", "features.safetensors", "reference.npz"}
    assert sum(files.values()) < 2_000_000


@torch.no_grad()
def test_packaged_teacher_leaves_clean_images_alone(data):
    images, labels = to_unit_range(data[0][:200]), one_hot(data[1][:200], 10)
    teacher = load_teacher("builtin:digits")
    denoised = teacher(images, 0.002, labels)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, images, atol=0.01, rtol=0)


@torch.no_grad()
def test_packaged_teacher_denoises(data):
    images, labels = to_unit_range(data[0]), one_hot(data[1], 10)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    denoised = load_teacher("builtin:digits")(images + 0.5 * noise, 0.5, labels)
    assert (denoised - images).square().mean() < 0.4 * 0.5**2


def test_packaged_classifier(data):
    network = load_features("digits", (1, 8, 8))
    _, held_out = split_indices(len(data[0]), 0.2, seed=0)
    assert accuracy(network, data[0], data[1]) > 0.97
    assert accuracy(network, data[0][held_out], data[1][held_out]) > 0.97
    features = network(data[0][:5])
    assert features.shape == (5, network.num_features) == (5, 64)
    assert features.dtype == torch.float32


def test_packaged_reference_is_of_the_packaged_network(data):
    reference = load_reference("builtin:digits")
    assert (reference.num, reference.features) == (1797, "digits")
    assert frechet_distance(image_statistics(data[0], load_features("digits", (1, 8, 8))), reference) == pytest.approx(
        0, abs=1e-4
    )


def test_packaged_teacher_samples_what_it_is_asked_for():
    """FID of 400 images: far below the untrained generator's, and the labels that were asked for."""
    teacher, network, reference = (
        load_teacher("builtin:digits"),
        load_features("digits", (1, 8, 8)),
        load_reference("builtin:digits"),
    )
    many = frechet_distance(generator_statistics(heun_sampler(teacher, 0), 400, network, 400), reference)
    one = frechet_distance(generator_statistics(one_step_sampler(teacher, 2.5, 0), 400, network, 400), reference)
    assert one > 10 * many
    measured = read_model_config("builtin:digits").provenance["measured"]
    assert one == pytest.approx(measured["untrained_generator_fid_2000_images"], rel=0.2)


def test_a_short_training_lowers_the_loss(data):
    losses: list[float] = []
    denoiser = train_teacher(*data, kimg=3, batch=64, report_every=500, report=lambda nimg, loss: losses.append(loss))
    assert losses[-1] < 0.85 * losses[0]
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_training_is_a_function_of_its_seed(data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_teacher(*data, kimg=0.2, batch=64, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = train_teacher(*data, kimg=0.2, batch=64, seed=7).state_dict()
    other = train_teacher(*data, kimg=0.2, batch=64, seed=8).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_learning_rate_rises_and_falls():
    assert learning_rate(0, 1000, 1.0) == 0
    assert learning_rate(20, 1000, 1.0) == 1
    assert learning_rate(1000, 1000, 1.0) == pytest.approx(0)


def test_fresh_augmentation_weights_are_zero():
    assert not build_denoiser().model.map_augment.weight.any()


def test_feature_training_is_a_function_of_its_seed(data):
    (first, _), (again, _) = (train_digits_features(*data, seed=3, epochs=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_teach_writes_a_model_directory_once(tmp_path, data, monkeypatch):
    """Few images everywhere: this is about the files, not about their quality."""
    monkeypatch.setattr("sid_ray.training.teach.digits_images", lambda: (data[0][:200], data[1][:200]))
    monkeypatch.setattr("sid_ray.training.teach.train_digits_features", lambda *a: train_digits_features(*a, epochs=1))
    lines: list[str] = []
    out = tmp_path / "digits"
    settings = {"kimg": 0.128, "fid_seeds": 1, "fid_images": 100}
    measured = teach_digits(out, **settings, progress=lines.append)
    assert measured["teacher_parameters"] == 260_497
    assert lines
    assert sum(p.numel() for p in load_teacher(str(out)).parameters()) == 260_497
    assert load_reference(out / "reference.npz").num == 200
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["settings"]["kimg"] == 0.128
    assert "torch" in provenance["libraries"]
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="not an empty directory"):
        teach_digits(out, **settings)
    teach_digits(out, **settings, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == weights
