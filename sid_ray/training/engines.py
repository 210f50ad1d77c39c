"""A network inside a DeepSpeed engine.

All that the project knows about DeepSpeed is here, and in `shares` what it cuts parameters into. Gradient flows
through the fake score while the generator learns: networks are therefore always called as `.module`, never through the
engine's own forward, whose hooks would take those gradients for the fake score's own.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.config import Config
from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.diffusion.generator import one_hot
from sid_ray.training.distributed import World
from sid_ray.training.optimizer import AdamWithEMA
from sid_ray.training.shares import gather_full, set_share

STATE_KEYS = ("exp_avg", "exp_avg_sq")
LARGEST_BUCKET = 12_288 * 4096
"""Elements (5e7) that DeepSpeed reduces or gathers at once; its default of 5e8 would waste gigabytes."""


def import_deepspeed() -> Any:
    """Import DeepSpeed, set up for the machine at hand."""
    # It calls collectives that torch renames; nobody who runs this can do anything about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.cuda.is_available():
        # Else the first start compiles a shared-memory extension: a minute, a compiler, a lock that can hang.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _initialize(**arguments: Any) -> Any:
    """A new engine. In bf16 DeepSpeed prints its memory on the way, between our own lines of progress."""
    deepspeed = import_deepspeed()
    with redirect_stdout(io.StringIO()):
        return deepspeed.initialize(dist_init_required=False, **arguments)[0]


def _engine_config(config: Config, module: nn.Module, slots_per_rank: int, world_size: int) -> dict[str, Any]:
    numel = sum(p.numel() for p in module.parameters())
    bucket = min(LARGEST_BUCKET, -(-numel // 4096) * 4096)  # DeepSpeed wants it aligned
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": slots_per_rank,
        "train_batch_size": config.micro_batch * slots_per_rank * world_size,
        "gradient_clipping": config.optimizer.gradient_clip or 0.0,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.engine.bf16, "check_grad_overflow": True},
        # float32 from the first addition to the last, else the number of workers would change the result.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**12,
    }


@contextmanager
def frozen(module: Denoiser) -> Iterator[Denoiser]:
    """A network in eval mode with parameters that take no gradient; afterwards they do."""
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


class TrainedNetwork:
    """A network that learns: its module, its sharded optimizer and, for the generator, its average.

    `shapes`: full shapes of the parameters by name, in order; `keys`: what there is of each, `weight` first.

    Use `module` for every forward pass, `backward` with this rank's share of the loss, then `step`; the update
    happens at the last slot. Losses are summed over ranks and slots: divide by the global batch yourself.
    """

    def __init__(
        self, denoiser: Denoiser, config: Config, world: World, slots_per_rank: int, *, beta1: float, ema: bool
    ):
        self.world, self.slots_per_rank = world, slots_per_rank
        self.stage, self.has_ema = config.engine.zero_stage, ema
        weights = {name: p.detach().float().cpu().clone() for name, p in denoiser.named_parameters()}
        self.shapes = {name: tuple(w.shape) for name, w in weights.items()}
        self.keys = ("weight", *STATE_KEYS, "ema") if ema else ("weight", *STATE_KEYS)
        self.buffers = denoiser.state_dict().keys() - weights.keys()
        optimizer = AdamWithEMA(
            denoiser.parameters(),
            lr=0.0,
            betas=(beta1, 0.999),
            eps=config.adam_eps,
            ema=ema,
            check_finite=self.stage == 0,
            clip=config.optimizer.gradient_clip if self.stage == 0 else None,
        )
        engine_config = _engine_config(config, denoiser, slots_per_rank, world.size)
        if self.stage == 0:
            engine_config["gradient_clipping"] = 0.0  # AdamWithEMA clips there, where it knows the norm anyway
        self.engine = _initialize(model=denoiser, optimizer=optimizer, config=engine_config)
        self.adam = optimizer
        self._create_optimizer_state(weights)

    @property
    def module(self) -> Denoiser:
        """The network, to be called for every forward pass."""
        return self.engine.module

    @property
    def skipped(self) -> int:
        """Steps skipped since the start of this process because a gradient was not finite."""
        return int(self.engine.skipped_steps)

    @property
    def gradient_norm(self) -> float:
        """Global gradient norm of the last step; inf if it was skipped."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's loss; the sum over ranks and slots is what `step` uses."""
        if self.stage > 0:
            # What the engine's own forward, which we never call, would do here as a new slot begins. Without the
            # first ZeRO-3 overwrites the gradients accumulated so far; without the second stage 1 in bf16 counts
            # those of the slots before again.
            self.engine.optimizer.clear_backward_seen_flag()
            self.engine.optimizer.backward_prologue()
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def step(self) -> None:
        """Advance by one slot; at the last one update the parameters, or skip if a gradient is not finite."""
        self.engine.step()

    def set_rates(self, lr: float, ema_beta: float | None = None) -> None:
        """Learning rate, and the share of the old average that is kept, of the next step."""
        for group in self.adam.param_groups:
            group["lr"] = lr
            group["ema_beta"] = ema_beta if self.has_ema else None

    def frozen(self) -> AbstractContextManager[Denoiser]:
        """The module in eval mode with parameters that take no gradient."""
        return frozen(self.module)

    def gather(self, keys: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield for each parameter its name and full float32 tensors: those of `keys`, else all of `self.keys`.

        Collective: every rank must consume it to the end. The tensors are valid until the next item.
        """
        keys = keys or self.keys
        parameters = dict(self.module.named_parameters())
        if self.stage > 0:
            yield from gather_full(parameters, self.shapes, keys, self.stage, self.world)
            return
        for name, p in parameters.items():
            yield name, {key: p.detach() if key == "weight" else self.adam.state[p][key] for key in keys}

    def average(self) -> dict[str, Tensor]:
        """Full moving average on the CPU, with the buffers: a plain state dict. Collective."""
        buffers = self.module.named_buffers()
        state = {name: b.detach().float().cpu() for name, b in buffers if name in self.buffers}
        return state | {name: tensors["ema"].cpu().clone() for name, tensors in self.gather(["ema"])}

    def load(self, tensors: dict[str, dict[str, Tensor]], steps: int) -> None:
        """Set weights, moments and average by parameter name, and Adam's step count.

        The module must have been built with these weights already: only then do its low-precision copies
        agree with the float32 masters.
        """
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                for key, value in tensors[name].items():
                    if self.stage > 0:
                        set_share(p, key, value.to(p.device), self.stage, self.world)
                    else:
                        (p if key == "weight" else self.adam.state[p][key]).copy_(value)
        for state in self.adam.state.values():
            state["step"].fill_(steps)

    def destroy(self) -> None:
        """Let go of DeepSpeed's hooks and of all memory."""
        self.adam.state.clear()
        destroy_engine(self.engine)

    def _create_optimizer_state(self, weights: dict[str, Tensor]) -> None:
        """Bring the optimizer state into being with a step of learning rate 0, then set it as if there was none.

        `weights`: the exact float32 ones; in bf16, DeepSpeed's masters start from rounded copies of them.
        """
        denoiser = self.module
        ones = torch.ones(1, *denoiser.image_shape, device=self.engine.device)
        labels = one_hot(torch.zeros(1, dtype=torch.int64, device=ones.device), denoiser.label_dim)
        for _ in range(self.slots_per_rank):
            self.backward(denoiser(ones, ones.new_ones(1), labels).mean())
            self.step()
        zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.load(
            {
                name: {"weight": w, "exp_avg": zeros[name], "exp_avg_sq": zeros[name]}
                | ({"ema": w} if self.has_ema else {})
                for name, w in weights.items()
            },
            steps=0,
        )


def wrap_frozen(module: nn.Module, config: Config, world: World, slots_per_rank: int) -> Any:
    """DeepSpeed's engine around a network that does not learn, which ZeRO-3 shards as the others."""
    engine_config = _engine_config(config, module, slots_per_rank, world.size)
    return _initialize(model=module, config=engine_config)


def destroy_engine(engine: Any) -> None:
    """Let go of an engine's hooks and of all its memory."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    engine.destroy()
    # ZeRO-3 puts each engine's module on this global stack and never takes it off again.
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    # ZeRO-3's engine stays alive all the same, through hooks that the garbage collector does not see: empty it.
    optimizer, engine.optimizer = engine.optimizer, None
    vars(optimizer).clear()
    for p in engine.module.parameters():
        p.data = p.data.new_empty(0)
        if is_zero_param(p):
            p.ds_tensor.data = p.ds_tensor.data.new_empty(0)
