"""How training ends when it is asked to, or when a part of it dies: by real signals, resumably."""

import json
import os
import pty
import signal
import subprocess
import termios
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.jobs import command
from tests.jobs.command import ended, interrupt_group, ranks, started, training, until

LONG = ["train.epochs=5000", "train.evaluate_every=5000"]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_one_rank_stops_with_a_checkpoint_and_resumes(recipe: Path, tmp_path: Path) -> None:
    run, arguments = tmp_path / "run", [recipe, *LONG, "--run", "run"]
    saved: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with training(*arguments, run=run) as process:
            os.killpg(process.pid, number)
            done = ended(process)
        assert done.returncode == 130
        assert done.stdout == ""  # no library speaks beside the log
        assert "stopped with a checkpoint; resume with: reprise train run" in done.stderr
        assert "Traceback" not in done.stderr
        saved = checkpoints(run)
        arguments = ["run"]
    assert len(saved) == 2
    log = (run / "logs" / "rank-0.log").read_text()
    assert f"resumed from run/checkpoints/{saved[0]}" in log


def test_two_ranks_stop_together_and_survive_a_lost_one(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def resume(*arguments: object) -> AbstractContextManager["subprocess.Popen[str]"]:
        return training(*arguments, "--nproc", 2, "--quiet", run=run, rank=1)

    with resume(recipe, *LONG, "--run", "run") as process:
        interrupt_group(process)
        done = ended(process)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["stopped with a checkpoint; resume with: reprise train run"]
    assert len(checkpoints(run)) == 1

    with resume("run") as process:
        os.kill(ranks(process.pid)[1], signal.SIGUSR2)  # a scheduler may tell one rank only
        done = ended(process)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["stopped with a checkpoint; resume with: reprise train run"]
    assert len(checkpoints(run)) == 2

    before = checkpoints(run)
    with resume("run") as process:
        os.kill(ranks(process.pid)[1], signal.SIGKILL)
        done = ended(process)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was killed (SIGKILL)" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(run) == before

    with resume("run") as process:
        os.kill(process.pid, signal.SIGTERM)  # to the launcher alone
        assert ended(process).returncode == 130
    assert f"checkpoints/{before[-1]}" in (run / "logs" / "rank-0.log").read_text()
    assert checkpoints(run)[-1] > before[-1]


def test_a_run_directory_has_one_owner_at_a_time(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (recipe, *LONG, "--run", "run", "--quiet")
    with training(*arguments, run=run) as holder:
        owner = json.loads((run / "owner.json").read_text())
        assert owner["pid"] == holder.pid
        refused = command.reprise("train", *arguments, "--nproc", 2, cwd=tmp_path)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert f"in use by host {owner['host']}, pid {holder.pid}" in refused.stderr
        holder.kill()
        holder.wait(command.PATIENCE)
        # Nothing was released in order, and still the directory is free.
        assert (run / "owner.json").is_file()
        again = command.reprise("train", *arguments, "--stop-after", 2, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert checkpoints(run) == ["step-000000002"]


def test_what_is_seen_of_a_run(finished: Path, recipe: Path) -> None:
    """Plain lines where there is no terminal, nothing when quiet, a bar on a terminal."""
    folder = finished.parent
    shown = (folder / "stderr").read_text()
    assert "step 4 of 4: loss" in shown
    assert "images/s" in shown
    assert "step/s" not in shown
    assert "reprise eval run" in (folder / "stdout").read_text()
    log = (finished / "logs" / "rank-0.log").read_text()
    assert "INFO step 4 of 4: loss" in log
    for told in (shown, log):
        roles = [line.split()[0] for line in told.splitlines() if line.endswith(" 0.0005")]
        assert roles == ["shared", "gate", "norm", "rest"]

    again = command.reprise("train", "run", "--quiet", cwd=folder)
    assert again.returncode == 0
    assert "run finished at step 4" in again.stderr
    assert len(again.stderr.splitlines()) == 1

    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    os.set_blocking(screen, False)
    process = command.start("train", recipe, "--run", "seen", cwd=folder, stderr=terminal)
    os.close(terminal)
    drawn = b""

    def read() -> bool:
        nonlocal drawn
        try:
            while part := os.read(screen, 65536):
                drawn += part
        except BlockingIOError:
            return process.poll() is not None
        except OSError:  # the other end is closed
            return True
        return True

    until(read, "the training has ended")
    assert process.wait(command.PATIENCE) == 0
    process.communicate()
    os.close(screen)
    assert "4/4" in drawn.decode()
    assert "step/s" in drawn.decode() or "s/step" in drawn.decode()


def test_interrupted_before_it_trains(recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C while modules are still loading is no bug either."""
    with started("train", recipe, *LONG, "--run", "run", cwd=tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        until(lambda: "libtorch" in maps.read_text(), "torch is being loaded")
        interrupt_group(process)
        done = ended(process)
    assert done.returncode == 130
    assert "bug of Reprise" not in done.stderr


def test_an_interrupted_preparation_says_how_to_go_on(images: Path, tmp_path: Path) -> None:
    prep = ("prep", "folder", "--source", images, "--out", "set", "--quiet")
    with started(*prep, cwd=tmp_path) as process:
        # The workers, which have not started yet, take longer than to look here again.
        until((tmp_path / "set" / ".partial").is_dir, "the preparation has begun")
        interrupt_group(process)
        done = ended(process)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["interrupted; the same command goes on from here"]
    assert command.reprise(*prep, cwd=tmp_path).returncode == 0
    assert (tmp_path / "set" / "manifest.json").is_file()


LOST = """
import os, signal, sys

class Forgotten:
    def __del__(self):  # what is raised here is printed and dropped
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            Forgotten()

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_interrupt_in_a_destructor_is_not_lost(recipe: Path, tmp_path: Path, nproc: int) -> None:
    arguments = ["train", recipe, *LONG, "--run", "run", "--nproc", nproc]
    done = command.reprise(*arguments, cwd=tmp_path, first=LOST)
    assert done.returncode == 130
    assert not (tmp_path / "run").exists()
