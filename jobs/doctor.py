"""Is an installation, and a cluster, such that training will work there; if not, what to do."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_prep.files import Lock
from jobs import scheduler, submit
from jobs.clusters import Profile
from jobs.submit import Request

PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "mlflow", "submitit")
MINUTES = 5  # that the ranks of the check may run, once they have their nodes
ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One line: all right, or what to do."""

    what: str
    found: str
    cure: str | None = None

    def __str__(self) -> str:
        return f"{'bad' if self.cure else 'ok':<4} {self.what}: {self.found}" + (
            f": {self.cure}" if self.cure else ""
        )


def examine(profile: Profile | None, data: Path | None, ranks: int) -> Iterator[Finding]:
    """Every check in turn; one that fails does not keep the next from being made."""
    checks = {
        "packages": _packages,
        "GPUs here": _gpus,
        "tracking": _tracking,
        "locks": lambda: _locks(profile),
    }
    if data is not None:
        checks["shards"] = lambda: _shards(data, ranks)
    if profile is not None and not profile.is_local:
        checks["SLURM"] = _slurm
        checks["profile"] = lambda: _site(profile)
        checks["two nodes"] = lambda: _reach(profile)
    for name, check in checks.items():
        try:
            yield from check()
        except (ValueError, OSError) as error:
            yield Finding(name, "not all right", " ".join(str(error).split()))


def _packages() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("Python", python, None if fits else "use Python 3.11 or 3.12")
    for name in PACKAGES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "not installed", "call `make setup`")


def _gpus() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    yield Finding("GPUs here", f"{count} {', '.join(names)}" if count else "none: the CPU is used")


def _tracking() -> Iterator[Finding]:
    from pipeline import tracking

    uri = tracking.store_uri()
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        with tempfile.NamedTemporaryFile(dir=folder):
            yield Finding("tracking", f"{uri} can be written")
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS):
            yield Finding("tracking", f"{uri} answers")
    except (urllib.error.URLError, TimeoutError) as error:
        cure = "start it, or correct MLFLOW_TRACKING_URI; runs keep what they have to tell"
        yield Finding("tracking", f"{uri} does not answer ({error})", cure)


def _locks(profile: Profile | None) -> Iterator[Finding]:
    """A run that nobody can own is not trained."""
    folder = _folder(profile)
    with tempfile.TemporaryDirectory(dir=folder) as own, Lock(Path(own) / "lock", timeout=0):
        yield Finding("locks", f"{folder} has them")


def _folder(profile: Profile | None) -> Path:
    """Where runs are to be: here, or where the nodes see them."""
    here, shared = Path.cwd(), profile.shared if profile else None
    return here if shared is None or here.is_relative_to(shared) else shared


def _shards(data: Path, ranks: int) -> Iterator[Finding]:
    from data_prep.manifest import Manifest
    from pipeline.data.shards import ShardSet

    manifest = Manifest.load(data)
    for split in manifest.splits.values():
        ShardSet(manifest, split).close()
    train = manifest.train
    yield Finding(
        "shards",
        f"{len(train.shards)} with {train.samples:,} images to train on, "
        f"{train.samples // ranks:,} for each of {ranks} ranks",
        None if train.samples >= ranks else "prepare more images, or use fewer ranks",
    )


def _slurm() -> Iterator[Finding]:
    """What must be so for a job to be stopped in time and queued again."""
    for program in ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel"):
        if shutil.which(program) is None:
            yield Finding(program, "not found", "go to a login node of the cluster")
            return
    told = dict(re.findall(r"^(\w+)\s*= (.*)$", scheduler.ask("scontrol", "show", "config"), re.M))
    yield Finding("SLURM", told.get("SLURM_VERSION", "of unknown version"))
    requeue = told.get("JobRequeue") == "1"
    yield Finding(
        "requeue",
        f"JobRequeue={told.get('JobRequeue')}",
        None if requeue else "ask the site whether `scontrol requeue` is allowed",
    )
    mode = told.get("PreemptMode", "")
    kills = "CANCEL" in mode and "REQUEUE" not in mode
    yield Finding(
        "preemption",
        f"PreemptMode={mode}",
        "preempted jobs are not queued again here: call `reprise resume` for them"
        if kills
        else None,
    )
    preempts = "REQUEUE" in mode
    signals = "preempt_send_user_signal" in told.get("SchedulerParameters", "")
    yield Finding(
        "signal",
        "USR2 comes first" if signals else "SIGTERM comes first, which saves as well",
        None
        if signals or not preempts or told.get("KillWait", "0") != "0 sec"
        else "a preempted job has no time to save: lower checkpoints.every_minutes",
    )
    accounting = told.get("AccountingStorageType", "").endswith("none")
    yield Finding(
        "accounting",
        "none" if accounting else "on",
        "the state of a job that has ended is unknown to `reprise runs`" if accounting else None,
    )


def _site(profile: Profile) -> Iterator[Finding]:
    submit.ask_site(Request(profile, 2, profile.gpus_per_node, 2 * MINUTES))
    yield Finding("profile", f"{profile.name}: SLURM takes a job of 2 nodes")


def _reach(profile: Profile) -> Iterator[Finding]:
    """Two nodes, one rank for each of their GPUs, as soon as SLURM has them."""
    request = Request(profile, 2, profile.gpus_per_node, MINUTES)
    options = submit.sbatch_options(request)
    python = (sys.executable, "-m", "jobs.reach", str(_folder(profile)))
    command = ("srun", *options, "--kill-on-bad-exit=1", *python)
    try:
        yield Finding("two nodes", scheduler.ask(*command, wait=None).strip())
    except scheduler.Refused as refused:
        # The ranks' lines, each once; srun's own have its name before the word.
        lines = [line for line in refused.said.splitlines() if line.startswith("error: ")]
        if not lines:
            raise
        said = "; ".join(line.removeprefix("error: ") for line in dict.fromkeys(lines))
        yield Finding("two nodes", "not all right", said)
