"""A trained network in one file: its weights, and all that is needed to show it an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.manifest import CLASSIFICATION, Manifest
from pipeline.config import Augmentation, Config, ConfigError
from pipeline.data.augment import resize
from pipeline.models import Network, create_model

ABOUT = "reprise"  # the key of the file's metadata


@dataclass(frozen=True)
class Exported:
    """A network in evaluation mode, on the CPU, and how its images were made.

    `classes` are names by index, empty for denoising. `step` is that of the weights.
    """

    network: Network
    classes: tuple[str, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    augment: Augmentation
    step: int

    def prepare(self, images: Sequence[Tensor]) -> Tensor:
        """As the evaluation of a run does: uint8 (C, H, W) each -> float32 (N, C, size, size).

        Scaled to the square of `eval_resize` or of `size`, cropped in the centre, normalised. For
        denoising (1, H, W), all of one size: only to 0..1; noise is what is there already.
        """
        if not self.classes:
            return torch.stack(list(images)).float() / 255
        size, side = self.augment.size, self.augment.eval_resize or self.augment.size
        margin = (side - size) // 2
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.channel_mean, self.channel_std))
        found = []
        for image in images:
            if image.shape[1:] != (side, side):
                image = resize(image.permute(1, 2, 0), side).permute(2, 0, 1)
            image = image[:, margin : margin + size, margin : margin + size]
            found.append((image.float() / 255 - mean) / std)
        return torch.stack(found)


def save(
    file: Path, weights: Mapping[str, Tensor], config: Config, manifest: Manifest, step: int
) -> None:
    """Write what `load` reads."""
    about = {
        "model": config.model,
        "model_options": config.model_options,
        "classes": manifest.classes if manifest.task == CLASSIFICATION else (),
        "channel_mean": manifest.channel_mean,
        "channel_std": manifest.channel_std,
        "augment": config.data.augment.model_dump(mode="json"),
        "step": step,
    }
    tensors = {name: value.cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, file, metadata={ABOUT: json.dumps(about)})


def load(path: Path) -> Exported:
    """The network of a finished run's directory, or of its `weights.safetensors`.

    Raises:
        ConfigError: there is no such file, or none of a finished run.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(ABOUT, "null"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {file}: {error}: give a finished run") from None
    if about is None:
        raise ConfigError(f"{file} does not say what network it is of: give that of a finished run")
    labelled = {"num_classes": len(about["classes"])} if about["classes"] else {}
    network = create_model(about["model"], **labelled, **about["model_options"])
    network.load_state_dict(weights)
    return Exported(
        network.eval(),
        tuple(about["classes"]),
        tuple(about["channel_mean"]),
        tuple(about["channel_std"]),
        Augmentation(**about["augment"]),
        about["step"],
    )
