"""Sweeps: every combination of settings with several values, as job arrays."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from jobs import scheduler, submit
from jobs.record import Job
from jobs.submit import Request
from pipeline import recipes
from pipeline.config import Config, ConfigError
from pipeline.tracking import journal

LARGEST_ARRAY = 1000  # where a site does not tell
TRACKED = (journal.JOURNAL, journal.IDENTITY, journal.SENT, journal.LOG, journal.LOCK)


def expand(overrides: Iterable[str]) -> dict[str, list[str]]:
    """Name -> overrides of each member: the product over `key=a,b`; YAML lists are one value.

    Raises:
        ConfigError: no setting has several values; members would have one name, or one that is
            too long for a folder.
    """
    axes, fixed = [], []
    for override in overrides:
        key, _, text = override.partition("=")
        if "," in text and not text.lstrip().startswith(("[", "{")):
            axes.append([f"{key}={value}" for value in text.split(",")])
        else:
            fixed.append(override)
    if not axes:
        raise ConfigError("nothing to sweep: give a setting several values, such as seed=0,1,2")
    found: dict[str, tuple[str, ...]] = {}
    for member in itertools.product(*axes):
        name = _name(member)
        if name in found:
            _refuse_equal(",".join(found[name]), ",".join(member))
        found[name] = member
    return {name: [*fixed, *member] for name, member in found.items()}


def _name(member: Iterable[str]) -> str:
    """Of a member's folder.

    Raises:
        ConfigError: it is too long.
    """
    name = ",".join(member).replace("/", "-")
    if (size := len(os.fsencode(name))) > submit.NAME_BYTES:
        raise ConfigError(
            f"the run {name[:60]}... would have a name of {size} "
            f"bytes, and a folder's has at most {submit.NAME_BYTES}: give shorter values, such as "
            "relative paths, or sweep fewer settings at a time"
        )
    return name


def _refuse_equal(one: str, other: str) -> NoReturn:
    if one == other:
        raise ConfigError(f"{one} is given twice: leave one of them away")
    raise ConfigError(
        f"{one} and {other} would have one folder, as / becomes -: give values that differ in more"
    )


def members(recipe: str, overrides: Iterable[str], folder: Path) -> dict[Path, Config]:
    """Run directory and configuration of each member."""
    return {
        folder / name: recipes.load(recipe, settings)
        for name, settings in expand(overrides).items()
    }


def start(
    runs: dict[Path, Config], folder: Path, request: Request, max_parallel: int | None
) -> list[Job]:
    """Queue all members, in as many arrays as the site's limit asks for, one after the other.

    Raises:
        ValueError: as `submit.submit`, for any member; then none is queued.
    """
    from pipeline import tracking

    if request.profile.is_local:
        raise ConfigError(
            "a sweep needs a scheduler: give --cluster with a cluster's name, or start the "
            "members by themselves"
        )
    with contextlib.ExitStack() as stack:
        announce = stack.enter_context(tracking.announcer())
        submit.check_all(runs, request)
        submit.ask_site(request)
        largest = largest_array()
        experiment = next(iter(runs.values())).experiment
        jobs: list[Job] = []
        stack.enter_context(submit.alone(folder))
        # A folder that is there already may hold members of an earlier call.
        own = (folder / name for name in ("code", "slurm", *TRACKED))
        stack.enter_context(submit.undone(folder, *own))
        folder.mkdir(parents=True, exist_ok=True)
        _track(folder, experiment)
        for run, config in runs.items():
            stack.enter_context(submit.made(config, run, folder))
        stack.enter_context(submit.announced(announce, folder))
        submit.snapshot(folder / "code")
        try:
            left = iter(runs.items())
            while chunk := dict(itertools.islice(left, largest)):
                after = jobs[-1].id.split("_")[0] if jobs else None
                jobs += submit.queue(chunk, request, folder, max_parallel, after)
        except BaseException:
            for job in {job.id.split("_")[0] for job in jobs}:
                scheduler.ask("scancel", job)
            raise
    return jobs


def _track(folder: Path, experiment: str) -> None:
    """The parent in MLflow; it is over as soon as it is there, its members are not."""
    from pipeline.tracking import Tracker

    Tracker(folder, run_name=folder.name, experiment=experiment).close("FINISHED")


def largest_array() -> int:
    """Members that an array may have on this site."""
    told = re.search(r"MaxArraySize\s*=\s*(\d+)", scheduler.ask("scontrol", "show", "config"))
    return int(told[1]) if told else LARGEST_ARRAY
