"""World: who this process is among the others. Plain numbers, and the few sums they agree on."""

from __future__ import annotations

import atexit
import datetime
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)
PORTS = range(20000, 32768)  # above services, below what Linux hands out to outgoing connections
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
        elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
            # SLURM_NTASKS would be the whole allocation's number in the shell that salloc opens.
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
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
        if self.world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
            atexit.register(_leave)  # NCCL complains of a group that nobody left
            return
        if "SLURM_STEP_NODELIST" in os.environ:
            # What is given is not looked for: it is the cure where it would not be found.
            if "MASTER_ADDR" not in os.environ:
                os.environ["MASTER_ADDR"] = _host(os.environ)
            if "MASTER_PORT" not in os.environ:
                os.environ["MASTER_PORT"] = str(_port(os.environ))
        dist.init_process_group(
            backend, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
        )

    def stop(self) -> None:
        """Leave the group; a lone process keeps its own to the end: DeepSpeed holds on to it."""
        if self.world_size > 1:
            _leave()

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


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _host(environment: Mapping[str, str]) -> str:
    """Where rank 0 of a job step listens; torch would wait ten minutes for a host it cannot find.

    Raises:
        ValueError: the name of the step's first node does not resolve.
    """
    if environment["SLURM_STEP_NUM_NODES"] == "1":
        return "localhost"
    host = _first_host(environment["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ValueError(
            f"{host}, the first node of this job step, has no address here: export MASTER_ADDR "
            "with one that all of its nodes can reach"
        ) from None
    return host


def _first_host(nodelist: str) -> str:
    """First name of a SLURM node list such as `node[1-2,7],other`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    return head + rest.split(",")[0].split("-")[0].rstrip("]")


def _port(environment: Mapping[str, str]) -> int:
    """A port on which the ranks of a job step meet, another one for the steps beside it."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return PORTS[(job * 8 + step) % len(PORTS)]
