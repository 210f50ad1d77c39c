"""Rehearsals on the meta device: what they count, what `auto` makes of it, and that a step waits for no device."""

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sid_ray.config import load_config, override
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import ModelConfig, read_model_config
from sid_ray.teachers.public import public_teacher
from sid_ray.training.bench import one_worker
from sid_ray.training.memory import memory_per_worker
from sid_ray.training.rehearsal import LiveMemory, bytes_per_image, rehearse
from sid_ray.training.settling import SHARE, largest_micro_batch, largest_share

# What the digits preset leaves out: augmentation, dropout, class frequencies.
EVERYTHING = {"method.augment": 0.5, "method.dropout": 0.1, "method.class_weights": [1.0] * 9 + [2.0]}


def digits(**changes):
    return load_config("digits", {"batch.size": 8, "engine.micro_batch": 8} | changes)


@pytest.fixture(scope="module")
def network():
    """The digits teacher's kind, with few blocks: rehearsals cost time by the operation."""
    fewer = dict(read_model_config("builtin:digits").network, num_blocks=1, channel_mult=[1])
    return ModelConfig(kind="teacher", network=fewer).skeleton()


def test_live_memory_is_what_is_alive():
    """Matrices of 1000 x 1000 float32: what autograd keeps, and what it lets go of."""
    x = torch.empty(1000, 1000, device="meta", requires_grad=True)
    w = torch.empty(1000, 1000, device="meta")
    with LiveMemory() as memory:
        a = x.exp()  # autograd keeps the result
        b = a.sin()  # and the input here
        assert memory.now == 8_000_000
        del a, b
        assert memory.now == 0
        y = (x @ w @ w @ w).square()  # of the products only the last is kept
        assert memory.now == memory.peak == 8_000_000
        del y
    assert memory.now == 0


def test_modes_keep_as_many_graphs_as_they_say(network):
    """Three graphs alive, two, one; half of it in bf16; with checkpointing much less."""
    alive = {
        name: rehearse(digits(**settings), network)
        for name, settings in {
            "fast": {},
            "lean": {"method.memory": "lean"},
            "minimal": {"method.memory": "minimal"},
            "bf16, minimal": {"engine.precision": "bf16", "method.memory": "minimal"},
            "checkpointing": {"engine.activation_checkpointing": True},
        }.items()
    }
    assert alive["lean"] / alive["fast"] == pytest.approx(2 / 3, abs=0.1)
    assert alive["minimal"] / alive["fast"] == pytest.approx(1 / 3, abs=0.1)
    assert alive["bf16, minimal"] / alive["minimal"] == pytest.approx(1 / 2, abs=0.1)
    assert alive["checkpointing"] < alive["fast"] / 2


def test_a_rehearsal_leaves_everything_as_it_was(network):
    before = torch.get_rng_state(), network.training, [p.requires_grad for p in network.parameters()]
    rehearse(digits(**EVERYTHING), network)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (network.training, [p.requires_grad for p in network.parameters()]) == before[1:]


class HostCopies(TorchDispatchMode):
    """Counts operations that bring something from the host to the meta device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = [t.device.type for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        out = [t.device.type for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        if "cpu" in devices and "meta" in out + devices:
            self.found[str(func)] += 1
        return result


@pytest.mark.parametrize(
    "changes", [{}, EVERYTHING, {"method.memory": "minimal", "engine.activation_checkpointing": True}]
)
def test_a_step_waits_for_no_device(network, changes):
    """On the meta device a value cannot be read: it would raise. Nor is anything copied there but once."""
    config = digits(**changes)
    rehearse(config, network)
    with HostCopies() as copies:
        rehearse(config, network)
    assert not copies.found
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(1, device="meta").item()


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, by the package that asks."""

    def __init__(self):
        super().__init__()
        self.by = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            last = next(f for f in reversed(frames) if "/sid_ray/" in f.filename or "/deepspeed/" in f.filename)
            if last.name != "one_hot":  # torch looks at the indices on the CPU only
                self.by["sid_ray" if "/sid_ray/" in last.filename else "deepspeed"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "ours"), [(0, 2), (1, 0), (2, 0), (3, 0)])
def test_host_synchronisations_of_a_step(stage, ours, tiny_teacher):
    """None of ours at stages 1 to 3; at stage 0 one per network: AdamWithEMA has to know whether to step."""
    settings = {"engine.zero_stage": stage, "teacher.path": str(tiny_teacher)}
    iteration, networks, _ = one_worker(digits(**settings))
    with Reads() as reads:
        iteration(0)
    networks.destroy()
    assert reads.by["sid_ray"] == ours
    assert (reads.by["deepspeed"] > 0) == (stage > 0)  # its own: overflow and norm; at stage 3 by the parameter


def test_the_largest_micro_batch_fits_and_the_next_does_not(network):
    config = load_config("digits", {"batch.size": 96, "engine.micro_batch": "auto"})
    kept = sum(memory_per_worker(config, sum(p.numel() for p in network.parameters()), 1).values())
    memory = (kept + 24.5 * bytes_per_image(config, network)) / SHARE
    assert largest_micro_batch(config, network, memory, 1) == 24
    with pytest.raises(UserError, match=r"engine\.micro_batch: auto: not one image fits into .* GB"):
        largest_micro_batch(config, network, kept / SHARE, 1)


@pytest.mark.parametrize(
    ("batch", "workers", "most", "expected"),
    [(96, 1, 24.5, 24), (96, 1, 47.9, 32), (96, 1, 1e9, 96), (96, 4, 1e9, 24), (96, 5, 1e9, 16), (7, 1, 6.9, 1),
     (2, 8, 5.0, 1), (96, 1, 0.9, None), (96, 1, -3.0, None)],
)  # fmt: skip
def test_a_share_divides_the_batch_and_leaves_nobody_idle(batch, workers, most, expected):
    assert largest_share(batch, workers, most) == expected


@pytest.mark.slow
def test_the_presets_fit_as_published():
    """CIFAR-10 and ImageNet on a GPU of 80 GB: plenty, and some."""
    sizes = {}
    for name in ("cifar10-uncond", "imagenet64"):
        config = override(load_config(name), {"engine.micro_batch": "auto"})
        network = ModelConfig(kind="teacher", network=public_teacher(config.teacher.path).network).skeleton()
        sizes[name] = largest_micro_batch(config, network, 80e9, 1)
    assert sizes == {"cifar10-uncond": 256, "imagenet64": 32}
