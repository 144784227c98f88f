"""Shards that an array of jobs packs are those of one machine, whatever happens to the jobs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.cluster.conftest import LATER, PATIENCE, jobs_of, reprise, slurm, start
from tests.jobs.command import ENTRY

ARRAY = ("--workers", 3, "--time", "10m")
MISSING = Path("train/1/00031.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 40), ("test", 8)):
        for number in range(count):
            file = root / split / str(number % 2) / f"{number:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (number, 2 * number, 99)).save(file)
    return root


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "set"
    done = reprise(*words(images), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return content(out)


def words(images: Path) -> tuple[object, ...]:
    return ("prep", "folder", "--source", images, "--out", "set", "--samples-per-shard", 5)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@contextlib.contextmanager
def waiting(images: Path, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The preparation with its jobs in the queue, which have to be told to start."""
    call = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *map(str, (*words(images), *ARRAY, "--cluster", LATER))],
        cwd=folder, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(lambda: queued(folder) or call.poll() is not None)
        assert call.poll() is None, call.communicate()
        yield call
    finally:
        call.kill()


def queued(folder: Path) -> str:
    """The number of the array, once there is one."""
    file = folder / "set/.partial/jobs/queued"
    return file.read_text().split("_")[0] if file.exists() else ""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_array_packs_the_same_bytes(
    images: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    done = reprise(*words(images), *ARRAY, "--cluster", "lab", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "packs 10 shards" in done.stdout + done.stderr
    assert content(tmp_path / "set") == expected


def test_a_member_that_fails_is_named_and_the_same_command_goes_on(
    images: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    aside, folder = tmp_path / "aside", (images / MISSING).parent
    times = folder.stat()
    with waiting(images, tmp_path) as call:
        (images / MISSING).rename(aside)
        start(queued(tmp_path))
        call.wait(PATIENCE)
    assert call.stderr is not None
    said = call.stderr.read()
    assert call.returncode == 2, said
    assert "ended as FAILED (error: cannot read" in said
    assert f"{MISSING}" in said
    assert "of 10 shards are not packed" in said
    assert len(list(tmp_path.glob("set/.partial/records/*.json"))) >= 4  # the other members'
    aside.rename(images / MISSING)
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))  # or the source were another
    done = reprise(*words(images), *ARRAY, "--cluster", "lab", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "set") == expected


@pytest.mark.alone
def test_a_preempted_member_is_queued_again(
    images: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """One waits for the bytes of an image until a job of higher priority takes its node."""
    aside, folder = tmp_path / "aside", (images / MISSING).parent
    times = folder.stat()
    with waiting(images, tmp_path) as call:
        (images / MISSING).rename(aside)
        os.mkfifo(images / MISSING)
        try:
            start(queued(tmp_path))
            until(lambda: len(list(tmp_path.glob("set/.partial/records/*.json"))) >= 6)
            until(lambda: len(jobs_of(tmp_path)) == 1)
            (member,) = jobs_of(tmp_path)
            slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive",
                  "--output=/dev/null", "--wrap", "sleep 2")  # fmt: skip
            until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", member))
        finally:
            aside.replace(images / MISSING)
            os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
        call.wait(PATIENCE)
    assert call.stderr is not None
    assert call.returncode == 0, call.stderr.read()
    assert content(tmp_path / "set") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whoever_waits_is_ended(
    images: Path, expected: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C cancels the jobs; after `kill -9` the next call does."""
    with waiting(images, tmp_path) as call:
        array = queued(tmp_path)
        call.send_signal(number)
        call.wait(PATIENCE)
        if number == signal.SIGINT:
            assert call.returncode == 130
            until(lambda: not jobs_of(tmp_path))
    done = reprise(*words(images), *ARRAY, "--cluster", "lab", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "set") == expected
    states = slurm("sacct", "-nXP", "-o", "State", "-j", array)
    if number == signal.SIGINT:
        assert {line.split()[0] for line in states.splitlines()} == {"CANCELLED"}


def test_what_a_cluster_cannot_do_is_refused(images: Path, tmp_path: Path) -> None:
    for extra, cure in (
        (("--cluster", "lab"), "give --workers too"),
        (("--cluster", "lab", "--workers", 5000), "an array has at most"),
        (("--cluster", "local", "--workers", 2), "needs a scheduler"),
        (("--cluster", "lab", "--workers", 2, "--time", "long"), "give such as 90m"),
        (("--cluster", "lab", "--workers", 2, "--estimate"), "exclude each other"),
    ):
        done = reprise(*words(images), *extra, cwd=tmp_path)
        assert done.returncode == 2
        assert cure in done.stderr
        assert not (tmp_path / "set").exists()
