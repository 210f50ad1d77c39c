"""diffusers' models as denoisers: what they predict, and which folders are read."""

import copy
import itertools
import json
import sys

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from sid_ray.cli import main
from sid_ray.diffusion.generator import one_hot
from sid_ray.errors import UserError
from sid_ray.teachers.diffusers_unet import DiffusersDenoiser, Schedule, log_noise_levels, timestep
from sid_ray.teachers.model_directory import ModelConfig, read_model_config
from sid_ray.teachers.sources import convert, load_denoiser, load_teacher, read_any_config
from tests.diffusers_folders import TINY, tiny_unet, write_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
CARD = "---\nlicense: apache-2.0\ntags:\n- diffusers\n---\n\n# A model\n"
SCHEDULES = {
    "linear": {},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.01 + 0.002 * i for i in range(100)], "num_train_timesteps": 100},
}
EDGES = (0, 1, 17, 60, 98, 99, 500, 998, 999)
"""Timesteps that are compared, as far as a schedule has them."""


@pytest.mark.parametrize(
    ("name", "prediction", "classes"),
    [
        *itertools.product(("linear", "cosine"), ("epsilon", "v_prediction"), (None, 7)),
        ("linear", "sample", 7),
        ("scaled linear", "epsilon", None),
        ("trained", "v_prediction", 7),
    ],
)
def test_parity_with_diffusers_at_its_own_timesteps(tmp_path, name, prediction, classes):
    """D(x_t / sqrt(abar), sigma_t) is the scheduler's pred_original_sample of the model's own call."""
    schedule = {**SCHEDULES[name], "prediction_type": prediction}
    unet = write_pipeline(tmp_path / "p", schedule, num_class_embeds=classes)
    scheduler = DDPMScheduler(**schedule, clip_sample=False)
    denoiser = load_teacher(str(tmp_path / "p"))
    assert denoiser.image_shape == (1, 8, 8) and denoiser.label_dim == (classes or 0) and denoiser.augment_dim == 0
    rng = torch.Generator().manual_seed(1)
    labels = None if classes is None else torch.tensor([2, 6])
    for t in [t for t in EDGES if t < len(scheduler.alphas_cumprod)]:
        abar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - abar) / abar).sqrt().float()
        clean, noise = torch.rand(2, 1, 8, 8, generator=rng) * 2 - 1, torch.randn(2, 1, 8, 8, generator=rng)
        noised = scheduler.add_noise(clean, noise, torch.tensor([t, t]))
        with torch.no_grad():
            output = unet(noised, t, class_labels=labels).sample
            expected = scheduler.step(output, t, noised).pred_original_sample
            actual = denoiser(noised / abar.sqrt().float(), sigma, one_hot(labels, 7) if classes else None)
        # x0 = x - sigma eps loses digits as sigma grows, in diffusers as here.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * (1 + sigma.item()))
        assert timestep(denoiser.schedule, sigma.reshape(1)).item() == pytest.approx(t, abs=2e-3)


