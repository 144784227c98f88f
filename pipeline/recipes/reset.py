"""Kemaev et al., ReSet: Learning Recurrent Dynamic Routing in ResNet-like Neural Networks.

The paper gives the optimizers (SGD as in He et al., 2016; Adam with lr 0.001, times 0.95 every
1,000 batches), the batch of 128, the 5,000 batches of a controller alone, and what is frozen. It
gives no weights of the regularisers, temperatures, rates of fine-tuning, bounds of clipping or
lengths of the other phases: those here are ours. "Pretrained" is a finished run of another
recipe, in its default folder; `init_from.path` names another. Accuracies are on CIFAR-10 and
CIFAR-10.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import (
    Augmentation,
    Config,
    Convergence,
    Data,
    InitFrom,
    Loss,
    Optimizer,
    Phase,
    Schedule,
    Scorer,
    Train,
    Weight,
)
from pipeline.recipes.recipe import Recipe

# He et al. (2016), Sec. 4.2: lr 0.1 divided by 10 at 32,000 and 48,000 of 64,000 batches of 128,
# in epochs of 390.
_SGD = Optimizer(lr=0.1, momentum=0.9, weight_decay=1e-4)
_SGD_SCHEDULE = Schedule(name="step", milestones=(82, 123))
_FINE_TUNING = Optimizer(lr=0.01, momentum=0.9, weight_decay=1e-4)
_ADAM = Optimizer(name="adam", lr=1e-3)
_CONTROLLER = Optimizer(name="adam", lr=1e-3, weight_decay=1e-4, clip_norm=1.0)
_ADAM_SCHEDULE = Schedule(name="staircase", gamma=0.95, every_steps=1000)
_EPOCHS = 164
_GUMBEL = Scorer(name="gumbel", temperature=1.0)
_STRAIGHT_THROUGH = Scorer(name="straight_through", temperature=1.0)
_ENTROPY = Loss(different_routes=Weight(first=0.1, last=0.0))
_CONVERGED = Convergence(change=0.01, window=500)


def cifar10(
    name: str,
    model: str,
    phases: Sequence[Phase] = (),
    pretrained: str | None = None,
    **sections: Any,
) -> Config:
    """From scratch, or in phases from what another recipe has trained."""
    start = Path(f"runs/reset-cifar10-{pretrained}-seed0")
    values: dict[str, Any] = {
        "init_from": InitFrom(path=start) if pretrained else None,
        "data": Data(
            path=Path("data/cifar10"),
            augment=Augmentation(crop="pad", padding=4, flip=True, size=32),
        ),
        "optimizer": _SGD,
        "schedule": _SGD_SCHEDULE,
        "train": Train(epochs=None if phases else _EPOCHS, batch_size=128, evaluate_every=4),
    }
    return Config(name=f"reset/cifar10/{name}", model=model, phases=phases, **values | sections)


def _controller(name: str = "controller", **changes: Any) -> Phase:
    """Sec. 5.1 and steps 2 to 4 of Sec. 5.3: 5,000 batches, everything else frozen."""
    values: dict[str, Any] = {
        "trains": ("controller",),
        "optimizer": _CONTROLLER,
        "schedule": _ADAM_SCHEDULE,
        "steps": 5000,
    }
    return Phase(name=name, **values | changes)


def _to_straight_through(**changes: Any) -> list[Phase]:
    """Steps 2 to 6 of Sec. 5.3."""
    return [
        _controller("gumbel", scorer=_GUMBEL),
        _controller("straight through", scorer=_STRAIGHT_THROUGH, **_UNTIL_CONVERGED | changes),
    ]


_UNTIL_CONVERGED: dict[str, Any] = {"steps": 20_000, "until": _CONVERGED}
_TUNED: dict[str, Any] = {
    "optimizer": _FINE_TUNING,
    "schedule": Schedule(name="step", milestones=(20, 30)),
    "epochs": 40,
}


def relaxation(name: str, reward: float) -> Config:
    """The eight steps of Sec. 5.3: the softmax network, its controller by Gumbel softmax, then by
    the straight-through estimator until the policy converges, then a reward for skipping.
    """
    skipping = Phase(
        name="skip reward",
        scorer=_STRAIGHT_THROUGH,
        loss=Loss(skip_reward=Weight(first=reward, last=reward)),
        **_TUNED,
    )
    return cifar10(name, "reset38", [*_to_straight_through(), skipping], "sm")


def two_phase() -> Config:
    """Sec. 5.4.1: controllers and all else in turns, a constant number of batches each."""
    phases = []
    for turn, lr in enumerate([0.1] * 8 + [0.01] * 4 + [0.001] * 4):
        sgd = _SGD.model_copy(update={"lr": lr})
        constant = {"optimizer": sgd, "schedule": Schedule(), "steps": 2000}
        phases += [
            Phase(name=f"body {turn + 1}", trains=("body",), **constant),
            Phase(name=f"controller {turn + 1}", trains=("controller",), **constant),
        ]
    return cifar10("two_phase", "reset38", phases)


def incremental() -> Config:
    """Sec. 5.4.2: from the last layers to the first."""
    parts = ("classifier", "stage3", "stage2", "stage1", "stem")
    return cifar10(
        "incremental",
        "reset38",
        [
            Phase(
                name=f"from {parts[last - 1]}",
                trains=parts[:last],
                optimizer=_FINE_TUNING,
                schedule=Schedule(),
                steps=4000,
            )
            for last in range(1, len(parts) + 1)
        ],
        "sm",
    )


def digits(
    name: str, model: str, phases: Sequence[Phase] = (), pretrained: str | None = None, **more: Any
) -> Config:
    """Minutes on one core: handwritten digits at 16x16 pixels, a pool in the third stage."""
    start = Path(f"runs/reset-digits-{pretrained}-short-seed0")
    values: dict[str, Any] = {
        "init_from": InitFrom(path=start) if pretrained else None,
        # Digits have no mirror images.
        "data": Data(
            path=Path("data/digits"),
            augment=Augmentation(crop="random_resized", scale=(0.7, 1.0), size=16, eval_resize=16),
        ),
        "optimizer": Optimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        "schedule": Schedule(name="one_cycle"),
        "train": Train(epochs=None if phases else 10, batch_size=32, evaluate_every=5),
    }
    return Config(name=f"reset/digits/{name}-short", model=model, phases=phases, **values | more)


def digits_controller(controller: str) -> Config:
    """Sec. 5.1: the controller alone, on the blocks of a trained ResNet 1-1-5."""
    alone = _controller(
        optimizer=_CONTROLLER.model_copy(update={"lr": 3e-3}), schedule=Schedule(), steps=600
    )
    return digits(
        f"controller-{controller}",
        "reset_1_1_5",
        [alone],
        "resnet_1_1_5",
        model_options={"controller": controller},
    )


_ADAM_SECTIONS: dict[str, Any] = {"optimizer": _ADAM, "schedule": _ADAM_SCHEDULE}
_POOLED = "reset38"
# Table 2, by its number N: accuracy on CIFAR-10 and CIFAR-10.1, what it is, and how it is trained.
_TABLE_2: dict[str, tuple[str, str, Any]] = {
    "resnet38": ("92.8 / 83.8", "static baseline", ("resnet38",)),
    "sm": ("91.9 / 83.5", "softmax", (_POOLED,)),
    "sm-adam": ("89.9 / 81.8", "softmax, Adam", (_POOLED, (), None, _ADAM_SECTIONS)),
    "sm-entr": ("92.1 / 85.1", "softmax, entropy", (_POOLED, (), None, {"loss": _ENTROPY})),
    "sm-entr-adam": (
        "89.3 / 79.5",
        "softmax, entropy, Adam",
        (_POOLED, (), None, {"loss": _ENTROPY, **_ADAM_SECTIONS}),
    ),
    "gsm-entr": (
        "89 / 80.8",
        "Gumbel softmax, entropy",
        (_POOLED, (), None, {"loss": _ENTROPY, "scorer": _GUMBEL}),
    ),
    "gst": (
        "60.5 / 54.1",
        "straight through, from scratch",
        (_POOLED, (), None, {"scorer": _STRAIGHT_THROUGH}),
    ),
    "sm-controller": (
        "91.8 / 81.9",
        "softmax, controller alone on ResNet-38's blocks",
        ("reset38_6x6", [_controller()], "resnet38"),
    ),
    "gsm-controller": (
        "91.8 / 83.5",
        "Gumbel softmax, controller alone",
        (_POOLED, [_controller(scorer=_GUMBEL)], "sm"),
    ),
    "gst-controller": (
        "66.5 / 54.1",
        "straight through, controller alone, from softmax",
        (_POOLED, [_controller(scorer=_STRAIGHT_THROUGH)], "sm"),
    ),
    "gst-relaxed-controller": (
        "70.1 / 57.3",
        "straight through, controller alone, from Gumbel softmax",
        (_POOLED, _to_straight_through(), "sm"),
    ),
    "gst-relaxed": (
        "68.3 / 56",
        "straight through, from Gumbel softmax",
        (_POOLED, _to_straight_through(**_TUNED, trains=("all",), until=None, steps=None), "sm"),
    ),
    "gst-then-all": (
        "89.8 / 79.9",
        "straight through from scratch, then softmax",
        (_POOLED, [Phase(name="softmax", **_TUNED)], "gst"),
    ),
    "gst-repeated": (
        "72.2 / 60.9",
        "straight through, each batch four times, from softmax",
        (_POOLED, [Phase(name="repeated", scorer=_STRAIGHT_THROUGH, draws=4, **_TUNED)], "sm"),
    ),
}
_TABLE_2 |= {
    f"top-{k}": (
        accuracies,
        f"the {k} largest of softmax",
        (_POOLED, [Phase(name="top k", scorer=Scorer(name="top_k", k=k), **_TUNED)], "sm"),
    )
    for k, accuracies in ((1, "92.6 / 83.9"), (2, "92.7 / 84.1"), (4, "92.1 / 83.7"))
}
# Rows 13 to 15 by their relative times; the paper gives no rewards.
_REWARDS = {"088": (0.1, "60.7 / 51.3"), "079": (0.2, "48.8 / 42.2"), "071": (0.4, "35.3 / 30.4")}
_TABLE_1 = {
    "resnet_1_1_5": "88.7 / 79.5",
    "reset_1_1_5": "88.9 / 79.5",
    "resnet_1_5_1": "87 / 78.1",
    "reset_1_5_1": "88 / 78.7",
    "resnet_5_1_1": "86.5 / 78",
    "reset_5_1_1": "87.1 / 78.2",
}
_TABLE_3 = {
    "resnet_2_1_1": "86.1 / 75",
    "reset_6x2": "87.2 / 76.9",
    "reset_3x2": "86.5 / 78.4",
    "reset_2x3": "86.4 / 77",
    "reset_2x6": "87.3 / 77",
}


def _row(name: str, model: str, phases: Any = (), pretrained: Any = None, more: Any = None) -> Any:
    return partial(cifar10, name, model, phases, pretrained, **(more or {}))


RECIPES: dict[str, Recipe] = {
    f"reset/cifar10/{model}": Recipe(
        partial(cifar10, model, model),
        "static baseline" if model.startswith("resnet") else "softmax, shortened",
        f"{accuracies} %, Table {table}",
    )
    for table, rows in ((1, _TABLE_1), (3, _TABLE_3))
    for model, accuracies in rows.items()
}
RECIPES |= {
    f"reset/cifar10/{name}": Recipe(_row(name, *how), about, f"{accuracies} %, Table 2")
    for name, (accuracies, about, how) in _TABLE_2.items()
}
RECIPES |= {
    f"reset/cifar10/hybrl-{time}": Recipe(
        partial(relaxation, f"hybrl-{time}", reward),
        f"relaxation in eight steps, skip reward {reward}",
        f"{accuracies} %, Table 2",
    )
    for time, (reward, accuracies) in _REWARDS.items()
}
RECIPES |= {
    "reset/cifar10/sm-controller-cnn": Recipe(
        partial(
            cifar10,
            "sm-controller-cnn",
            "reset38_6x6",
            [_controller()],
            "resnet38",
            model_options={"controller": "cnn"},
        ),
        "softmax, convolutional controller alone on ResNet-38's blocks",
    ),
    "reset/cifar10/two_phase": Recipe(two_phase, "controllers and all else in turns"),
    "reset/cifar10/incremental": Recipe(incremental, "unfrozen from the last layers to the first"),
}
RECIPES |= {
    "reset/digits/resnet_1_1_5-short": Recipe(
        partial(digits, "resnet_1_1_5", "resnet_1_1_5"), "static baseline; minutes on one core"
    ),
    "reset/digits/reset_1_1_5-short": Recipe(
        partial(digits, "reset_1_1_5", "reset_1_1_5"), "softmax; minutes on one core"
    ),
    "reset/digits/reset_1_1_5-entropy-short": Recipe(
        partial(digits, "reset_1_1_5-entropy", "reset_1_1_5", loss=_ENTROPY),
        "softmax, entropy; minutes on one core",
    ),
}
RECIPES |= {
    f"reset/digits/controller-{kind}-short": Recipe(
        partial(digits_controller, kind), f"{about} controller alone; minutes on one core"
    )
    for kind, about in (("rnn", "recurrent"), ("cnn", "convolutional"))
}
