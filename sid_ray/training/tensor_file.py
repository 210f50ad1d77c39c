"""Writing safetensors one tensor at a time; the library's own writer wants them all in memory at once.

The format (https://huggingface.co/docs/safetensors): the size of the header as 8 bytes, little-endian; the header, JSON
that gives each tensor's dtype, shape and place; the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 8


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write float32 tensors, which come with their names in the order of `shapes`, as they come.

    `tensors` is consumed to its end also if the file cannot be written (OSError), for other workers may depend on it.
    ValueError if something else comes than was announced.
    """
    coming = iter(tensors)
    try:
        with path.open("wb") as file:
            file.write(_header(shapes))
            for (name, shape), (given, tensor) in zip(shapes.items(), coming, strict=True):
                if given != name or tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
                    raise ValueError(f"{path}: expected {name} {tuple(shape)}, got {given} {tuple(tensor.shape)}")
                file.write(tensor.detach().cpu().numpy().tobytes())
    except OSError:
        deque(coming, maxlen=0)
        raise


def _header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
