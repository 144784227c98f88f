"""A preparation's shards as a job array: each member packs a share of them on its node."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from data_prep.pack import Packed, PackShards, Record, Work
from data_prep.plan import Plan, ShardPlan
from jobs import scheduler, submit, sweep
from jobs.errors import guarded
from jobs.submit import Request
from pipeline.config import ConfigError

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks for finished shards
ASK_SECONDS = 10.0  # between two questions to the scheduler
SETTLE_SECONDS = 10.0  # until a shared file system shows what an ended job wrote


@dataclass(frozen=True)
class OnNode:
    """A member's share; what submitit pickles."""

    share: PackShards

    def __call__(self) -> int:
        # Nothing is to be saved early, and SLURM itself queues a preempted member again. The
        # processes that pack inherit that the signal is ignored.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        status = guarded(self._pack)
        if status:
            sys.stderr.flush()
            os._exit(status)  # not by an exception, of which submitit would make another status
        return status

    def _pack(self) -> int:
        self.share()
        return 0


@dataclass(frozen=True)
class ShardArray:
    """Has planned shards packed by at most ``members`` jobs, and waits for them.

    Whoever waits may be ended: the members go on with their shards, which are kept, until the same
    preparation is begun again.
    """

    request: Request
    members: int

    def check(self, *paths: Path) -> None:
        """Raises ValueError for what would not work, before anything is written."""
        if self.request.profile.is_local:
            raise ConfigError(
                "--cluster needs a scheduler: leave it away to prepare with the cores of this "
                "machine"
            )
        if self.members > (largest := sweep.largest_array()):
            raise ConfigError(f"--workers {self.members}: an array has at most {largest} jobs here")
        submit.check_shared(self.request.profile, *paths)
        submit.ask_site(self.request)

    def __call__(self, pack: PackShards) -> Iterator[Packed]:
        """Queue the members and tell of each shard as it is finished.

        Raises:
            ValueError: the members ended without all of the shards; the message is what one said.
        """
        work = pack.pack.work
        shards = pack.unfinished(Plan.load(work.plan))
        if not shards:
            return
        array = _Array(work.root / "jobs")
        array.cancel()  # of a call that was ended while it waited
        try:
            array.queue(self._shares(pack, shards), self.request)
            log.info("job %s packs %d shards", array.id, len(shards))
            yield from _packed(work, shards, array)
        finally:
            try:
                array.cancel()
            except scheduler.Unreachable as error:
                log.warning("jobs may be left, and the same command ends them: %s", error)

    def _shares(self, pack: PackShards, shards: list[ShardPlan]) -> list[PackShards]:
        """Ranges that hold the unfinished shards, as even in their number as can be."""
        places = {shard: n for n, shard in enumerate(Plan.load(pack.pack.work.plan).shards)}
        work = Work(pack.pack.work.root.resolve())
        cores = self.request.profile.cpus_per_gpu
        members = min(self.members, len(shards))
        cuts = [len(shards) * number // members for number in range(members + 1)]
        return [
            replace(
                pack,
                pack=replace(pack.pack, work=work),
                first=places[shards[start]],
                stop=places[shards[stop - 1]] + 1,
                workers=cores,
            )
            for start, stop in itertools.pairwise(cuts)
        ]


def _packed(work: Work, shards: list[ShardPlan], array: _Array) -> Iterator[Packed]:
    """Tell of each shard once it is finished, until all are."""
    left, asked, ended = list(shards), time.monotonic(), 0.0
    while left:
        # One listing, and not a question for each of thousands, of a file system that all share.
        recorded = set(work.records.iterdir())
        finished = {
            shard for shard in left if work.record(shard) in recorded and work.is_finished(shard)
        }
        for shard in finished:
            yield Record.load(work.record(shard)).packed
        left = [shard for shard in left if shard not in finished]
        now = time.monotonic()
        if ended and now - ended > SETTLE_SECONDS:
            raise ValueError(
                f"{array.said()}: {len(left)} of {len(shards)} shards are not packed. Mend this, "
                "and the same command goes on with them"
            )
        if not ended and now - asked > ASK_SECONDS:
            asked = now
            try:
                ended = 0.0 if array.is_alive() else now
            except scheduler.Unreachable as error:
                log.warning("%s; the shards are waited for", error)
        if left:
            time.sleep(LOOK_SECONDS)


class _Array:
    """The jobs of a preparation; their folder remembers them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._members: list[str] = []
        self._reasons = ""
        with contextlib.suppress(FileNotFoundError):
            self._members = self._file.read_text().split()

    @property
    def _file(self) -> Path:
        return self._folder / "queued"

    @property
    def id(self) -> str:
        return self._members[0].split("_")[0]

    def queue(self, shares: list[PackShards], request: Request) -> None:
        import submitit

        submit.snapshot(self._folder / "code")
        executor = submitit.SlurmExecutor(folder=(self._folder / "slurm").resolve())
        wanted: dict[str, Any] = submit.common_parameters(request, self._folder)
        executor.update_parameters(**wanted | {"job_name": "reprise-prep"})
        tasks = [OnNode(share) for share in shares]
        self._members = [handle.job_id for handle in executor.submit_array(tasks)]
        write_atomically(self._file, "\n".join(self._members).encode())

    def is_alive(self) -> bool:
        """Whether SLURM still has members to run; what keeps them waiting is logged."""
        states = scheduler.states(self._members).values()
        reasons = ", ".join(sorted({state.reason for state in states} - {"", "None"}))
        if reasons != self._reasons:
            self._reasons = reasons
            if reasons:
                log.info("job %s waits: %s", self.id, reasons)
        return any(state.alive for state in states)

    def cancel(self) -> None:
        if self.is_alive():
            scheduler.ask("scancel", self.id)

    def said(self) -> str:
        """How the members ended, and the last line of one that says why."""
        states = scheduler.states(self._members)
        bad = {job: state for job, state in states.items() if state.name != "COMPLETED"}
        for job, state in bad.items():
            lines = self._output(job)
            if lines:
                return f"job {job} on {state.nodes} ended as {state.name} ({lines[-1]})"
        ends = sorted({state.name for state in bad.values()}) or ["lost"]
        return f"job {self.id} ended as {', '.join(ends)}"

    def _output(self, job: str) -> list[str]:
        try:
            text = (self._folder / "slurm" / f"{job}_0_log.out").read_text(errors="replace")
        except FileNotFoundError:
            return []
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        return errors or text.split("\n")[-2:-1]
