"""Real ranks for tests: one process each, joined by gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipeline.distributed import World


def on_ranks(work: Callable[[World], Any], world_size: int, folder: Path) -> list[Any]:
    """What `work` returns on each rank; `work` and its results must be picklable."""
    folder.mkdir(parents=True)
    multiprocessing.spawn(_rank, (work, world_size, folder), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, work: Callable[[World], Any], world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    try:
        torch.save(work(World(rank, world_size, rank)), folder / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        if dist.is_initialized():  # the work may have left the group itself
            dist.destroy_process_group()
