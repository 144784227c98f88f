"""Every recipe of recurrent convolution takes two steps as it is, but for data and batch size."""

from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.recipes import RECIPES
from pipeline.tracking import history
from tests.training.conftest import Tiny, train

pytestmark = pytest.mark.usefixtures("journal_only")

# A recipe differs between the sets by its data alone: one of the two is enough.
NAMES = [
    name
    for name in RECIPES
    if name.startswith(("rc/cifar", "rc/digits"))
    and (not name.startswith("rc/cifar100/") or name.replace("cifar100", "cifar10") not in RECIPES)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_two_steps(name: str, tiny: Tiny, tmp_path: Path) -> None:
    small = [f"data.path={tiny.shards}", "train.batch_size=8", "data.reader=torch"]
    config = recipes.load(name, [*small, "data.workers=0", "train.log_every=1"])
    assert train(config, tmp_path / "run", stop_after=2) == 0
    assert [step for step, _ in history(tmp_path / "run")["train/loss"]] == [1, 2]
