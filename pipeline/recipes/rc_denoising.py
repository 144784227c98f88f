"""Recurrent convolution for image denoising: Fig. 5 and Table 3.

The paper trains on 232 images of the Berkeley segmentation data and tests on 68, with the settings
of Zhang et al., Beyond a Gaussian denoiser (2017), Sec. IV-A. These recipes take that paper's own
split, which `reprise prep bsd` prepares: 400 images and BSD68.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.config import (
    Augmentation,
    Config,
    Data,
    Optimizer,
    ParameterGroup,
    Schedule,
    Train,
)
from pipeline.recipes.recipe import Recipe

SIGMAS = (15, 25, 50)
STEPS = (1, 2, 3, 4)
# Table 3, dB, where the paper calls R_3^4 by the name of its classification network. Fig. 5 is a
# picture without numbers.
_TABLE_3 = {
    "none": {15: "31.36 dB", 25: "28.78 dB", 50: "25.77 dB"},
    "shared": {15: "no convergence", 25: "no convergence", 50: "17.54 dB"},
    "per_step": {15: "31.61 dB", 25: "29.07 dB", 50: "26.06 dB"},
}
_EPOCHS = 50
# 128 x 1,600 patches an epoch, cut from 400 images.
_PATCHES_PER_IMAGE = 512
# From 0.1 down to 1e-4 in equal factors, one per epoch.
_DECAY = 1e-3 ** (1 / (_EPOCHS - 1))
_PATCH = Augmentation(crop="pad", padding=0, size=40, flip=True, rotate=True)


def denoising(network: str, sigma: int, norm: str | None = None) -> Config:
    """50 epochs of 1,600 batches of 128 patches of 40x40, flipped and turned at random."""
    return Config(
        name=_name(network, sigma, norm),
        model=f"rc_{network}",
        model_options={"norm": norm} if norm else {},
        data=_data(sigma, repeats=_PATCHES_PER_IMAGE),
        optimizer=Optimizer(
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            # RC Sec. 3.3 clips the gradient and gives shared parameters half the rate; it gives no
            # bound.
            clip_norm=1.0,
            groups=_groups(network),
        ),
        schedule=Schedule(name="step", milestones=tuple(range(1, _EPOCHS)), gamma=_DECAY),
        train=Train(epochs=_EPOCHS, batch_size=128, evaluate_every=5, log_every=100),
    )


def short(network: str, sigma: int) -> Config:
    """A quarter of an hour on two cores: small patches and batches, Adam, one cycle.

    Without the half rate of shared parameters: it answers to gradients that are summed over steps,
    which Adam divides by their size.
    """
    data = _data(sigma, repeats=25)
    return Config(
        name=f"{_name(network, sigma)}-short",
        model=f"rc_{network}",
        data=data.model_copy(update={"augment": _PATCH.model_copy(update={"size": 24})}),
        optimizer=Optimizer(name="adam", lr=4e-3),
        schedule=Schedule(name="one_cycle", peak=0.1),
        train=Train(epochs=3, batch_size=8, evaluate_every=3),
    )


def _data(sigma: int, repeats: int) -> Data:
    return Data(path=Path("data/bsd"), sigma=sigma, repeats=repeats, augment=_PATCH)


def _groups(network: str) -> dict:
    """A cell used once shares nothing."""
    shares = network.startswith("r") and not network.endswith("_1")
    return {"shared": ParameterGroup(lr_factor=0.5)} if shares else {}


def _name(network: str, sigma: int, norm: str | None = None) -> str:
    return f"rc/denoising/{network}{f'-{norm}' if norm else ''}-sigma{sigma}"


def _recipe(network: str, sigma: int, norm: str | None = None) -> Recipe:
    about = "recurrent" if network.startswith("r") else "standard, unrolled"
    if norm is not None:
        about = {"none": "recurrent, no norm", "shared": "recurrent, one norm for all steps"}[norm]
    figure = _TABLE_3[norm or "per_step"][sigma] if network == "r3_4" else ""
    return Recipe(partial(denoising, network, sigma, norm), about, figure and f"{figure}, Table 3")


RECIPES = {
    _name(f"{kind}3_{n}", sigma): _recipe(f"{kind}3_{n}", sigma)
    for sigma in SIGMAS
    for kind in ("r", "s")
    for n in STEPS
}
RECIPES |= {
    _name("r3_4", sigma, norm): _recipe("r3_4", sigma, norm)
    for sigma in SIGMAS
    for norm in ("none", "shared")
}
RECIPES |= {
    f"{_name(network, 25)}-short": Recipe(
        partial(short, network, 25), "recurrent; minutes on two cores"
    )
    for network in ("r3_1", "r3_4")
}
