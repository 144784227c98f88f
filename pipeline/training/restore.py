"""From a checkpoint back to a network, and only to the network that it is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.manifest import Manifest
from pipeline.config import Config
from pipeline.models import Network
from pipeline.training import phases
from pipeline.training.checkpoint import Checkpoint, CheckpointError
from pipeline.training.plan import build_model

# Where and how, or how often it is told: keys and beginnings of keys.
FREE = (
    "train.precision",
    "train.compile",
    "train.zero_stage",
    "train.evaluate_every",
    "train.log_every",
    "data.path",
    "data.reader",
    "data.workers",
    "data.eval_batch_size",
    "checkpoints",
    "experiment",
)


# The samples that an epoch visits, and their order.
SAMPLES = "train_shards_sha256"

_SAME_CLASSES = "give a shard set with the classes it was trained on, in their order"
_SAME_SET = "give the shard set it was trained on"
_CURES = {
    "model": "use the model it was trained with",
    "classes": _SAME_CLASSES,
    "class_map_sha256": _SAME_CLASSES,
    "channel_mean": _SAME_SET,
    "channel_std": _SAME_SET,
    SAMPLES: "prepare the images with the seed and the shard size of the set it was trained on",
}


def identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What must not change over the life of a run directory."""
    return network_identity(config, manifest) | {SAMPLES: manifest.train.sha256}


def network_identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What a trained network must agree on with the images that it is shown."""
    return {
        "model": config.model,
        "classes": len(manifest.classes),
        "class_map_sha256": manifest.class_map_sha256,
        "channel_mean": list(manifest.channel_mean),
        "channel_std": list(manifest.channel_std),
    }


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose identity (model, class map, samples) is not the one expected."""
    saved = checkpoint.load("identity")
    for key, expected in identity.items():
        if saved.get(key) != expected:
            before, now = _in_brief(key, saved.get(key)), _in_brief(key, expected)
            raise CheckpointError(
                f"checkpoint {checkpoint.path} has {key} {before}, now {now}: {_CURES[key]}, or "
                "start a new run"
            )


def _in_brief(key: str, value: Any) -> str:
    return str(value)[:12] if key.endswith("sha256") else str(value)


def check_config(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to go on with a configuration that was changed since in what decides the training.

    Raises:
        CheckpointError: it was; every such key is listed with both values.
    """
    saved, now = checkpoint.load("identity")["config"], config.flat()
    odd = [
        f"{key}={now.get(key)} instead of {saved.get(key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    if odd:
        raise CheckpointError(
            f"the configuration is not that of checkpoint {checkpoint.path}: {', '.join(odd)}. Set "
            f"it back, or start a new run; what may change is {', '.join(FREE)}"
        )


def load_model(model: Network, origin: Path, saved: Mapping[str, Tensor]) -> None:
    """Load weights and averaged statistics that come from `origin`.

    Raises:
        CheckpointError: names or shapes differ; all of them are listed.
    """
    own = model.state_dict()
    odd = [f"{key} (missing)" for key in own.keys() - saved.keys()]
    odd += [f"{key} (unknown)" for key in saved.keys() - own.keys()]
    odd += [
        f"{key} {tuple(saved[key].shape)} instead of {tuple(own[key].shape)}"
        for key in saved.keys() & own.keys()
        if saved[key].shape != own[key].shape
    ]
    if odd:
        raise CheckpointError(
            f"{origin} is of another network: {', '.join(sorted(odd))}: "
            "use the model it was trained with"
        )
    model.load_state_dict(saved)


def trained_network(
    config: Config, manifest: Manifest, checkpoint: Checkpoint, device: torch.device
) -> Network:
    """The network of a checkpoint, for evaluation: the averaged weights where there are any.

    Its scorer is that of the phase that the checkpoint is in, or of the last.

    Raises:
        CheckpointError: it is of another model or class map.
    """
    check_identity(checkpoint, network_identity(config, manifest))
    model = build_model(config, len(manifest.classes))
    load_model(model, checkpoint.path, evaluated_weights(checkpoint))
    reached = checkpoint.load("rank-00000")["progress"]["phase"]
    all_phases = config.all_phases
    model.scorer = phases.scorer(config.during(all_phases[min(reached, len(all_phases) - 1)]))
    return model.to(device)


def evaluated_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that evaluation uses, by name."""
    if "average" in checkpoint.states:
        average: dict[str, Tensor] = checkpoint.load("average")["network"]
        return average
    return checkpoint.load("model")
