"""ReSet's regularisers by hand, and over the global mini-batch of several ranks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import Loss, Weight
from pipeline.distributed import World
from pipeline.models import CellRoute, Output, Policy
from pipeline.tasks import losses
from tests.training.processes import on_ranks


def output(probabilities: Tensor, weights: Tensor | None = None) -> Output:
    """Of one pool: (N, iterations, units + 1)."""
    policy = Policy("pool", probabilities if weights is None else weights, probabilities)
    assert isinstance(policy, Policy)
    route = CellRoute("unit", probabilities[..., 0], probabilities[..., 0] > 0, None, policy)
    return Output(torch.zeros(len(probabilities), 3), (route,))


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares if share)


# Two samples, two iterations, two units and the zero unit.
ROUTES = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])


def test_equation_13_by_hand() -> None:
    policies = output(ROUTES).policies
    means = entropy(0.5, 0.5) + entropy(0.5, 0.5)  # over samples, at either iteration
    across = losses.different_routes(policies, World())
    assert float(across) == pytest.approx(2 * math.log(3) - means)
    within = losses.decided_routes(policies, World())
    assert float(within) == pytest.approx(entropy(0.5, 0.5) + 0)


def test_equation_9_by_hand() -> None:
    """Of two iterations, one sample skips one, by its weights whatever the probabilities."""
    policies = output(torch.full_like(ROUTES, 1 / 3), ROUTES).policies
    assert float(losses.skip_reward(policies, World())) == pytest.approx(2 - 0.5)


def test_means_are_over_samples_and_sums_over_iterations() -> None:
    """Eq. 9 and 13 of three samples and two iterations, of which one sample skips the second."""
    policies = output(ROUTES[[1, 0, 0]]).policies
    assert float(losses.decided_routes(policies, World())) == pytest.approx(entropy(0.5, 0.5))
    assert float(losses.skip_reward(policies, World())) == pytest.approx(2 - 1 / 3)
    means = entropy(0.5, 0.5) + entropy(2 / 3, 1 / 3)
    across = losses.different_routes(policies, World())
    assert float(across) == pytest.approx(2 * math.log(3) - means)


@pytest.mark.parametrize("term", ["different_routes", "decided_routes", "skip_reward"])
def test_the_terms_of_several_pools_are_summed(term: str) -> None:
    """In Eq. 9 and 13, t counts the invocations of all controllers, whose pools may differ."""
    torch.manual_seed(0)
    outputs = [output(torch.randn(4, 2, components).softmax(2)) for components in (3, 5)]
    one_by_one = [getattr(losses, term)(found.policies, World()) for found in outputs]
    policies = [policy for found in outputs for policy in found.policies]
    together = getattr(losses, term)(policies, World())
    assert float(together) == pytest.approx(float(sum(one_by_one)))


def test_the_gradients_favour_what_the_paper_says() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]], requires_grad=True)

    def downhill(term: str) -> Tensor:
        policies = output(logits.softmax(2)).policies
        (gradient,) = torch.autograd.grad(getattr(losses, term)(policies, World()), logits)
        return -gradient

    assert bool((downhill("different_routes")[..., 0] < 0).all())  # the common favourite loses
    assert bool((downhill("decided_routes")[..., 0] > 0).all())  # each sample's favourite gains
    assert bool((downhill("skip_reward")[..., 2] > 0).all())  # the zero unit gains


def test_terms_carry_their_weight_of_the_moment() -> None:
    config = Loss(
        different_routes=Weight(first=0.4, last=0.0),
        decided_routes=Weight(first=1e-4, last=1e-2, shape="exponential"),
    )
    labels = torch.tensor([0, 1])
    plain = losses.terms(output(ROUTES), labels, Loss(), World())
    assert list(plain) == ["cross_entropy"]
    for progress, across, within in ((0.0, 0.4, 1e-4), (0.5, 0.2, 1e-3), (1.0, 0.0, 1e-2)):
        found = losses.terms(output(ROUTES), labels, config, World(), progress)
        policies = output(ROUTES).policies
        assert found["different_routes"] == pytest.approx(
            across * losses.different_routes(policies, World())
        )
        assert found["decided_routes"] == pytest.approx(
            within * losses.decided_routes(policies, World())
        )
        assert "skip_reward" not in found


def test_a_plain_number_is_a_weight_that_stays() -> None:
    assert Loss.model_validate({"skip_reward": 0.3}).skip_reward == Weight(first=0.3, last=0.3)
    assert Weight(first=0.3, last=0.3).at(0.7) == pytest.approx(0.3)


def of_half(world: World) -> tuple[float, Tensor]:
    """Value, and gradient of the rank's own samples as averaging makes it."""
    logits = torch.arange(24.0).reshape(4, 2, 3).sin().requires_grad_()
    own = logits[2 * world.rank : 2 * world.rank + 2] if world.world_size > 1 else logits
    loss = losses.different_routes(output(own.softmax(2)).policies, world)
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient / world.world_size


def test_routes_differ_over_the_global_mini_batch(tmp_path: Path) -> None:
    whole, gradient = of_half(World())
    ranks = on_ranks(of_half, 2, tmp_path / "ranks")
    assert [value for value, _ in ranks] == pytest.approx([whole] * 2)
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], gradient)
