"""Comparisons of the papers that two CPU cores make in minutes, on handwritten digits."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Augmentation, Config, Data, Schedule, Train
from pipeline.recipes.recipe import Recipe


def short(recipe: Recipe) -> Recipe:
    """The same network, optimizer and loss: eight epochs of 1,437 digits at 16x16 pixels.

    In fp32, because only some CPUs compute in half precision, and the others do so many times more
    slowly.
    """

    def config() -> Config:
        full = recipe.config()
        paper, _, network = full.name.split("/")
        # Digits have no mirror images.
        augment = Augmentation(crop="random_resized", scale=(0.7, 1.0), size=16, eval_resize=16)
        return full.model_copy(
            update={
                "name": f"{paper}/digits/{network}-short",
                "data": Data(path=Path("data/digits"), augment=augment),
                "schedule": Schedule(name="one_cycle"),
                "train": Train(epochs=8, batch_size=32),
            }
        )

    return Recipe(config, f"{recipe.about}; minutes on two cores")
