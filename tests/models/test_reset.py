"""ReSet by hand: its pools, its controllers and the sizes of its networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from by_hand import normalise, random_norms

from pipeline.models import create_model, list_models
from pipeline.models.cost import measure
from pipeline.models.folding import fold
from pipeline.models.norms import Step
from pipeline.models.pool import Pool
from pipeline.models.reset import MODELS
from pipeline.models.routers.controller import (
    HIDDEN,
    ConvolutionalController,
    RecurrentController,
)
from pipeline.models.scorers import Scorer

ROUTED = [name for name in MODELS if name.startswith("reset")]
SCORERS = {
    "softmax": Scorer(),
    "gumbel": Scorer("gumbel", temperature=0.5),
    "straight_through": Scorer("straight_through", temperature=0.5),
    "top_k": Scorer("top_k", k=2),
}


def _model(name, **options):
    torch.manual_seed(0)
    return create_model(name, **options)


def _lively(model):
    """Controllers whose scores differ between images, so that top-k and one-hot choices do too."""
    for name, parameter in model.named_parameters():
        if "controller.scores" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet38", (6, 6, 6)), ("resnet_1_1_5", (1, 1, 5)), ("resnet_5_1_1", (5, 1, 1))],
)
def test_the_static_networks_are_counted_by_hand(name, blocks):
    cost = measure(_model(name))
    widths, pixels = (16, 32, 64), (32**2, 16**2, 8**2)
    block = [2 * 9 * width**2 for width in widths]
    between = [9 * 16 * 32, 9 * 32 * 64]
    stem, classifier = 27 * 16, 64 * 10
    assert cost.nominal == (
        stem * pixels[0]
        + sum(n * one * size for n, one, size in zip(blocks, block, pixels, strict=True))
        + between[0] * pixels[1]
        + between[1] * pixels[2]
        + classifier
    )
    norms = 2 * 16 + 2 * 32 + 2 * 64
    assert cost.parameters == (
        stem
        + sum(n * (one + 4 * width) for n, one, width in zip(blocks, block, widths, strict=True))
        + sum(between)
        + norms
        + classifier
        + 10
    )


@pytest.mark.parametrize("controller", ["cnn", "rnn"])
def test_reset38_is_counted_by_hand(controller):
    cost = measure(_model("reset38", controller=controller))
    parameters = 27 * 16 + 9 * (16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 650
    for width in (16, 32, 64):
        parameters += 5 * (18 * width**2 + 5 * 4 * width)  # norms per iteration
        if controller == "cnn":
            parameters += 18 * width**2 + 5 * 4 * width + width * 6
        else:
            parameters += 4 * 64 * (width + 64 + 2) + 64 * 6 + 6
    assert cost.parameters == parameters
    assert len(cost.cells) == 15
    assert all(len(set(cell.per_step)) == 1 and cell.steps == 5 for cell in cost.cells.values())
    assert cost.cells["stages.1.pool.units.2"].per_step[0] == 18 * 32**2 * 16**2
    fixed = 27 * 16 * 32**2 + 9 * 16 * 32 * 16**2 + 9 * 32 * 64 * 8**2 + 640
    for width, size in ((16, 32), (32, 16), (64, 8)):
        if controller == "cnn":
            fixed += 5 * (9 * width**2 * ((size // 2) ** 2 + (size // 4) ** 2) + width * 6)
        else:
            fixed += 5 * (4 * 64 * (width + 64) + 64 * 6)
    assert cost.fixed == fixed


def test_reset38_has_the_parameters_of_resnet38():
    """The paper's claim: a comparable number of parameters."""
    static, routed = (measure(_model(name)).parameters for name in ("resnet38", "reset38"))
    assert routed == pytest.approx(static, rel=0.02)


