"""Portable checkpoints: safetensors by parameter name and JSON, whole or not there at all.

    checkpoints/nimg-000012800/
        generator-00000-of-00002.safetensors    NAME/weight, NAME/exp_avg, NAME/exp_avg_sq, NAME/ema
        fake_score-00000-of-00002.safetensors   the same without ema
        progress.json                           the counters
        complete.json                           size and sha256 of all files; written last

Each rank writes its share of the parameters, a few at a time as they are gathered; when all have, rank 0 writes the
marker (`storage.depot`). Any number of workers and any ZeRO stage reads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from sid_ray.errors import UserError
from sid_ray.storage.depot import Damaged, Depot, Written
from sid_ray.training.distributed import World
from sid_ray.training.engines import TrainedNetwork
from sid_ray.training.networks import Networks
from sid_ray.training.progress import Progress
from sid_ray.training.tensor_file import write_tensors

FORMAT = 2
ROLES = ("generator", "fake_score")
PAUSES = (1.0, 4.0)
"""Seconds before a failed checkpoint is written again."""
log = logging.getLogger(__name__)
T = TypeVar("T")

NamedState = dict[str, dict[str, Tensor]]
"""Parameter name -> key (`weight`, `exp_avg`, `exp_avg_sq`, `ema`) -> full float32 tensor."""


def save_checkpoint(
    depot: Depot, networks: Networks, progress: Progress, world: World, before_marker: Callable[[], None] = lambda: None
) -> str | None:
    """Write a checkpoint of all ranks together; returns why that failed, after retries, or None. Collective.

    A usable checkpoint of the same image count is left as it is; a failure leaves all others as they are.
    `before_marker` is called on the first worker when all files are there; an OSError from it is a failure too.
    """
    name = f"nimg-{progress.nimg:012d}"
    for pause in (*PAUSES, None):
        problem = _write(depot, name, networks, progress, world, before_marker)
        if problem is None or pause is None:
            return problem
        time.sleep(pause)
    return problem


def clean_up(depot: Depot, keep: int, wanted: Iterable[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, and those at or before each of the image counts `wanted`.

    Called by the first worker after a checkpoint was written; also removes damaged ones.
    """
    names = complete_names(depot)
    kept = {*names[:keep], *(best_name(names, nimg) for nimg in wanted)}
    for name in depot.names():
        if name not in kept:
            depot.remove(name)


def complete_names(depot: Depot) -> list[str]:
    """Names of the complete checkpoints, newest first; damaged ones are left out with a warning.

    Files are checked by size only; `restore` checks their content. UserError if another version wrote one.
    """
    complete = []
    for name in reversed([n for n in depot.names() if n.startswith("nimg-")]):
        marker = depot.marker(name)
        if marker is not None and marker.get("format") != FORMAT:
            raise UserError(
                f"{depot.where(name)} has format {marker.get('format')}; this version reads format {FORMAT}"
            )
        problem = depot.problem(name)
        if problem is None:
            complete.append(name)
        else:
            log.warning("checkpoint %s is skipped: %s", depot.where(name), problem)
    return complete


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a local folder, newest first; see `complete_names`."""
    return [folder / name for name in complete_names(Depot(folder))]


def best_name(names: list[str], best_nimg: int | None) -> str | None:
    """Of complete checkpoints, newest first, that at the best FID's image count or the nearest before it."""
    if best_nimg is None:
        return None
    return next((name for name in names if nimg_of(name) <= best_nimg), None)


def nimg_of(name: str) -> int:
    """The image count in a checkpoint's name."""
    return int(name.removeprefix("nimg-"))


def restore(depot: Depot, world: World, note: Callable[[str], None]) -> Path | None:
    """Folder of the newest checkpoint that is intact on every worker, its files verified; None if there is none.

    Damaged ones are passed over, saying so, and lose their marker, so that they are written again when training
    comes by. UserError if the storage cannot be read. Collective.
    """
    for name in world.once(lambda: complete_names(depot)):
        path, damage, failure = None, None, None
        try:
            path = depot.fetch(name)
        except Damaged as error:
            damage = str(error)
        except OSError as error:
            failure = f"run.storage: {depot.where(name)} cannot be read: {error}"
        outcomes = world.gather((damage, failure))
        if failures := [f for _, f in outcomes if f is not None]:
            raise UserError(failures[0])
        damages = [d for d, _ in outcomes if d is not None]
        if not damages:
            return path
        if world.is_first:
            note(f"warning: checkpoint {name} is damaged and passed over: {damages[0]}")
            depot.disown(name)
    return None


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


def _write(
    depot: Depot, name: str, networks: Networks, progress: Progress, world: World, before_marker: Callable[[], None]
) -> str | None:
    """One attempt at `save_checkpoint`."""
    suffix = f"{world.rank:05d}-of-{world.size:05d}.safetensors"

    def begin() -> bool:
        if world.is_first and depot.problem(name) is None:
            return False
        if world.is_first:
            depot.begin(name)
        return True

    def put(file: str, write: Callable[[Path], object]) -> Written:
        write(depot.aside(name) / file)
        return depot.put(name, file)

    def commit() -> None:
        if world.is_first:
            counters = progress.model_dump_json(indent=2)
            files = [*written, put("progress.json", lambda path: path.write_text(counters))]
            before_marker()
            depot.commit(name, files, format=FORMAT, nimg=progress.nimg, rollbacks=progress.rollbacks)

    written: list[Written] = []
    try:
        if not all(_together(world, begin)):
            return None
        for role, network in (("generator", networks.generator), ("fake_score", networks.fake_score)):
            write = partial(_write_share, network, world)
            written += _together(world, partial(put, f"{role}-{suffix}", write))
        _together(world, commit)
    except _Failed as failure:
        return str(failure)
    finally:
        depot.abandon(name)
    return None


class _Failed(Exception):
    """Some worker could not write; raised on all."""


def _together(world: World, action: Callable[[], T]) -> list[T]:
    """Do it on every worker; what came out of it, in the order of ranks. _Failed on all if it failed on any."""
    result: T | None = None
    problem = None
    try:
        result = action()
    except OSError as error:
        problem = str(error)
    outcomes = world.gather((result, problem))
    if problems := [p for _, p in outcomes if p is not None]:
        raise _Failed(problems[0])
    return [cast(T, r) for r, _ in outcomes]


def _write_share(network: TrainedNetwork, world: World, path: Path) -> None:
    """Write this rank's share of the parameters, one after the other as they are gathered. Collective."""
    own = list(network.shapes)[world.rank :: world.size]
    shapes = {f"{name}/{key}": network.shapes[name] for name in own for key in network.keys}
    write_tensors(path, shapes, _own_share(network, world))


def _own_share(network: TrainedNetwork, world: World) -> Iterator[tuple[str, Tensor]]:
    for index, (name, tensors) in enumerate(network.gather()):
        if index % world.size == world.rank:
            for key, tensor in tensors.items():
                yield f"{name}/{key}", tensor.float()
