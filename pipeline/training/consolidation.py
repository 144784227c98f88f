"""The end of relaxed sharing: every tied tensor is replaced by the mean of its set.

*Towards Efficient Recurrent Visual Models*, Sec. 3.1. What it makes is an ordinary run directory of
the network with raw sharing, inside that of the run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from data_prep.files import replace_folder, write_atomically
from data_prep.manifest import Manifest
from pipeline import exported
from pipeline.config import Config, ConfigError
from pipeline.distributed import World
from pipeline.models import Network
from pipeline.models.sharing import consolidate
from pipeline.run_directory import RunDirectory
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.plan import build_model
from pipeline.training.relaxation import SAFE_ANGLE
from pipeline.training.restore import identity

log = logging.getLogger(__name__)


def shared(config: Config) -> Config:
    """The configuration of the consolidated network: raw sharing, and nothing that pulls.

    Raises:
        ConfigError: nothing is tied in the network.
    """
    if config.pull is None:
        raise ConfigError(
            f"model={config.model} with model_options={config.model_options} ties nothing, so that "
            "there is nothing to consolidate: give a run with model_options.sharing=relaxed"
        )
    options = {key: value for key, value in config.model_options.items() if key != "sharing"}
    groups = {
        "shared" if role == "tied" else role: g for role, g in config.optimizer.groups.items()
    }
    optimizer = config.optimizer.model_copy(update={"groups": groups})
    return config.model_copy(
        update={"model_options": options, "optimizer": optimizer, "pull": None}
    )


def network(config: Config, classes: int, model: Network) -> Network:
    """The consolidated form of a network with relaxed sharing, on the same device.

    `config` is that of the consolidated network.
    """
    made = build_model(config, classes)
    made.load_state_dict(consolidate(model.state_dict(), model))
    return made.to(next(model.parameters()).device)


def angle_of(model: Network) -> float:
    """The largest angle between tied tensors, degrees; a warning where it is not safe."""
    angle = max(float(tied.angle()) for tied in model.tied_sets())
    if angle >= SAFE_ANGLE:
        log.warning(
            "tied weights are up to %.2f degrees apart: below %g consolidation does not cost "
            "accuracy; train longer, or with a higher pull at the end",
            angle,
            SAFE_ANGLE,
        )
    return angle


def write(
    run: RunDirectory,
    config: Config,
    model: Network,
    manifest: Manifest,
    *,
    progress: Mapping[str, Any],
    angle: float,
) -> RunDirectory:
    """A run directory of the consolidated network, in place of an earlier one.

    `progress` and `angle`, degrees, are those of the network it was made of.
    """
    step = progress["step"]
    aside = RunDirectory(run.consolidated.path.with_name(".consolidated.partial"))
    shutil.rmtree(aside.path, ignore_errors=True)
    aside.checkpoints.mkdir(parents=True)
    write_atomically(aside.config_file, config.to_yaml().encode())
    record = {"step": step, "largest_angle_degrees": angle}
    write_atomically(aside.consolidation, json.dumps(record).encode())
    weights: dict[str, Tensor] = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    states = {"model": weights, "identity": {**identity(config, manifest), "config": config.flat()}}
    CheckpointStore(aside.checkpoints, World(), 1).save(step, states, {"progress": progress})
    exported.save(aside.weights, weights, config, manifest, step)
    replace_folder(run.consolidated.path, aside.path)
    return run.consolidated
