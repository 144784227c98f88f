"""`srun python -m jobs.reach`: do the ranks of a job step reach each other, as training does it."""

from __future__ import annotations

import socket
import sys

from jobs.errors import Exit


def main() -> int:
    """The exit status. An error is one line, whatever it is: `doctor` shows it to a person."""
    try:
        return _sum()
    except Exception as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return Exit.USER_ERROR


def _sum() -> int:
    """Sum a number over the ranks; rank 0 prints with what, and over which machines."""
    import torch

    from pipeline.distributed import World

    world = World.detect()
    world.start()
    total = world.sum(torch.ones((), device=world.device))
    names = sorted(set(world.gather(socket.gethostname())))
    world.stop()
    if world.is_main:
        backend = "NCCL" if world.device.type == "cuda" else "gloo"
        print(f"{world.world_size} ranks on {', '.join(names)} over {backend}")
    return int(total.item() != world.world_size)


if __name__ == "__main__":
    sys.exit(main())
