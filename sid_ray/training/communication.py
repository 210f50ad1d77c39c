"""What workers send each other: every collective counted where it reaches torch's process group."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SHARED_BY_ALL = ("allreduce_", "allreduce_coalesced_")
"""Collectives that reduce and then gather: twice the way of the others."""


class Communication(TorchDispatchMode):
    """Counts collectives while it is entered, and makes each wait for its end, so that its seconds are its own.

    DeepSpeed's own log would miss the coalesced ones that ZeRO-3 uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        """How often each was called, by its name in torch, e.g. `allreduce_`."""
        self.bytes: Counter[str] = Counter()
        """Size of the whole tensor that was reduced, gathered or scattered, over all calls."""
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        work = result[-1] if isinstance(result, tuple) else result
        dist.Work.unbox(work).wait()
        self.seconds += time.perf_counter() - started
        name = func._schema.name.removeprefix("c10d::")
        self.calls[name] += 1
        self.bytes[name] += max(_size(argument) for argument in args)
        return result

    def sent(self, workers: int) -> float:
        """Bytes that one of so many workers sends, if the collectives go around in a ring."""
        ways = sum(size * (2 if name in SHARED_BY_ALL else 1) for name, size in self.bytes.items())
        return ways * (workers - 1) / workers


def _size(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_iter(argument) if isinstance(t, Tensor))