def test_timesteps_are_interpolated_in_the_logarithm_and_clamped():
    schedule = Schedule()
    levels = log_noise_levels(schedule, torch.device("cpu"))
    assert levels[0].exp() == pytest.approx(0.0100005, rel=1e-3) and levels[-1].exp() == pytest.approx(157.4, rel=1e-3)
    middle = ((levels[300] + levels[301]) / 2).exp()
    sigma = torch.stack([torch.tensor(0.0, dtype=torch.float64), levels[0].exp() / 3, middle, levels[-1].exp() * 9])
    t = timestep(schedule, sigma.float())
    assert t.dtype == torch.float32
    torch.testing.assert_close(t, torch.tensor([0.0, 0.0, 300.5, 999.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_output_and_scaling_stay_float32_in_bf16(tmp_path, prediction):
    """In bf16 only the network's own rounding is added: a few per cent of what its output is multiplied by."""
    write_pipeline(tmp_path / "p", {"prediction_type": prediction}, num_class_embeds=3)
    exact = load_teacher(str(tmp_path / "p"))
    rounded = copy.deepcopy(exact).bfloat16()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = one_hot(torch.tensor([0, 1, 2, 0]), 3)
    for sigma in (0.02, 1.0, 80.0):
        with torch.no_grad():
            full, half = exact(sigma * x, sigma, labels), rounded(sigma * x, sigma, labels)
        assert half.dtype == torch.float32
        weight = sigma if prediction == "epsilon" else sigma / (1 + sigma**2) ** 0.5
        torch.testing.assert_close(half, full, rtol=0, atol=0.06 * weight)
    # At a small noise level the image passes through exactly: bf16 scaling would lose it.
    small = 1e-3
    with torch.no_grad():
        assert (rounded(x, small, labels) - exact(x, small, labels)).abs().max() < 1e-4


def test_no_labels_are_a_row_of_zeros_and_reach_every_parameter(tmp_path):
    write_pipeline(tmp_path / "p", num_class_embeds=3)
    denoiser = load_denoiser(str(tmp_path / "p"))[0]
    x = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(denoiser(x, 1.0), denoiser(x, 1.0, torch.zeros(1, 3)), rtol=0, atol=0)
    denoiser(x, 1.0).sum().backward()
    assert not [name for name, p in denoiser.named_parameters() if p.grad is None]


def test_dropout_is_set_as_the_networks_argument_sets_it():
    denoiser = DiffusersDenoiser({**TINY, "dropout": 0.0}, {})
    denoiser.set_dropout(0.13)
    wanted = [m.p for m in tiny_unet(dropout=0.13).modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in denoiser.modules() if isinstance(m, torch.nn.Dropout)] == wanted and 0.13 in wanted


def test_conversion_is_bitwise_and_needs_the_folder_no_more(tmp_path, monkeypatch, capsys):
    """Through the command line, with the licence of the model card."""
    unet = write_pipeline(tmp_path / "p", {"beta_schedule": "squaredcos_cap_v2"}, CARD, num_class_embeds=3)
    before = load_teacher(str(tmp_path / "p"))
    monkeypatch.setattr(sys, "argv", ["sid-ray", "convert", str(tmp_path / "p"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "UNet2DModel" in printed and "1 x 8 x 8" in printed and "apache-2.0" in printed
    (tmp_path / "p").rename(tmp_path / "gone")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == {f"model.{k}" for k in unet.state_dict()}
    assert all(torch.equal(stored[f"model.{k}"], v) for k, v in unet.state_dict().items())
    config = read_model_config(str(tmp_path / "out"))
    assert config.licence == "apache-2.0" and config.provenance["format"] == "diffusers folder"
    assert "apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    after, x = load_teacher(str(tmp_path / "out")), torch.randn(2, 1, 8, 8)
    labels = one_hot(torch.tensor([0, 2]), 3)
    assert torch.equal(after(x, 1.3, labels), before(x, 1.3, labels))
    assert config.network == read_any_config(str(tmp_path / "gone")).network


@pytest.mark.parametrize(
    ("card", "given", "licence"),
    [
        (CARD, "mine", "mine"),
        (None, None, "unknown"),
        ("# license: mit\n", None, "unknown"),
        ("---\nlicense: [\n---\n", None, "unknown"),
    ],
    ids=["given", "no card", "no front matter", "broken"],
)
def test_the_licence(tmp_path, card, given, licence):
    write_pipeline(tmp_path / "p", card=card)
    assert convert(str(tmp_path / "p"), tmp_path / "out", given).licence == licence


def test_the_folder_of_the_unet_alone(tmp_path):
    """Inside its pipeline, or with the schedule beside it, as the first public models lie."""
    write_pipeline(tmp_path / "p", {"prediction_type": "v_prediction"}, CARD)
    whole, inside = read_any_config(str(tmp_path / "p")), read_any_config(str(tmp_path / "p" / "unet"))
    assert inside.network == whole.network and inside.licence == "apache-2.0"
    assert inside.provenance["source_sha256"] == whole.provenance["source_sha256"]
    (tmp_path / "p" / "scheduler" / "scheduler_config.json").rename(tmp_path / "p" / "unet" / "scheduler_config.json")
    (tmp_path / "p" / "unet").rename(tmp_path / "flat")
    (tmp_path / "p" / "model_index.json").rename(tmp_path / "flat" / "model_index.json")
    assert read_any_config(str(tmp_path / "flat")).network == whole.network
    (tmp_path / "flat" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"teacher\.path: .*flat has no noise schedule: scheduler_config\.json is"):
        load_teacher(str(tmp_path / "flat"))


def test_names_of_before_0_15_are_read(tmp_path):
    """The first public models (google/ddpm-*) call the attention's weights otherwise."""
    write_pipeline(tmp_path / "p")
    expected = load_denoiser(str(tmp_path / "p"))[0].state_dict()
    file = tmp_path / "p" / "unet" / WEIGHTS
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in load_file(file).items():
        for today, then in names.items():
            name = name.replace(today, then)
        old[name] = tensor
    save_file(old, file, metadata={"format": "pt"})
    assert any(".query." in name for name in old)
    theirs = UNet2DModel.from_pretrained(tmp_path / "p" / "unet", use_safetensors=True).state_dict()
    state = load_denoiser(str(tmp_path / "p"))[0].state_dict()
    assert state.keys() == expected.keys() == {f"model.{k}" for k in theirs}
    assert all(torch.equal(state[f"model.{k}"], v) for k, v in theirs.items())


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
REFUSED = [
    (SCHEDULER, {"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr: true is not supported .*allowed: false"),
    (SCHEDULER, {"beta_schedule": "sigmoid"}, r"beta_schedule: 'sigmoid' is not supported; .*'squaredcos_cap_v2'"),
    (SCHEDULER, {"prediction_type": "flow"}, r"prediction_type: 'flow' is not supported; .*'v_prediction'"),
    (SCHEDULER, {"trained_betas": [0.1, 1.0]}, r"trained_betas\.1: 1\.0 is not supported; .*less than 1"),
    (SCHEDULER, {"num_train_timesteps": 100_000}, "noise levels are not finite and increasing"),
    (SCHEDULER, {"_class_name": "KarrasVeScheduler"}, r"'KarrasVeScheduler' is not supported; allowed: DDPMScheduler"),
    (UNET, {"_class_name": "UNet2DConditionModel"}, r"'UNet2DConditionModel' is not supported; allowed: UNet2DModel"),
    (UNET, {"out_channels": 2}, r"out_channels: 2 is not supported; allowed: in_channels \(1\)"),
    (UNET, {"time_embedding_type": "fourier"}, r"time_embedding_type: 'fourier' is not supported; .*'positional'"),
    (UNET, {"class_embed_type": "timestep"}, r"class_embed_type: 'timestep' is not supported"),
    (UNET, {"sample_size": None}, r"sample_size: None is not supported"),
    (UNET, {"sample_size": 9}, r"sample_size: 9 is not supported; allowed: multiples of 2"),
    (UNET, {"down_block_types": ["SkipDownBlock2D"] * 2}, r"'SkipDownBlock2D' is not supported; .*'AttnDownBlock2D'"),
    (UNET, {"layers_per_block": 10**9}, r"layers_per_block: 1000000000 is not supported"),
    (UNET, {"norm_num_groups": 3}, r"cannot be built by diffusers: .*divisible"),
    (UNET, {"act_fn": 5}, "cannot be built by diffusers"),
    (UNET, {"mystery": 1}, r"cannot be built by diffusers: .*mystery"),
    (UNET, {"block_out_channels": [8, 32]}, r"has of another shape \d+ tensors"),
    (INDEX, {"_class_name": "LDMPipeline"}, r"_class_name: 'LDMPipeline' is not supported; allowed: DDPMPipeline"),
    (INDEX, {"vqvae": ["diffusers", "VQModel"]}, r"component 'vqvae' is not supported; allowed: unet and scheduler"),
]


@pytest.mark.parametrize(("name", "fields", "words"), REFUSED, ids=[f"{next(iter(f.items()))}" for _, f, _ in REFUSED])
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, fields, words):
    write_pipeline(tmp_path / "p")
    edit(tmp_path / "p" / name, **fields)
    with pytest.raises(UserError, match=words) as error:
        convert(str(tmp_path / "p"), tmp_path / "out", field="teacher.path")
    assert str(error.value).startswith("teacher.path: ") and not (tmp_path / "out").exists()
    if "another shape" not in words:
        assert str(tmp_path / "p" / name) in str(error.value)


def test_pickled_missing_and_broken_weights_are_refused(tmp_path):
    write_pipeline(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match=r"is a pickle, which is never loaded; .*safe_serialization=True"):
        load_teacher(str(tmp_path / "pickled"))
    write_pipeline(tmp_path / "p")
    file = tmp_path / "p" / "unet" / WEIGHTS
    state = load_file(file)
    save_file({**state, "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"has unknown 1 tensors of its architecture, e\.g\. model\.extra\.weight"):
        load_teacher(str(tmp_path / "p"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"{WEIGHTS} cannot be read"):
        load_teacher(str(tmp_path / "p"))
    file.unlink()
    with pytest.raises(UserError, match=rf"has no {WEIGHTS}"):
        load_teacher(str(tmp_path / "p"))


def test_without_diffusers_the_extra_is_named(monkeypatch):
    config = ModelConfig(kind="teacher", network={"model_type": "UNet2DModel", "unet": TINY, "schedule": {}})
    assert config.build().label_dim == 0
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'sid-ray\[diffusers\]'"):
        config.build()


def test_an_unknown_network_in_a_model_directory_is_refused(tmp_path):
    write_pipeline(tmp_path / "p")
    convert(str(tmp_path / "p"), tmp_path / "out")
    network = read_model_config(str(tmp_path / "out")).network
    edit(tmp_path / "out" / "config.json", network={**network, "model_type": "VGG"})
    with pytest.raises(UserError, match=r"unknown network 'VGG'; allowed: SongUNet, DhariwalUNet, UNet2DModel"):
        load_teacher(str(tmp_path / "out"))
