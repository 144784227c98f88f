"""`reprise` with a fault in one rank: `python -m tests.training.faults FAULT RANK STEP COMMAND...`.

The rest of the arguments is the command's own. A fault strikes in every process that the launcher
gives this rank, at this optimizer step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from jobs.cli import main
from pipeline import evaluate as evaluation
from pipeline.training import checkpoint, run
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.trainer import Trainer, Verdict


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def kill_in_step(step: int) -> None:
    """kill -9 after the backward pass, before the update."""
    micro_step = Trainer._exchange

    def deadly(self: Trainer, loss: Any) -> Any:
        agreed = micro_step(self, loss)

        def struck() -> Any:
            if self.progress.step == step:
                _send(signal.SIGKILL)
            return agreed()

        return struck

    Trainer._exchange = deadly  # type: ignore[method-assign]


def kill_before_own_state(step: int) -> None:
    """kill -9 while saving, before this rank's own state is written."""
    write = checkpoint._write_states

    def deadly(folder: Any, states: Any) -> Any:
        if folder.name.endswith(f"{step:09d}"):
            _send(signal.SIGKILL)
        return write(folder, states)

    checkpoint._write_states = deadly


def kill_before_publishing(step: int) -> None:
    """kill -9 while saving, when all ranks have written their states."""
    publish = checkpoint._publish

    def deadly(partial: Any, final: Any, manifest: Any) -> Any:
        if manifest["step"] == step:
            _send(signal.SIGKILL)
        return publish(partial, final, manifest)

    checkpoint._publish = deadly


def stop_thrice(step: int) -> None:
    """SIGUSR2 twice in a step, and once more while the checkpoint that it asks for is written."""
    after_update, save = Trainer._after_update, CheckpointStore.save

    def asked(self: Trainer, verdict: Verdict) -> None:
        after_update(self, verdict)
        if self.progress.step == step:
            _send(signal.SIGUSR2)
            _send(signal.SIGUSR2)

    def again(self: CheckpointStore, at: int, *arguments: Any, **options: Any) -> Any:
        if at > step:
            _send(signal.SIGUSR2)
        return save(self, at, *arguments, **options)

    Trainer._after_update = asked  # type: ignore[method-assign]
    CheckpointStore.save = again  # type: ignore[method-assign]


def _in_evaluation(step: int, strike: Callable[[], None]) -> None:
    """Strike after the first batch of the evaluation at this step."""
    evaluate, count, at = run._Evaluation.__call__, evaluation._Pace.count, [0]

    def begun(self: Any, now: int) -> Any:
        at[0] = now
        return evaluate(self, now)

    def counted(self: Any, images: int) -> None:
        count(self, images)
        if at[0] == step and len(self._moments) == 2:
            strike()

    run._Evaluation.__call__ = begun  # type: ignore[method-assign]
    evaluation._Pace.count = counted  # type: ignore[method-assign]


def kill_in_evaluation(step: int) -> None:
    """kill -9 in the evaluation at this step."""
    _in_evaluation(step, lambda: _send(signal.SIGKILL))


def stop_in_evaluation(step: int) -> None:
    """SIGUSR2 in the evaluation at this step."""
    _in_evaluation(step, lambda: _send(signal.SIGUSR2))


FAULTS: dict[str, Callable[[int], None]] = {
    fault.__name__: fault
    for fault in (
        kill_in_step,
        kill_before_own_state,
        kill_before_publishing,
        kill_in_evaluation,
        stop_in_evaluation,
        stop_thrice,
    )
}

if __name__ == "__main__":
    fault, rank, step = sys.argv[1:4]
    if os.environ.get("RANK", "0") == rank:
        FAULTS[fault](int(step))
    sys.argv[1:] = sys.argv[4:]
    main()
