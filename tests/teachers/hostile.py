"""Hostile and broken checkpoints, made on the spot. Each would do, or cost, something if it were believed."""

import io
import os
import pickle
import struct
from collections import OrderedDict

import torch

MARKER = "executed-by-a-pickle"


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def persistence(state, class_name="EDMPrecond", source=f"import os; os.system('touch {MARKER}')"):
    """A persistence record in the file's own words."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return by_name("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


class Named:
    """A call of a function known by name only, as the unpickler looks it up."""

    def __init__(self, module, name, arguments):
        self.module, self.name, self.arguments = module, name, arguments


def by_name(module, name, *arguments):
    return Named(module, name, arguments)


class Pickler(pickle._Pickler):
    """Writes `Named` calls."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            super().save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def dumped(content):
    file = io.BytesIO()
    Pickler(file, 4).dump(content)
    return file.getvalue()


def storage(tensor):
    """A tensor's storage as torch's old format nests it."""
    file = io.BytesIO()
    torch.save(tensor.storage(), file, _use_new_zipfile_serialization=False)
    return by_name("torch.storage", "_load_from_bytes", file.getvalue())


def tensor(values, offset=0, size=None, stride=None):
    size = tuple(values.shape) if size is None else size
    stride = tuple(values.stride()) if stride is None else stride
    hooks = OrderedDict()
    return by_name("torch._utils", "_rebuild_tensor_v2", storage(values), offset, size, stride, False, hooks)


def network(**state):
    """A checkpoint of a network with this state."""
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"}
    return {"ema": persistence({"_init_kwargs": kwargs, "_parameters": {}, "_buffers": {}, "_modules": {}} | state)}


def old_format(content):
    """torch's old file format around anything."""
    from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

    parts = (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}, content, [])
    return b"".join(pickle.dumps(p, 2) for p in parts)


def corpus():
    """Name -> bytes of a file that must be refused."""
    run = Calls(os.system, f"touch {MARKER}")
    evil_torch = io.BytesIO()
    torch.save({"x": run}, evil_torch, _use_new_zipfile_serialization=False)
    zipped = io.BytesIO()
    torch.save(torch.zeros(3), zipped)
    good, one = dumped(network()), torch.arange(4.0)
    nested_tuple = b"\x80\x04}(" + b"K\x01" + b"\x85" * 200_000 + b"K\x02" + b"u."
    files = {
        "os.system": dumped({"ema": run}),
        "eval": dumped({"ema": Calls(eval, f"open({MARKER!r}, 'w')")}),
        "exec in a state": dumped(network(_parameters={"w": Calls(exec, f"open({MARKER!r}, 'w')")})),
        "getattr": dumped(by_name("builtins", "getattr", 1, "real")),
        "subprocess": dumped(by_name("subprocess", "check_output", ["touch", MARKER])),
        "torch.load": dumped(by_name("torch", "load", "x.pt", None)),
        "dotted name": dumped(by_name("torch._utils", "_rebuild_tensor_v2.__globals__", 1)),
        "operator": dumped(by_name("operator", "attrgetter", "__class__")),
        "nested os.system": dumped(network(_parameters={"w": by_name(
            "torch.storage", "_load_from_bytes", evil_torch.getvalue())})),
        "nested call in old format": dumped(network(_parameters={"w": by_name(
            "torch.storage", "_load_from_bytes", old_format(run))})),
        "nested zip": dumped(network(_parameters={"w": by_name(
            "torch.storage", "_load_from_bytes", zipped.getvalue())})),
        "nested plain pickle": dumped(by_name("torch.storage", "_load_from_bytes", pickle.dumps(run))),
        "storage from text": dumped(by_name("torch.storage", "_load_from_bytes", "text")),
        "numpy object dtype": dumped(by_name("numpy", "dtype", "O8", False, True)),
        "numpy scalar of objects": dumped(by_name(
            "numpy._core.multiarray", "scalar", by_name("numpy", "dtype", "O"), pickle.dumps(run))),
        "numpy reconstruct": dumped(by_name("numpy._core.multiarray", "_reconstruct", 1, (0,), b"b")),
        "numpy scalar too long": dumped(by_name(
            "numpy.core.multiarray", "scalar", by_name("numpy", "dtype", "f8"), b"123")),
        "build on a function": b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        "build on a class": b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n}K\x01K\x01sb.",
        "build on a tensor": dumped(tensor(one))[:-1] + b"}X\x04\x00\x00\x00sizeK\x09sb.",
        "build on a storage": dumped(storage(one))[:-1] + b"}X\x06\x00\x00\x00valuesNsb.",
        "setstate with a number": dumped(persistence({}))[:-1] + b"K\x01b.",
        "persistent id": b"\x80\x04\x8c\x01xQ.",
        "text persistent id": b"\x80\x04Px\n.",
        "extension": b"\x80\x04\x82\x01.",
        "old instance": b"(S'touch x'\nios\nsystem\n.",
        "protocol 5": pickle.dumps(bytearray(b"x"), 5),
        "huge memo index": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
        "huge text memo index": b"\x80\x04K\x01p2147483647\n.",
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**61) + b"K\x01.",
        "huge integer": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
        "million nested tuples": nested_tuple,
        "million nested lists": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "huge tensor": dumped(network(_parameters={"w": tensor(one, size=(2**40,), stride=(0,))})),
        "tensor past its storage": dumped(network(_parameters={"w": tensor(one, offset=3, size=(4,), stride=(1,))})),
        "tensor of negative stride": dumped(network(_parameters={"w": tensor(one, size=(4,), stride=(-1,))})),
        "tensor of a list shape": dumped(network(_parameters={"w": tensor(one, size=[4], stride=[1])})),
        "tensor of a float shape": dumped(network(_parameters={"w": tensor(one, size=(4.0,), stride=(1,))})),
        "tensor without storage": dumped(by_name("torch._utils", "_rebuild_tensor_v2", "x", 0, (1,), (1,))),
        "parameter of text": dumped(by_name("torch._utils", "_rebuild_parameter", "x", True, OrderedDict())),
        "class of another network": dumped({"ema": persistence({}, class_name="Generator")}),
        "no architecture": dumped({"ema": persistence({"_modules": {}})}),
        "architecture by position": dumped(network(_init_args=(8, 1))),
        "impossible architecture": dumped(network(_init_kwargs={
            "img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "num_blocks": 10**9})),
        "unknown architecture": dumped(network(_init_kwargs={
            "img_resolution": 8, "img_channels": 1, "model_type": "Transformer"})),
        "architecture of objects": dumped(network(_init_kwargs={"img_resolution": tensor(one)})),
        "parameters are a list": dumped(network(_parameters=[tensor(one)])),
        "module is text": dumped(network(_modules={"model": "x"})),
        "no tensors": good,
        "no network": dumped({"optimizer": 1}),
        "a list": dumped([1, 2]),
        "cut in half": good[: len(good) // 2],
        "no stop": good[:-1],
        "bytes after the end": good + b"more",
        "empty": b"",
        "not a pickle": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"hello world\n",
        "zeros": bytes(10_000),
    }  # fmt: skip
    return files