@pytest.mark.parametrize("controller", ["cnn", "rnn"])
def test_a_pool_is_equation_12(controller):
    pool = _model("reset_5_1_1", controller=controller).stages[0].pool
    x = torch.randn(3, 16, 8, 8)
    found, policy = pool(x, SCORERS["softmax"])
    state, wanted = None, x
    for index in range(5):
        logits, state = pool.controller(wanted, state, Step(index))
        y = logits.softmax(1)
        torch.testing.assert_close(policy.weights[:, index], y)
        wanted = wanted + sum(
            y[:, j, None, None, None] * unit(wanted, Step(index))
            for j, unit in enumerate(pool.units)
        )
    torch.testing.assert_close(found, wanted)
    assert policy.weights.shape == (3, 5, 6)
    assert torch.equal(policy.weights, policy.probabilities)


def test_the_convolutional_controller_by_hand():
    """Fig. 2a: without biases, with norms of each iteration."""
    torch.manual_seed(0)
    controller = ConvolutionalController(4, 3, iterations=2, sync=False).eval()
    random_norms(controller)
    x = torch.randn(2, 4, 9, 9)
    for index in range(2):
        y = x
        for conv, bank in (
            (controller.conv1, controller.norm1),
            (controller.conv2, controller.norm2),
        ):
            y = F.conv2d(y, conv.weight, stride=2, padding=1)
            y = normalise(y, bank.norms[index]).relu()
        logits, state = controller(x, None, Step(index))
        torch.testing.assert_close(logits, y.mean((2, 3)) @ controller.scores.weight.T)
        assert state is None


def test_the_recurrent_controller_by_hand():
    """Fig. 2b: an LSTM cell (Hochreiter and Schmidhuber) that remembers the iterations before."""
    torch.manual_seed(0)
    controller = RecurrentController(4, 3, iterations=3, sync=False)
    cell, scores = controller.cell, controller.scores
    hidden = memory = torch.zeros(2, HIDDEN)
    state = None
    for index in range(3):
        x = torch.randn(2, 4, 5, 5) * 3
        logits, state = controller(x, state, Step(index))
        gates = F.linear(x.mean((2, 3)), cell.weight_ih, cell.bias_ih)
        gates = gates + F.linear(hidden, cell.weight_hh, cell.bias_hh)
        enter, keep, candidate, leave = gates.chunk(4, 1)
        memory = keep.sigmoid() * memory + enter.sigmoid() * candidate.tanh()
        hidden = leave.sigmoid() * memory.tanh()
        torch.testing.assert_close(logits, F.linear(hidden, scores.weight, scores.bias))


def test_the_static_network_by_hand():
    """Fig. 3, and what the paper leaves open: a 3x3 maximum of stride 1; norm and ReLU between."""
    model = _model("resnet_2_1_1").eval()
    random_norms(model)
    images = torch.randn(2, 3, 16, 16)
    x = normalise(F.conv2d(images, model.stem.weight, padding=1), model.norm).relu()
    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))
    for number, stage in enumerate(model.stages):
        if number:
            between = stage.downsampling
            x = F.conv2d(x, between.conv.weight, stride=2, padding=1)
            x = normalise(x, between.norm).relu()
        for unit in stage.pool.units:
            y = normalise(F.conv2d(x, unit.conv1.weight, padding=1), unit.norm1.norms[0]).relu()
            x = x + normalise(F.conv2d(y, unit.conv2.weight, padding=1), unit.norm2.norms[0])
    expected = x.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_sequential_policy_is_the_static_network():
    """Sec. 5.1: what a controller over ResNet-38's blocks should find."""
    model = _model("reset38_6x6").eval()
    static = _model("resnet38").eval()
    images = torch.randn(4, 3, 32, 32)
    static.train()(images)  # statistics that are not those of a fresh network
    static.eval()
    before = model.state_dict()["stages.0.pool.controller.scores.weight"].clone()
    model.load_state_dict(fold(static.state_dict(), model, "mean"))
    assert torch.equal(model.state_dict()["stages.0.pool.controller.scores.weight"], before)
    again = fold(model.state_dict(), _model("reset38_6x6"), "mean")  # of a network with pools: all
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())

    class Sequential(torch.nn.Module):
        def forward(self, x, state, step):
            return F.one_hot(torch.full((len(x),), step.index), 7) * 1e4, None

    for pool in model.pools:
        pool.controller = Sequential()
    routed, wanted = model(images), static(images)
    torch.testing.assert_close(routed.logits, wanted.logits)
    assert all(route.executed.sum() == 4 for route in routed.routes)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("controller", ["cnn", "rnn"])
