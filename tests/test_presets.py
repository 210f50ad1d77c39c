"""The presets: published settings, explained, and planned anywhere without network."""

import re
import socket
import sys

import pexpect
import pytest
import yaml

from sid_ray.cli import main
from sid_ray.config import load_config, parse_config, preset_names
from sid_ray.errors import UserError
from sid_ray.teachers.public import PUBLIC, public_teacher
from sid_ray.training.memory import memory_per_worker
from sid_ray.training.plan import describe_run
from tests.launching import SID_RAY

# name: (teacher, alpha, batch, learning rate, dropout, augmentation, generator's beta1, EMA half-life in kimg, Mimg)
PUBLISHED = {
    "cifar10-uncond": ("edm-cifar10-32x32-uncond-vp.pkl", 1.2, 256, 1e-5, 0.13, 0.12, 0.0, 500, 500),
    "cifar10-cond": ("edm-cifar10-32x32-cond-vp.pkl", 1.2, 256, 1e-5, 0.13, 0.12, 0.0, 500, 800),
    "imagenet64": ("edm-imagenet-64x64-cond-adm.pkl", 1.2, 8192, 4e-6, 0.10, 0.0, 0.0, 2000, 1000),
    "ffhq64": ("edm-ffhq-64x64-uncond-vp.pkl", 1.2, 512, 1e-5, 0.05, 0.15, 0.9, 500, 500),
    "afhqv2-64": ("edm-afhqv2-64x64-uncond-vp.pkl", 1.0, 512, 5e-6, 0.05, 0.15, 0.0, 500, 500),
}
# name: (published FID of SiD, of the teacher, by evaluations, its Heun steps, reference statistics)
QUALITY = {
    "cifar10-uncond": (1.923, {35: 1.97}, 18, "cifar10-32x32.npz"),
    "cifar10-cond": (1.710, {35: 1.79}, 18, "cifar10-32x32.npz"),
    "imagenet64": (1.524, {79: 2.64, 511: 1.36}, 40, "imagenet-64x64.npz"),
    "ffhq64": (1.550, {79: 2.39}, 40, "ffhq-64x64.npz"),
    "afhqv2-64": (1.628, {79: 1.96}, 40, "afhqv2-64x64.npz"),
}


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sid-ray", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, arguments


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty working directory and cache, and no network."""

    def refuse(*_):
        raise OSError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    c = load_config(name)
    o, m = c.optimizer, c.method
    assert o.generator_lr == o.fake_score_lr
    found = (c.teacher.path.rsplit("/", 1)[-1], m.alpha, c.batch.size, o.generator_lr, m.dropout, m.augment)
    found += (o.generator_beta1, o.ema_halflife_kimg, c.run.total_kimg / 1000)
    assert found == PUBLISHED[name]
    common = (m.sigma_init, m.tmax, m.loss_scale_fake_score, m.loss_scale_generator, m.p_mean, m.p_std)
    assert common == (2.5, 800, 1, 100, -1.2, 1.2)
    assert (m.latents, o.schedule, o.gradient_clip, o.ema_rampup_ratio) == ("fresh", "constant", None, 0.05)
    assert not c.teacher.random and c.run.name == name


@pytest.mark.parametrize("name", QUALITY)
def test_measuring_is_as_published(name):
    c = load_config(name)
    teacher = public_teacher(c.teacher.path)
    e = c.evaluation
    assert c.teacher.path == teacher.address and e.reference == teacher.reference
    found = (teacher.fid_sid, teacher.fid_teacher, e.teacher_steps, e.reference.rsplit("/", 1)[-1])
    assert found == QUALITY[name] and teacher.steps == e.teacher_steps
    assert (e.features, e.num_images, e.confirmations) == ("inception", 50_000, 10)


def test_every_preset_is_in_the_catalogue_and_every_teacher_has_one():
    assert set(preset_names()) == PUBLISHED.keys() | {"digits"}
    assert {public_teacher(load_config(n).teacher.path).name for n in preset_names()} == PUBLIC.keys()


def test_the_table(offline):
    """On a terminal of 80 columns nothing is cut off."""
    text, code = pexpect.run(f"{SID_RAY} presets", withexitstatus=True, encoding="utf-8", dimensions=(60, 80))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert code == 0 and "\u2026" not in text and max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if "teacher:" not in line and line.split()}  # the last wins
    for name, (sid, teacher, *_) in QUALITY.items():
        assert rows[name][1:3] == [f"{next(iter(teacher.values())):.2f}", f"{sid:.3f}"]
        assert PUBLISHED[name][0] in text
    assert rows["cifar10-uncond"][3:] == ["55.7", "M", "42.4", "466", "500", "233,000"]  # 11 x 42.38 G; 466.2 G x 500 M
    assert rows["imagenet64"][3:] == ["296", "M", "219", "2,410", "1000", "2,410,000"]
    assert rows["digits"][1:] == ["-", "-", "0.26", "M", "0.0127", "0.139", "0.0512", "0.00713"]


@pytest.mark.parametrize("name", preset_names())
def test_show_explains_and_is_a_file_to_start_from(name, offline, monkeypatch, capsys):
    run(["presets", "show", name], monkeypatch)
    text = capsys.readouterr().out
    comments = [line for line in text.splitlines() if line.startswith("#")]
    teacher = public_teacher(load_config(name).teacher.path)
    for word in (teacher.address, teacher.reference, f"{teacher.parameters:,} parameters", "11 forward passes"):
        assert any(word in line for line in comments), word
    if teacher.fid_sid:
        assert any(f"SiD {teacher.fid_sid:.3f}" in line for line in comments)
        assert any("CC BY-NC-SA 4.0" in line for line in comments)
    assert parse_config(yaml.safe_load(text)) == load_config(name)


@pytest.mark.parametrize(
    ("name", "extra"), [*((name, []) for name in PUBLISHED), ("imagenet64", ["--teacher.random", "true"])]
)
def test_dry_run_works_offline_and_leaves_nothing(name, extra, offline, monkeypatch, capsys):
    run(["distill", name, "--dry-run", *extra], monkeypatch)
    text = capsys.readouterr().out
    teacher = public_teacher(load_config(name).teacher.path)
    told = "RANDOM TEACHER" if extra else f"{teacher.address}, fetched at the start (licence: CC BY-NC-SA 4.0)"
    for word in (told, f"{teacher.parameters:,} parameters", f"{teacher.gflop:.4g} GFLOP", "8 worker(s):"):
        assert word in text, word
    assert f"{teacher.reference}, fetched at the start" in text
    assert parse_config(yaml.safe_load(text)).teacher.random == bool(extra)
    assert list(offline.iterdir()) == []


def test_dry_run_refuses_what_can_be_known_to_be_wrong(offline):
    wrong = [
        ({"method.class_weights": "[1, 2]"}, "method.class_weights: 2 numbers do not fit the teacher; allowed: none"),
        ({"evaluation.features": "vgg"}, "evaluation.features: there is no feature network 'vgg'"),
        ({"evaluation.reference": "none.npz"}, "evaluation.reference: 'none.npz' is not a file"),
        ({"teacher.path": "none"}, "teacher.path: 'none' is not a model directory"),
        ({"init.generator": "none"}, "init.generator: 'none' is not a model directory"),
    ]
    for overrides, message in wrong:
        with pytest.raises(UserError) as error:
            describe_run(load_config("cifar10-uncond", overrides))
        assert message in str(error.value)
    own = load_config("cifar10-uncond", {"evaluation.reference": "teacher", "cluster.workers": "2-4"})
    told = describe_run(own)
    assert ("reference", "made of the teacher's samples") in told
    assert [text.split(":")[0] for what, text in told if what == "memory"] == ["2 worker(s)", "4 worker(s)"]
    unknown = load_config("cifar10-uncond", {"teacher.path": "https://example.org/other.pkl"})
    assert "its architecture is not known before" in dict(describe_run(unknown))["teacher"]
    with pytest.raises(UserError, match=r"method\.augment: 0\.1 needs a network with 9 augmentation labels"):
        describe_run(load_config("imagenet64", {"method.augment": 0.1}))


def test_memory_per_worker_by_stage():
    def each(workers, **engine):
        c = load_config("cifar10-uncond", {f"engine.{k}": v for k, v in engine.items()})
        return memory_per_worker(c, 1_000, workers)

    fp32 = each(4, precision="fp32", zero_stage=0)
    kept = {"weights": 12_000, "gradients": 4_000, "optimizer + EMA": 20_000, "evaluation": 4_000}
    assert fp32 == kept | {"buffers": 0}
    shares = [each(8, zero_stage=stage) for stage in (1, 2, 3)]
    assert [share.pop("buffers") for share in shares] == [8_000, 8_000, 8_000 + 6_000]
    assert [share.pop("gradients") for share in shares] == [10_000, 750, 1_500]
    totals = [sum(share.values()) for share in shares]
    assert totals == [6_000 + 3_500 + 4_000, 6_000 + 3_500 + 4_000, 750 + 3_500 + 4_000]
