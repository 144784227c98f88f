"""Parameters and multiply-adds against DRNN Table 1 and against hand counts."""

import pytest
import torch

from pipeline.models import create_model, list_models
from pipeline.models.cost import CellCost, Cost, measure

# Ten classes: parameters, GFLOPs of all steps; dynamic networks hold their gates' parameters.
TABLE_1 = {
    "resnet110": (1_727_962, "0.2529"),
    "dr_resnet74": (911_226, "0.2435"),
    "dr_resnet66": (724_402, "0.2623"),
    "dr_resnet58": (536_042, "0.2435"),
    "dr_resnet54": (441_862, "0.2340"),
    "resnet56": (853_018, "0.1255"),
    "dr_resnet40": (490_922, "0.1255"),
    "dr_resnet32": (303_330, "0.1255"),
    "resnet20": (269_722, "0.0406"),
    "dr_resnet16": (179_198, "0.0406"),
    "r_resnet74": (898_138, "0.2435"),
    "r_resnet66": (714_586, "0.2623"),
    "r_resnet58": (529_498, "0.2435"),
    "r_resnet54": (436_954, "0.2340"),
    "r_resnet40": (484_378, "0.1255"),
    "r_resnet32": (300_058, "0.1255"),
    "r_resnet16": (177_562, "0.0406"),
}


def test_every_network_is_in_the_table():
    assert sorted(TABLE_1) == list_models("*resnet*")


@pytest.mark.parametrize("name", TABLE_1)
def test_size_and_cost_are_those_of_the_table(name):
    cost = measure(create_model(name))
    assert (cost.parameters, f"{cost.nominal / 1e9:.4f}") == TABLE_1[name]
    if name.startswith("dr_"):
        assert cost.fixed < cost.expected < cost.nominal < cost.maximal
    else:
        assert cost.expected == cost.nominal == cost.maximal
    assert (len(cost.cells) > 0) == ("r_" in name)


@pytest.mark.parametrize("name", list_models("dr_*"))
def test_gates_of_a_dynamic_network_are_its_only_difference_in_size(name):
    dynamic = measure(create_model(name))
    recursive = measure(create_model(name.removeprefix("d")))
    channels = [32 if cell.startswith("stages.1") else 64 for cell in dynamic.cells]
    assert dynamic.parameters - recursive.parameters == sum(16 * c + 16 + 34 for c in channels)
    assert dynamic.nominal == recursive.nominal
    assert dynamic.fixed == recursive.fixed


def test_smallest_dynamic_network_by_hand():
    cost = measure(create_model("dr_resnet16", target_rate=0.7))
    stem, first = 9 * 3 * 16 * 32**2, 6 * 9 * 16 * 16 * 32**2
    second = 9 * 16 * 32 * 16**2 + 9 * 32 * 32 * 16**2
    third = 9 * 32 * 64 * 8**2 + 9 * 64 * 64 * 8**2
    assert cost.fixed == stem + first + second + third + 64 * 10
    per_step = 2 * 9 * 32 * 32 * 16**2
    assert cost.cells == {
        "stages.1.1": CellCost(per_step, router=32 * 16 + 32, steps=2, target=0.7),
        "stages.2.1": CellCost(per_step, router=64 * 16 + 32, steps=2, target=0.7),
    }
    # A gate is asked by all samples for step 1, by those that executed step 1 for step 2.
    gates = (1 + 0.7) * (544 + 1056)
    assert cost.expected == pytest.approx(cost.fixed + 2 * per_step * (0.7 + 0.49) + gates)
    assert cost.maximal == cost.fixed + 4 * per_step + 2 * (544 + 1056)


def test_executed_follows_the_rates():
    cost = Cost(0, fixed=1000, cells={"a": CellCost(100, 10, 3, 0.5), "b": CellCost(7, 0, 2, None)})
    rates = {"a": [0.5, 0.25, 0.0], "b": [1.0, 1.0]}
    assert cost.executed(rates) == 1000 + 75 + 10 * 1.75 + 14
    assert cost.executed({"a": [1, 1, 1], "b": [1, 1]}) == cost.maximal
    assert cost.executed({"a": [0, 0, 0], "b": [1, 1]}) == 1000 + 10 + 14


@pytest.mark.parametrize(
    "rates", [{}, {"a": [1.0]}, {"a": [1.0] * 3, "c": [1.0]}, {"a": [1.0] * 4}]
)
def test_rates_of_other_cells_or_steps_are_refused(rates):
    cost = Cost(0, fixed=1000, cells={"a": CellCost(100, 10, 3, 0.5)})
    with pytest.raises(ValueError, match=r"execution rates for cell '[ac]' of [03] steps: give"):
        cost.executed(rates)


def test_measuring_leaves_the_model_and_the_generator_alone():
    model = create_model("dr_resnet16")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_cost_grows_with_the_image():
    model = create_model("r_resnet16")
    small, large = measure(model), measure(model, image_size=64)
    assert large.nominal - 640 == 4 * (small.nominal - 640)
