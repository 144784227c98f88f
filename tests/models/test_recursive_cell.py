"""The recursion itself: DRNN Eq. 1 and 7, who stays out, and what is computed."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from undecided import undecided

from pipeline.models import create_model
from pipeline.models.cells import BasicCell, Bottleneck, ConvCell, InvertedResidual
from pipeline.models.cost import measure
from pipeline.models.norms import BANKS, Step
from pipeline.models.routers import FixedRouter, Gate, RandomDrop, Router
from pipeline.models.stage import RecursiveCell

N, C, SIDE = 6, 4, 5


class Scripted(Router):
    """Answers from a table (steps, N), so that a test knows every decision; asked once per step.

    Samples carry their number in the first pixel of the first channel.
    """

    decides = True

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.step = 0

    def forward(self, x, index=0):
        answer = self.table[self.step]
        self.step += 1
        return answer[x[:, 0, 0, 0].round().long()] if len(x) < len(answer) else answer


class Recorded(torch.nn.Module):
    """A cell that adds one everywhere but in the sample's number, and notes what it is given."""

    def __init__(self):
        super().__init__()
        self.samples = []
        self.steps = []

    def forward(self, x, step):
        self.samples.append(len(x))
        self.steps.append(step)
        y = x + 1
        y[:, 0, 0, 0] = x[:, 0, 0, 0]
        return y


def _cell(router, norm="per_step", steps=3, seed=0):
    torch.manual_seed(seed)
    cell = BasicCell(C, C, norm=partial(BANKS[norm], steps=steps))
    return RecursiveCell("cell", cell, steps=steps, router=router)


def _numbered():
    x = torch.zeros(N, C, SIDE, SIDE)
    x[:, 0, 0, 0] = torch.arange(N)
    return x


@pytest.mark.parametrize("norm", ["shared", "per_step"])
@pytest.mark.parametrize("training", [True, False])
def test_fixed_router_is_a_hand_unrolled_loop(norm, training):
    recursive = _cell(FixedRouter(), norm).train(training)
    by_hand = _cell(FixedRouter(), norm).train(training).cell
    x = torch.randn(N, C, SIDE, SIDE)
    y, route = recursive(x)
    expected = by_hand(by_hand(by_hand(x, Step(0)), Step(1)), Step(2))
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip(recursive.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
    for name, buffer in by_hand.named_buffers():
        assert torch.equal(recursive.cell.get_buffer(name), buffer), name
    assert route.target is None
    assert route.executed.all()
    assert route.weights.shape == (N, 3)


def test_a_cell_used_once_has_no_route():
    _, route = _cell(FixedRouter(), steps=1)(torch.randn(N, C, SIDE, SIDE))
    assert route is None


def test_output_is_mixed_by_eq_7_and_so_is_its_gradient():
    first = torch.tensor([0.25, 1.0, 0.0, 0.5, 0.75, 0.125], requires_grad=True)
    second = torch.tensor([0.5, 1.0, 1.0, 0.25, 0.0, 0.75], requires_grad=True)
    recursive = _cell(Scripted([first, second]), steps=2)
    cell = _cell(FixedRouter(), steps=2).cell
    x = torch.randn(N, C, SIDE, SIDE, requires_grad=True)
    y, route = recursive(x)

    g = first[:, None, None, None]
    x1 = g * cell(x, Step(0)) + (1 - g) * x
    g = g * second[:, None, None, None]
    x2 = g * cell(x1, Step(1)) + (1 - g) * x1

    torch.testing.assert_close(y, x2)
    assert torch.equal(route.weights, torch.stack([first, first * second], 1))
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, first, second), upstream)
    wanted = torch.autograd.grad(x2, (x, first, second), upstream)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_who_left_the_loop_stays_out(training):
    #               sample: 0  1  2  3  4  5
    table = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 1.0]])
    executed = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]])
    recursive = RecursiveCell("cell", Recorded(), steps=3, router=Scripted(table)).train(training)
    y, route = recursive(_numbered())
    assert torch.equal(route.executed, executed.T.bool())
    assert torch.equal(route.weights, executed.T.float())
    assert torch.equal(y[:, 1, 1, 1], executed.sum(0).float())
    assert recursive.cell.samples == ([N, N, N] if training else [4, 3, 2])
    assert [step.index for step in recursive.cell.steps] == [0, 1, 2]
    if training:
        told = torch.stack([step.executed for step in recursive.cell.steps])
        assert torch.equal(told, executed.bool()), "the norms must know who takes part"


def test_nothing_is_computed_once_all_have_left():
    table = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1.0]])
    router = Scripted(table)
    recursive = RecursiveCell("cell", Recorded(), steps=3, router=router).eval()
    y, route = recursive(_numbered())
    assert recursive.cell.samples == [N]
    assert router.step == 2
    assert route.executed.sum(0).tolist() == [N, 0, 0]
    assert torch.equal(y[:, 1, 1, 1], torch.ones(N))


