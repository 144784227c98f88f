"""The run directory: the identity of a run, owned by one group of processes at a time."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout

from data_prep.files import Lock, write_atomically
from data_prep.manifest import Manifest
from pipeline import configure
from pipeline.config import Config, ConfigError

CONFIG = "config.yaml"


BEST = "-best"  # ends the name of an evaluation of the best checkpoint


class RunDirectoryInUse(ValueError):
    """Another process owns the run directory."""


class RunDirectory:
    """Paths inside a run directory, its configuration, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        self.checkpoints = path / "checkpoints"
        self.newest_saved = path / "saved.json"
        self.logs = path / "logs"
        self.evaluation = path / "evaluation"
        self.report = path / "report.html"
        self.weights = path / "weights.safetensors"
        self.consolidation = path / "consolidation.json"
        self._owner = path / "owner.json"
        self._lock = Lock(path / ".lock", timeout=0)

    @property
    def consolidated(self) -> RunDirectory:
        """That of the network which consolidation makes of one with relaxed sharing."""
        return RunDirectory(self.path / "consolidated")

    @property
    def exists(self) -> bool:
        return self.config_file.is_file()

    def evaluation_of(
        self,
        manifest: Manifest,
        other: Path | None = None,
        *,
        split: str | None = None,
        fewer_steps: int | None = None,
        best: bool = False,
    ) -> Path:
        """Where the evaluation on a shard set's split, None: its evaluation split, is kept.

        A set `other` than the run's own is known by its path: two sets may have one name.
        `fewer_steps` than the largest number have a place of their own, and so has the `best`
        checkpoint.
        """
        name = manifest.name if other is None else "-".join(other.parts).strip("-./")
        suffix = "" if fewer_steps is None else f"-{fewer_steps}-steps"
        suffix += BEST if best else ""
        split = split or manifest.evaluation.name
        return self.evaluation / f"{name.replace('/', '')}-{split}{suffix}"

    def read_config(self) -> Config:
        """Raises ConfigError if this is not a run directory."""
        if not self.exists:
            raise ConfigError(
                f"{self.path} is not a run directory (no {CONFIG}): give the folder that "
                "`reprise train` printed"
            )
        return configure.read(self.config_file)

    def claim(self, config: Config) -> None:
        """Own this directory for this configuration until `release` or death.

        Raises:
            RunDirectoryInUse: somebody else owns it; the message says who.
            ConfigError: it belongs to a run of another configuration, or is no run's.
            ValueError: its file system has no locks.
        """
        foreign = self.path.is_dir() and any(self.path.iterdir()) and not self.exists
        if foreign and not (self.path / ".lock").exists():
            raise ConfigError(f"{self.path} holds other files: give another --run folder")
        if self.consolidation.exists():
            raise ConfigError(
                f"{self.path} holds a consolidated network, which can be evaluated and not trained "
                "on: give the run that it was made of"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunDirectoryInUse(
                f"{self.path} is in use by {self._read_owner()}: wait for it, stop it, or give "
                "another --run folder"
            ) from None
        try:
            self._adopt(config)
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _adopt(self, config: Config) -> None:
        if self.exists:
            before, now = self.read_config().flat(), config.flat()
            if before != now:
                key = next(k for k in {**before, **now} if before.get(k) != now.get(k))
                raise ConfigError(
                    f"{self.path} is a run with {key}={before.get(key)}, now {now.get(key)}: a run "
                    "keeps its configuration; resume it as it is or give another --run folder"
                )
        else:
            write_atomically(self.config_file, config.to_yaml().encode())
        self.logs.mkdir(exist_ok=True)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if job := os.environ.get("SLURM_JOB_ID"):
            owner["slurm_job"] = job
        self._owner.write_text(json.dumps(owner))

    def _read_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text())
        except (OSError, ValueError):
            return "another process"
        return ", ".join(f"{key} {value}" for key, value in owner.items())
