"""What a network is trained for: its loss, its metrics, and which of them picks the best weights.

One file per task; the loop, the evaluation and the report ask the task and know none by name.
"""

from __future__ import annotations

from pipeline.config import Config, TaskName
from pipeline.tasks.classification import Classification
from pipeline.tasks.denoising import Denoising
from pipeline.tasks.task import Samples, Summary, Task

__all__ = ["TASKS", "Classification", "Denoising", "Samples", "Summary", "Task", "of"]

TASKS: dict[TaskName, type[Classification] | type[Denoising]] = {
    "classification": Classification,
    "denoising": Denoising,
}


def of(config: Config) -> Task:
    """The task of a configuration."""
    return Denoising() if config.task == "denoising" else Classification(config.loss)
