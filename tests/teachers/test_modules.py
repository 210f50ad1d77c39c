"""Modules of the user's own: what is asked of them, and what a UserError says when they lack it."""

import copy

import pytest
import torch
from torch import nn

from sid_ray.config import parse_config
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import ModelConfig, save_model
from sid_ray.teachers.modules import Handed, check_denoiser, check_trainable, config_of, fingerprint, load_python
from sid_ray.teachers.sources import load_denoiser, load_generator, load_teacher
from sid_ray.teachers.start import Start
from tests.own_networks import LabelledMLP, Plain, student, teacher

STUDENT, TEACHER = "python:tests.own_networks:student", "python:tests.own_networks:teacher"


def answering(answer):
    """A network that answers in its own way."""

    class Answering(Plain):
        def forward(self, x, sigma, class_labels=None):
            return answer(x, sigma)

    return Answering()


def test_a_module_needs_no_base_class():
    plain = Plain()
    assert check_denoiser(plain, "x") is plain
    check_trainable(plain, "x", "bf16")
    check_trainable(LabelledMLP(), "x", "bf16")


@pytest.mark.parametrize("name", ["image_shape", "label_dim", "sigma_data", "augment_dim"])
def test_a_missing_attribute_is_named(name):
    plain = Plain()
    delattr(plain, name)
    with pytest.raises(UserError, match=rf"^teacher: Plain has no attribute '{name}'"):
        check_denoiser(plain, "teacher")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (3, "int is not a torch.nn.Module"),
        (Plain(image_shape=(2, 1)), r"image_shape is \(2, 1\)"),
        (Plain(image_shape=(0, 1, 1)), "image_shape"),
        (Plain(label_dim=None), "label_dim is None"),
        (Plain(augment_dim=-1), "augment_dim is -1"),
        (Plain(sigma_data=0), "sigma_data is 0"),
        (answering(lambda x, sigma: x[:1]), r"gives \(1, 2, 1, 1\)"),
        (answering(lambda x, sigma: x.double()), "torch.float64"),
        (answering(lambda x, sigma: x / 0), "not finite"),
        (answering(lambda x, sigma: None), "gives NoneType"),
        (answering(lambda x, sigma: x + sigma), "fails: .*|gives"),
        (answering(lambda x, sigma: undefined), "NameError"),  # noqa: F821
    ],
)
def test_what_is_no_denoiser_is_refused(module, words):
    with pytest.raises(UserError, match=words):
        check_denoiser(module, "teacher")


def test_what_cannot_be_trained_is_refused():
    tied, unused, normalised = Plain(), Plain(), Plain()
    tied.also = tied.linear
    unused.other = nn.Linear(1, 1)
    normalised.linear = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    normalised.linear.weight = torch.ones(1)
    for module, words in (
        (teacher(), "no parameters"),
        (tied, "also.bias is another one too"),
        (unused, "other.weight takes no part"),
        (normalised, "buffer linear.1.running_mean changes"),
    ):
        with pytest.raises(UserError, match=words):
            check_trainable(module, "init.student")


def test_a_network_that_does_not_follow_the_precision_is_refused_for_bf16():
    class Float(Plain):
        def forward(self, x, sigma, class_labels=None):
            return self.linear(x.flatten(1)).view_as(x)

    check_trainable(Float(), "init.student")
    with pytest.raises(UserError, match=r"init.student: engine.precision bf16: Float"):
        check_trainable(Float(), "init.student", "bf16")


def test_checks_leave_the_module_as_it_was():
    network = student().train()
    before = copy.deepcopy(network.state_dict())
    handed = Handed.of(teacher(), network)
    check_trainable(handed.student, "student")
    assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    with torch.no_grad():
        network.shift += 1
    assert not torch.equal(handed.student.shift, network.shift)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("python:tests.own_networks", "allowed: python:package.module:factory"),
        ("python:tests.no_such:x", "ModuleNotFoundError"),
        ("python:tests.own_networks:no_such", "has no 'no_such'"),
        ("python:tests.own_networks:broken", "RuntimeError: no weights here"),
        ("python:tests.own_networks:not_a_module", "int is not a torch.nn.Module"),
    ],
)
def test_bad_factories_are_refused(path, words):
    with pytest.raises(UserError, match=rf"teacher.path: .*{words}"):
        load_denoiser(path, "teacher.path")


def test_a_factory_is_a_source_like_any_other():
    denoiser = load_teacher(STUDENT)
    assert isinstance(denoiser, LabelledMLP) and not denoiser.training
    _, config = load_python(STUDENT, "x")
    assert config.skeleton().image_shape == (1, 2, 2) and config.skeleton().label_dim == 2
    assert config.network["factory"] == STUDENT and config.network["class_name"] == "LabelledMLP"


