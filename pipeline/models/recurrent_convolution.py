"""Recurrent convolution for classification (Zhang & Jung: RC), Sec. 5, Eq. 8 and 10.

| name             | in the paper       | what it is                                             |
|------------------|--------------------|--------------------------------------------------------|
| rc_r2_1 .. _4    | R_2^n              | two recurrent cells, each unrolled n steps             |
| rc_s2_1 .. _4    | S_2^n              | the same graph with a cell of its own at every step    |
| rc_s2_4_half     | S_2^4 x0.5         | with half the channels                                 |
| rc_r2, rc_r4     | R_2, R_4           | cost-adjustable: one network for several step counts   |
| rc_s4_1 .. _3    | S_4^n              | R_4's graph at n steps without sharing                 |
| rc_early_exit    | Fig. 7's baseline  | R_4's graph at 3 steps, classifiers after C_2 and C_3  |

Cells are pre-activation blocks. No norm follows the last of them: the paper's numbers of parameters
leave room for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.cells import NormFactory, PreActivationCell
from pipeline.models.network import Network, Output, check_common_options
from pipeline.models.norms import BANKS, PerPathNorm
from pipeline.models.pooling import global_average
from pipeline.models.sharing import Sharing, check, convolution
from pipeline.models.stage import CellRoute, RecursiveCell, Stage, routing

FIXED_NORMS = ("none", "shared", "per_step")
ADJUSTABLE_NORMS = (*FIXED_NORMS, "per_path")
R2_WIDTHS = (64, 256)
R4_WIDTHS = (64, 128, 256, 512)
R4_STEPS = 3


@dataclass(frozen=True)
class Parts:
    """What the cells are made of; `choices` are the network's numbers of steps, empty where fixed.

    `norm` names the recurrent cells' bank, `death_rate` is the last cell's in stochastic depth.
    """

    norm: str
    choices: tuple[int, ...]
    sync: bool
    sharing: Sharing
    death_rate: float | None

    def bank(self, steps: int, *, first: bool) -> NormFactory:
        """For a cell of at most `steps` steps; before the `first` stage no steps vary."""
        match self.norm:
            case "per_path":
                paths = {1: steps} if first else {n: min(n, steps) for n in self.choices}
                return partial(PerPathNorm, paths=paths, sync=self.sync)
            case kind:
                return partial(BANKS[kind], steps=steps, sync=self.sync)


class InvertibleDownsampling(nn.Module):
    """InvPool: the four copies of a channel that 2x2 subsampling gives, as channels.

    Dinh et al., Density estimation using Real NVP (2017); RC Sec. 5.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 C, H / 2, W / 2)."""
        return F.pixel_unshuffle(x, 2)


class RecurrentConvolution(Network):
    """A 3x3 stem, stages, global average pooling and a linear classifier.

    All recurrent cells take the same number of steps (RC Sec. 4.2); the norms of a stage are told
    how many those of the stage before took.
    """

    image_size = 32

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        widths: tuple[int, ...],
        num_classes: int,
        between: nn.Module | None = None,
        choices: tuple[int, ...] = (),
    ) -> None:
        """`between` is applied from one stage to the next."""
        super().__init__()
        self.step_choices = choices
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(stages)
        self.between = between or nn.Identity()
        self.classifier = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), H and W multiples of 8."""
        taken = self.steps_taken(steps)
        x = self.stem(images)
        routes: tuple[CellRoute, ...] = ()
        for number, stage in enumerate(self.stages):
            if number:
                x = self.between(x)
            x, stage_routes = stage(x, taken, taken if number and taken else 1)
            routes += stage_routes
        return Output(self.classifier(global_average(x)), routes)