def test_skipping_units_without_weight_equals_the_dense_computation(scorer, controller):
    model = _lively(_model("reset_5_1_1", controller=controller))
    model.scorer = SCORERS[scorer]
    images = torch.randn(16, 3, 16, 16)
    model.train()(images)
    dense = copy.deepcopy(model).eval()
    computed = []
    for pool in model.eval().pools:
        for number, unit in enumerate(pool.units):
            unit.register_forward_hook(
                lambda _, inputs, y, number=number: computed.append((number, len(inputs[0])))
            )
    skipped = model(images)
    (pool,) = dense.pools
    pool.skipping = lambda x, y, index: Pool.masked(pool, x, y, Step(index))
    wanted = dense(images)
    torch.testing.assert_close(skipped.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    weights = skipped.policies[0].weights
    chosen = (weights[..., :-1] > 0).sum((0, 1))
    assert sum(count for _, count in computed) == int(chosen.sum())
    if scorer in ("straight_through", "top_k"):
        assert 0 < int(chosen.sum()) < 16 * 5 * 5


def test_the_zero_unit_leaves_a_sample_as_it_is():
    pool = _model("reset_5_1_1").stages[0].pool.eval()
    x = torch.randn(4, 16, 8, 8)
    y = torch.zeros(4, 6)
    y[:2, 5] = 1.0
    y[2:, 1] = 0.5
    found = pool.skipping(x, y, 3)
    assert torch.equal(found[:2], x[:2])
    torch.testing.assert_close(found[2:], x[2:] + 0.5 * pool.units[1](x[2:], Step(3)))


def test_scorers_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0]], requires_grad=True)
    for training in (True, False):
        assert torch.equal(SCORERS["softmax"](logits, training), logits.softmax(1))
        top = Scorer("top_k", k=1)(logits, training)
        wanted = logits.softmax(1) * torch.tensor([[0.0, 0, 1], [1, 0, 0]])
        assert torch.equal(top, wanted)
    assert torch.equal(SCORERS["gumbel"](logits, False), (logits / 0.5).softmax(1))
    hard = SCORERS["straight_through"](logits, False)
    assert torch.equal(hard, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    (gradient,) = torch.autograd.grad(hard[0, 2], logits)
    soft = (logits / 0.5).softmax(1)
    (wanted,) = torch.autograd.grad(soft[0, 2], logits)
    torch.testing.assert_close(gradient, wanted)


def test_gumbel_noise_draws_from_the_softmax():
    """The Gumbel trick: the largest is drawn with the probability that softmax gives it."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    drawn = SCORERS["straight_through"](logits, True)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn.sum(1), torch.ones(20_000))
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize("name", ROUTED)
def test_norms_are_per_iteration_and_the_state_lives_through_one_module(name):
    model = _model(name)
    for pool in model.pools:
        for unit in pool.units:
            assert len(unit.norm1.norms) == len(unit.norm2.norms) == pool.iterations
    x = torch.randn(2, 3, 16, 16)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


def test_names_and_options():
    assert set(MODELS) <= set(list_models())
    with pytest.raises(ValueError, match="controller='lstm' is unknown: choose one of cnn, rnn"):
        create_model("reset38", controller="lstm")
    with pytest.raises(ValueError, match="unknown option 'controller' of resnet38"):
        create_model("resnet38", controller="rnn")
