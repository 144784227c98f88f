"""What a run directory knows of its job: which one it is, and how its starts ended."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_prep.files import write_atomically
from pipeline.config import ConfigError

FILE = "job.json"
SAME_STEP = 3  # failures without a step between them, after which a job is not queued again
# Stops alike. A stop saves the step that it met, so these met none; but others' jobs may be why.
SAME_STOP = 5
_STEP = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class Failure:
    """A start that ended badly: `step` is where the next one would begin."""

    job: str
    step: int
    status: int
    said: str = ""  # by the rank that failed


@dataclass(frozen=True)
class Job:
    """The job of a run; `stopped` says why it will not be queued again.

    `stops` has the step where the next start would begin, once for each that was stopped there.
    """

    cluster: str
    id: str
    nodes: int
    gpus_per_node: int
    minutes: int
    host: str
    failures: tuple[Failure, ...] = ()
    stops: tuple[int, ...] = ()
    stopped: str | None = None

    @classmethod
    def load(cls, run: Path) -> Job | None:
        """The recorded job; None where the run was never submitted.

        Raises:
            ConfigError: the record cannot be read, such as one of another version.
        """
        file = run / FILE
        try:
            values = json.loads(file.read_text())
            failures = tuple(Failure(**failure) for failure in values.pop("failures", ()))
            return cls(failures=failures, stops=tuple(values.pop("stops", ())), **values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}): see `squeue --me` for the run's job; once that "
                f"has ended, move the file away and call `reprise submit {run}/config.yaml --run "
                f"{run}`"
            ) from None

    def save(self, run: Path) -> None:
        write_atomically(run / FILE, json.dumps(asdict(self), indent=1).encode())

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus_per_node)

    def failed(self, step: int, status: int, said: str = "") -> Job:
        """With one failure more; stopped, if it is the last one allowed."""
        failures = (*self.failures, Failure(self.id, step, status, said))
        alike = [failure for failure in failures[-SAME_STEP:] if failure.step == step]
        reason = None
        if len(alike) == SAME_STEP:
            reason = f"failed {SAME_STEP} times at step {step}, last with status {status}"
            reason += f" ({said})" if said else ""
        return replace(self, failures=failures, stopped=reason)

    def halted(self, step: int) -> Job:
        """With one stop by a signal more; stopped for good, if it is the last one allowed."""
        stops = (*(one for one in self.stops if one == step), step)
        reason = None
        if len(stops) == SAME_STOP:
            reason = (
                f"stopped {SAME_STOP} times at step {step} before a new checkpoint: see `reprise "
                "logs`; give a longer time limit, or a partition without preemption"
            )
        return replace(self, stops=stops, stopped=reason)


def saved_steps(run: Path) -> set[int]:
    """Steps of the checkpoint directories; whether they are whole is not asked."""
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    return {int(found[1]) for name in names if (found := _STEP.fullmatch(name))}


def newest_step(run: Path) -> int:
    """The last of them, 0 without one."""
    return max(saved_steps(run), default=0)
