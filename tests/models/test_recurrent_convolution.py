"""RC's networks against Tables 1 and 5, and against networks unrolled by hand."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import normalise
from recurrent import ADJUSTABLE, IMAGES, SIDE, build, logits

from pipeline.models import create_model, list_models
from pipeline.models.cost import measure, measure_choices

# Parameters: computed, and millions in the paper; unrolled depth of Tables 1 and 5.
TABLE_1 = {  # 10 classes
    "rc_r2_1": (1_258_954, 1.259, 6),
    "rc_r2_2": (1_260_234, 1.260, 10),
    "rc_r2_3": (1_261_514, 1.262, 14),
    "rc_r2_4": (1_262_794, 1.263, 18),
    "rc_s2_2": (2_513_610, 2.514, 10),
    "rc_s2_3": (3_768_266, 3.768, 14),
    "rc_s2_4": (5_022_922, 5.023, 18),
    "rc_s2_4_half": (1_258_090, 1.258, 18),
}
TABLE_5 = {  # 100 classes
    "rc_s4_1": (11_217_316, 11.217, 18),
    "rc_s4_2": (17_488_036, 17.488, 26),
    "rc_s4_3": (23_758_756, 23.759, 34),
}


def convolutions_on_the_way(model, steps=None):
    """Convolutions and linear layers that an image passes, shortcuts apart."""
    count = 0

    def passed(module, *_):
        nonlocal count
        count += module.kernel_size != (1, 1) if isinstance(module, torch.nn.Conv2d) else 1

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(passed)
    model.eval()(torch.zeros(1, 3, SIDE, SIDE), steps)
    return count


def test_names():
    assert [name for name in list_models("rc_*") if name not in list_models("rc_?3_*")] == [
        *("rc_early_exit", "rc_r2", "rc_r2_1", "rc_r2_2", "rc_r2_3", "rc_r2_4", "rc_r4"),
        *("rc_s2_1", "rc_s2_2", "rc_s2_3", "rc_s2_4", "rc_s2_4_half"),
        *("rc_s4_1", "rc_s4_2", "rc_s4_3"),
    ]


@pytest.mark.parametrize("name", [*TABLE_1, *TABLE_5])
def test_size_and_depth_are_those_of_the_tables(name):
    parameters, millions, depth = (TABLE_1 | TABLE_5)[name]
    model = create_model(name, num_classes=10 if name in TABLE_1 else 100)
    assert measure(model).parameters == parameters
    assert f"{parameters / 1e6:.3f}" == f"{millions:.3f}"
    assert convolutions_on_the_way(model) == depth


def test_one_network_has_the_three_depths_of_table_5():
    model = create_model("rc_r4", num_classes=100)
    costs = measure_choices(model)
    assert {cost.parameters for cost in costs.values()} == {11_241_124}
    assert costs[1].parameters == pytest.approx(11.250e6, rel=0.005)
    assert [convolutions_on_the_way(create_model("rc_r4"), n) for n in (1, 2, 3)] == [18, 26, 34]


def test_norms_are_all_that_an_adjustable_network_adds():
    fixed = measure(create_model("rc_r2_4")).parameters
    # C_1: one path of 4 steps, as the fixed network. C_2: 2 + 3 + 4 places instead of 4.
    assert measure(create_model("rc_r2")).parameters - fixed == (9 - 4) * 2 * 2 * 256


@pytest.mark.parametrize("name", ADJUSTABLE)
def test_cost_by_number_of_steps(name):
    costs = measure_choices(create_model(name))
    assert tuple(costs) == create_model(name).step_choices == ADJUSTABLE[name]
    nominal = [cost.nominal for cost in costs.values()]
    assert nominal == sorted(set(nominal))
    assert measure(create_model(name)).nominal == nominal[-1]


def test_a_step_after_the_pooling_costs_a_quarter():
    full = 2 * 9 * 64 * 64 * 32**2  # of both cells: four times the channels, half the side
    for steps, at_full in ((1, 1), (2, 1), (3, 2), (4, 2)):
        cost = measure(create_model(f"rc_r2_{steps}"))
        taken = at_full * full + (steps - at_full) * full // 4
        assert cost.nominal == 9 * 3 * 64 * 32**2 + 2 * taken + 2560
        assert cost.nominal == measure(create_model(f"rc_s2_{steps}")).nominal
        if steps > 1:
            assert measure(create_model("rc_r2"), steps=steps).nominal == cost.nominal
    cells = measure(create_model("rc_r2"), steps=3).cells
    assert cells["stages.0.0"].per_step == (full, full, full // 4, 0)


def test_an_adjustable_network_costs_what_the_static_one_does():
    for steps, cost in measure_choices(create_model("rc_r4")).items():
        assert cost.nominal == measure(create_model(f"rc_s4_{steps}")).nominal


# -- the equations, unrolled by hand ---------------------------------------------------------------


def cell_by_hand(x, cell, number):
    """Pre-activation block with the norms of the given number, or none where it is None."""
    stride = cell.conv1.stride[0]
    first = x if number is None else normalise(x, cell.norm1.norms[number])
    first = first.relu()
    second = F.conv2d(first, cell.conv1.weight, stride=stride, padding=1)
    second = second if number is None else normalise(second, cell.norm2.norms[number])
    y = F.conv2d(second.relu(), cell.conv2.weight, padding=1)
    if cell.projection is not None:
        x = F.conv2d(first, cell.projection.weight, stride=stride)
    return x + y


def halve(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def invertible(x):
    """InvPool: every channel's four subsampled copies, side by side."""
    copies = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(copies, 2).flatten(1, 2)


