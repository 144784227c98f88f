"""Who a process is, from what torchrun and srun set."""

import pytest
import torch

from pipeline.distributed import World, _first_host

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_NTASKS": "16",  # of the allocation; the step has fewer
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "2",
}


@pytest.mark.parametrize(
    ("environment", "numbers"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        (SRUN, (3, 4, 2)),
        (SRUN | TORCHRUN, (5, 8, 1)),  # torchrun inside a job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # a batch script, not a step
        ({"RANK": "5"}, (0, 1, 0)),
    ],
)
def test_detect(environment: dict[str, str], numbers: tuple[int, int, int]) -> None:
    world = World.detect(environment)
    assert (world.rank, world.world_size, world.local_rank) == numbers
    assert world.is_main == (numbers[0] == 0)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node[1-2,7],other", "node1"),
        ("node[03,07]", "node03"),
        ("a,b[1-2]", "a"),
        ("gpu[12]", "gpu12"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert _first_host(nodelist) == first


def test_a_world_of_one_needs_no_group() -> None:
    world, values = World(), torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(world.sum(values), values)
    assert not world.sum(values).requires_grad
    assert world.mean(values) is values
    assert world.gather("a") == ["a"]
    assert world.broadcast("a") == "a"


def _collectives(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    world = World(rank=rank, world_size=2)
    values = torch.tensor([1.0 + rank, 10.0 * rank], requires_grad=True)
    assert world.sum(values).tolist() == [3.0, 10.0]
    mean = world.mean(values)
    assert mean.tolist() == [1.5, 5.0]
    (mean**2).sum().backward()
    # That of this rank's own values: averaged over the ranks it is that of the global batch.
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 10.0]
    assert values.tolist() == [1.0 + rank, 10.0 * rank]
    assert world.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.broadcast(rank) == 0
    world.stop()
    assert not torch.distributed.is_initialized()


def test_two_ranks_agree(tmp_path) -> None:
    torch.multiprocessing.spawn(_collectives, (f"file://{tmp_path}/rendezvous",), nprocs=2)
