"""Guo et al., Dynamic Recursive Neural Network, CVPR 2019."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.config import Augmentation, Config, Data, Optimizer, Schedule, Train
from pipeline.recipes.recipe import Recipe

# Table 1, error in %; the recursive networks without gates are not in the table.
_TABLE_1 = {
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
_TARGET_RATE = 0.7


def cifar10(model: str) -> Config:
    """Section 4.1: 350 epochs of batch 256, lr 0.1 divided by 10 at 150 and 250."""
    return Config(
        name=f"drnn/cifar10/{model}",
        model=model,
        model_options={"target_rate": _TARGET_RATE} if model.startswith("dr_") else {},
        data=Data(
            path=Path("data/cifar10"),
            augment=Augmentation(crop="pad", padding=4, flip=True, size=32),
        ),
        optimizer=Optimizer(lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="step", milestones=(150, 250)),
        train=Train(epochs=350, batch_size=256),
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
        train=Train(epochs=16, batch_size=64, evaluate_every=2),
    )


RECIPES = {
    f"drnn/cifar10/{model}": Recipe(
        partial(cifar10, model),
        "dynamic recursive" if model.startswith("dr_") else "static baseline",
        f"{error:.2f} % error, Table 1",
    )
    for model, error in _TABLE_1.items()
}
RECIPES |= {
    f"drnn/cifar10/{model.removeprefix('d')}": Recipe(
        partial(cifar10, model.removeprefix("d")), "recursive, one norm per step, no gates"
    )
    for model in _TABLE_1
    if model.startswith("dr_")
}
RECIPES["drnn/digits/dr_resnet16"] = Recipe(digits, "dynamic recursive; the demo")
