"""Checkpoints are streamed: the library reads what is written one tensor at a time, and little is in memory."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sid_ray.config import load_config
from sid_ray.storage.depot import Depot
from sid_ray.training import shares
from sid_ray.training.bench import one_worker
from sid_ray.training.checkpoints import complete_checkpoints, read_network, save_checkpoint
from sid_ray.training.progress import Progress
from sid_ray.training.rehearsal import LiveMemory
from sid_ray.training.tensor_file import write_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "naïve": torch.tensor([float("nan"), float("inf")]),
}
SHAPES = {name: tuple(t.shape) for name, t in TENSORS.items()}


def test_the_library_reads_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, SHAPES, iter(TENSORS.items()))
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(read[name], tensor.contiguous(), rtol=0, atol=0, equal_nan=True)
    with safe_open(path, "pt") as file:
        assert file.get_slice("a")[1:, :2].tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    "given", [{"a": torch.zeros(3, 2)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3).double()}, {}]
)
def test_what_was_not_announced_is_refused(tmp_path, given):
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "x.safetensors", {"a": (2, 3)}, iter(given.items()))


def test_all_is_consumed_where_nothing_can_be_written(tmp_path):
    """The tensors are gathered together with other workers, which would wait for ever."""
    consumed = []

    def coming():
        for name, tensor in TENSORS.items():
            consumed.append(name)
            yield name, tensor
        consumed.append("the end")

    with pytest.raises(OSError):
        write_tensors(tmp_path / "missing" / "x.safetensors", SHAPES, coming())
    assert consumed == [*TENSORS, "the end"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_takes_the_memory_of_what_is_gathered_at_once(tmp_path, stage, tiny_teacher, monkeypatch):
    """One parameter, however small; then as much as the largest one, so that the network is much more than that."""
    sizes = {"batch.size": 4, "engine.micro_batch": 4, "teacher.path": str(tiny_teacher)}
    config = load_config("digits", sizes | {"engine.zero_stage": stage})
    iteration, networks, world = one_worker(config)
    iteration(0)
    expected = {n: {k: t.clone() for k, t in tensors.items()} for n, tensors in networks.generator.gather()}
    largest = max(tensors["weight"].numel() for tensors in expected.values())
    peaks = {}
    for limit in (1, 4 * largest):
        monkeypatch.setattr(shares, "GATHERED_AT_ONCE", limit)
        with LiveMemory() as memory:
            assert save_checkpoint(Depot(tmp_path), networks, Progress(nimg=limit), world) is None
        peaks[limit] = memory.peak
    checkpoint, alone = complete_checkpoints(tmp_path)
    assert [alone.name, checkpoint.name] == [f"nimg-{limit:012d}" for limit in peaks]
    written = read_network(checkpoint, "generator")
    assert list(written) == list(expected)
    for name, tensors in expected.items():
        assert written[name].keys() == tensors.keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"}
        assert all(torch.equal(written[name][key], tensor) for key, tensor in tensors.items())
    networks.destroy()
    network = 16 * sum(tensors["weight"].numel() for tensors in expected.values())
    gathered = 16 * largest
    assert peaks[1] <= 1.5 * gathered
    assert peaks[4 * largest] <= 2.1 * gathered < network / 4, "one that is used and the next"
