"""Feature networks from files, addresses and the user's code, with a stand-in for the published detector."""

import sys

import pytest
import torch
from torch import Tensor, nn

from sid_ray.errors import UserError
from sid_ray.evaluation import detectors
from sid_ray.evaluation.detectors import INCEPTION_SHA256, load_inception
from sid_ray.evaluation.features import load_features
from sid_ray.storage import digest

CIFAR = (3, 32, 32)


class StandIn(nn.Module):
    """The published detector's interface: features, or the softmax of the last layer with or without its bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Conv2d(3, 16, 3)
        self.output = nn.Linear(16, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = self.layers((img.to(torch.float32) - 128) / 128).relu().mean(dim=[2, 3])
        if return_features:
            return features
        if no_output_bias:
            return nn.functional.linear(features, self.output.weight).softmax(dim=1)
        return self.output(features).softmax(dim=1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The stand-in's file."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("detector") / "inception-2015-12-05.pt"
    torch.jit.script(StandIn()).save(str(file))
    return file


@pytest.fixture
def published(detector, monkeypatch):
    """The stand-in, as if it were the published file."""
    monkeypatch.setattr(detectors, "INCEPTION_SHA256", digest(detector))
    return load_inception(CIFAR, str(detector), digest(detector))


def images(n=6, channels=3):
    return torch.randint(0, 256, (n, channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_inception_gives_features_and_the_probabilities_of_a_second_pass(detector, published):
    raw = torch.jit.load(str(detector))
    features = published(images())
    assert published.name == "inception" and features.shape == (6, published.num_features) == (6, 16)
    assert torch.equal(features, raw(images(), return_features=True))
    torch.testing.assert_close(published.probabilities(features), raw(images(), no_output_bias=True))
    assert not torch.allclose(published.probabilities(features), raw(images()))  # the bias would matter


def test_grey_images_become_three_equal_channels(published):
    grey = images(channels=1)
    assert torch.equal(published(grey), published(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(UserError, match="2 channels"):
        load_inception((2, 8, 8), "unread")


def test_the_published_file_is_known_wherever_it_lies(detector, published):
    found = load_features(str(detector), CIFAR)
    assert found.name == "inception" and found.probabilities(found(images())) is not None
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_another_file_is_named_by_its_digest(detector):
    found = load_features(str(detector), CIFAR)
    assert found.name == f"sha256:{digest(detector)}"
    assert torch.equal(found(images()), torch.jit.load(str(detector))(images()))
    assert found.num_features == 5 and found.probabilities(found(images())) is None


def test_a_detector_from_the_web_is_checked_and_kept(web, detector, monkeypatch):
    folder, address = web
    (folder / detector.name).write_bytes(detector.read_bytes())
    load_inception(CIFAR, f"{address}/{detector.name}", digest(detector))
    (folder / detector.name).unlink()
    assert load_inception(CIFAR, f"{address}/{detector.name}", digest(detector)).num_features == 16


@pytest.mark.parametrize("what", ["absent", "other", "unreachable"])
def test_a_detector_that_is_not_the_published_one_is_never_opened(what, web, tmp_path, detector, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened"))
    where = {"absent": str(tmp_path / "none.pt"), "other": str(detector), "unreachable": f"{web[1]}/none.pt"}[what]
    with pytest.raises(UserError) as error:
        load_features("inception", CIFAR, where)
    for words in ("evaluation.detector", where, "inception-2015-12-05.pt", INCEPTION_SHA256, "https://nvlabs-fi-cdn"):
        assert words in str(error.value)


def test_files_that_are_no_torchscript_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(3)}, tmp_path / "tensors.pt")
    for name in ("text.pt", "tensors.pt"):
        with pytest.raises(UserError, match=rf"evaluation\.features: .*{name} is not a TorchScript module"):
            load_features(str(tmp_path / name), CIFAR)
    with pytest.raises(UserError, match="is not a file"):
        load_features(str(tmp_path / "none.pt"), CIFAR)


def test_a_module_must_give_a_row_per_image(tmp_path, detector):
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "relu.pt"))
    with pytest.raises(UserError, match=r"gives \(2, 3, 32, 32\) for 2 images; allowed: features of shape \(2, d\)"):
        load_features(str(tmp_path / "relu.pt"), CIFAR)
    with pytest.raises(UserError, match="does not take uint8 images of 1 x 8 x 8"):
        load_features(str(detector), (1, 8, 8))


def test_digits_look_at_digits_only():
    with pytest.raises(UserError, match=r"'digits' looks at images of 1 x 8 x 8 .* these are 3 x 32 x 32"):
        load_features("digits", CIFAR)


OWN = """
import torch
from sid_ray.evaluation.feature_network import FeatureNetwork

class Means(torch.nn.Module):
    def forward(self, images):
        return images.double().mean(dim=(2, 3))

class Classes(FeatureNetwork):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))
    def probabilities(self, features):
        return features.softmax(dim=1)

def broken():
    raise ValueError("no weights here")

number = 3
text = lambda: "text"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, `own_features`."""
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_features", None)


def test_the_users_own_code(own):
    found = load_features("python:own_features:Means", CIFAR)
    features = found(images())
    assert found.name == "python:own_features:Means" and found.num_features == 3 and features.dtype == torch.float32
    torch.testing.assert_close(features, images().float().mean(dim=(2, 3)))
    assert found.probabilities(features) is None
    knows = load_features("python:own_features:Classes", CIFAR)
    torch.testing.assert_close(knows.probabilities(features), features.softmax(dim=1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:own_features", "allowed: python:package.module:factory"),
        ("python:no_such_module:f", "No module named 'no_such_module'"),
        ("python:own_features:none", "has no 'none'"),
        ("python:own_features:number", "not callable"),
        ("python:own_features:broken", "ValueError: no weights here"),
        ("python:own_features:text", "returns str; allowed: a torch.nn.Module"),
    ],
)
def test_own_code_that_cannot_be_used_is_named(own, name, words):
    with pytest.raises(UserError, match=r"^evaluation\.features: ") as error:
        load_features(name, CIFAR)
    assert words in str(error.value) and name in str(error.value)
