"""A stopped, killed and resumed run is one run in MLflow, each point once."""

from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.errors import Exit
from pipeline.distributed import World
from pipeline.training.checkpoint import CheckpointStore
from tests.training.conftest import Tiny, train


def test_one_run_with_every_point_once(tiny: Tiny, tmp_path: Path) -> None:
    config, run = tiny.config(**{"checkpoints.every_steps": 4}), tmp_path / "run"
    assert train(config, run, stop_after=6) == 0
    # As after a kill: the journal is ahead of the newest checkpoint, whose steps are run again.
    (run / "checkpoints" / "step-000000006" / "model.safetensors").unlink()
    assert train(config, run) == 0

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'reprise'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "run"
    assert tracked.data.params["name"] == "tiny"
    assert tracked.data.params["optimizer.nesterov"] == "True"
    assert tracked.data.params["model"] == "dr_resnet16"
    names = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert names == {"config.yaml", "report.html", "weights.safetensors"}
    for name in ("train/loss", "lr/gate", "train/rate/stages.1.1/2", "epoch", "eval/top1"):
        points = client.get_metric_history(tracked.info.run_id, name)
        steps = Counter(point.step for point in points)
        assert steps
        assert set(steps.values()) == {1}, (name, steps)
        assert max(steps) == 12
    assert any(name.startswith("system/") for name in tracked.data.metrics)
    newest = CheckpointStore(run / "checkpoints", World(), 1).newest()
    assert newest is not None
    assert newest.load("tracker")["mlflow_run_id"] == tracked.info.run_id


def test_a_dead_server_neither_stops_training_nor_fails_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert train(tiny.config(**{"train.epochs": 1}), tmp_path / "run") == 0
    assert "are not at http://127.0.0.1:9 yet" in capsys.readouterr().err


def test_checkpoints_come_by_the_clock(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"checkpoints.every_minutes": 1e-9, "checkpoints.keep_last": 20})
    assert train(config, tmp_path / "run", stop_after=3) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:09d}" for step in (1, 2, 3)]


def test_a_diverged_run_is_marked_as_failed(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(**{"optimizer.lr": 1e30, "schedule.name": "constant"})
    assert train(config, tmp_path / "run") == Exit.NON_FINITE
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'reprise'")
    assert client.search_runs([experiment.experiment_id])[0].info.status == "FAILED"
