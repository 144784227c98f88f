"""The proof that a preempted job loses nothing, on the user's own cluster, with a tiny network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs import runs, scheduler, submit
from jobs.record import Job, newest_step, saved_steps
from jobs.submit import Request
from pipeline.config import Config, ConfigError

log = logging.getLogger(__name__)
RECIPE = "drnn/digits/dr_resnet16"
SAVE_EVERY = 10  # steps
ENDLESS = 500  # epochs: more than are trained before all has been seen, also on fast devices
KEPT = 100  # checkpoints: those that one training makes while nobody looks
LOOK_SECONDS = 2.0


def drill(request: Request, folder: Path) -> Iterator[str]:
    """Train twice on digits, once with a signal as a preemption sends it; say how they compare.

    How fast they train does not matter: each is ended once it has the steps that are compared.

    Raises:
        ValueError: they are not equal, a job has ended by itself, or the cluster refuses them.
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
            f"train.epochs={ENDLESS}",
            f"train.evaluate_every={ENDLESS}",
            f"checkpoints.every_steps={SAVE_EVERY}",
            f"checkpoints.keep_last={KEPT}",
        ],
    )
    started = time.strftime("%Y%m%d-%H%M%S")
    whole, struck = (folder / f"{started}-{name}" for name in ("whole", "struck"))
    try:
        yield from _proof(config, struck, whole, request)
    finally:
        for run in (struck, whole):
            _cancel(run)


def _proof(config: Config, struck: Path, whole: Path, request: Request) -> Iterator[str]:
    job = submit.submit(config, struck, request)
    yield f"job {job.id}: waiting for step {SAVE_EVERY}"
    _wait(struck, job, lambda: newest_step(struck) >= SAVE_EVERY)
    scheduler.ask("scancel", "--signal=USR2", job.id)
    yield f"job {job.id}: told to save, as before a preemption"
    _wait(struck, job, lambda: _said(struck, "resumed from"))
    again = newest_step(struck)
    _wait(struck, job, lambda: newest_step(struck) >= again + 2 * SAVE_EVERY)
    stops, starts = (_said(struck, what) for what in ("stopped with a checkpoint", "resumed from"))
    if (stops, starts) != (1, 1):
        raise ValueError(
            f"job {job.id} was told to stop once, saved {stops} times and went on {starts} times: "
            f"see {struck}/logs"
        )
    _cancel(struck)
    # Not before: with room for one job, this one would keep the other from going on.
    other = submit.submit(config, whole, request)
    yield f"job {other.id}: the same training, left alone"
    _wait(whole, other, lambda: _common(struck, whole, again))
    step = max(_common(struck, whole, again))
    _compare(whole, struck, step)
    yield (
        f"the same weights bit by bit at step {step}, the same samples in the same order "
        f"({struck}, {whole})"
    )


def _cancel(run: Path) -> None:
    try:
        runs.cancel(run)
    except ConfigError:
        pass  # it has no job, or one that has ended
    except ValueError as error:  # the scheduler does not answer
        log.error("%s has a job that may train on: reprise cancel %s (%s)", run, run, error)


def _said(run: Path, what: str) -> int:
    """How often rank 0 has said so."""
    return (run / "logs" / "rank-0.log").read_text().count(what)


def _common(struck: Path, whole: Path, after: int) -> set[int]:
    """Steps of which both have a checkpoint."""
    return {step for step in saved_steps(struck) & saved_steps(whole) if step > after}


def _wait(run: Path, job: Job, reached: Callable[[], object]) -> None:
    while not reached():
        try:
            state = scheduler.states([job.id]).get(job.id)
        except scheduler.Unreachable:
            time.sleep(LOOK_SECONDS)
            continue
        if state is None or not state.alive:
            # The last word of a job may come before the last of its files.
            time.sleep(LOOK_SECONDS)
            if reached():
                return
            ended = state.name.lower() if state else "unknown to SLURM"
            raise ValueError(f"job {job.id} of {run} is {ended}: `reprise logs {run}` says why")
        time.sleep(LOOK_SECONDS)


def _compare(whole: Path, struck: Path, step: int) -> None:
    import torch

    from pipeline.training import checkpoint

    a, b = (checkpoint.find(run / "checkpoints", at=step) for run in (whole, struck))
    for state in a.states:
        if state.startswith("rank-"):
            keys = [one.load(state)["progress"]["keys_digest"] for one in (a, b)]
            if keys[0] != keys[1]:
                raise ValueError(f"{state} saw other samples after the signal: {whole}, {struck}")
    weights, others = a.load("model"), b.load("model")
    odd = [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])]
    if odd:
        raise ValueError(f"{len(odd)} of {len(weights)} tensors differ, first {odd[0]}")
