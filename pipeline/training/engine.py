"""DeepSpeed beneath the trainer: mixed precision, ZeRO 0 and 1, and a state in our own terms.

The state names every tensor by its parameter, whatever the ZeRO stage and the number of ranks, so
that a checkpoint of one arrangement loads into another. DeepSpeed's own checkpoints are not used:
they unpickle, and they carry no checksum.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import Config
from pipeline.distributed import World
from pipeline.models import Network, Output
from pipeline.training import compiling, optim
from pipeline.training.idle import IdleParameters, Place, is_moment, kept

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(world: World) -> None:
    """Load what an engine needs and this module does not: seconds, better spent before all else."""
    if world.device.type == "cpu":
        # Asked while it is loaded; left to itself it takes whatever device it finds, and says so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _without("mlflow"):
        import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401  which every optimizer loads


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Within, a package that is not loaded yet cannot be.

    DeepSpeed's autotuner, which is not used here, loads MLflow where it can: a third of the time
    that a rank takes to start, and thousands of small files read by every rank of a cluster.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def has_kernels(precision: str) -> bool:
    """Whether this CPU has fast convolutions of the precision."""
    ops = torch.ops.mkldnn
    probes = {"bf16": ops._is_mkldnn_bf16_supported, "fp16": ops._is_mkldnn_fp16_supported}
    return precision not in probes or bool(probes[precision]())


class Engine:
    """One network with its optimizer, schedule and precision, on all ranks."""

    def __init__(
        self, model: Network, config: Config, world: World, factor: Callable[[int], float]
    ) -> None:
        """Args:
        factor: of the learning rates, as a function of the optimizer step.
        """
        load(world)
        import deepspeed
        from deepspeed.runtime import torch_autocast

        # DeepSpeed notes in a global that an engine of this process uses autocast, and in which
        # precision: after one in fp16, ZeRO would scale the losses of every later engine, and its
        # clipping does not know of the scale.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        # Training calls none of DeepSpeed's compiled kernels; unless told that there are none, it
        # probes compilers and builds a shared-memory kernel at start, which needs a C++ compiler.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        deepspeed.utils.logger.setLevel(logging.ERROR)

        if world.device.type == "cpu":
            keep_freed_memory()
        self.model = model
        self.world = world
        self._inner = optim.build(self.model, config.optimizer)
        self._names = _names_by_group(self.model, self._inner)
        self._idle = IdleParameters(model) if model.step_choices else None
        self._factor = factor
        self._base_rates = [group["lr"] for group in self._inner.param_groups]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=self._inner,
            config=_deepspeed_config(config, world),
            dist_init_required=False,
        )
        # They measure for a report that nobody asked for, and wait for the device twice in every
        # step to do so; torch.compile would trace them with the network.
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        # Without ZeRO it would go from parameter to parameter, for milliseconds at every update.
        self._engine.zero_grad = self._inner.zero_grad
        self._engine.clip_fp32_gradients = self._clip
        # DeepSpeed copies every gradient to a buffer and back to sum it, over a single rank too. It
        # also fills in those that are missing, without which the optimizer keeps no state of them.
        self._engine.enable_backward_allreduce = (
            self._zero or world.world_size > 1 or self._idle is not None
        )
        self._compiled = config.train.compile
        if self._compiled:
            compiling.begin(model, config, world.device)
        self._scale: LossScale | None = None
        if self._zero and config.train.precision == "fp16":
            self._scale = LossScale()
            # DeepSpeed's own scaler is not lowered when ZeRO finds an overflow, so that no later
            # step is made, and its clipping does not know of the scale.
            self._optimizer.torch_autocast_gradscaler = None
            self._optimizer.override_loss_scale(self._scale.value)
        self._to_step(0)
        self.applied_rates = self.learning_rates()  # those of the last update, for the record

    def close(self) -> None:
        """Let go of the network, for another engine."""
        if self._idle:
            self._idle.close()
        self._engine.destroy()
        if self._compiled:
            compiling.end(self.model)
        for parameter in self.model.parameters():
            parameter.grad = None

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """Training forward pass of this rank's micro-batch, in the configured precision."""
        return self._engine(images, steps)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """After each micro-batch; updates the weights when the last of an update is in."""
        with self._idle_kept():
            self._engine.step()
        if self.updated:
            self.applied_rates = self.learning_rates()
            if self._scale:
                self._scale.update(overflow=self._optimizer.overflow)
                self._optimizer.override_loss_scale(self._scale.value)
            self._to_step(self._steps + 1)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._engine.gradient_clipping())

    def _to_step(self, step: int) -> None:
        """Set the rates of an optimizer step; one that a loss scale skipped counts as made."""
        self._steps = step
        for group, base in zip(self._inner.param_groups, self._base_rates, strict=True):
            group["lr"] = base * self._factor(step)

    @contextmanager
    def _idle_kept(self) -> Iterator[None]:
        """Within, an update leaves the parameters that no gradient reached alone."""
        closes = self._engine.is_gradient_accumulation_boundary()
        idle = self._idle.take() if self._idle and closes else {}
        with kept(idle, [*self._places(idle)], self._inner.state) if idle else nullcontext():
            yield

    def _places(self, names: Collection[str]) -> Iterator[Place]:
        """Where the inner optimizer has these parameters on this rank."""
        for flat, layout in self._partitions():
            start = flat.numel() * self.world.rank if self._zero else 0
            for name, shape, offset in layout:
                first = max(offset - start, 0)
                last = min(offset + shape.numel() - start, flat.numel())
                if name in names and first < last:
                    yield flat, slice(first, last) if self._zero else ...

    @property
    def micro_batch(self) -> int:
        """Number of the coming micro-batch in its optimizer step, from 0."""
        return int(self._engine.micro_steps % self._engine.gradient_accumulation_steps())

    @property
    def updated(self) -> bool:
        """Whether the last `step` closed an optimizer step."""
        return bool(self._engine.micro_steps % self._engine.gradient_accumulation_steps() == 0)

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group in the coming update."""
        return {group["name"]: float(group["lr"]) for group in self._inner.param_groups}

    def loss_scale(self) -> float | None:
        """Current loss scale of fp16; None in other precisions."""
        scaler = self._scaler
        return float(scaler.state_dict()["scale"]) if scaler else None

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, step and loss scale; collective. Parameters are the model's own state."""
        return {
            "moments": self._moments(),
            "step": self._steps,
            "loss_scale": self._scaler.state_dict() if self._scaler else None,
            "learning_rates": self.learning_rates(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore after the model's own state has been loaded.

        Raises:
            ValueError: the state is of other parameters.
        """
        if self._zero:
            self._optimizer.refresh_fp32_params()
        self._load_moments(state.get("moments", {}))
        self._to_step(state["step"])
        if self._scaler and state["loss_scale"]:
            self._scaler.load_state_dict(state["loss_scale"])
        if self._scale:
            self._optimizer.override_loss_scale(self._scale.value)
        assert self.learning_rates() == state["learning_rates"], "the schedule is another"

    @property
    def _zero(self) -> bool:
        return bool(self._engine.zero_optimization())

    @property
    def _scaler(self) -> Any:
        """What scales fp16 losses, torch's GradScaler or ours; None in other precisions."""
        return self._scale or self._engine.torch_autocast_z0_gradscaler

    def _moments(self) -> dict[str, dict[str, Any]]:
        """Optimizer state: kind ("momentum_buffer", ...) -> parameter name -> value."""
        moments: dict[str, dict[str, Any]] = {}
        for group, (flat, layout) in enumerate(self._partitions()):
            for kind, value in sorted(self._inner.state[flat].items()):
                whole = self._gather(value, group) if is_moment(value) else value
                for name, shape, offset in layout:
                    moments.setdefault(kind, {})[name] = (
                        whole[offset : offset + shape.numel()].view(shape)
                        if is_moment(value)
                        else whole
                    )
        return moments

    def _load_moments(self, moments: dict[str, dict[str, Any]]) -> None:
        known = {name for names in self._names for name in names}
        for kind, values in moments.items():
            if set(values) != known:
                odd = sorted(set(values) ^ known)
                raise ValueError(
                    f"optimizer state {kind!r} is of other parameters: {', '.join(odd[:5])}"
                )
        for flat, layout in self._partitions():
            state = self._inner.state[flat]
            for kind, values in moments.items():
                example = values[layout[0][0]]
                if not is_moment(example):
                    state[kind] = example.clone()
                    continue
                end = max(offset + shape.numel() for _, shape, offset in layout)
                size = flat.numel() * (self.world.world_size if self._zero else 1)
                whole = torch.zeros(max(size, end), dtype=example.dtype, device=flat.device)
                for name, shape, offset in layout:
                    whole[offset : offset + shape.numel()] = values[name].to(flat.device).view(-1)
                start = flat.numel() * self.world.rank if self._zero else 0
                piece = whole[start : start + flat.numel()].clone().view(flat.shape)
                state[kind] = piece if self._zero else _like(piece, flat)

    def _partitions(self) -> Iterator[tuple[Tensor, list[tuple[str, torch.Size, int]]]]:
        """Each tensor that the inner optimizer updates, with the parameters that lie in it.

        Without ZeRO that is the parameter itself, at offset 0. With ZeRO 1 it is this rank's slice
        of a flat tensor of a whole group, and the offsets are those in the flat tensor.
        """
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        if not self._zero:
            for group in self._inner.param_groups:
                for parameter in group["params"]:
                    yield parameter, [(names[parameter], parameter.shape, 0)]
            return
        zero = self._optimizer
        for flat, members, offsets in zip(
            zero.single_partition_of_fp32_groups,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            strict=True,
        ):
            yield (
                flat,
                [
                    (names[member], member.shape, int(offset))
                    for member, offset in zip(members, offsets, strict=True)
                ],
            )

    def _gather(self, piece: Tensor, group: int) -> Tensor:
        """The whole flat tensor of which each rank holds a piece of equal size."""
        if not self._zero or self.world.world_size == 1:
            return piece.reshape(-1)
        pieces = [torch.empty_like(piece) for _ in range(self.world.world_size)]
        dist.all_gather(pieces, piece, group=self._optimizer.real_dp_process_group[group])
        return torch.cat(pieces)


# Names of glibc's malloc.h, which Python's ctypes does not know.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for the next step's activations.

    glibc gives large blocks back to the system when they are freed; to get them again costs a page
    fault per 4 KiB, in every step, up to a tenth of a step's CPU time. Other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


class LossScale:
    """Dynamic loss scale by the rule and with the constants of torch.amp.GradScaler.

    Halved when gradients overflow, doubled after 2,000 updates without.
    """

    def __init__(self) -> None:
        self.value = 2.0**16
        self._good_steps = 0

    def update(self, overflow: bool) -> None:
        self._good_steps = 0 if overflow else self._good_steps + 1
        if overflow:
            self.value /= 2
        elif self._good_steps == 2000:
            self.value *= 2
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.value, "_growth_tracker": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._good_steps = state["scale"], state["_growth_tracker"]


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    """The values in the parameter's memory layout, as a fresh optimizer would hold them."""
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(values)


def _names_by_group(model: Network, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    train = config.train
    described: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size
        // (train.accumulation * world.world_size),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if train.precision != "fp32":
        dtype = str(DTYPES[train.precision]).removeprefix("torch.")
        described["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return described
