"""What every network of this folder answers, whatever its family."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from pipeline.models.norms import BatchNorm
from pipeline.models.pool import Pool
from pipeline.models.recurrent_layer import RecurrentLayer
from pipeline.models.routers import Router
from pipeline.models.routers.controller import Controller
from pipeline.models.scorers import Scorer
from pipeline.models.sharing import RelaxedConv, SharedConv, TiedSet, tied_sets
from pipeline.models.stage import CellRoute, Policy, RecursiveCell

Role = Literal["shared", "tied", "gate", "norm", "rest"]


class Output(NamedTuple):
    """What the network says, and one route per recursive cell; no routes in a static network.

    `prediction`: logits (N, classes) in classification, restored images (N, 1, H, W) in denoising.
    """

    prediction: Tensor
    routes: tuple[CellRoute, ...]

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One per pool with a controller, whose units' routes are among the routes."""
        found = {route.policy.pool: route.policy for route in self.routes if route.policy}
        return tuple(found.values())

    @property
    def components(self) -> list[str]:
        """Names of the policies' weights in order: `<pool>/<iteration>/<unit>`, both from 1.

        The last unit of a pool is its zero unit.
        """
        return [
            f"{policy.pool}/{iteration + 1}/{unit + 1}"
            for policy in self.policies
            for iteration in range(policy.weights.shape[1])
            for unit in range(policy.weights.shape[2])
        ]

    @property
    def logits(self) -> Tensor:
        """The prediction of classification by its usual name."""
        return self.prediction


class Network(nn.Module):
    """A network of recursive cells.

    `image_size` is the side, in pixels, it is meant for; `channels` is how many its images have.
    `step_choices`, ascending, are the numbers of steps that a cost-adjustable network can be asked
    for (RC Sec. 4); empty where there is no choice. `scorer` makes weights of the logits of ReSet's
    controllers; `pools` are those it has.
    """

    image_size: int
    channels: int = 3
    step_choices: tuple[int, ...] = ()
    scorer: Scorer = Scorer()

    @property
    def pools(self) -> list[Pool]:
        """The pools with a controller, in order."""
        return [m for m in self.modules() if isinstance(m, Pool) and m.controller is not None]

    def forward(self, images: Tensor, steps: int | None = None) -> Output:
        """images (N, channels, H, W); None takes the largest number of steps.

        Raises:
            ValueError: a number of steps that is not one of `step_choices`.
        """
        raise NotImplementedError

    def steps_taken(self, steps: int | None) -> int | None:
        """What a network asked for `steps` takes: the largest choice for None, None without choice.

        Raises:
            ValueError: a number of steps that is not one of `step_choices`.
        """
        if steps is None:
            return self.step_choices[-1] if self.step_choices else None
        if not self.step_choices:
            raise ValueError(
                f"steps={steps}: this network always takes the same steps: leave the number out, "
                "or take a cost-adjustable network (rc_r2, rc_r4)"
            )
        if steps not in self.step_choices:
            raise ValueError(
                f"steps={steps}: this network was built for "
                f"{', '.join(map(str, self.step_choices))} steps: give one of them"
            )
        return steps

    def tied_sets(self) -> list[TiedSet]:
        """The tensors that relaxed sharing pulls together; none without it.

        Raises:
            ValueError: tensors of different shapes.
        """
        return tied_sets(self)

    def roles(self) -> dict[str, Role]:
        """The role of every parameter, by the type of the module that holds it.

        `shared`: used at more than one step; `tied`: of one step, pulled to those of the others;
        `gate`: of a router or controller; `norm`: of a batch norm, wherever it stands; `rest`:
        everything else.
        """
        roles: dict[str, Role] = {name: "rest" for name, _ in self.named_parameters()}
        # Modules come before their children, so the innermost role stays.
        for prefix, module in self.named_modules():
            role = _role(module)
            if role is not None:
                roles |= {name: role for name, _ in module.named_parameters(prefix)}
            if isinstance(module, SharedConv):
                roles[f"{prefix}.biases"] = "rest"
        return roles | {name: "tied" for tied in self.tied_sets() for name in tied.members}


def check_common_options(num_classes: int, sync_norm: bool) -> None:
    """Raises ValueError where an option that every network has makes no sense."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f"num_classes={num_classes!r} is not a positive integer: count the classes"
        )
    check_sync_norm(sync_norm)


def check_sync_norm(sync_norm: bool) -> None:
    """Raises ValueError for what is no truth value: text of a command line, say."""
    if not isinstance(sync_norm, bool):
        raise ValueError(f"sync_norm={sync_norm!r} is neither true nor false: give one of them")


def _role(module: nn.Module) -> Role | None:
    match module:
        case BatchNorm():
            return "norm"
        case Router() | Controller():
            return "gate"
        case RelaxedConv():
            return "rest"
        case RecursiveCell() if module.steps > 1:
            return "shared"
        case RecurrentLayer():
            return "shared"
        case Pool() if module.iterations > 1:
            return "shared"
        case _:
            return None
