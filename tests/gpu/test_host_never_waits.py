"""A step in fp32 or bf16 only queues work: a GPU that is waited for then waits for the host."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.trainer import Trainer
from tests.training.conftest import Tiny, journal_only, tiny, train  # noqa: F401 - fixtures

pytestmark = pytest.mark.gpu
WARM = 3  # steps in which kernels are chosen and compiled
SAMPLED = {"model": "rc_r2", "steps.probabilities": "{2: 0.4, 3: 0.3, 4: 0.3}"}
PHOTOMETRIC = {"data.augment.photometric": True, "data.augment.rotate": True}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """From one update to the next no call may wait for the device; the steps that were watched."""
    watched: list[int] = []
    after, synchronize = Trainer._after_update, torch.cuda.synchronize

    def after_update(trainer: Trainer, verdict: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        after(trainer, verdict)
        done = trainer.progress.step
        # At the end of an epoch metrics are read, and the next one's reader may begin.
        if done >= WARM and done % trainer.steps_per_epoch:
            watched.append(done)
            torch.cuda.set_sync_debug_mode("error")

    def refuse(*device: Any) -> None:
        assert torch.cuda.get_sync_debug_mode() == 0, "the whole device was waited for"
        synchronize(*device)

    monkeypatch.setattr(Trainer, "_after_update", after_update)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    yield watched
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "values",
    [
        {"train.precision": "bf16"},
        {"train.precision": "bf16", "train.compile": True},
        {"optimizer.clip_norm": 1.0, "train.precision": "bf16", **SAMPLED},
        {"data.reader": "torch", "train.precision": "bf16", **PHOTOMETRIC},
        {"train.ema_decay": 0.9, **PHOTOMETRIC},
    ],
    ids=["gates", "compiled", "sampled steps, clipped", "torch reader", "fp32, average"],
)
def test_no_step_waits_for_the_gpu(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    waits: list[int],
    journal_only: None,  # noqa: F811
    values: dict[str, object],
) -> None:
    config = tiny.config(**{"train.log_every": 1000, "optimizer.lr": 0.01, **values})
    assert train(config, tmp_path / "run") == 0
    assert len(waits) == 7
