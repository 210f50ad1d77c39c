"""A rehearsal: the work of an iteration on torch's meta device, where nothing is allocated or computed.

The step's own code runs with plain networks in place of engines. So the memory that activations take is counted, not
guessed; and as values cannot be read there, a step that rehearses does not wait for a device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.training.engines import frozen
from sid_ray.training.networks import set_up_computing
from sid_ray.training.slots import SeededDraws, Slot
from sid_ray.training.step import Iteration

META = torch.device("meta")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made, and still alive, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in _tensors(result)]
        if made:
            given = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
            for storage in made:
                if storage._cdata not in given:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


@dataclass
class StandIn:
    """A network that learns, without an engine: gradients are made, and no update."""

    module: Denoiser

    def backward(self, loss: Tensor) -> None:
        """Make gradients, as an engine would: they stay where they are."""
        loss.backward()

    def step(self) -> None:
        """Nothing."""

    def set_rates(self, lr: float, ema_beta: float | None = None) -> None:
        """Nothing."""

    def frozen(self) -> AbstractContextManager[Denoiser]:
        """The module in eval mode with parameters that take no gradient."""
        return frozen(self.module)


@dataclass
class StandIns:
    """The three networks of SiD on the meta device."""

    teacher: Denoiser
    generator: StandIn
    fake_score: StandIn


def rehearse(config: Config, network: Denoiser, slots: int = 1) -> int:
    """Bytes of the activations at the peak of an iteration of so many slots; parameters, gradients, optimizer not
    included.

    `network`: of the trained networks' architecture, anywhere; it is copied. Precision and micro-batch are settled.
    """
    dtype = torch.bfloat16 if config.engine.bf16 else torch.float32
    three = [copy.deepcopy(network).to(META, dtype) for _ in range(3)]
    teacher, generator, fake_score = three
    teacher.eval().requires_grad_(False)
    for trained in (generator, fake_score):
        trained.train().requires_grad_(True)
        for p in trained.parameters():
            p.grad = torch.zeros_like(p)
    for one in three:
        set_up_computing(one, config)
    networks = StandIns(teacher, StandIn(generator), StandIn(fake_score))
    draws = SeededDraws.of(config, network, 0, META)
    iteration = Iteration(config, networks, draws, [Slot(i, 1.0) for i in range(slots)])
    with torch.random.fork_rng(), LiveMemory() as memory:
        iteration(0)
    return memory.peak


def bytes_per_image(config: Config, network: Denoiser) -> float:
    """Activations' bytes at the peak that each further image of a micro-batch adds."""
    few, more = (rehearse(_with_micro_batch(config, n), network) for n in (1, 3))
    return (more - few) / 2


def _with_micro_batch(config: Config, size: int) -> Config:
    engine = config.engine.model_copy(update={"micro_batch": size})
    return config.model_copy(update={"engine": engine, "batch": config.batch.model_copy(update={"size": size})})
