"""DRNN Eq. 12 by hand, and over the global mini-batch of several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import configure
from pipeline.config import Loss
from pipeline.distributed import World
from pipeline.models import CellRoute, Network, Output, create_model
from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Gate
from pipeline.tasks import losses
from pipeline.training.engine import Engine
from tests.training.processes import on_ranks


def route(rows: list[list[float]], target: float | None = 0.5) -> CellRoute:
    weights = torch.tensor(rows, requires_grad=True)
    return CellRoute("cell", weights, weights.detach() > 0, target)


def test_execution_rate_by_hand() -> None:
    # Cell a executes 1.5 steps on average, cell b none; both should execute 0.5 + 0.25.
    a, b = route([[1.0, 1.0], [1.0, 0.0]]), route([[0.0, 0.0], [0.0, 0.0]])
    loss = losses.execution_rate([a, b], World())
    assert float(loss.detach()) == pytest.approx(((1.5 - 0.75) ** 2 + (0 - 0.75) ** 2) / 2)
    loss.backward()
    # d/dw = 1/M * 2 (rate - expected) / batch
    assert a.weights.grad is not None
    torch.testing.assert_close(a.weights.grad, torch.full((2, 2), (1.5 - 0.75) / 2))
    torch.testing.assert_close(b.weights.grad, torch.full((2, 2), (0 - 0.75) / 2))


def test_the_target_of_step_i_is_t_to_the_power_of_i() -> None:
    everybody = route([[1.0, 1.0, 1.0]], target=0.7)
    expected = 0.7 + 0.7**2 + 0.7**3
    assert float(losses.execution_rate([everybody], World()).detach()) == pytest.approx(
        (3 - expected) ** 2
    )


def test_terms_are_weighted_smoothed_and_in_fp32() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]).bfloat16(), torch.tensor([0])
    output = Output(logits, (route([[1.0, 1.0]]),))
    found = losses.terms(output, labels, Loss(label_smoothing=0.3, execution_rate=2.0), World())
    log_p = logits.float().log_softmax(1)[0]
    expected = -(0.7 * log_p[0] + 0.3 * log_p.mean())
    assert found["cross_entropy"].dtype == torch.float32
    assert float(found["cross_entropy"]) == pytest.approx(float(expected))
    assert float(found["execution_rate"].detach()) == pytest.approx(2 * (2 - 0.75) ** 2)


def test_without_gates_there_is_no_execution_rate() -> None:
    output = Output(torch.zeros(1, 3), (route([[1.0, 1.0]], target=None),))
    assert list(losses.terms(output, torch.tensor([0]), Loss(), World())) == ["cross_entropy"]


CASES = [("fixed", 0), ("fixed", 1), ("synchronised", 0)]


def test_two_ranks_with_half_the_batch_make_the_step_of_one_rank(tmp_path: Path) -> None:
    alone = steps(World())
    for rank in on_ranks(steps, 2, tmp_path / "ranks"):
        for case in CASES:
            torch.testing.assert_close(rank[case], alone[case], rtol=1e-4, atol=2e-6)


def steps(world: World) -> dict[tuple[str, int], dict[str, Tensor]]:
    world.start()
    return {case: one_step(*case, world) for case in CASES}


def one_step(norms: str, zero_stage: int, world: World) -> dict[str, Tensor]:
    """How one optimizer step at lr 1 changes each parameter; the sign is the gradient's."""
    torch.manual_seed(10)
    model = create_model("dr_resnet16", sync_norm=norms == "synchronised")
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    # Unequal parts, so that the rates of the ranks differ from the global ones.
    images = images * torch.linspace(0.2, 3, 16)[:, None, None, None]
    model.train()
    decide_without_noise(model, norms)
    engine = Engine(model, step_config(zero_stage), world, lambda step: 1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    part = slice(world.rank * 16 // world.world_size, (world.rank + 1) * 16 // world.world_size)
    output = engine.forward(images[part])
    terms = losses.terms(output, labels[part], Loss(execution_rate=5.0), world)
    assert float(terms["execution_rate"].detach()) > 0.01
    rates = world.gather([route.executed.float().mean(0).tolist() for route in output.routes])
    # Equal rates would hide a rank that looks at its own alone.
    assert all(rate != rates[0] for rate in rates[1:]), rates
    engine.backward(torch.stack(list(terms.values())).sum())
    engine.step()
    step = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    assert all(bool(step[name].any()) for name in step if "router.scores" in name)
    return step


def step_config(zero_stage: int) -> Any:
    values = {
        "name": "step",
        "model": "dr_resnet16",
        "data": {"path": "unused"},
        "optimizer": {"lr": 1.0, "momentum": 0.0},
        "train": {"epochs": 1, "batch_size": 16, "zero_stage": zero_stage},
    }
    return configure.build(values)


def decide_without_noise(model: Network, norms: str) -> None:
    for module in model.modules():
        if isinstance(module, Gate):
            module.eval()
            # Undecided gates: the samples differ in what they execute.
            nn.init.normal_(module.scores.weight, std=2.0)
        if norms == "fixed" and isinstance(module, BatchNorm):
            module.eval()
