"""File systems without locks: refused in words, as a lock that outlives its holder is none."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from data_prep.files import Lock
from jobs import doctor, runs, submit
from jobs.clusters import Profile
from pipeline import configure
from pipeline.run_directory import RunDirectory
from tests.conftest import ROOT
from tests.jobs.command import PATIENCE


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as Lustre mounted without flock, or NFS without its lock service."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


WORDS = r"has no locks .*\): have it mounted with them \(Lustre: -o flock"


@pytest.mark.usefixtures("without")
def test_a_run_is_refused_where_nothing_would_give_it_back(recipe: Path, tmp_path: Path) -> None:
    """And nothing is left that would look like an owner."""
    config, run = configure.read(recipe), RunDirectory(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match=WORDS) as refused:
            run.claim(config)
        assert str(run.path) in str(refused.value)
        assert list(run.path.iterdir()) == []
    with pytest.raises(ValueError, match=WORDS), submit.alone(tmp_path / "other"):
        pass
    assert not list(tmp_path.glob(".*.lock"))
    run.config_file.write_text(config.to_yaml())
    assert [row.state for row in runs.table(tmp_path)] == ["not started"]


@pytest.mark.usefixtures("without")
def test_doctor_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (found,) = [one for one in doctor.examine(None, None, 1) if one.what == "locks"]
    assert "Lustre: -o flock" in str(found.cure)


def test_where_doctor_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the runs would be, if that is a folder that the nodes see."""
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    for profile, folder in ((None, tmp_path), (Profile(name="x", shared=shared), shared)):
        (found,) = doctor._locks(profile)
        assert found.cure is None
        assert found.found.startswith(f"{folder} has them")
    assert list(shared.iterdir()) == []


def test_a_lock_that_is_held_is_another_matter(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock"), pytest.raises(Timeout):
        Lock(tmp_path / "lock", timeout=0).acquire()
    Lock(tmp_path / "lock", timeout=0).acquire()


RANK = """
import fcntl, os, sys
from jobs import reach
if os.environ["RANK"] in sys.argv[2:]:
    fcntl.flock = lambda *_: None
sys.argv = ["reach", sys.argv[1]]
sys.exit(reach.main())
"""


@pytest.mark.parametrize("alone", [(), ("1",)])
def test_nodes_whose_locks_are_their_own_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: tuple[str, ...]
) -> None:
    """Such as those of Lustre's localflock, which each node keeps to itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path, *alone], cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for rank in range(2)
    ]  # fmt: skip
    (out, err), _ = said = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert {rank.returncode for rank in ranks} == {2 if alone else 0}, said
    if alone:
        assert f"error: {tmp_path}: a node takes a lock that another one holds" in err
        assert "Lustre: -o flock, not localflock" in err
    else:
        assert "2 ranks on" in out
    assert not list(tmp_path.glob("*lock*"))
