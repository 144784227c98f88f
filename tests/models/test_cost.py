"""Parameters and multiply-adds against DRNN's tables, what was recorded, and hand counts."""

import functools
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.models import create_model, list_models
from pipeline.models.cost import CellCost, Cost, measure
from pipeline.models.shapes import ShapesOnly

# Ten classes: parameters, GFLOPs of all steps; dynamic networks hold their gates' parameters.
TABLE_1 = {
    "resnet110": (1_727_962, "0.2529"),
    "preact_resnet110": (1_730_522, "0.2531"),
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


# ImageNet, Tables 2 and 3: parameters and multiply-adds at the target, 10^6 and 10^9.
TABLES_2_AND_3 = {
    "resnet101": ({}, 44.54, 7.6),
    "sd_resnet101": ({}, 44.54, 7.6),
    "dr_resnet65": ({}, 28.12, 5.49),
    "dr_resnet53": ({}, 23.60, 4.92),
    "dr_resnet53, t=0.65": ({"target_rate": 0.65}, 23.60, 4.62),
    "dr_resnet53, t=0.6": ({"target_rate": 0.6}, 23.60, 4.35),
    "dr_resnet53, without I": ({"norm": "per_step"}, 23.60, 4.92),
    "dr_resnet47": ({}, 21.34, 4.56),
    "dr_resnet44": ({}, 20.21, 4.25),
    "resnet50": ({}, 25.56, 3.8),
    "sd_resnet50": ({}, 25.56, 3.8),
    "dr_resnet35": ({}, 17.61, 3.12),
    # The table has 3.40: that of a narrower classifier. 3.504 is the published network's.
    "mobilenet_v2": ({}, 3.504, 0.300),
    "dr_mobilenet_v2": ({}, 2.96, 0.275),
    # The table repeats ResNet-101's 7.6, but seven cells of three steps are 22 of its 23.
    "r_resnet53": ({}, 23.39, 7.352),
}
GOLDEN = Path(__file__).parents[1] / "golden" / "models.yaml"


@functools.cache
def _measure(name, **options):
    with ShapesOnly():
        model = create_model(name, **options)
    return measure(model)


def describe(name):
    """What is recorded of a network, with its default options."""
    cost = _measure(name)
    return {
        "parameters": cost.parameters,
        "multiply_adds": cost.nominal,
        "multiply_adds_at_target": round(cost.expected),
    }


def test_every_network_costs_what_was_recorded():
    """A change must be meant: then record it anew."""
    assert {name: describe(name) for name in list_models()} == yaml.safe_load(GOLDEN.read_text())


@pytest.mark.parametrize("row", TABLES_2_AND_3)
def test_imagenet_networks_are_the_papers(row):
    options, parameters, gflops = TABLES_2_AND_3[row]
    cost = _measure(row.split(",")[0], **options)
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.005)
    assert cost.expected / 1e9 == pytest.approx(gflops, rel=0.025)


def test_expected_loops_of_the_largest_stage_are_the_papers():
    """Fig. 8: 11.921 of 23 at the target of 0.7."""
    cells = _measure("dr_resnet53").cells.values()
    assert sum(cell.steps for cell in cells) == 23
    loops = sum(cell.target**i for cell in cells for i in range(1, cell.steps + 1))
    assert loops == pytest.approx(11.921)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_published_networks_have_torchvisions_size(name):
    import torchvision

    with torch.device("meta"):
        theirs = sum(p.numel() for p in torchvision.models.get_model(name).parameters())
    assert _measure(name).parameters == theirs


def test_the_stride_may_stand_on_the_3x3_convolution():
    first, second = (_measure("resnet50", stride_on=on) for on in ("1x1", "3x3"))
    assert first.parameters == second.parameters
    assert second.nominal / 1e9 == pytest.approx(4.089, abs=1e-3)  # torchvision's "v1.5"


def test_a_cell_under_a_wrong_name_is_refused():
    model = create_model("dr_resnet16")
    model.stages[1][1].name = "loop"
    with pytest.raises(
        ValueError, match=r"not named as the modules .* loop, stages\.1\.1; give Recur"
    ):
        measure(model)


def test_what_skipped_samples_cost_an_adaptive_network():
    """A skipped cell still projects its shortcut, and its gate was asked."""
    cost = _measure("aig_resnet50")
    assert len(cost.cells) == 16
    first = cost.cells["stages.1.0"]
    branch = 28**2 * (256 * 128 + 9 * 128**2 + 128 * 512)
    assert (first.per_step, first.router) == ((branch,), 256 * 16 + 16 * 2)
    stem, classifier = 112**2 * 64 * 147, 2048 * 1000
    shortcuts = [56**2 * 64 * 256, 28**2 * 256 * 512, 14**2 * 512 * 1024, 7**2 * 1024 * 2048]
    assert cost.fixed == stem + classifier + sum(shortcuts)
    assert cost.nominal == _measure("resnet50").nominal
    gate = 16 + 32 + 34  # bias, norm, second layer
    added = sum(16 * c + gate for c in (64, *[256] * 3, *[512] * 4, *[1024] * 6, *[2048] * 2))
    assert cost.parameters == _measure("resnet50").parameters + added


@pytest.mark.parametrize("name", TABLE_1)
def test_size_and_cost_are_those_of_the_table(name):
    cost = _measure(name)
    assert (cost.parameters, f"{cost.nominal / 1e9:.4f}") == TABLE_1[name]
    if name.startswith("dr_"):
        assert cost.fixed < cost.expected < cost.nominal < cost.maximal
    else:
        assert cost.expected == cost.nominal == cost.maximal
    assert (len(cost.cells) > 0) == ("r_" in name)


@pytest.mark.parametrize("name", [name for name in TABLE_1 if name.startswith("dr_")])
def test_gates_of_a_dynamic_network_are_its_only_difference_in_size(name):
    dynamic, recursive = _measure(name), _measure(name.removeprefix("d"))
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
        "stages.1.1": CellCost((per_step,) * 2, router=32 * 16 + 32, target=0.7),
        "stages.2.1": CellCost((per_step,) * 2, router=64 * 16 + 32, target=0.7),
    }
    # A gate is asked by all samples for step 1, by those that executed step 1 for step 2.
    gates = (1 + 0.7) * (544 + 1056)
    assert cost.expected == pytest.approx(cost.fixed + 2 * per_step * (0.7 + 0.49) + gates)
    assert cost.maximal == cost.fixed + 4 * per_step + 2 * (544 + 1056)


def test_executed_follows_the_rates():
    cost = Cost(
        0, fixed=1000, cells={"a": CellCost((100,) * 3, 10, 0.5), "b": CellCost((7,) * 2, 0, None)}
    )
    rates = {"a": [0.5, 0.25, 0.0], "b": [1.0, 1.0]}
    assert cost.executed(rates) == 1000 + 75 + 10 * 1.75 + 14
    assert cost.executed({"a": [1, 1, 1], "b": [1, 1]}) == cost.maximal
    assert cost.executed({"a": [0, 0, 0], "b": [1, 1]}) == 1000 + 10 + 14


@pytest.mark.parametrize(
    "rates", [{}, {"a": [1.0]}, {"a": [1.0] * 3, "c": [1.0]}, {"a": [1.0] * 4}]
)
def test_rates_of_other_cells_or_steps_are_refused(rates):
    cost = Cost(0, fixed=1000, cells={"a": CellCost((100,) * 3, 10, 0.5)})
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
