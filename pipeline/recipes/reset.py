"""Kemaev et al., ReSet: Learning Recurrent Dynamic Routing in ResNet-like Neural Networks."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Augmentation, Config, Data, Optimizer, Schedule, Train
from pipeline.recipes.recipe import Recipe


def scratch(name: str, model: str) -> Config:
    """64,000 batches of 128, lr 0.1 divided by 10 at 32,000 and 48,000: SGD as in He et al."""
    return Config(
        name=f"reset/cifar10/{name}",
        model=model,
        data=Data(
            path=Path("data/cifar10"),
            augment=Augmentation(crop="pad", padding=4, flip=True, size=32),
        ),
        optimizer=Optimizer(lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=Schedule(name="step", milestones=(82, 123)),
        train=Train(epochs=164, batch_size=128),
    )


RECIPES: dict[str, Recipe] = {
    "reset/cifar10/sm": Recipe(lambda: scratch("sm", "reset38"), "softmax")
}
