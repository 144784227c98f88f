"""Training with the step compiled: the eager step but for rounding, and resumed bit by bit."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed import World
from pipeline.training import compiling
from tests.training.conftest import Tiny, trace, train
from tests.training.test_engine import IMAGES, LABELS, engine, norm

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as g++"
)
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


def changes(*, compiled: bool) -> dict[str, Tensor]:
    """What an update of two steps of three does to each parameter."""
    made = engine(model="rc_r2", **{"train.compile": compiled})
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made.backward(F.cross_entropy(made.forward(IMAGES, 2).logits, LABELS))
    made.step()
    found = {name: before[name] - value.detach() for name, value in made.model.named_parameters()}
    made.close()
    return found


@needs_compiler
def test_an_update_is_the_eager_one() -> None:
    found = changes(compiled=True)
    assert counters["stats"]["unique_graphs"] == 1, "the network is one graph"
    wanted = changes(compiled=False)
    assert norm(wanted) > 0
    idle = [name for name, change in wanted.items() if not change.any()]
    assert idle, "the norms of the third step"
    assert all(not found[name].any() for name in idle)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@needs_compiler
def test_a_run_resumes_bit_by_bit(tiny: Tiny, tmp_path: Path, journal_only: None) -> None:
    """Its evaluations, between the steps, are not compiled: their shapes are the data's."""
    config = tiny.config(**{"train.compile": True, "train.evaluate_every": 1})
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(config, whole) == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert train(config, halves, stop_after=6) == 0
    assert train(config, halves) == 0
    assert trace(halves) == trace(whole)


@pytest.mark.parametrize(
    ("device", "overrides", "mode"),
    [
        (CUDA, {}, "reduce-overhead"),
        (torch.device("cpu"), {}, "default"),
        (CUDA, {"train.accumulation": 2}, "default"),
        (CUDA, {"steps.draw": "all"}, "default"),
        (
            CUDA,
            {"train.epochs": "null", "phases": "[{name: only, epochs: 1, draws: 2}]"},
            "default",
        ),
    ],
)
def test_only_an_update_of_one_pass_is_replayed(
    tiny: Tiny, device: torch.device, overrides: dict[str, object], mode: str
) -> None:
    assert compiling.mode(tiny.config(**overrides), device) == mode


@pytest.mark.parametrize(
    ("device", "variable", "value", "wanted"),
    [
        ("cpu", "CXX", None, "a C++ compiler (g++)"),
        ("cpu", "CXX", "ccache c++17", "a C++ compiler (ccache c++17)"),
        ("cuda", "CC", None, "a C compiler (gcc or clang)"),
        ("cuda", "CC", "/nowhere/cc -O2", "a C compiler (/nowhere/cc -O2)"),
    ],
)
def test_without_a_compiler_nothing_starts(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    variable: str,
    value: str | None,
    wanted: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if value:
        monkeypatch.setenv(variable, value)
    world = World(device=torch.device(device))
    compiling.check(tiny.config(), world)
    with pytest.raises(ConfigError) as caught:
        compiling.check(tiny.config(**{"train.compile": True}), world)
    assert f"train.compile=true needs {wanted} on " in str(caught.value)


def test_a_refused_run_leaves_no_directory(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert train(tiny.config(**{"train.compile": True}), tmp_path / "run") == 2
    assert "install one, or leave train.compile out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
