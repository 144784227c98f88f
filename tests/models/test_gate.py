"""DRNN's gate: Eq. 8 to 10, its gradient, its noise and its first rate."""

import pytest
import torch
from by_hand import normalise, random_norms

from pipeline.models.norms import BatchNorm
from pipeline.models.routers import Gate
from pipeline.models.routers.gate import HIDDEN

N, C = 8, 5


def _gate(seed=0, norm=None):
    torch.manual_seed(seed)
    gate = Gate(C, target=0.7, norm=norm)
    torch.nn.init.normal_(gate.scores.weight)
    torch.nn.init.normal_(gate.scores.bias)
    return gate


def _margin(gate, x):
    """Score of `execute` minus score of `skip` without noise: Eq. 8 by hand."""
    hidden = x.mean((2, 3)) @ gate.hidden.weight.T + gate.hidden.bias
    hidden = (hidden if gate.norm is None else normalise(hidden, gate.norm)).clamp(min=0)
    return hidden @ (gate.scores.weight[1] - gate.scores.weight[0]) + (
        gate.scores.bias[1] - gate.scores.bias[0]
    )


@pytest.mark.parametrize("seed", range(4))
def test_training_draws_hard_and_differentiates_soft(seed):
    gate = _gate()
    x = torch.randn(N, C, 3, 3, requires_grad=True)
    torch.manual_seed(seed)
    decision = gate(x)

    torch.manual_seed(seed)
    gumbel = -torch.empty(N, 2).exponential_().log()
    noisy = _margin(gate, x) + gumbel[:, 1] - gumbel[:, 0]
    assert torch.equal(decision, (noisy > 0).float())
    assert 0 < decision.sum() < N

    upstream = torch.randn(N)
    parameters = (x, *gate.parameters())
    found = torch.autograd.grad(decision, parameters, upstream)
    wanted = torch.autograd.grad(torch.sigmoid(noisy), parameters, upstream)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_evaluation_takes_the_larger_score_and_draws_nothing():
    gate = _gate().eval()
    x = torch.randn(64, C, 1, 1) * 3
    state = torch.get_rng_state()
    decision = gate(x)
    assert torch.equal(decision, (_margin(gate, x) > 0).float())
    assert 0 < decision.sum() < 64
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gate(x), decision)


def test_the_norm_of_an_adaptive_gate_stands_before_its_activation():
    """Veit and Belongie (2018), Sec. 3.2."""
    gate = _gate(1, BatchNorm(HIDDEN)).eval()
    random_norms(gate)
    x = torch.randn(256, C, 1, 1) * 9
    decision = gate(x)
    assert torch.equal(decision, (_margin(gate, x) > 0).float())
    assert 0 < decision.sum() < 256


def test_training_noise_comes_from_the_default_generator():
    gate = Gate(C, target=0.7)
    x = torch.randn(256, C, 3, 3)
    state = torch.get_rng_state()
    first, second = gate(x), gate(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(gate(x), first)


def test_decisions_are_exactly_zero_or_one():
    decision = _gate()(torch.randn(20_000, C, 1, 1))
    assert decision.dtype == torch.float32
    assert set(decision.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("channels", [32, 64])
def test_first_rate_in_training_is_about_85_percent(channels):
    torch.manual_seed(0)
    gate = Gate(channels, target=0.7)
    features = torch.randn(20_000, channels, 2, 2).relu() * 2
    assert gate(features).mean().item() == pytest.approx(0.85, abs=0.015)
    assert gate.eval()(features).mean().item() == 1


def test_scores_are_fp32_under_autocast():
    gate = _gate()
    x = torch.randn(4096, C, 1, 1)
    expected = gate.eval()(x)
    assert 0 < expected.sum() < len(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), expected)


@pytest.mark.parametrize("target", [0, -0.5, 1.01, float("nan"), "0.7", None])
def test_targets_that_are_no_rates_are_refused(target):
    with pytest.raises(ValueError, match=r"target_rate=.* is not in \(0, 1\]: give"):
        Gate(C, target=target)
