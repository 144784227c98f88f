"""docs/extending.md is true: its network, its gate and its use of a trained network work."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_documents import blocks, commands, images, run

from pipeline import models, recipes
from pipeline.config import ConfigError
from pipeline.models import create_model
from pipeline.models.cost import measure
from pipeline.models.stage import RecursiveCell
from pipeline.tracking import Tracker
from pipeline.training.plan import plan
from tests.conftest import ROOT
from tests.training.conftest import train

TEXT = (ROOT / "docs/extending.md").read_text()
NETWORK, GATE, USE = blocks("python", TEXT)


def module(name: str, source: str) -> types.ModuleType:
    made = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(made))
    return made


@pytest.mark.parametrize("gate", ["its own", "the document's"])
def test_the_network_trains_and_is_counted(
    gate: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = NETWORK
    if gate != "its own":
        monkeypatch.setitem(sys.modules, "threshold", module("threshold", GATE))
        source = source.replace("Gate(16, target=target)", "Threshold(target)")
        source = source.replace("class Tiny", "from threshold import Threshold\n\nclass Tiny")
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "finish", lambda self, status: True)
    monkeypatch.setattr(models, "_MODELS", models._MODELS | module("tiny", source).MODELS)
    network = create_model("tiny")
    assert list(measure(network).cells) == ["stages.0.0"]
    assert "gate" in network.roles().values()
    with pytest.raises(ValueError, match="unknown option 'width'"):
        create_model("tiny", width=3)
    config = recipes.load(
        "drnn/digits/dr_resnet16",
        ["model=tiny", f"data.path={shards}", "data.reader=torch", "train.epochs=1"],
    )
    if gate != "its own":
        bare = module("bare", GATE.replace("torch.zeros(1)", "torch.zeros(())"))
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["threshold"], "Threshold", bare.Threshold)
            patch.setattr(models, "_MODELS", module("tiny", source).MODELS)
            with pytest.raises(ConfigError, match=r"router.threshold has no dimensions.*\(1,\)"):
                plan(config, world_size=1)
    assert train(config, tmp_path / "run") == 0
    for cell in network.modules():
        if isinstance(cell, RecursiveCell):
            assert cell.router.target == 0.7
    images = torch.randn(5, 3, 32, 32)
    assert network.eval()(images).routes[0].executed.shape == (5, 3)


def test_a_trained_network_is_used_and_gone_on_from_as_written(tmp_path: Path) -> None:
    images(tmp_path / "photos", {"train": 32, "val": 8})
    prepare, _, first, *_ = commands(blocks("sh")[0])
    run(prepare, tmp_path)
    run(first, tmp_path)
    done = run_python(USE, tmp_path)
    name, steps = done.split(maxsplit=1)
    assert name in ("class0", "class1")
    assert len(steps.split(",")) == 2
    (command,) = [line for line in TEXT.splitlines() if line.startswith("    reprise train runs/")]
    (further,) = commands(command.strip())
    run([*further, "train.epochs=3"], tmp_path)
    assert (tmp_path / "runs/longer/weights.safetensors").is_file()


def run_python(source: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
