"""World: who this process is among the others. Plain numbers, and the few sums they agree on."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)
RENDEZVOUS_PORT = 29400
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process; collectives are no-ops for a world of one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @classmethod
    def detect(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read the ranks that torchrun or srun set; a lone process is a world of one."""
        if "RANK" in environment and "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        else:
            names = ("", "", "")
        rank, world_size, local_rank = (
            int(environment.get(name, default))
            for name, default in zip(names, (0, 1, 0), strict=True)
        )
        device = torch.device("cpu")
        if torch.cuda.is_available():
            # A scheduler may show each task only its own device, which is then number 0.
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        return cls(rank, world_size, local_rank, device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self) -> None:
        """Join the process group: gloo on CPU, NCCL (gloo beside it) on CUDA."""
        if dist.is_initialized():
            return
        # DeepSpeed looks the ranks up in the environment, whoever launched us.
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
        }
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
            return
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host(os.environ["SLURM_STEP_NODELIST"])
        os.environ.setdefault("MASTER_PORT", str(RENDEZVOUS_PORT))
        dist.init_process_group(
            backend, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
        )

    def stop(self) -> None:
        """Leave the group; a lone process keeps its own, which DeepSpeed holds on to."""
        if dist.is_initialized() and self.world_size > 1:
            dist.destroy_process_group()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, without gradient; a new tensor of the same shape."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks whose gradient on each rank is that of its own values.

        Gradients are averaged over the ranks after backward, so a loss of this mean, computed on
        every rank, gets exactly the gradient of the same loss over the global mini-batch.
        """
        if self.world_size == 1:
            return values
        return values + (self.sum(values) / self.world_size - values).detach()

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


def _first_host(nodelist: str) -> str:
    """First name of a SLURM node list such as `node[1-2,7],other`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    return head + rest.split(",")[0].split("-")[0].rstrip("]")
