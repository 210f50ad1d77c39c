"""EDM's public checkpoints (`.pkl`) read without trusting them.

The files are pickles whose every network module is a record of `torch_utils.persistence`: class name, state,
and the source text of its class, which the usual way of loading executes. Here nothing is executed: an
unpickler with an allow-list builds inert records, and the tensors are taken out of those. Whatever else a
pickle asks for is refused by name before it runs.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.teachers.checkpoint import Checkpoint
from sid_ray.teachers.pickle_scan import RefusedPickle, scan
from sid_ray.teachers.public import EDM_LICENCE

EDM_NAMES = ("edm-", "sid-", "sida-")
"""How the names begin of EDM's checkpoints and of what SiD's authors made from them, all under EDM's licence."""
LARGEST_FILE = 8 * 2**30
"""Bytes; the largest public checkpoint (ImageNet 64) has 1.2e9."""
DEEPEST = 200
"""Nesting of records beyond which a file is not a network."""
WANTED = ("ema", "net", "model", "G_ema")
"""Keys of a checkpoint's dictionary that may hold the network, in this order."""


class Record:
    """A module of the checkpoint as data: what it was called and what it held. Nothing of it can run."""

    def __init__(self, meta: Any = None):
        meta = meta if isinstance(meta, dict) else {}
        self.class_name = str(meta.get("class_name", ""))
        state = meta.get("state")
        self.state: dict[str, Any] = dict(state) if isinstance(state, dict) else {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedPickle(f"a module's state is a {type(state).__name__}, not a dictionary")
        self.state = dict(state)


class _Dtype:
    """Stand-in for numpy.dtype: the name of a number type."""

    def __init__(self, code: str):
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str) else "<"


_NUMBERS = {"f4": "f", "f8": "d", "f2": "e", "i4": "i", "i8": "q", "i2": "h", "i1": "b", "u1": "B", "b1": "?"}


def _make_dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str) or code.lstrip("<>=|") not in _NUMBERS:
        raise RefusedPickle(f"numpy.dtype {code!r} is not a plain number type")
    return _Dtype(code.lstrip("<>=|"))


def _scalar(dtype: Any, data: Any = None) -> float | int | bool:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, str)):
        raise RefusedPickle("numpy scalar without plain bytes")
    raw = data.encode("latin1") if isinstance(data, str) else data
    order = ">" if dtype.order == ">" else "<"
    try:
        return struct.unpack(order + _NUMBERS[dtype.code], raw)[0]
    except struct.error as error:
        raise RefusedPickle(f"numpy scalar of type {dtype.code}: {error}") from error


class _Inert:
    """Base of what the file may hold but not alter."""

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickle(f"it alters a {type(self).__name__.strip('_').lower()} after building it")


class _Storage(_Inert):
    """The values of tensors, of one number type."""

    def __init__(self, values: Tensor):
        self.values = values


class _Tensor(_Inert):
    """A view of a storage, checked to lie inside it."""

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    @property
    def nbytes(self) -> int:
        """Bytes of a copy."""
        return math.prod(self.size) * self.storage.values.element_size()

    def copy(self) -> Tensor:
        """A tensor of its own."""
        return self.storage.values.as_strided(self.size, self.stride, self.offset).clone()


LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch's old file format begins, the only one in which checkpoints nest their storages."""


