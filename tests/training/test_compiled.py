"""Training with the step compiled: the eager step but for rounding, and resumed bit by bit."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.config import ConfigError
from tests.training.conftest import Tiny, trace, train
from tests.training.test_engine import engine, norm, step

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, such as g++"
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    counters.clear()


@needs_compiler
def test_a_step_is_the_eager_one() -> None:
    compiled = engine(model="rc_r2_1", **{"train.compile": True})
    found = step(compiled)
    assert counters["stats"]["unique_graphs"] == 1, "the network is one graph"
    wanted = step(engine(model="rc_r2_1"))
    assert norm(wanted) > 0
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


def test_without_a_compiler_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"train.compile=true needs a C\+\+ compiler"):
        engine(**{"train.compile": True})
