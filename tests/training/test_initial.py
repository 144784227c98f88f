"""Runs that start from the weights of another network."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from pipeline.config import ConfigError
from pipeline.models import create_model
from pipeline.models.folding import fold
from pipeline.run_directory import RunDirectory
from pipeline.training import checkpoint
from pipeline.training.initial import start_from
from tests.training.conftest import Tiny, train

STILL = {"optimizer.lr": 1e-30, "optimizer.momentum": 0, "optimizer.nesterov": "false"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a static network, as a finished run keeps them."""
    torch.manual_seed(7)
    state = create_model("resnet20", num_classes=4).state_dict()
    (tmp_path / "static").mkdir()
    save_file(state, tmp_path / "static" / "weights.safetensors")
    return tmp_path / "static" / "weights.safetensors"


def _parameters(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.find(RunDirectory(run).checkpoints).load("model")
    return {name: saved[name] for name, _ in create_model("dr_resnet16").named_parameters()}


@pytest.mark.usefixtures("journal_only")
@pytest.mark.parametrize("how", ["mean", "first"])
def test_a_new_run_starts_from_a_static_network(
    how: str, tiny: Tiny, weights: Path, tmp_path: Path
) -> None:
    config = tiny.config(**STILL, **{"init_from.path": weights.parent, "init_from.recursive": how})
    assert train(config, tmp_path / "run", stop_after=1) == 0
    model = create_model("dr_resnet16", num_classes=4)
    expected = fold(load_file(weights), model, how)
    for name, value in _parameters(tmp_path / "run").items():
        if ".router." not in name:
            torch.testing.assert_close(value, expected[name], atol=1e-20, rtol=0)


def test_a_network_for_other_classes_keeps_its_own_classifier(tiny: Tiny, weights: Path) -> None:
    model = create_model("dr_resnet16", num_classes=7)
    own = model.state_dict()
    init = tiny.config(**{"init_from.path": weights}).init_from
    with pytest.raises(ConfigError, match=r"4, 64\) instead of \(7, .*init_from.classifier=fresh"):
        start_from(init, model)
    fresh = tiny.config(**{"init_from.path": weights, "init_from.classifier": "fresh"}).init_from
    start_from(fresh, model)
    now = model.state_dict()
    assert torch.equal(now["classifier.weight"], own["classifier.weight"])
    assert torch.equal(now["stem.weight"], load_file(weights)["stem.weight"])


@pytest.mark.usefixtures("journal_only")
def test_a_resumed_run_does_not_start_again(tiny: Tiny, weights: Path, tmp_path: Path) -> None:
    whole = tiny.config(**{"init_from.path": weights, "train.zero_stage": 1})
    assert train(whole, tmp_path / "whole", stop_after=4) == 0
    assert train(whole, tmp_path / "parts", stop_after=2) == 0
    shutil.rmtree(weights.parent)  # what a run has started from is no longer needed
    assert train(whole, tmp_path / "parts", stop_after=4) == 0
    expected = _parameters(tmp_path / "whole")
    for name, value in _parameters(tmp_path / "parts").items():
        assert torch.equal(value, expected[name]), name


def test_weights_that_cannot_be_used_leave_no_run_behind(
    tiny: Tiny, weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {
        str(tmp_path / "nowhere"): "init_from.path=.*nowhere: there is no .*: give a finished run",
        str(weights): r"not the weights of this network or of its .*: .*conv1.weight \(missing\)",
    }
    for path, message in cases.items():
        config = tiny.config(model="dr_resnet32", **{"init_from.path": path})
        assert train(config, tmp_path / "run") != 0
        assert re.search(message, capfd.readouterr().err)
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_damaged_file_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("weights.safetensors", "resnet50.pth"):
        (tmp_path / name).write_bytes(b"no weights")
        init = tiny.config(**{"init_from.path": tmp_path / name}).init_from
        with pytest.raises(ConfigError, match=f"init_from.path=.*cannot read .*{name}: "):
            start_from(init, create_model("resnet20"))


def test_torchvisions_file_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    theirs = torchvision.models.mobilenet_v2().state_dict()
    torch.save(theirs, tmp_path / "mobilenet_v2.pth")
    model = create_model("dr_mobilenet_v2")
    start_from(tiny.config(**{"init_from.path": tmp_path / "mobilenet_v2.pth"}).init_from, model)
    assert torch.equal(model.classifier.weight, theirs["classifier.1.weight"])
    cells = [theirs[f"features.{i}.conv.0.0.weight"] for i in (5, 6)]
    ours = model.stages[2][1].cell.conv1.weight
    torch.testing.assert_close(ours, torch.stack(cells).mean(0))