class EarlyExit(Network):
    """Classifiers after the second, third and last stage: the baseline of RC Fig. 7.

    Lee et al., Deeply-supervised nets (2015). Its number of steps is that of the stages before the
    classifier that answers.
    """

    image_size = 32
    step_choices = (2, 3, 4)

    def __init__(
        self, stages: Sequence[Stage], *, widths: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(stages)
        self.classifiers = nn.ModuleDict(
            {str(last): nn.Linear(widths[last - 1], num_classes) for last in self.step_choices}
        )
        _initialise(self)

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, 3, H, W), H and W multiples of 8."""
        taken = self.steps_taken(steps)
        assert taken is not None
        x = self.stem(images)
        routes: tuple[CellRoute, ...] = ()
        for number, stage in enumerate(self.stages):
            # A stage of no steps passes its input on, and its routes say that nobody executed it.
            x, stage_routes = stage(x, None if number < taken else 0)
            routes += stage_routes
        return Output(self.classifiers[str(taken)](global_average(x)), routes)


def _initialise(network: Network) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# -- R_2 and S_2 (Eq. 8) ---------------------------------------------------------------------------


def _r2(
    steps: int,
    *,
    num_classes: int = 10,
    norm: str = "per_step",
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    _check_norm(norm, FIXED_NORMS)
    shared = check(sharing, recursive=steps > 1, name=f"rc_r2_{steps}")
    stages = _r2_stages(steps, Parts(norm, (), sync_norm, shared, death_rate))
    return RecurrentConvolution(
        stages, widths=R2_WIDTHS, num_classes=num_classes, between=InvertibleDownsampling()
    )


def _adjustable_r2(
    *,
    num_classes: int = 10,
    steps: Sequence[int] = (2, 3, 4),
    norm: str = "per_path",
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    _check_norm(norm, ADJUSTABLE_NORMS)
    choices = _choices(steps)
    shared = check(sharing, recursive=True, name="rc_r2")
    stages = _r2_stages(max(choices), Parts(norm, choices, sync_norm, shared, death_rate))
    return RecurrentConvolution(
        stages,
        widths=R2_WIDTHS,
        num_classes=num_classes,
        between=InvertibleDownsampling(),
        choices=choices,
    )


def _r2_stages(steps: int, parts: Parts) -> list[Stage]:
    """C_1^n and C_2^n, each with its pooling after step ceil(n/2)."""
    routers = routing([steps] * len(R2_WIDTHS), parts.death_rate)
    return [
        Stage(
            [
                RecursiveCell(
                    f"stages.{number}.0",
                    PreActivationCell(
                        width,
                        width,
                        norm=parts.bank(steps, first=number == 0),
                        conv=convolution(parts.sharing, steps),
                    ),
                    steps=steps,
                    router=router,
                    pool_midway=True,
                    weighs=weighs,
                )
            ]
        )
        for number, (width, (router, weighs)) in enumerate(zip(R2_WIDTHS, routers, strict=True))
    ]


def _s2(
    steps: int,
    scale: float,
    *,
    num_classes: int = 10,
    sync_norm: bool = False,
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    parts = Parts("per_step", (), sync_norm, "raw", death_rate)
    widths = tuple(round(width * scale) for width in R2_WIDTHS)
    routers = iter(routing([1] * steps * len(widths), death_rate))
    stages = [
        Stage(
            RecursiveCell(
                f"stages.{number}.{index}",
                PreActivationCell(width, width, norm=parts.bank(1, first=True)),
                steps=1,
                router=router,
                # After its only step, which is step ceil(n/2) of the unrolled cell.
                pool_midway=index + 1 == (steps + 1) // 2,
                weighs=weighs,
            )
            for index, (router, weighs) in zip(range(steps), routers, strict=False)
        )
        for number, width in enumerate(widths)
    ]
    return RecurrentConvolution(
        stages, widths=widths, num_classes=num_classes, between=InvertibleDownsampling()
    )


# -- R_4 and S_4 (Eq. 10) --------------------------------------------------------------------------


def _adjustable_r4(
    *,
    num_classes: int = 10,
    steps: Sequence[int] = (1, 2, 3),
    norm: str = "per_path",
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    _check_norm(norm, ADJUSTABLE_NORMS)
    choices = _choices(steps)
    shared = check(sharing, recursive=True, name="rc_r4")
    stages = _r4_stages((max(choices),), Parts(norm, choices, sync_norm, shared, death_rate))
    return RecurrentConvolution(stages, widths=R4_WIDTHS, num_classes=num_classes, choices=choices)


def _s4(
    steps: int,
    *,
    num_classes: int = 10,
    sync_norm: bool = False,
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    stages = _r4_stages((1,) * steps, Parts("per_step", (), sync_norm, "raw", death_rate))
    return RecurrentConvolution(stages, widths=R4_WIDTHS, num_classes=num_classes)


def _early_exit(
    *,
    num_classes: int = 10,
    sync_norm: bool = False,
    sharing: str = "raw",
    death_rate: float | None = None,
) -> Network:
    check_common_options(num_classes, sync_norm)
    shared = check(sharing, recursive=True, name="rc_early_exit")
    stages = _r4_stages((R4_STEPS,), Parts("per_step", (), sync_norm, shared, death_rate))
    return EarlyExit(stages, widths=R4_WIDTHS, num_classes=num_classes)


def _r4_stages(unrolled: tuple[int, ...], parts: Parts) -> list[Stage]:
    """T_i, which changes channels and resolution, then cells of the given numbers of steps."""
    stages = []
    widths = (R4_WIDTHS[0], *R4_WIDTHS)
    routers = iter(routing((1, *unrolled) * len(R4_WIDTHS), parts.death_rate))
    for number, (before, width) in enumerate(pairwise(widths)):
        cells = [
            RecursiveCell(
                f"stages.{number}.{index}",
                PreActivationCell(
                    before if index == 0 else width,
                    width,
                    stride=2 if number > 0 and index == 0 else 1,
                    norm=parts.bank(steps, first=number == 0),
                    conv=convolution(parts.sharing, steps),
                ),
                steps=steps,
                router=router,
                weighs=weighs,
            )
            for (index, steps), (router, weighs) in zip(
                enumerate((1, *unrolled)), routers, strict=False
            )
        ]
        stages.append(Stage(cells))
    return stages


# -- options ---------------------------------------------------------------------------------------


def _check_norm(norm: str, valid: tuple[str, ...]) -> None:
    if norm == "per_path" and norm not in valid:
        raise ValueError(
            "norm='per_path' with a fixed number of steps, where there is one path only: use "
            "norm='per_step', or take a cost-adjustable network (rc_r2, rc_r4)"
        )
    if norm not in list(valid):
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(valid)}")


def _choices(steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of steps to choose from, ascending."""
    numbers = list(steps) if isinstance(steps, list | tuple) else []
    valid = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if not valid or len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise ValueError(
            f"steps={steps!r} is no choice of steps: give at least two different positive "
            "integers, such as [2, 3, 4]; for one number of steps take rc_r2_1 to rc_r2_4"
        )
    return tuple(sorted(numbers))


MODELS: dict[str, Callable[..., Network]] = {
    **{f"rc_r2_{n}": partial(_r2, n) for n in (1, 2, 3, 4)},
    **{f"rc_s2_{n}": partial(_s2, n, 1.0) for n in (1, 2, 3, 4)},
    "rc_s2_4_half": partial(_s2, 4, 0.5),
    "rc_r2": _adjustable_r2,
    "rc_r4": _adjustable_r4,
    **{f"rc_s4_{n}": partial(_s4, n) for n in (1, 2, 3)},
    "rc_early_exit": _early_exit,
}
