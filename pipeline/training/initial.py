"""The weights that a run starts from, where it does not start from scratch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import Config, ConfigError, InitFrom
from pipeline.models import Network
from pipeline.models.folding import fold
from pipeline.models.torchvision_weights import translate
from pipeline.run_directory import RunDirectory
from pipeline.training.plan import build_model

CLASSIFIERS = ("classifier.", "classifiers.")  # beginnings of names


def start_from(init: InitFrom, model: Network) -> None:
    """Give the model the weights of the same network or of its static form.

    Gates that these have not keep their own, and a classifier that is to be fresh.

    Raises:
        ConfigError: no such weights, or those of another network.
    """
    file = RunDirectory(init.path).weights if init.path.is_dir() else init.path
    if not file.is_file():
        raise ConfigError(
            f"init_from.path={init.path}: there is no {file}: give a finished run, its "
            "weights.safetensors, or a .pth file of torchvision's"
        )
    try:
        saved = _read(file)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ConfigError(
            f"init_from.path={init.path}: cannot read {file}: {' '.join(str(error).split())}"
        ) from None
    try:
        if file.suffix == ".pth":
            saved = translate(saved, model)
        if init.classifier == "fresh":
            saved = _without_classifier(saved, model)
        model.load_state_dict(fold(saved, model, init.recursive))
    except ValueError as error:
        other_classes = any(f"{name}weight (" in str(error) for name in CLASSIFIERS)
        cure = "; for other classes give init_from.classifier=fresh" if other_classes else ""
        raise ConfigError(f"init_from.path={init.path}: {error}{cure}") from None


def check(config: Config, classes: int) -> None:
    """Refuse weights that a run of this configuration cannot start from.

    Raises:
        ConfigError: as `start_from`.
    """
    if config.init_from:
        start_from(config.init_from, build_model(config, classes))


def _without_classifier(saved: Mapping[str, Tensor], model: Network) -> dict[str, Tensor]:
    """With the model's own in its place.

    Raises:
        ValueError: the model has none.
    """
    own = {k: v for k, v in model.state_dict().items() if k.startswith(CLASSIFIERS)}
    if not own:
        raise ValueError("classifier=fresh with a network that has none: leave it out")
    return {k: v for k, v in saved.items() if not k.startswith(CLASSIFIERS)} | own


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".pth":
        saved: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return saved
    return load_file(file)