def _random_statistics(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def test_skipping_equals_masking_where_nobody_skips():
    recursive = _cell(Gate(C, target=0.7)).eval()
    _random_statistics(recursive)
    x = torch.randn(N, C, SIDE, SIDE)
    y, weights = recursive.skipping(x)
    assert weights.all(), "a new gate lets everybody in"
    assert torch.equal(y, recursive.masked(x)[0])


@pytest.mark.parametrize("norm", ["shared", "per_step", "gated_per_step"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_skipping_equals_masking(norm, layout):
    recursive = _cell(Gate(C, target=0.7), norm, steps=4).eval()
    _random_statistics(recursive)
    x = torch.randn(32, C, SIDE, SIDE) + 4 * torch.randn(32, C, 1, 1)
    x = x.to(memory_format=layout)
    undecided(recursive, x)
    with torch.no_grad():
        masked, masked_weights = recursive.masked(x)
        y, route = recursive(x)
    steps = route.executed.sum(0)
    assert 0 < steps[1] < steps[0] < 32, "the gates must differ between samples and steps"
    torch.testing.assert_close(y, masked)
    assert torch.equal(route.weights, masked_weights)


def test_the_multiply_adds_done_in_evaluation_are_those_reported():
    torch.manual_seed(0)
    images = torch.randn(12, 3, 32, 32) * torch.linspace(0.2, 3, 12)[:, None, None, None]
    model = undecided(create_model("dr_resnet32"), images).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        routes = model(images).routes
    rates = {route.cell: route.executed.float().mean(0).tolist() for route in routes}
    assert any(0 < rate < 1 for cell in rates.values() for rate in cell)
    done = counter.get_total_flops() / 2 / len(images)
    assert measure(model).executed(rates) == pytest.approx(done, rel=1e-6)


def test_separate_norms_for_skipped_samples_need_a_router_that_skips():
    with pytest.raises(ValueError, match=r"gated_per_step.*fixed router skips none: use"):
        _cell(FixedRouter(), "gated_per_step")


def _branch(router, channels=(C, 2 * C), stride=2, seed=0):
    """A cell that changes the shape, its branch weighed by the router."""
    torch.manual_seed(seed)
    cell = Bottleneck(*channels, stride=stride, norm=partial(BANKS["per_step"], steps=1))
    return RecursiveCell("cell", cell, steps=1, router=router, weighs="branch")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "stride"), [((C, 2 * C), 2), ((C, C), 1)])
@pytest.mark.parametrize(
    "answers", [[1, 0, 1, 1, 0, 1.0], [1] * N, [0] * N], ids=["some", "all", "none"]
)
def test_a_weighed_branch_leaves_the_shortcut(answers, channels, stride, training):
    answers = torch.tensor(answers).float()
    recursive = _branch(Scripted([answers]), channels, stride).train(training)
    plain = _branch(FixedRouter(), channels, stride).train(training).cell
    x = torch.randn(N, C, 6, 6)
    x[:, 0, 0, 0] = torch.arange(N)
    before = x.clone()
    y, route = recursive(x)
    g = answers[:, None, None, None]
    expected = (plain.shortcut(x) + g * plain.residual(x, Step(0))).relu()
    torch.testing.assert_close(y, expected)
    assert torch.equal(x, before), "the input must stay as it is"
    assert torch.equal(route.weights[:, 0], answers)
    assert torch.equal(route.executed[:, 0], answers.bool())


def test_the_gradient_of_a_weighed_branch():
    answers = torch.rand(N, requires_grad=True)
    recursive, plain = _branch(Scripted([answers])), _branch(FixedRouter()).cell
    x = torch.randn(N, C, 6, 6, requires_grad=True)
    y, _ = recursive(x)
    expected = plain.shortcut(x) + answers[:, None, None, None] * plain.residual(x, Step(0))
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, answers, *recursive.parameters()), upstream)
    wanted = torch.autograd.grad(expected.relu(), (x, answers, *plain.parameters()), upstream)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_skipped_branch_is_not_computed():
    torch.manual_seed(0)
    images = torch.randn(12, 3, 32, 32) * torch.linspace(0.2, 3, 12)[:, None, None, None]
    model = undecided(create_model("aig_resnet50", num_classes=10), images).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        routes = model(images).routes
    rates = {route.cell: route.executed.float().mean(0).tolist() for route in routes}
    assert len(rates) == 16
    assert sum(0 < rate < 1 for cell in rates.values() for rate in cell) > 4
    done = counter.get_total_flops() / 2 / len(images)
    assert measure(model, 32).executed(rates) == pytest.approx(done, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "steps", "decides"),
    [("basic", 2, True), ("inverted", 1, True), ("plain", 1, False), ("no shortcut", 1, False)],
)
def test_only_a_branch_that_there_is_can_be_weighed(kind, steps, decides):
    norm = partial(BANKS["per_step"], steps=steps)
    cell = {
        "basic": lambda: BasicCell(C, C, norm=norm),
        "inverted": lambda: InvertedResidual(C, C, expansion=2, norm=norm),
        "plain": lambda: ConvCell(C, norm=norm),
        "no shortcut": lambda: InvertedResidual(C, C + 1, expansion=2, norm=norm),
    }[kind]()
    router = Gate(C, target=0.5) if decides else RandomDrop([0.5])
    with pytest.raises(ValueError, match=rf"weighs='branch' with {steps} steps of .*use"):
        RecursiveCell("cell", cell, steps=steps, router=router, weighs="branch")
