"""The networks agree with the reference implementation's numbers, names and shapes."""

import json

import pytest
import torch

from sid_ray.diffusion.denoiser import EDMDenoiser
from tests.golden_numbers import GOLDEN, NETWORKS, golden_denoiser, load_golden

FULL_SIZE = json.loads((GOLDEN / "networks" / "full_size_state_dicts.json").read_text())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_outputs_and_input_gradients(name, memory_format):
    numbers, meta = load_golden(f"networks/{name}")
    denoiser = golden_denoiser(numbers, meta["init_kwargs"], "net.").eval().to(memory_format=memory_format)
    x = numbers["x"].to(memory_format=memory_format).requires_grad_()
    denoised = denoiser(x, numbers["sigma"], numbers.get("labels"))
    assert relative_error(denoised, numbers["denoised"]) < 2e-5
    (gradient,) = torch.autograd.grad(denoised.square().sum(), x)
    assert relative_error(gradient, numbers["grad_x_of_sum_sq"]) < 2e-5
    if "augment_labels" in numbers:
        augmented = denoiser(x, numbers["sigma"], numbers.get("labels"), numbers["augment_labels"])
        assert relative_error(augmented, numbers["denoised_augmented"]) < 2e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_network_keeps_float32_preconditioning(name):
    """In bf16 the error is that of the network F only: at sigma -> 0 the output is the input to float32."""
    numbers, meta = load_golden(f"networks/{name}")
    denoiser = golden_denoiser(numbers, meta["init_kwargs"], "net.").eval().to(torch.bfloat16)
    denoised = denoiser(numbers["x"], numbers["sigma"], numbers.get("labels"))
    assert denoised.dtype == torch.float32
    assert relative_error(denoised, numbers["denoised"]) < 5e-2
    image = numbers["x"] / (1 + numbers["sigma"].reshape(-1, 1, 1, 1))
    assert relative_error(denoiser(image, 1e-7, numbers.get("labels")), image) < 1e-6


def test_fourier_frequencies_survive_a_cast():
    numbers, meta = load_golden("networks/ncsnpp_uncond")
    denoiser = golden_denoiser(numbers, meta["init_kwargs"], "net.")
    before = denoiser.model.map_noise.freqs.clone()
    denoiser.bfloat16()
    assert denoiser.model.map_noise.freqs.dtype == torch.float32
    assert torch.equal(denoiser.model.map_noise.freqs, before)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes(name):
    entry = FULL_SIZE[name]
    with torch.device("meta"):
        denoiser = EDMDenoiser(**entry["init_kwargs"])
    assert {k: list(v.shape) for k, v in denoiser.state_dict().items()} == entry["state_dict"]
    assert sum(p.numel() for p in denoiser.parameters()) == entry["parameters"]


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="unknown network 'VGG'"):
        EDMDenoiser(img_resolution=8, img_channels=1, model_type="VGG")
    with pytest.raises(ValueError, match="decoder_type='skip'"):
        EDMDenoiser(img_resolution=8, img_channels=1, decoder_type="skip")
