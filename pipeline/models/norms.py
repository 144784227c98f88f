"""Norm banks: which batch-norm parameters and statistics a step of the recursion uses.

| bank             | its norms                                    | source                   |
|------------------|----------------------------------------------|--------------------------|
| `shared`         | one for all steps                            | the naive baseline       |
| `per_step`       | one per step                                 | DRNN Sec. 3.2, LVBN      |
| `gated_per_step` | one per step, executed apart from skipped    | DRNN Sec. 3.4, I-LVBN    |
| per path         | one per (steps of the stage before, step)    | RC Sec. 4.1, Eq. 6       |
| `none`           | none                                         | RC Tables 2 and 3        |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.distributed import several_ranks


@dataclass(frozen=True, eq=False)
class Step:
    """Where in the recursion a norm is called; the only thing that tells steps apart.

    `index` counts from 0. `upstream_steps` is the number of steps that the stage before took.
    `executed` is a bool tensor (N,), or None where every sample takes part.
    """

    index: int
    upstream_steps: int = 1
    executed: Tensor | None = None


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over (N, C, H, W), by groups of samples and over all ranks where asked.

    With `executed` (N,) given in training, the executed and the skipped samples are normalised
    separately, each by its own statistics of the batch, with the same scale and shift; only the
    executed ones update the running statistics (DRNN Sec. 3.4, Eq. 11). With `sync`, the statistics
    of the batch are those of all ranks; every rank must bring images of the same size.

    A frozen norm uses its running statistics in training too and leaves them as they are.
    """

    def __init__(self, channels: int, *, sync: bool = False) -> None:
        super().__init__(channels)
        self.sync = sync
        self.frozen = False

    def train(self, mode: bool = True) -> BatchNorm:
        super().train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor, executed: Tensor | None = None) -> Tensor:
        sync = self.sync and several_ranks()
        if not self.training or (executed is None and not sync):
            y: Tensor = super().forward(x)
            return y
        group = x.new_zeros(len(x), dtype=torch.long) if executed is None else executed.long()
        groups = 1 if executed is None else 2
        y, mean, var, count = _GroupedBatchNorm.apply(
            x, self.weight, self.bias, group, groups, self.eps, sync
        )
        # The last group is the executed one, or the only one.
        self._update_running_statistics(mean[-1], var[-1], count[-1])
        return y

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move towards the batch's statistics; stay where the batch has no such sample."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        present = count > 0
        momentum = self.momentum * present
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * count / (count - 1).clamp(min=1), momentum)
        self.num_batches_tracked.add_(present.squeeze())


