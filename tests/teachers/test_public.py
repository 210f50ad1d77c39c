"""The catalogue of public teachers: architectures and parameters as the files have them, costs as counted now."""

import json

import pytest
import torch

from sid_ray.diffusion.denoiser import EDMDenoiser
from sid_ray.diffusion.flops import network_cost
from sid_ray.teachers.public import PUBLIC, public_teacher
from tests.golden_numbers import GOLDEN

FULL_SIZE = json.loads((GOLDEN / "networks" / "full_size_state_dicts.json").read_text())
FULL_SIZE["afhqv2-64x64-uncond-vp"] = FULL_SIZE["ffhq-64x64-uncond-vp"]  # one architecture


@pytest.mark.parametrize("name", FULL_SIZE)
def test_architectures_are_those_of_the_files(name):
    teacher = PUBLIC[f"edm-{name}.pkl"]
    with torch.device("meta"):
        denoiser = EDMDenoiser(**teacher.network)
    assert {k: list(v.shape) for k, v in denoiser.state_dict().items()} == FULL_SIZE[name]["state_dict"]
    assert teacher.parameters == FULL_SIZE[name]["parameters"]
    assert teacher.licence == "CC BY-NC-SA 4.0"


def test_nothing_else_is_in_the_catalogue():
    assert PUBLIC.keys() == {f"edm-{name}.pkl" for name in FULL_SIZE} | {"builtin:digits"}


@pytest.mark.parametrize("name", PUBLIC)
def test_costs_are_as_counted(name):
    with torch.device("meta"):
        parameters, flops = network_cost(EDMDenoiser(**PUBLIC[name].network).eval())
    assert parameters == PUBLIC[name].parameters
    assert flops / 1e9 == pytest.approx(PUBLIC[name].gflop, rel=1e-4)


def test_the_count_is_that_of_a_dense_layer_and_a_backward_pass_costs_two():
    """What the costs rest on: 2 per multiply-add, and 3 forwards for forward and backward of a whole network."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.nn.Linear(7, 5)(torch.zeros(3, 7))
    assert counter.get_total_flops() == 2 * 3 * 7 * 5
    denoiser = EDMDenoiser(**PUBLIC["builtin:digits"].network)
    image = torch.zeros(1, *denoiser.image_shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        denoiser(image, 1.0).sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * network_cost(denoiser)[1], rel=1e-3)


@pytest.mark.parametrize(
    "path",
    [
        "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl",
        "s3://bucket/teachers/edm-ffhq-64x64-uncond-vp.pkl",
        "/data/edm-ffhq-64x64-uncond-vp.pkl",
        "edm-ffhq-64x64-uncond-vp.pkl",
    ],
)
def test_a_public_teacher_is_known_wherever_it_lies(path):
    assert public_teacher(path) is PUBLIC["edm-ffhq-64x64-uncond-vp.pkl"]
    assert public_teacher(path + ".zip") is None
