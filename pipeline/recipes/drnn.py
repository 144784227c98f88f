"""Guo et al., Dynamic Recursive Neural Network, CVPR 2019."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Augmentation, Config, Data, Optimizer, Schedule, Train
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.short import short

# Table 1, error in %; the recursive networks without gates are not in the table.
_TABLE_1 = {
    "sd_resnet110": 5.25,
    "preact_resnet110": 6.37,
    "aig_resnet110": 5.76,
    "rcnn160": 7.09,
    "resnet110": 6.61,
    "dr_resnet74": 5.21,
    "dr_resnet66": 5.66,
    "dr_resnet58": 5.79,
    "dr_resnet54": 5.97,
    "resnet56": 6.97,
    "dr_resnet40": 6.51,
    "dr_resnet32": 6.73,
    "resnet20": 8.75,
    "dr_resnet16": 8.14,
}
_ABOUT = {
    "dr_": "dynamic recursive",
    "r_": "recursive, one norm per step, no gates",
    "sd_": "stochastic depth baseline",
    "aig_": "adaptive inference graph baseline",
    "preact_": "static baseline, pre-activation",
    "rcnn": "recurrent convolutional layers (Liang and Hu), baseline",
}


class _Row(NamedTuple):
    """A row of Table 2 or 3: the paper's figure, and what the network is with its options."""

    reported: str
    model: str
    target: float | None = None
    norm: str | None = None
    about: str = ""


# Accuracy in %. ResNet-101 and the row of Table 3 with L, G and I are also in Table 2. DRNN names
# no targets for AIG: those of the networks here.
_IMAGENET = {
    "resnet101": _Row("77.95 % top-1, 93.86 % top-5, Table 2", "resnet101"),
    "sd_resnet101": _Row("77.20 % top-1, 93.56 % top-5, Table 2", "sd_resnet101"),
    "aig_resnet101": _Row("77.93 % top-1, 93.85 % top-5, Table 2", "aig_resnet101", 0.5),
    "dr_resnet65": _Row("78.12 % top-1, 93.90 % top-5, Table 2", "dr_resnet65", 0.7),
    "dr_resnet53": _Row("77.96 % top-1, 93.86 % top-5, Table 2", "dr_resnet53", 0.7),
    "dr_resnet53_t065": _Row("77.14 % top-1, 93.52 % top-5, Table 2", "dr_resnet53", 0.65),
    "dr_resnet53_t060": _Row("76.91 % top-1, 93.51 % top-5, Table 2", "dr_resnet53", 0.6),
    "dr_resnet47": _Row("77.41 % top-1, 93.54 % top-5, Table 2", "dr_resnet47", 0.7),
    "dr_resnet44": _Row("77.27 % top-1, 93.53 % top-5, Table 2", "dr_resnet44", 0.7),
    "resnet50": _Row("76.45 % top-1, 92.90 % top-5, Table 2", "resnet50"),
    "sd_resnet50": _Row("72.25 % top-1, 90.86 % top-5, Table 2", "sd_resnet50"),
    "aig_resnet50": _Row("76.42 % top-1, 93.17 % top-5, Table 2", "aig_resnet50", 0.7),
    "dr_resnet35": _Row("76.48 % top-1, 92.92 % top-5, Table 2", "dr_resnet35", 0.8),
    "mobilenet_v2": _Row("71.8 % top-1, 90.27 % top-5, Table 2", "mobilenet_v2"),
    "dr_mobilenet_v2": _Row("71.8 % top-1, 90.28 % top-5, Table 2", "dr_mobilenet_v2", 0.9),
    "r_resnet53_shared_norm": _Row(
        "fails, Table 3",
        "r_resnet53",
        norm="shared",
        about="naive recursive: one norm for all steps",
    ),
    "r_resnet53": _Row("77.22 % top-1, Table 3", "r_resnet53"),
    "dr_resnet53_per_step_norm": _Row(
        "77.52 % top-1, Table 3",
        "dr_resnet53",
        0.7,
        norm="per_step",
        about="dynamic recursive, skipped samples in the norms' statistics",
    ),
    "r_resnet53_long": _Row(
        "78.38 % top-1, Table 3",
        "r_resnet53",
        about="recursive, one norm per step, no gates; long schedule",
    ),
}
_TARGET_RATE = 0.7