def classify(x, classifier):
    return x.flatten(2).mean(2) @ classifier.weight.T + classifier.bias


def eq_8(model, images, steps, numbers):
    """numbers[i] are the norms of cell i + 1, step by step; S has a cell at every step."""
    x = F.conv2d(images, model.stem.weight, padding=1)
    for stage, cells in enumerate(numbers):
        x = invertible(x) if stage else x
        for index in range(steps):
            own = model.stages[stage][index if len(model.stages[stage]) > 1 else 0].cell
            x = cell_by_hand(x, own, cells[index])
            if index + 1 == -(-steps // 2):
                x = halve(x)
    return classify(x, model.classifier)


def eq_10(model, images, steps, transition, cells, stages=4, classifier=None):
    """transition(stage) and cells(stage, index) say which norms are used."""
    x = F.conv2d(images, model.stem.weight, padding=1)
    for stage in range(stages):
        x = cell_by_hand(x, model.stages[stage][0].cell, transition(stage))
        for index in range(steps):
            own = model.stages[stage][1 + index if len(model.stages[stage]) > 2 else 1].cell
            x = cell_by_hand(x, own, cells(stage, index))
    return classify(x, classifier or model.classifier)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["per_step", "shared", "none"])
def test_r2_is_eq_8(steps, kind):
    model = build(f"rc_r2_{steps}", norm=kind)
    number = {"per_step": list(range(steps)), "shared": [0] * steps, "none": [None] * steps}[kind]
    expected = eq_8(model, IMAGES, steps, [number, number])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_s2_is_eq_8_with_a_cell_for_each_step(steps):
    model = build(f"rc_s2_{steps}")
    assert [len(stage) for stage in model.stages] == [steps, steps]
    expected = eq_8(model, IMAGES, steps, [[0] * steps] * 2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_adjustable_r2_takes_its_row_of_eq_6(steps):
    model = build("rc_r2")
    row = {2: 0, 3: 2, 4: 5}[steps]  # rows of 2, 3 and 4 norms lie one after the other
    numbers = [list(range(steps)), list(range(row, row + steps))]
    expected = eq_8(model, IMAGES, steps, numbers)
    torch.testing.assert_close(logits(model, steps), expected, rtol=1e-4, atol=1e-4)
    if steps == 4:
        assert torch.equal(logits(model), logits(model, 4))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adjustable_r4_is_eq_10_with_the_norms_of_its_path(steps):
    model = build("rc_r4")
    row = {1: 0, 2: 1, 3: 3}[steps]
    expected = eq_10(
        model,
        IMAGES,
        steps,
        transition=lambda stage: steps - 1 if stage else 0,
        cells=lambda stage, index: (row if stage else 0) + index,
    )
    torch.testing.assert_close(logits(model, steps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_s4_is_eq_10_with_a_cell_for_each_step(steps):
    model = build(f"rc_s4_{steps}")
    expected = eq_10(model, IMAGES, steps, transition=lambda _: 0, cells=lambda *_: 0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [2, 3, 4])
def test_early_exit_answers_after_its_stage(last):
    model = build("rc_early_exit")
    expected = eq_10(
        model,
        IMAGES,
        3,
        transition=lambda _: 0,
        cells=lambda _, index: index,
        stages=last,
        classifier=model.classifiers[str(last)],
    )
    torch.testing.assert_close(logits(model, last), expected, rtol=1e-4, atol=1e-4)
