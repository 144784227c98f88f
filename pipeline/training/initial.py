"""The weights that a run starts from, where it does not start from scratch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import ConfigError, InitFrom
from pipeline.models import Network
from pipeline.models.folding import fold
from pipeline.models.torchvision_weights import translate
from pipeline.run_directory import RunDirectory


def start_from(init: InitFrom, model: Network) -> None:
    """Give the model the weights of a static network; its gates keep their own.

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
        model.load_state_dict(fold(saved, model, init.recursive))
    except ValueError as error:
        raise ConfigError(f"init_from.path={init.path}: {error}") from None


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".pth":
        saved: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return saved
    return load_file(file)