class NormBank(nn.Module):
    """The norms of one position in a cell. Called as `bank(x, step)` with x (N, C, H, W)."""

    def __init__(self, channels: int, *, norms: int, sync: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(BatchNorm(channels, sync=sync) for _ in range(norms))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        raise NotImplementedError


class SharedNorm(NormBank):
    """One norm for all steps: what plain weight sharing does, and why it diverges."""

    def __init__(self, channels: int, *, steps: int, sync: bool = False) -> None:
        super().__init__(channels, norms=1, sync=sync)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self.norms[0](x)
        return y


class PerStepNorm(NormBank):
    """One norm per step: DRNN Sec. 3.2 (loopy variable batch norm)."""

    def __init__(self, channels: int, *, steps: int, sync: bool = False) -> None:
        super().__init__(channels, norms=steps, sync=sync)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self.norms[step.index](x)
        return y


class GatedPerStepNorm(NormBank):
    """One norm per step, executed and skipped samples apart: DRNN Sec. 3.4 (improved LVBN)."""

    def __init__(self, channels: int, *, steps: int, sync: bool = False) -> None:
        super().__init__(channels, norms=steps, sync=sync)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self.norms[step.index](x, step.executed)
        return y


class PerPathNorm(NormBank):
    """One norm per step and path that leads to it: RC Sec. 4.1, Eq. 6 (double independent BN).

    `paths` gives, for each number of steps that the stage before can take, the steps taken here
    after it. With one number of steps for the whole network these are the rows of Eq. 6 up to the
    diagonal, which are all that is ever used (Sec. 4.2).
    """

    def __init__(self, channels: int, *, paths: Mapping[int, int], sync: bool = False) -> None:
        super().__init__(channels, norms=sum(paths.values()), sync=sync)
        places = [(before, index) for before, steps in paths.items() for index in range(steps)]
        self._number = {place: number for number, place in enumerate(places)}

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y: Tensor = self.norms[self._number[step.upstream_steps, step.index]](x)
        return y


class NoNorm(NormBank):
    """No norm at any step: what the other banks are compared with (RC Tables 2 and 3)."""

    def __init__(self, channels: int, *, steps: int, sync: bool = False) -> None:
        super().__init__(channels, norms=0, sync=sync)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return x


# Those that need to know nothing but the number of steps.
BANKS: dict[str, type[NoNorm] | type[SharedNorm] | type[PerStepNorm] | type[GatedPerStepNorm]] = {
    "shared": SharedNorm,
    "per_step": PerStepNorm,
    "gated_per_step": GatedPerStepNorm,
    "none": NoNorm,
}


class _GroupedBatchNorm(torch.autograd.Function):
    """Batch norm of each group of samples by its own statistics, in float32, without host sync.

    Written by hand because autograd's own backward of the same formulas keeps and passes over
    several times as much memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        group: Tensor,
        groups: int,
        eps: float,
        sync: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, C, H, W), group (N,) -> y, then mean, biased var (groups, C), count (groups, 1)."""
        pixels = x.shape[2] * x.shape[3]
        member = (group[:, None] == torch.arange(groups, device=x.device)).float()
        exact = x.float()
        sample_mean, sample_var = _moments(exact)
        mean, var, count = _pool(sample_mean[:, None], sample_var[:, None], member * pixels)
        if sync:
            mean, var, count = _pool_ranks(mean, var, count)
        rstd = torch.rsqrt(var + eps)
        scale = weight * rstd
        shift = bias - mean * scale  # Eq. 11: gamma (x - mean) rstd + beta = scale x + shift
        y = torch.addcmul(_per_sample(shift, group), exact, _per_sample(scale, group))
        ctx.save_for_backward(x, weight, group, member, mean, rstd, count)
        ctx.sync = sync
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, group, member, mean, rstd, count = ctx.saved_tensors
        x, dy = x.float(), grad.float()
        normalised = torch.addcmul(_per_sample(-mean * rstd, group), x, _per_sample(rstd, group))
        sample_dy = dy.sum((2, 3))
        sample_dot = (dy * normalised).sum((2, 3))
        sums = torch.stack([sample_dy, sample_dot], 1)[:, :, None] * member[:, None, :, None]
        group_dy, group_dot = total = sums.sum(0)
        if ctx.sync:
            dist.all_reduce(total)
        # With m over the group: dx = scale (dy - m(dy) - normalised m(dy normalised)).
        scale = weight * rstd
        size = count.clamp(min=1)
        along = -scale * group_dot / size
        offset = -scale * group_dy / size
        dx = torch.addcmul(_per_sample(offset, group), normalised, _per_sample(along, group))
        dx.addcmul_(dy, _per_sample(scale, group))
        return (
            dx.to(grad.dtype),
            sample_dot.sum(0),
            sample_dy.sum(0),
            None,
            None,
            None,
            None,
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each sample's channels: (N, C, H, W) -> (N, C), (N, C)."""
    if x.is_cuda:
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return mean, var
    # On CPUs the one kernel takes 5 to 15 times as long as these four.
    mean = x.mean((2, 3))
    centred = x - mean[:, :, None, None]
    return mean, centred.square_().mean((2, 3))


def _pool(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of groups whose K parts are known by theirs.

    The law of total variance: no difference of large sums, so it is stable for any mean.
    mean, var (K, groups or 1, C), count (K, groups) -> (groups, C), (groups, C), (groups, 1).
    """
    count = count[..., None]
    total = count.sum(0)
    size = total.clamp(min=1)
    pooled_mean = (count * mean).sum(0) / size
    pooled_var = (count * (var + (mean - pooled_mean).square())).sum(0) / size
    return pooled_mean, pooled_var, total


def _pool_ranks(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The groups' statistics over all ranks."""
    own = torch.cat([mean, var, count], 1)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    channels = mean.shape[1]
    means, variances, counts = torch.stack(ranks).split([channels, channels, 1], 2)
    return _pool(means, variances, counts[..., 0])


def _per_sample(values: Tensor, group: Tensor) -> Tensor:
    """(groups, C), (N,) -> (N, C, 1, 1)."""
    return values[group][:, :, None, None]
