"""torch.compile of a step of training."""

from __future__ import annotations

import os
import shlex
import shutil
import socket

import torch

from pipeline.config import Config, ConfigError
from pipeline.distributed import World
from pipeline.models import Network


def check(config: Config, world: World) -> None:
    """Refuse on all ranks what one of them cannot compile; collective.

    Raises:
        ConfigError: a machine has no compiler.
    """
    if not config.train.compile:
        return
    lacking = [name for name in world.gather(_lacks(world)) if name]
    if lacking:
        raise ConfigError(
            f"train.compile=true needs {lacking[0]}, which is not there: install one, or leave "
            "train.compile out"
        )


def _lacks(world: World) -> str | None:
    """The compiler that this rank would call and does not find, and the machine's name."""
    if world.device.type == "cuda":  # Triton's choice
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    else:  # Inductor's
        names = [os.environ.get("CXX") or "g++"]
    if any(shutil.which(shlex.split(name)[0]) for name in names):
        return None
    kind = "C" if world.device.type == "cuda" else "C++"
    return f"a {kind} compiler ({' or '.join(names)}) on {socket.gethostname()}"


def begin(model: Network, config: Config, device: torch.device) -> None:
    """Compile the network's passes when they are first made."""
    model.compile(mode=mode(config, device), dynamic=False)


def end(model: Network) -> None:
    """As before `begin`; kernels of other engines of this process are let go as well."""
    model._compiled_call_impl = None
    # What is frozen, and the hooks, are others in the next phase: their graphs would pile up to
    # the number at which the compiler gives up, and says nothing.
    torch.compiler.reset()


def mode(config: Config, device: torch.device) -> str:
    """Of torch.compile; "reduce-overhead" replays a pass's kernels as a CUDA graph.

    A graph's outputs, gradients among them, last until its next replay, so that only an update of
    one forward and one backward pass can be replayed.
    """
    one_pass = (
        config.train.accumulation == 1
        and config.steps.draw == "one"
        and all(phase.draws == 1 for phase in config.all_phases)
    )
    return "reduce-overhead" if device.type == "cuda" and one_pass else "default"
