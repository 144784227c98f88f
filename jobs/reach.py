"""`srun python -m jobs.reach FOLDER`: do the ranks of a step reach each other, as training does.

And has the folder, in which runs are to be, locks that hold on all of their nodes.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from data_prep.files import Lock
from jobs.errors import Exit

if TYPE_CHECKING:
    from pipeline.distributed import World


def main() -> int:
    """The exit status. An error is one line, whatever it is: `doctor` shows it to a person."""
    try:
        return _reach(Path(sys.argv[1]))
    except Exception as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return Exit.USER_ERROR


def _reach(folder: Path) -> int:
    """Sum a number over the ranks; rank 0 prints with what, and over which machines."""
    import torch

    from pipeline.distributed import World

    world = World.detect()
    world.start()
    try:
        total = world.sum(torch.ones((), device=world.device))
        names = sorted(set(world.gather(socket.gethostname())))
        _check_locks(world, folder)
    finally:
        world.stop()  # gloo's threads would end the process with a signal
    if world.is_main:
        backend = "NCCL" if world.device.type == "cuda" else "gloo"
        print(f"{world.world_size} ranks on {', '.join(names)} over {backend}")
    return int(total.item() != world.world_size)


def _check_locks(world: World, folder: Path) -> None:
    """Raises ValueError, on all ranks, where one can take a lock that rank 0 holds, or not try."""
    made = tempfile.mkdtemp(prefix=".reprise-", dir=folder) if world.is_main else ""
    own = Path(world.broadcast(made))
    if world.is_main:
        problem = _try(lock := Lock(own / "lock", timeout=0), free=True)
        world.broadcast(None)
    else:
        world.broadcast(None)  # rank 0 has its lock
        problem = _try(Lock(own / "lock", timeout=0), free=False)
    problems = [text for text in world.gather(problem) if text]
    if world.is_main:
        lock.release()
        shutil.rmtree(own, ignore_errors=True)
    if problems:
        raise ValueError(f"{folder}: {problems[0]}")


def _try(lock: Lock, free: bool) -> str:
    """What is wrong with a lock that can be had, or cannot."""
    try:
        lock.acquire()
    except Timeout:
        return "nobody gets a new lock" if free else ""
    except (OSError, ValueError) as error:
        return str(error)
    if free:
        return ""
    lock.release()
    return (
        "a node takes a lock that another one holds: have the file system mounted with locks for "
        "all nodes (Lustre: -o flock, not localflock), or two jobs may write to one run"
    )


if __name__ == "__main__":
    sys.exit(main())
