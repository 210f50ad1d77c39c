"""Portable checkpoints: safetensors by parameter name and JSON, whole or not there at all.

    checkpoints/nimg-000012800/
        generator-00000-of-00002.safetensors    NAME/weight, NAME/exp_avg, NAME/exp_avg_sq, NAME/ema
        fake_score-00000-of-00002.safetensors   the same without ema
        progress.json                           the counters
        complete.json                           names and sizes of all files; written last

Each rank writes its share of the parameters into a folder aside; when all have, rank 0 writes the marker and
renames the folder. Any number of workers and any ZeRO stage reads it.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.training.distributed import World
from sid_ray.training.engines import Networks, TrainedNetwork
from sid_ray.training.progress import Progress

FORMAT = 1
MARKER = "complete.json"
ROLES = ("generator", "fake_score")
log = logging.getLogger(__name__)

NamedState = dict[str, dict[str, Tensor]]
"""Parameter name -> key (`weight`, `exp_avg`, `exp_avg_sq`, `ema`) -> full float32 tensor."""


def save_checkpoint(folder: Path, networks: Networks, progress: Progress, world: World, keep: int) -> Path:
    """Write a checkpoint of all ranks together and return its path; afterwards keep the newest `keep`.

    Collective. A complete checkpoint of the same image count is left as it is.
    """
    final = folder / f"nimg-{progress.nimg:012d}"
    aside = folder / f".{final.name}.partial"
    if _problem(final) is None:
        return final
    if world.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    for role in ROLES:
        share = _own_share(getattr(networks, role), world)
        save_file(share, aside / f"{role}-{world.rank:05d}-of-{world.size:05d}.safetensors")
    if world.is_first:
        (aside / "progress.json").write_text(progress.model_dump_json(indent=2))
    world.barrier()
    if world.is_first:
        sizes = {p.name: p.stat().st_size for p in sorted(aside.iterdir())}
        (aside / MARKER).write_text(json.dumps({"format": FORMAT, "nimg": progress.nimg, "files": sizes}, indent=2))
        aside.rename(final)
        for old in complete_checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    world.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first; damaged ones are left out with a warning."""
    complete = []
    for path in sorted(folder.glob("nimg-*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            complete.append(path)
        else:
            log.warning("checkpoint %s is skipped: %s", path, problem)
    return complete


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress.model_validate_json((checkpoint / "progress.json").read_text())


def read_network(checkpoint: Path, role: str) -> NamedState:
    """A network's full state, put together from all ranks' shares, on the CPU."""
    state: NamedState = {}
    for part in sorted(checkpoint.glob(f"{role}-*.safetensors")):
        for key, tensor in load_file(part).items():
            name, _, kind = key.rpartition("/")
            state.setdefault(name, {})[kind] = tensor
    return state


def check_names(state: NamedState, network: torch.nn.Module, checkpoint: Path) -> None:
    """UserError unless a checkpoint's parameters are those of the network."""
    expected = {name: p.shape for name, p in network.named_parameters()}
    found = {name: tensors["weight"].shape for name, tensors in state.items()}
    if expected != found:
        name = next(n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n))
        raise UserError(
            f"{checkpoint} belongs to another architecture: {name} is {found.get(name)} there, "
            f"{expected.get(name)} in this run"
        )


def _own_share(network: TrainedNetwork, world: World) -> dict[str, Tensor]:
    share: dict[str, Tensor] = {}
    for index, (name, tensors) in enumerate(network.gather()):
        if index % world.size == world.rank:
            share |= {f"{name}/{key}": t.float().cpu().clone() for key, t in tensors.items()}
    return share


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it can. UserError if a newer version wrote it."""
    try:
        marker = json.loads((path / MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        return f"it has no readable {MARKER}"
    if marker.get("format") != FORMAT:
        raise UserError(f"{path} has format {marker.get('format')}; this version reads format {FORMAT}")
    for name, size in marker["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has not the size it was written with"
    return None
