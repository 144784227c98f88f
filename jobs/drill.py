"""The proof that a preempted job loses nothing, on the user's own cluster, with a tiny network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jobs import runs, scheduler, submit
from jobs.record import Job, newest_step
from jobs.submit import Request

RECIPE = "drnn/digits/dr_resnet16"
EPOCHS = 2
STRIKE_AT = 10  # steps, of about 45
LOOK_SECONDS = 2.0


def drill(request: Request, folder: Path) -> Iterator[str]:
    """Train twice on digits, once with a signal as a preemption sends it; say how they compare.

    Raises:
        ValueError: they are not equal, a job has ended otherwise, or the cluster refuses them.
    """
    from data_prep.prepare import prepare
    from data_prep.sources import open_source
    from pipeline import recipes

    shards = folder / "digits"
    prepare(open_source("digits", None), shards)
    config = recipes.load(
        RECIPE,
        [
            f"data.path={shards}",
            f"train.epochs={EPOCHS}",
            f"train.evaluate_every={EPOCHS}",
            f"checkpoints.every_steps={STRIKE_AT}",
        ],
    )
    started = time.strftime("%Y%m%d-%H%M%S")
    whole, struck = (folder / f"{started}-{name}" for name in ("whole", "struck"))
    job = submit.submit(config, struck, request)
    yield f"job {job.id}: waiting for step {STRIKE_AT}"
    _wait(struck, job, lambda: newest_step(struck) >= STRIKE_AT)
    scheduler.ask("scancel", "--signal=USR2", job.id)
    yield f"job {job.id}: told to save, as before a preemption"
    other = submit.submit(config, whole, request)
    yield f"job {other.id}: the same training, left alone"
    for run, waited in ((struck, job), (whole, other)):
        _wait(run, waited, partial(_has_finished, run))
    starts = (struck / "logs" / "rank-0.log").read_text().count("resumed from")
    if starts != 1:
        raise ValueError(f"job {job.id} went on {starts} times instead of once: see {struck}/logs")
    _compare(whole, struck)
    yield f"the same weights bit by bit, the same samples in the same order ({struck}, {whole})"


def _has_finished(run: Path) -> bool:
    return runs.progress(run).status == "FINISHED"


def _wait(run: Path, job: Job, reached: Callable[[], bool]) -> None:
    while not reached():
        state = scheduler.states([job.id]).get(job.id)
        if state is None or not state.alive:
            # The last word of a job may come before the last of its files.
            time.sleep(LOOK_SECONDS)
            if reached():
                return
            ended = state.name.lower() if state else "unknown to SLURM"
            raise ValueError(f"job {job.id} of {run} is {ended}: `reprise logs {run}` says why")
        time.sleep(LOOK_SECONDS)


def _compare(whole: Path, struck: Path) -> None:
    import torch

    from pipeline.training import checkpoint

    a, b = (checkpoint.find(run / "checkpoints") for run in (whole, struck))
    for state in a.states:
        if state.startswith("rank-"):
            keys = [one.load(state)["progress"]["keys_digest"] for one in (a, b)]
            if keys[0] != keys[1]:
                raise ValueError(f"{state} saw other samples after the signal: {whole}, {struck}")
    weights, others = a.load("model"), b.load("model")
    odd = [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])]
    if odd:
        raise ValueError(f"{len(odd)} of {len(weights)} tensors differ, first {odd[0]}")
