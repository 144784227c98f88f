"""Two ranks with half the batch each are one rank with the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from undecided import undecided

from pipeline.models import create_model
from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Gate

NORMS = ["shared", "per_step", "gated_per_step"]
RANKS = 2


def _step(norm, rank, ranks):
    """One training step on this rank's part: logits, gradients and buffers."""
    torch.manual_seed(0)
    model = create_model("dr_resnet16", norm=norm, sync_norm=True)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    # The ranks see different distributions, so statistics of one rank alone would be wrong.
    images = images * torch.linspace(0.2, 3, 16)[:, None, None, None]
    undecided(model, images)
    for module in model.modules():
        if isinstance(module, Gate):
            module.eval()  # without noise, the decisions do not depend on the number of ranks
    part = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)
    output = model(images[part])
    F.cross_entropy(output.logits, labels[part]).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    return {
        "logits": output.logits.detach(),
        "executed": torch.cat([route.executed for route in output.routes], 1),
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def _groups(rank):
    """Statistics of a group that only rank 0 has, and of one that nobody has."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4) * 2 + 5
    masks = [[1, 0, 1, 1, 0, 0, 0, 0], [0] * 8]
    found = []
    for mask in masks:
        norm = BatchNorm(3, sync=True)
        executed = torch.tensor(mask, dtype=torch.bool)
        part = slice(0, 8) if rank is None else slice(rank * 4, rank * 4 + 4)
        y = norm(x[part], executed[part])
        found.append((y.detach(), norm.running_mean, norm.running_var))
    return found


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    results = {norm: _step(norm, rank, RANKS) for norm in NORMS}
    for result in results.values():
        for gradient in result["gradients"].values():
            dist.all_reduce(gradient)
            gradient /= RANKS
    torch.save((results, _groups(rank)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def _ranks(folder):
    torch.multiprocessing.spawn(_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return _ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("norm", NORMS)
def test_outputs_gradients_and_statistics_are_those_of_one_rank(ranks, norm):
    whole = _step(norm, 0, 1)
    parts = [results[norm] for results, _ in ranks]
    executed = [part["executed"].sum().item() for part in parts]
    assert executed[0] != executed[1], "the ranks must execute different numbers of samples"
    assert torch.equal(torch.cat([part["executed"] for part in parts]), whole["executed"])
    logits = torch.cat([part["logits"] for part in parts])
    torch.testing.assert_close(logits, whole["logits"], atol=1e-4, rtol=1e-4)
    for part in parts:
        torch.testing.assert_close(part["gradients"], whole["gradients"], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(part["buffers"], whole["buffers"], atol=1e-5, rtol=1e-5)
    for key, buffer in parts[0]["buffers"].items():
        assert torch.equal(buffer, parts[1]["buffers"][key]), key


@pytest.mark.parametrize("case", [0, 1], ids=["only rank 0 executes", "nobody executes"])
def test_groups_may_be_missing_on_a_rank(ranks, case):
    y, mean, var = _groups(None)[case]
    for rank, (_, groups) in enumerate(ranks):
        found = groups[case]
        torch.testing.assert_close(found[0], y[rank * 4 : rank * 4 + 4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[2], var, atol=1e-6, rtol=1e-6)


def test_without_other_ranks_it_is_an_ordinary_norm():
    torch.manual_seed(0)
    plain, sync = BatchNorm(3), BatchNorm(3, sync=True)
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(plain(x), sync(x))
    assert torch.equal(plain.running_var, sync.running_var)
