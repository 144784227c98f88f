"""Real run directories on a real shard set."""

from collections.abc import Callable

import pytest
from finished_runs import EPOCHS, prepared, results, track

from data_prep.manifest import Manifest
from pipeline import configure, evaluate
from pipeline.run_directory import RunDirectory


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepared(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def make_run(
    tmp_path_factory: pytest.TempPathFactory, shards: Manifest
) -> Callable[..., RunDirectory]:
    """A run directory; `tracked` and `evaluated` say how far the run came."""

    def make(
        model: str = "dr_resnet16",
        *,
        tracked: bool = True,
        evaluated: bool = True,
        manifest: Manifest = shards,
        name: str = "first",
    ) -> RunDirectory:
        directory = RunDirectory(tmp_path_factory.mktemp("runs") / name)
        values = {"name": "mine", "model": model, "data": {"path": str(manifest.root)}}
        directory.claim(configure.build(values | {"train": {"epochs": EPOCHS, "batch_size": 6}}))
        directory.release()
        summary, samples = results(manifest, model)
        if tracked:
            track(directory, summary)
        if evaluated:
            evaluate.save(directory.evaluation_of(manifest), summary, samples)
        return directory

    return make
