"""Networks that are the user's own code: any module with a denoiser's attributes and call, checked before use."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import one_hot
from sid_ray.errors import UserError
from sid_ray.teachers.model_directory import PYTHON_NETWORK, ModelConfig
from sid_ray.teachers.user_code import HANDED, call_factory

ATTRIBUTES = {
    "image_shape": "(channels, height, width)",
    "label_dim": "the number of classes, 0 without",
    "sigma_data": "the standard deviation of the images",
    "augment_dim": "the number of augmentation labels, 0 without",
}
"""What a denoiser has, and what it means."""


@dataclass(frozen=True)
class Handed:
    """Modules that a Python program hands over, instead of naming networks in the configuration; on the CPU."""

    teacher: Denoiser | None = None
    student: Denoiser | None = None

    @classmethod
    def of(cls, teacher: nn.Module | None, student: nn.Module | None) -> Handed:
        """Checked copies of the modules, so that nothing the program does to them afterwards matters."""

        def taken(module: nn.Module | None, field: str) -> Denoiser | None:
            return None if module is None else check_denoiser(copy.deepcopy(module), field).cpu()

        return cls(taken(teacher, "teacher"), taken(student, "student"))

    def fields(self) -> dict[str, str]:
        """How the configuration records them. A teacher with another state is another teacher; a student is only
        where the run starts from."""
        found = {}
        if self.teacher is not None:
            found["teacher.path"] = f"{HANDED}{type(self.teacher).__name__}-{fingerprint(self.teacher)[:12]}"
        if self.student is not None:
            found["init.student"] = f"{HANDED}{type(self.student).__name__}"
        return found


def handed_over(module: Denoiser | None, path: str, field: str) -> Denoiser:
    """A copy of the module that the configuration records as `path`. UserError if it is not there."""
    if module is None:
        raise UserError(
            f"{field}: {path!r} was handed over by a Python program; the run goes on with the same call of "
            f"sid_ray.distill(..., {'student' if field == 'init.student' else 'teacher'}=...)"
        )
    return copy.deepcopy(module)


def load_python(path: str, field: str) -> tuple[Denoiser, ModelConfig]:
    """The network that `python:package.module:factory` returns, in eval mode, and its configuration."""
    denoiser = check_denoiser(call_factory(path, field), f"{field}: {path}")
    return denoiser, config_of(denoiser, path)


def named_network(name: str | None) -> Denoiser | None:
    """The network that `--network python:package.module:factory` names; None without it."""
    return None if name is None else load_python(name, "--network")[0]


def config_of(denoiser: Denoiser, factory: str | None = None) -> ModelConfig:
    """`config.json` of a network that is the user's code: what it takes, and what to look for to have it again."""
    network: dict[str, Any] = {
        "model_type": PYTHON_NETWORK,
        "class_name": type(denoiser).__name__,
        "factory": factory,
        "image_shape": list(denoiser.image_shape),
        "label_dim": denoiser.label_dim,
        "augment_dim": denoiser.augment_dim,
    }
    return ModelConfig(kind="teacher", network=network, sigma_data=denoiser.sigma_data)


def fingerprint(module: nn.Module) -> str:
    """Hex sha256 of a module's parameters and persistent buffers, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_denoiser(module: object, what: str) -> Denoiser:
    """The module, put in eval mode, if it has a denoiser's attributes and denoises two images as one does.

    UserError, beginning with `what`, that names the attribute that is missing or wrong, or what the call gave.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"{what}: {type(module).__name__} is not a torch.nn.Module")
    for name, meaning in ATTRIBUTES.items():
        if name not in dir(module):
            raise UserError(
                f"{what}: {type(module).__name__} has no attribute {name!r} ({meaning}); derive it from "
                "sid_ray.Denoiser, or set the attribute"
            )
    denoiser: Denoiser = module  # type: ignore[assignment]
    _check_attributes(denoiser, what)
    with torch.no_grad():
        output = _try(denoiser.eval(), what)
    if not isinstance(output, Tensor):
        raise UserError(f"{what}: {_call(denoiser)} gives {type(output).__name__}; allowed: a tensor")
    if output.shape != (2, *denoiser.image_shape) or output.dtype != torch.float32:
        raise UserError(
            f"{what}: {_call(denoiser)} gives {tuple(output.shape)} {output.dtype}; "
            f"allowed: {(2, *denoiser.image_shape)} torch.float32"
        )
    if not bool(output.isfinite().all()):
        raise UserError(f"{what}: {_call(denoiser)} gives values that are not finite")
    return denoiser


def check_trainable(denoiser: Denoiser, what: str, precision: str = "fp32") -> None:
    """UserError, beginning with `what`, unless the network can be the generator and the fake score of a run.

    Its parameters are known by name, all take part in the output, and no buffer changes in a forward pass: what
    depends on a batch, such as batch normalisation, would depend on the number of workers.
    """
    parameters = dict(denoiser.named_parameters())
    if not parameters:
        raise UserError(f"{what}: {type(denoiser).__name__} has no parameters to train; a student is required")
    shared = dict(denoiser.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    if shared:
        raise UserError(f"{what}: the parameter {sorted(shared)[0]} is another one too; tied parameters do not work")
    tried = copy.deepcopy(denoiser).cpu().train().requires_grad_(True)
    before = {name: buffer.clone() for name, buffer in tried.named_buffers()}
    gradients = torch.autograd.grad(_try(tried, what).sum(), list(tried.parameters()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"{what}: the parameter {name} takes no part in the output; remove or freeze it as a buffer"
            )
    for name, buffer in tried.named_buffers():
        if not torch.equal(buffer, before[name]):
            raise UserError(f"{what}: the buffer {name} changes in train mode; batch statistics do not work here")
    if precision == "bf16":
        output = _try(tried.to(torch.bfloat16), f"{what}: engine.precision bf16")
        if output.dtype != torch.float32:
            raise UserError(f"{what}: engine.precision bf16: its output is {output.dtype}; allowed: torch.float32")


def _check_attributes(denoiser: Denoiser, what: str) -> None:
    shape, name = denoiser.image_shape, type(denoiser).__name__
    if not (len(tuple(shape)) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise UserError(f"{what}: {name}.image_shape is {shape!r}; allowed: three numbers (channels, height, width)")
    for attribute, value in (("label_dim", denoiser.label_dim), ("augment_dim", denoiser.augment_dim)):
        if not (isinstance(value, int) and value >= 0):
            raise UserError(f"{what}: {name}.{attribute} is {value!r}; allowed: a whole number from 0 on")
    if not (isinstance(denoiser.sigma_data, (int, float)) and denoiser.sigma_data > 0):
        raise UserError(f"{what}: {name}.sigma_data is {denoiser.sigma_data!r}; allowed: a number above 0")


def _try(denoiser: Denoiser, what: str) -> Any:
    """D(x, sigma, class_labels) of two images of zeros at noise levels 0.5 and 5, on the network's device."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    x = torch.zeros(2, *denoiser.image_shape, device=device)
    labels = one_hot(torch.zeros(2, dtype=torch.int64, device=device), denoiser.label_dim)
    try:
        return denoiser(x, torch.tensor([0.5, 5.0], device=device), labels)
    except Exception as error:  # foreign code: there is no telling what it raises
        raise UserError(f"{what}: {_call(denoiser)} fails: {type(error).__name__}: {error}") from error


def _call(denoiser: Denoiser) -> str:
    shape, dim = (2, *denoiser.image_shape), denoiser.label_dim
    return f"{type(denoiser).__name__}(x {shape}, sigma (2,), class_labels {(2, dim) if dim else None})"
