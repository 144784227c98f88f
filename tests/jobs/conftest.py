"""A recipe file on the tiny shard set, and one finished run of it."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.command import reprise

RECIPE = """
name: tiny
model: dr_resnet16
data: {{path: {shards}, reader: torch, workers: 0, augment: {{crop: pad, size: 32}}}}
optimizer: {{lr: 0.05, nesterov: true, weight_decay: 5.0e-4}}
train: {{epochs: 1, batch_size: 16}}
"""


@pytest.fixture
def tmp_path(tmp_path: Path, database: Path) -> Path:
    """A working folder in which a run was tracked before."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE.format(shards=shards))
    return file


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; its parent is the working folder it was made in."""
    folder = tmp_path_factory.mktemp("finished")
    done = reprise("train", recipe, "--run", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "run"