def _storage(data: Any) -> _Storage:
    """A tensor's storage; the nested file is read by torch's own restricted loader."""
    if not isinstance(data, bytes) or not data.startswith(LEGACY_MAGIC):
        raise RefusedPickle("torch.storage._load_from_bytes is given no storage of torch's old format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own TypedStorage
        try:
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise RefusedPickle(f"a nested storage asks for {named[1] if named else 'more than numbers'}") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise RefusedPickle(f"a storage holds a {type(storage).__name__}")
        untyped = storage._untyped_storage
        if untyped.nbytes() > len(data):
            raise RefusedPickle(f"a storage claims {untyped.nbytes()} bytes in a record of {len(data)}")
        return _Storage(torch.tensor([], dtype=storage.dtype).set_(untyped))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise RefusedPickle("a tensor without a storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or not len(size) == len(stride) <= 8:
        raise RefusedPickle("a tensor of impossible shape")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride)):
        raise RefusedPickle("a tensor of impossible shape")
    available = storage.values.numel()
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if numel and (last >= available or numel > available):
        raise RefusedPickle(f"a tensor of shape {size} does not fit its {available} stored values")
    return _Tensor(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise RefusedPickle("a parameter that is not a tensor")
    return data


class _Container(Record):
    """ModuleDict, ModuleList, Sequential."""


class _Maker(_Inert):
    """A function that a pickle may call; unlike a plain one it cannot be given attributes by the file."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
    ("torch.storage", "_load_from_bytes"): _Maker(_storage),
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("torch.nn.modules.container", "ModuleList"): _Container,
    ("torch.nn.modules.container", "Sequential"): _Container,
    ("numpy._core.multiarray", "scalar"): _Maker(_scalar),
    ("numpy.core.multiarray", "scalar"): _Maker(_scalar),
    ("numpy", "dtype"): _Maker(_make_dtype),
}
"""Everything a checkpoint may name, and the inert thing that stands for it."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise RefusedPickle(f"it asks for {module}.{name}, which no checkpoint needs")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("it refers to objects outside the file")

    def get_extension(self, code: int) -> Any:
        raise RefusedPickle(f"it uses the pickle extension {code}")


def is_edm_pickle(path: Path) -> bool:
    """Whether a file is named like a pickle."""
    return path.suffix == ".pkl" and path.is_file()


def read_edm_pickle(path: Path, field_name: str = "source") -> Checkpoint:
    """The network of an EDM, SiD or SiDA checkpoint.

    UserError, naming the file and what it asked for, for anything but such a checkpoint. No code of the file
    is executed, and nothing is built that the file does not hold bytes for.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise RefusedPickle(f"it has {size} bytes; allowed: up to {LARGEST_FILE}")
        scan(path)
        with path.open("rb") as file:
            content = _RestrictedUnpickler(file).load()
        record = _find_network(content)
        tensors: dict[str, _Tensor] = {}
        _collect(record, "", tensors, set(), 0)
        if (total := sum(t.nbytes for t in tensors.values())) > size:
            raise RefusedPickle(f"its tensors claim {total} bytes in a file of {size}")
        state = {name: tensor.copy() for name, tensor in tensors.items()}
        network, sigma_data = _architecture(record)
    except OSError as error:
        raise UserError(f"{field_name}: {path} cannot be read: {error}") from error
    except RefusedPickle as error:
        raise UserError(f"{field_name}: {path} is refused: {error}. Nothing in it was executed") from error
    except Exception as error:  # a broken or hostile file can fail anywhere in the unpickler
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{field_name}: {path} is not a readable checkpoint ({reason}). Nothing was executed"
        ) from error
    licence = EDM_LICENCE if path.name.startswith(EDM_NAMES) else None
    return Checkpoint(network, state, sigma_data, licence)


def _find_network(content: Any) -> Record:
    if isinstance(content, Record):
        return content
    if isinstance(content, dict):
        for key in WANTED:
            if isinstance(content.get(key), Record):
                return content[key]
        raise RefusedPickle(
            f"it holds no network under {', '.join(WANTED)}; found: {', '.join(map(str, list(content)[:8]))}"
        )
    raise RefusedPickle(f"it holds a {type(content).__name__}, not a checkpoint")


def _collect(record: Record, prefix: str, tensors: dict[str, _Tensor], seen: set[int], depth: int) -> None:
    """Parameters and persistent buffers of a record and its modules, in torch's order."""
    if depth > DEEPEST or id(record) in seen:
        raise RefusedPickle("its modules contain each other")
    seen.add(id(record))
    hidden = record.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _mapping(record, kind).items():
            if tensor is None or (kind == "_buffers" and name in hidden):
                continue
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise RefusedPickle(f"{prefix}{name} in {kind} is a {type(tensor).__name__}")
            tensors[prefix + name] = tensor
    for name, module in _mapping(record, "_modules").items():
        if module is None:
            continue
        if not isinstance(name, str) or not isinstance(module, Record):
            raise RefusedPickle(f"module {prefix}{name} is a {type(module).__name__}")
        _collect(module, f"{prefix}{name}.", tensors, seen, depth + 1)


def _mapping(record: Record, key: str) -> dict[Any, Any]:
    value = record.state.get(key, {})
    if not isinstance(value, dict):
        raise RefusedPickle(f"{key} is a {type(value).__name__}, not a dictionary")
    return dict(value)  # the file may have given an OrderedDict attributes of its own


def _architecture(record: Record) -> tuple[dict[str, Any], float]:
    """Arguments of `EDMDenoiser` from the record of EDMPrecond."""
    if record.class_name != "EDMPrecond":
        raise RefusedPickle(f"its network is a {record.class_name or 'nameless class'!r}; supported: EDMPrecond")
    arguments = record.state.get("_init_kwargs")
    if not isinstance(arguments, dict) or not arguments:
        raise RefusedPickle("it does not record its architecture (_init_kwargs)")
    if record.state.get("_init_args"):
        raise RefusedPickle("it records its architecture by position (_init_args)")
    network = {str(k): _plain(k, v) for k, v in arguments.items()}
    for ignored in ("use_fp16", "sigma_min", "sigma_max"):
        network.pop(ignored, None)
    return network, float(network.pop("sigma_data", 0.5))


def _plain(name: Any, value: Any) -> Any:
    """The argument, if it is one a network could have: building must not be made to run forever."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and 0 <= value <= (64 if name == "num_blocks" else 65_536):
        return value
    if isinstance(value, str) and len(value) <= 64:
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 32 and not any(isinstance(v, (list, tuple)) for v in value):
        return [_plain(name, v) for v in value]
    raise RefusedPickle(f"architecture argument {name!r} is impossible ({type(value).__name__})")