def test_a_generator_is_loaded_into_the_users_module_and_no_code_is_imported(tmp_path):
    network = student()
    config = config_of(network, "python:tests.own_networks:broken")
    config = config.model_copy(update={"kind": "generator", "sigma_init": 2.5})
    save_model(tmp_path, network.state_dict(), config, "")
    with pytest.raises(UserError, match=r"code of yours; nothing is imported .*load_generator\(path, network=...\)"):
        load_generator(str(tmp_path))
    other = LabelledMLP()
    generator = load_generator(str(tmp_path), network=other)
    assert generator.denoiser is other and torch.equal(other.enter.weight, network.enter.weight)
    assert generator.sample(3, class_labels=[0, 1, 0]).shape == (3, 1, 2, 2)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_generator(str(tmp_path), network=Plain())


def test_fingerprints_tell_states_apart():
    first, second = teacher(), teacher()
    assert fingerprint(first) == fingerprint(second)
    second.means[0, 0] += 1e-12
    assert fingerprint(first) != fingerprint(second)
    fields = Handed.of(first, student()).fields()
    assert (
        fields["teacher.path"].startswith("module:GaussianMixture-") and fields["init.student"] == "module:LabelledMLP"
    )


def start(teacher_path, handed=Handed(), **init):
    config = parse_config({"teacher": {"path": teacher_path}, "init": init})
    return Start(config, teacher_path, handed)


def test_a_teacher_without_parameters_needs_a_student():
    with pytest.raises(UserError, match=r"init.student: is required, because the teacher .* has no parameters"):
        start(TEACHER).check()
    assert isinstance(start(TEACHER, student=STUDENT).check(), LabelledMLP)


def test_a_teacher_with_parameters_is_its_own_student():
    network = start(STUDENT)
    assert not network.needs_fit and isinstance(network.check(), LabelledMLP)
    assert start(TEACHER, student=STUDENT).needs_fit and not start(TEACHER, student=STUDENT, fit_kimg=0).needs_fit


def test_teacher_and_student_must_fit_together():
    with pytest.raises(UserError, match=r"init.student: its image_shape is \(1, 2, 2\), the teacher's \(1, 8, 8\)"):
        start("builtin:digits", student=STUDENT).check()
    plain = Handed.of(Plain(image_shape=(1, 2, 1)), None)
    with pytest.raises(UserError, match="image_shape"):
        start("module:Plain", plain, student=STUDENT).check()


def test_a_module_that_is_not_there_is_asked_for():
    with pytest.raises(UserError, match=r"teacher.path: 'module:Plain' was handed over .*distill\(..., teacher=...\)"):
        start("module:Plain").check()
    with pytest.raises(UserError, match=r"init.student: .* student=...\)"):
        start(TEACHER, student="module:Plain").check()


def test_warm_starts_of_own_networks(tmp_path):
    """A generator of a former run is where the next one starts; one of another class is refused."""
    trained = student()
    with torch.no_grad():
        trained.leave.weight += 1
    save_model(tmp_path / "own", trained.state_dict(), config_of(trained), "")
    warm = start(TEACHER, student=STUDENT, generator=str(tmp_path / "own"))
    warm.check()
    assert warm.needs_fit  # the fake score still starts from the student
    generator, fake_score = warm.role("generator", student()), warm.role("fake_score", student())
    assert torch.equal(generator.leave.weight, trained.leave.weight)
    assert torch.equal(fake_score.leave.weight, student().leave.weight)
    other = ModelConfig(kind="teacher", network=config_of(trained).network | {"class_name": "Other"})
    save_model(tmp_path / "other", trained.state_dict(), other, "")
    with pytest.raises(UserError, match=r"init.fake_score: .* is not of the student's architecture"):
        start(TEACHER, student=STUDENT, fake_score=str(tmp_path / "other")).check()


def test_dropout_is_set_on_networks_that_derive_from_denoiser():
    path = "python:tests.own_networks:Plain"
    config = parse_config({"teacher": {"path": path}, "method": {"dropout": 0.2}})
    with pytest.raises(UserError, match=r"method.dropout: .* derives from sid_ray.Denoiser"):
        Start(config, path).check()
    network = student()
    network.set_dropout(0.4)
    assert network.dropout.p == 0.4


def test_names_of_code_are_no_paths():
    from sid_ray.training.opening import absolute_paths

    given = {"teacher": {"path": TEACHER}, "init": {"student": "module:Plain"}, "evaluation": {"reference": "teacher"}}
    config = absolute_paths(parse_config(given))
    assert (config.teacher.path, config.init.student, config.evaluation.reference) == (
        TEACHER,
        "module:Plain",
        "teacher",
    )
