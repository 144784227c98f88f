"""Checkpoints of jobs that are damaged, half written or refused by the disk cost steps, no more."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from jobs.record import newest_step
from pipeline.training.checkpoint import PARTIAL
from tests.cluster.conftest import LATER, Submitted, jobs_of, reprise, slurm, start
from tests.training.conftest import Trace, trace

Submit = Callable[..., Submitted]


def test_a_killed_save_and_then_damaged_checkpoints(submit: Submit, whole: Trace) -> None:
    """Rank 0 is killed with a checkpoint half written. Later the newest is cut, and the one before
    has a flipped bit: the third is used."""
    run = submit("checkpoints.every_steps=2", "checkpoints.keep_last=3")
    run.trains()
    writer = run.rank(0)
    half = stopped_in_a_save(run, writer)
    writer.kill()
    psutil.wait_procs([writer])
    assert half.is_dir()
    run.goes_on()
    run.trains()
    slurm("scancel", run.job.id)
    run.until(lambda: not jobs_of(run.run.parent), "the job has ended")
    assert not half.exists()
    newest, before, third = sorted((run.run / "checkpoints").glob("step-*"), reverse=True)
    cut, flipped = (path / "engine.safetensors" for path in (newest, before))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    resumed = reprise("resume", "run", "--runs", ".", cwd=run.run.parent)
    assert resumed.returncode == 0, resumed.stderr
    run.finished()
    assert f"{newest.name} is damaged" in run.log
    assert f"{before.name} is damaged" in run.log
    assert f"resumed from {third}" in run.log
    assert trace(run.run) == whole


def stopped_in_a_save(run: Submitted, writer: psutil.Process) -> Path:
    """The unfinished checkpoint that a rank has been stopped over."""
    while True:
        newest = newest_step(run.run)
        for path in (run.run / "checkpoints").glob(f"{PARTIAL}*"):
            # Old checkpoints that are being removed have the prefix too.
            if int(path.name.split("-")[-1]) > newest:
                writer.suspend()
                if path.is_dir() and not path.with_name(path.name.removeprefix(PARTIAL)).exists():
                    return path
                writer.resume()
        assert newest < 40, "no save was met half done"


def test_a_full_disk(submit: Submit, whole: Trace) -> None:
    """Training goes on without checkpoints; the last one it cannot do without."""
    run = submit(cluster=LATER)
    disk = run.run / "checkpoints"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)
    try:
        start(run.job.id)
        run.trains()
        with pytest.raises(OSError, match="space"), (disk / "other").open("wb") as other:
            other.write(bytes(2**25))
        with pytest.raises(AssertionError, match="the disk must be mended"):
            run.until(lambda: False, "it is given up")
        assert "No space left on device" in run.log
        (disk / "other").unlink()
        resumed = reprise("resume", "run", "--runs", ".", cwd=run.run.parent)
        assert resumed.returncode == 0, resumed.stderr
        start(run.job.id)
        run.finished()
        assert trace(run.run) == whole
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
