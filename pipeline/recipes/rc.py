"""Zhang & Jung, Recurrent Convolution for Compact and Cost-Adjustable Neural Networks.

The paper gives the learning rate of shared parameters (half that of the others), that gradients are
clipped (Section 3.3) and the probabilities of R_2 (Section 5.3). It says nothing of epochs, batch,
learning rates, weight decay, augmentation and the threshold of clipping: those here are the usual
ones for residual networks on CIFAR. Its errors are means over three runs: seeds 0, 1 and 2.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import (
    Augmentation,
    Config,
    Data,
    Optimizer,
    ParameterGroup,
    Schedule,
    Steps,
    Train,
)
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.short import short

SETS = ("cifar10", "cifar100")

# Error in % on each of the two. Table 1:
_TABLE_1 = {
    "rc_r2_1": (14.46, 40.30),
    "rc_r2_2": (8.53, 32.22),
    "rc_r2_3": (8.44, 31.78),
    "rc_r2_4": (7.65, 30.33),
    "rc_s2_2": (7.93, 30.89),
    "rc_s2_3": (7.41, 30.26),
    "rc_s2_4": (6.86, 28.35),
    "rc_s2_4_half": (8.32, 31.54),
}
# Table 2, of R_2^4; with per-step norms it is in Table 1.
_TABLE_2 = {
    "-no-norm": ("none", "no norms", (10.37, 38.56)),
    "-shared-norm": ("shared", "one norm for all steps", (21.00, 54.52)),
}
# Table 4, at 2, 3 and 4 steps.
_TABLE_4 = ("8.46 / 8.08 / 7.87", "31.55 / 31.21 / 30.67")
# Table 5, CIFAR-100 alone.
_TABLE_5 = {"rc_s4_1": 26.45, "rc_s4_2": 25.59, "rc_s4_3": 25.22}
_TABLE_5_R4 = "25.83 / 25.54 / 25.29"

# Section 5.3 for R_2. For R_4 the paper says only that larger numbers get more (Section 4.2).
_R2_STEPS = Steps(probabilities={2: 0.2, 3: 0.3, 4: 0.5})
_R4_STEPS = Steps(probabilities={1: 0.2, 2: 0.3, 3: 0.5})
# Every classifier learns from every image, as in deeply-supervised nets.
_EXITS = Steps(probabilities={2: 0.2, 3: 0.3, 4: 0.5}, draw="all")


def cifar(
    dataset: str,
    model: str,
    suffix: str = "",
    options: dict[str, Any] | None = None,
    steps: Steps | None = None,
) -> Config:
    """200 epochs of batch 128, lr 0.1 divided by 10 at 100 and 150."""
    # S_2^n and R_2^1 share nothing between steps.
    shares = not model.startswith("rc_s") and model != "rc_r2_1"
    return Config(
        name=f"rc/{dataset}/{model}{suffix}",
        model=model,
        model_options=options or {},
        data=Data(
            path=Path("data") / dataset,
            augment=Augmentation(crop="pad", padding=4, flip=True, size=32),
        ),
        optimizer=Optimizer(
            lr=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            clip_norm=1.0,
            groups={"shared": ParameterGroup(lr_factor=0.5)} if shares else {},
        ),
        schedule=Schedule(name="step", milestones=(100, 150)),
        steps=steps or Steps(),
        train=Train(epochs=200, batch_size=128),
    )


def _tables_1_2_and_4(dataset: str) -> dict[str, Recipe]:
    column = SETS.index(dataset)
    found = {
        model: Recipe(
            partial(cifar, dataset, model), _about(model), f"{errors[column]:.2f} % error, Table 1"
        )
        for model, errors in _TABLE_1.items()
    }
    for suffix, (norm, about, errors) in _TABLE_2.items():
        found[f"rc_r2_4{suffix}"] = Recipe(
            partial(cifar, dataset, "rc_r2_4", suffix, {"norm": norm}),
            f"recurrent, 4 steps, {about}",
            f"{errors[column]:.2f} % error, Table 2",
        )
    found["rc_r2"] = Recipe(
        partial(cifar, dataset, "rc_r2", options={"steps": [2, 3, 4]}, steps=_R2_STEPS),
        "cost-adjustable, 2 to 4 steps",
        f"{_TABLE_4[column]} % error at 2 / 3 / 4 steps, Table 4",
    )
    return found


def _table_5_and_figure_7() -> dict[str, Recipe]:
    return {
        "rc_r4": Recipe(
            partial(cifar, "cifar100", "rc_r4", options={"steps": [1, 2, 3]}, steps=_R4_STEPS),
            "cost-adjustable, 1 to 3 steps",
            f"{_TABLE_5_R4} % error at 1 / 2 / 3 steps, Table 5",
        ),
        **{
            model: Recipe(
                partial(cifar, "cifar100", model), _about(model), f"{error:.2f} % error, Table 5"
            )
            for model, error in _TABLE_5.items()
        },
        "rc_early_exit": Recipe(
            partial(cifar, "cifar100", "rc_early_exit", steps=_EXITS),
            "early exits, the baseline of Fig. 7",
        ),
    }


def _about(model: str) -> str:
    _, kind, steps, *half = model.split("_")
    what = "recurrent" if kind.startswith("r") else "static baseline"
    count = "1 step" if steps == "1" else f"{steps} steps"
    return f"{what}, {count}{', half the channels' if half else ''}"


RECIPES: dict[str, Recipe] = {
    f"rc/{dataset}/{name}": recipe
    for dataset in SETS
    for name, recipe in _tables_1_2_and_4(dataset).items()
}
RECIPES |= {f"rc/cifar100/{name}": recipe for name, recipe in _table_5_and_figure_7().items()}
RECIPES |= {
    f"rc/digits/{name}-short": short(RECIPES[f"rc/cifar10/{name}"])
    for name in (
        *("rc_r2_1", "rc_r2_2", "rc_r2_3", "rc_r2_4", "rc_s2_2"),
        *("rc_r2_4-no-norm", "rc_r2_4-shared-norm", "rc_r2"),
    )
}
