"""*Towards Efficient Recurrent Visual Models*: relaxed weight sharing.

Whether the networks of the tables were trained with stochastic depth the paper does not say; it is
part of the approach (Section 3.2), so they are here, and `-no-drop` is without. "Per feature"
normalisation is taken to be by the mean and standard deviation of each channel.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Augmentation, Config, Data, Optimizer, Pull, Schedule, Train
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.short import short

RELAXED, NO_DROP = "-relaxed", "-no-drop"
_ABOUT = {
    "": "raw sharing",
    "_minimal": "one cell in place of the shared ones",
    RELAXED: "relaxed sharing",
}
# Error in %; 18 and 3 cells per level.
_ROWS = {
    "rs_18": "6.67 % error, Tables 1 and 2",
    "rs_18_middle-relaxed": "6.67 % error, Table 1",
    "rs_18_middle": "7.78 % error, Table 1",
    "rs_18_middle_minimal": "7.23 % error, Table 1",
    "rs_18_all-relaxed": "10.63 % error, Table 2",
    "rs_18_all": "12.04 % error, Table 2",
    "rs_18_all_minimal": "11.18 % error, Table 2",
    "rs_3": "8.26 % error, Table 3",
    "rs_3_all-relaxed": "10.06 % error, Table 3",
    "rs_3_all": "10.29 % error, Table 3",
    "rs_3_all_minimal": "11.25 % error, Table 3",
}


def cifar10(name: str) -> Config:
    """Section 4: 500 epochs of batch 128, lr 0.1 divided by 10 at 250 and 375, flips alone."""
    options: dict[str, Any] = {} if NO_DROP in name else {"death_rate": 0.5}
    if RELAXED in name:
        options["sharing"] = "relaxed"
    return Config(
        name=f"relaxed/cifar10/{name}",
        model=name.split("-")[0],
        model_options=options,
        data=Data(path=Path("data/cifar10"), augment=Augmentation(flip=True, size=32)),
        optimizer=Optimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        schedule=Schedule(name="step", milestones=(250, 375)),
        pull=Pull() if RELAXED in name else None,
        train=Train(epochs=500, batch_size=128),
    )


def digits(name: str) -> Recipe:
    """The rows of Table 3 on digits of 8x8 pixels, as they are scanned, without stochastic depth.

    The pull has grown to the paper's last value after half of the few steps, so that it still meets
    a learning rate with which it can bring the weights together.
    """
    row = f"{name}{NO_DROP}"
    base = short(Recipe(partial(cifar10, row), _about(row)))

    def config() -> Config:
        made = base.config()
        pull = Pull(points=((0, 1e-4), (0.5, 1e-1))) if made.pull else None
        augment = made.data.augment.model_copy(update={"size": 8, "eval_resize": 8})
        return made.model_copy(
            update={
                "name": f"relaxed/digits/{name}-short",
                "data": made.data.model_copy(update={"augment": augment}),
                "pull": pull,
                "train": made.train.model_copy(update={"epochs": 12, "evaluate_every": 3}),
            }
        )

    return Recipe(config, base.about)


def _about(name: str) -> str:
    model, *_ = name.split("-")
    cells = f"{model.split('_')[1]} cells per level"
    drop = ", without stochastic depth" if NO_DROP in name else ""
    if model.count("_") == 1:
        return f"not shared, {cells}{drop}"
    where = "the middle level" if "middle" in model else "all levels"
    how = RELAXED if RELAXED in name else "_minimal" if "minimal" in model else ""
    return f"{_ABOUT[how]} on {where}, {cells}{drop}"


RECIPES = {
    f"relaxed/cifar10/{name}": Recipe(partial(cifar10, name), _about(name), reported)
    for name, reported in _ROWS.items()
}
RECIPES |= {
    f"relaxed/cifar10/{name}": Recipe(partial(cifar10, name), _about(name))
    for name in (f"rs_18{NO_DROP}", f"rs_18_middle{RELAXED}{NO_DROP}")
}
RECIPES |= {
    f"relaxed/digits/{name}-short": digits(name)
    for name in ("rs_3", f"rs_3_all{RELAXED}", "rs_3_all", "rs_3_all_minimal")
}
