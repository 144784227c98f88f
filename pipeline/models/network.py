"""What every network of this folder answers, whatever its family."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Router
from pipeline.models.stage import CellRoute, RecursiveCell

Role = Literal["shared", "gate", "norm", "rest"]


class Output(NamedTuple):
    """What the network says, and one route per recursive cell; no routes in a static network.

    `prediction`: logits (N, classes) in classification, restored images (N, 1, H, W) in denoising.
    """

    prediction: Tensor
    routes: tuple[CellRoute, ...]

    @property
    def logits(self) -> Tensor:
        """The prediction of classification by its usual name."""
        return self.prediction


class Network(nn.Module):
    """A network of recursive cells.

    `image_size` is the side, in pixels, it is meant for; `channels` is how many its images have.
    """

    image_size: int
    channels: int = 3

    def forward(self, images: Tensor) -> Output:
        """images (N, channels, H, W)."""
        raise NotImplementedError

    def roles(self) -> dict[str, Role]:
        """The role of every parameter, by the type of the module that holds it.

        `shared`: used at more than one step; `gate`: of a router; `norm`: of a batch norm, wherever
        it stands; `rest`: everything else.
        """
        roles: dict[str, Role] = {name: "rest" for name, _ in self.named_parameters()}
        # Modules come before their children, so the innermost role stays.
        for prefix, module in self.named_modules():
            role = _role(module)
            if role is not None:
                roles |= {name: role for name, _ in module.named_parameters(prefix)}
        return roles


def _role(module: nn.Module) -> Role | None:
    match module:
        case BatchNorm():
            return "norm"
        case Router():
            return "gate"
        case RecursiveCell() if module.steps > 1:
            return "shared"
        case _:
            return None
