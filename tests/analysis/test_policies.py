"""What controllers learned, in numbers."""

import numpy as np
import pytest

from pipeline.analysis import neighbours, policies
from pipeline.analysis.contents import Evaluation
from pipeline.analysis.figure import MUTED, SERIES
from pipeline.tasks.classification import Samples


def evaluation(routes: np.ndarray, components: list[str]) -> Evaluation:
    count = len(routes)
    samples = Samples(
        np.arange(count).astype(str),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.float32),
        np.zeros((count, 0), np.int64),
        routes.astype(np.float32),
        np.array(components, np.str_),
    )
    return Evaluation("set-test", None, samples)  # type: ignore[arg-type]


def test_components_are_in_the_order_of_iterations_and_units() -> None:
    names = ["stages.0.pool/10/1", "stages.0.pool/2/2", "stages.0.pool/2/1"]
    assert policies.components(names) == [
        ("stages.0.pool", 2, 1),
        ("stages.0.pool", 2, 2),
        ("stages.0.pool", 10, 1),
    ]
    assert policies.units(policies.components(names)) == 2
    assert policies.color(3, of=3) == MUTED
    assert policies.color(2, of=3) == SERIES[1]


def test_the_nearest_are_those_of_least_manhattan_distance() -> None:
    routes = np.array([[0, 0], [1, 1], [0, 0.5], [3, 0], [0, 0.5], [9, 9], [0, 4], [2, 0]])
    order, distances = neighbours.nearest(routes, 0)
    assert order.tolist() == [2, 4, 1, 7, 3]  # ties in the order of the split
    assert distances.tolist() == [0.5, 0.5, 2, 2, 3]


def test_deviations_are_drawn_for_controllers_alone() -> None:
    routes = np.array([[0.0, 1.0], [1.0, 0.0]])
    names = ["stages.2.pool/1/1", "stages.2.pool/1/2"]
    picture = policies.deviations(evaluation(routes, names))
    assert picture is not None
    assert ">stage 3</text>" in picture.svg
    assert policies.deviations(evaluation(np.zeros((2, 0)), [])) is None


@pytest.mark.parametrize("model", ["resnet20"])
def test_a_run_without_controllers_has_no_evolution(make_run, model: str) -> None:
    from pipeline.analysis import contents

    assert policies.evolution(contents.read(make_run(model))) is None
