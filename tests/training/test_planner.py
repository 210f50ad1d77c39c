"""The planner: parsing, arithmetic against numbers worked out by hand, and counts against real tensors."""

import re
import sys

import pytest

from sid_ray.cli import main
from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.training.memory import memory_per_worker, on_gpus
from sid_ray.training.planner import (
    GPUS,
    NetworkSize,
    images_per_second,
    largest_micro_batch,
    memory_table,
    parse_machine,
    plan_lines,
)

SIZE = NetworkSize(parameters=50_000_000, flops=42_380_430_000, activations=190e6)


@pytest.mark.parametrize(
    ("text", "count", "name", "memory"),
    [
        ("8xH100-80GB", 8, "H100", 80),
        ("1xa100-40GB", 1, "A100", 40),
        ("16xL4", 16, "L4", 24),
        ("2xRTX4090", 2, "RTX4090", 24),
    ],
)
def test_machines(text, count, name, memory):
    machine = parse_machine(text)
    assert (machine.count, machine.name, machine.memory_gb, machine.speed) == (count, name, memory, GPUS[name][1])


@pytest.mark.parametrize("text", ["", "H100", "0xH100", "8xTPU", "8xH100-80", "8 x H100", "-1xH100"])
def test_other_machines_are_refused(text):
    with pytest.raises(UserError, match=r"--plan: .* is not allowed; allowed: .*8xH100-80GB.*L40S-48GB"):
        parse_machine(text)


def test_speed_time_and_money():
    """CIFAR-10: 8 x 989 TFLOP/s x 0.25 by 11 x 42.380430 GFLOP an image."""
    config = load_config("cifar10-uncond", {"engine.precision": "bf16"})
    rate = images_per_second(config, SIZE.flops, parse_machine("8xH100"), 0.25)
    assert rate == pytest.approx(8 * 989e12 * 0.25 / (11 * 42.38043e9)) == pytest.approx(4243.0, rel=1e-3)
    lines = plan_lines(config, SIZE, parse_machine("8xH100"), 2.5, 0.25)
    assert any(line.startswith("32.7 hours for 500000 kimg") for line in lines)
    assert lines[-1] == "655 at 2.5 per GPU and hour"
    # 8 micro-batches on 6 GPUs need two passes each: 8 of 12 train.
    uneven = images_per_second(config, SIZE.flops, parse_machine("6xH100"), 0.25)
    assert uneven == pytest.approx(rate * 6 / 8 * 8 / 12)
    fp32 = load_config("cifar10-uncond", {"engine.precision": "fp32"})
    assert images_per_second(fp32, SIZE.flops, parse_machine("8xA100"), 0.5) == pytest.approx(
        8 * 156e12 * 0.5 / (11 * 42.38043e9)
    )


def test_the_largest_micro_batch_divides_the_batch_and_just_fits():
    config = load_config("cifar10-uncond", {"batch.size": 256, "engine.micro_batch": 1, "engine.precision": "bf16"})
    machine = parse_machine("2xL4-24GB")
    largest = largest_micro_batch(config, SIZE, machine)
    assert 256 % largest == 0 and largest <= 128

    def needed(images):
        activations = images * SIZE.activations
        return sum(memory_per_worker(config, SIZE.parameters, 2, activations=activations).values()) + activations

    limit = (24 - 2.0) * 0.95e9
    assert needed(largest) <= limit < needed(2 * largest)
    assert largest_micro_batch(config, SIZE, parse_machine("2xL4-3GB")) is None
    assert largest_micro_batch(config, SIZE, parse_machine("2xB200")) == 128, "no more than a GPU's share"


def test_the_table_has_every_stage_and_says_what_does_not_fit():
    config = load_config("cifar10-uncond", {"engine.micro_batch": 256, "engine.precision": "bf16"})
    table = memory_table(config, SIZE, parse_machine("4xL4"))
    assert [line.split()[0] for line in table[1:4]] == ["ZeRO-1*", "ZeRO-2", "ZeRO-3"]
    assert all("TOO LARGE" in line for line in table[1:4])
    fp32 = load_config("digits", {"engine.zero_stage": 0, "engine.precision": "fp32"})
    assert [line.split()[0] for line in memory_table(fp32, SIZE, parse_machine("4xL4"))[1:5]] == [
        "ZeRO-0*", "ZeRO-1", "ZeRO-2", "ZeRO-3",
    ]  # fmt: skip


def test_what_is_left_to_the_machine_is_settled_for_gpus():
    auto = load_config("cifar10-uncond", {"engine.precision": "auto", "engine.micro_batch": "auto"})
    assert on_gpus(auto).engine.precision == "bf16"
    assert (
        on_gpus(load_config("digits", {"engine.precision": "auto", "engine.zero_stage": 0})).engine.precision == "fp32"
    )
    lines = plan_lines(on_gpus(auto), SIZE, parse_machine("2xL4"), None, 0.25)
    assert any(
        f"engine.micro_batch {largest_micro_batch(on_gpus(auto), SIZE, parse_machine('2xL4'))}," in x for x in lines
    )
    with pytest.raises(UserError, match="--plan: not one image fits into 3 GB"):
        plan_lines(on_gpus(auto), SIZE, parse_machine("2xL4-3GB"), None, 0.25)


def test_the_command(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sid-ray", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    digits = ["distill", "digits", "--engine.precision", "bf16"]
    code, told = run(*digits, "--dry-run", "--plan", "8xH100-80GB", "--price-per-gpu-hour", "2")
    assert not code
    assert re.search(r"^# +ZeRO-1\*", told.out, re.MULTILINE) and "largest micro-batch" in told.out
    for part in (
        "weights",
        "gradients",
        "optimizer + EMA",
        "buffers",
        "activations",
        "images/s",
        "at 2 per GPU and hour",
    ):
        assert part in told.out
    code, told = run("distill", "cifar10-uncond", "--plan", "8xH100")
    assert code == 2 and "--plan: needs --dry-run" in told.err
    code, told = run("distill", "cifar10-uncond", "--dry-run", "--plan", "8xTPU")
    assert code == 2 and "8xTPU" in told.err and not list(tmp_path.iterdir())
