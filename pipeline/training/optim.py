"""Parameter groups by role, and the optimizer over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from pipeline.config import Config, ConfigError, Optimizer, Role
from pipeline.models import Network

WARMUP_EPOCHS = 5.0  # of a batch larger than the rate is for: Goyal et al. (2017), Sec. 2.2


@dataclass(frozen=True)
class Group:
    """The parameters of one role and how they train."""

    role: str
    names: tuple[str, ...]
    parameters: int
    lr: float
    weight_decay: float


def scaled(config: Config) -> Config:
    """The configuration with its learning rate for its own global batch.

    Linear scaling: lr x batch_size / lr_batch, and for a larger batch a warm-up of five epochs,
    unless the schedule has one (Goyal et al., Accurate, large minibatch SGD, 2017, Sec. 2).
    """
    optimizer, schedule, batch = config.optimizer, config.schedule, config.train.batch_size
    if optimizer.lr_batch is None:
        return config
    warms_up = schedule.warmup_epochs > 0 or schedule.name == "one_cycle"
    if batch > optimizer.lr_batch and not warms_up:
        schedule = schedule.model_copy(update={"warmup_epochs": WARMUP_EPOCHS})
    lr = optimizer.lr * batch / optimizer.lr_batch
    optimizer = optimizer.model_copy(update={"lr": lr, "lr_batch": batch})
    return config.model_copy(update={"optimizer": optimizer, "schedule": schedule})


def groups(model: Network, config: Optimizer) -> list[Group]:
    """One group for each role of which a parameter trains, in the order of `Role`.

    Raises:
        ConfigError: the configuration selects a role of which the model has no parameter.
    """
    roles = model.roles()
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    had = [role for role in get_args(Role) if role in roles.values()]
    present = [role for role in had if any(roles[name] == role for name in sizes)]
    for role in config.groups:
        if role not in had:
            raise ConfigError(
                f"optimizer.groups.{role} selects no parameter of this network; "
                f"roles it has: {', '.join(had)}: remove that group"
            )
    found = []
    for role in present:
        names = tuple(name for name in sizes if roles[name] == role)
        own = config.groups.get(role)
        decay = own.weight_decay if own and own.weight_decay is not None else config.weight_decay
        lr = config.lr * (own.lr_factor if own else 1.0)
        found.append(Group(role, names, sum(sizes[name] for name in names), lr, decay))
    return found


def build(model: Network, config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer; each group of its `param_groups` has its role under `name`."""
    parameters = dict(model.named_parameters())
    described: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.role,
        }
        for group in groups(model, config)
    ]
    if config.name == "sgd":
        return torch.optim.SGD(
            described, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(described, lr=config.lr, betas=config.betas)