# What Figure 6 and Section 3.4 compare, on a network whose cells are used four times.
_COMPARED: list[tuple[str, str, dict[str, Any], str]] = [
    ("r_resnet32", "", {}, "recursive, one norm per step, no gates"),
    ("r_resnet32", "-shared-norm", {"norm": "shared"}, "naive recursive: one norm for all steps"),
    ("dr_resnet32", "", {}, "dynamic recursive"),
    ("dr_resnet32", "-t060", {"target_rate": 0.6}, "dynamic recursive, target 0.6"),
    ("dr_resnet32", "-t080", {"target_rate": 0.8}, "dynamic recursive, target 0.8"),
    (
        "dr_resnet32",
        "-per-step-norm",
        {"norm": "per_step"},
        "dynamic recursive, skipped samples in the norms' statistics",
    ),
]


def cifar10(model: str, suffix: str = "", options: dict[str, Any] | None = None) -> Config:
    """Section 4.1: 350 epochs of batch 256, lr 0.1 divided by 10 at 150 and 250.

    RCNN has no batch norm, and at that rate it diverges: its rate and its clipping are ours.
    """
    gated = model.startswith(("dr_", "aig_"))
    rate: dict[str, Any] = {"lr": 0.03, "clip_norm": 1.0} if model == "rcnn160" else {"lr": 0.1}
    return Config(
        name=f"drnn/cifar10/{model}{suffix}",
        model=model,
        model_options={**({"target_rate": _TARGET_RATE} if gated else {}), **(options or {})},
        data=Data(
            path=Path("data/cifar10"),
            augment=Augmentation(crop="pad", padding=4, flip=True, size=32),
        ),
        optimizer=Optimizer(**rate, momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="step", milestones=(150, 250)),
        train=Train(epochs=350, batch_size=256),
    )


def imagenet(name: str) -> Config:
    """Section 4.2: 100 epochs, lr 0.1 divided by 10 every 30 epochs.

    The paper names no batch; 256 is that of the ResNet training procedure it follows.
    """
    row = _IMAGENET[name]
    options = {"target_rate": row.target, "norm": row.norm}
    lr, weight_decay, epochs = 0.1, 1e-4, 100
    milestones: tuple[int, ...] = (30, 60, 90)
    if "mobilenet" in row.model:
        lr, epochs, milestones = 0.01, 400, (200, 300)
    elif name == "r_resnet53_long":  # Table 3's R-ResNet 53*
        lr, weight_decay, epochs, milestones = 0.01, 5e-4, 180, (100, 130, 160)
    elif name == "r_resnet53_shared_norm":
        lr = 0.01  # Fig. 6
    return Config(
        name=f"drnn/imagenet/{name}",
        model=row.model,
        model_options={key: value for key, value in options.items() if value is not None},
        data=Data(
            path=Path("data/imagenet"),
            augment=Augmentation(
                crop="random_resized", size=224, flip=True, photometric=True, eval_resize=256
            ),
        ),
        optimizer=Optimizer(lr=lr, lr_batch=256, momentum=0.9, weight_decay=weight_decay),
        schedule=Schedule(name="step", milestones=milestones),
        train=Train(epochs=epochs, batch_size=256),
    )


def digits() -> Config:
    """The smallest network of Table 1 on handwritten digits: about a minute on two cores."""
    return Config(
        name="drnn/digits/dr_resnet16",
        model="dr_resnet16",
        model_options={"target_rate": _TARGET_RATE},
        # Digits have no mirror images, and a shift of two pixels is half a pixel of the scan.
        data=Data(path=Path("data/digits"), augment=Augmentation(crop="pad", padding=2, size=32)),
        optimizer=Optimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=Schedule(name="one_cycle"),
        train=Train(epochs=8, batch_size=64),
    )


def _about(model: str) -> str:
    for prefix, about in _ABOUT.items():
        if model.startswith(prefix):
            return about
    return "static baseline"


RECIPES = {
    f"drnn/cifar10/{model}": Recipe(
        partial(cifar10, model), _about(model), f"{error:.2f} % error, Table 1"
    )
    for model, error in _TABLE_1.items()
}
RECIPES |= {
    f"drnn/cifar10/{model}": Recipe(partial(cifar10, model), _about(model))
    for model in (dynamic.removeprefix("d") for dynamic in _TABLE_1 if dynamic.startswith("dr_"))
}
RECIPES |= {
    f"drnn/imagenet/{name}": Recipe(
        partial(imagenet, name), row.about or _about(row.model), row.reported
    )
    for name, row in _IMAGENET.items()
}
RECIPES["drnn/digits/dr_resnet16"] = Recipe(digits, "dynamic recursive; the demo")
RECIPES |= {
    f"drnn/digits/{model}{suffix}-short": short(
        Recipe(partial(cifar10, model, suffix, options), about)
    )
    for model, suffix, options, about in _COMPARED
}
