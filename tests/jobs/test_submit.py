"""Submission without a cluster: what is asked of SLURM, what is refused before, and the end."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import clusters, doctor, endings, runs, scheduler, submit, supervise, sweep
from jobs.clusters import Profile
from jobs.endings import Ending
from jobs.errors import Exit
from jobs.record import SAME_STOP, Job
from jobs.submit import Request
from jobs.tasks import Train
from pipeline import configure
from pipeline.config import Config, ConfigError
from pipeline.run_directory import RunDirectory
from pipeline.tracking import Tracker, replay
from tests.conftest import ROOT
from tests.jobs.command import PATIENCE, assert_untouched, start

GOLDEN = ROOT / "tests" / "golden" / "two_nodes.sbatch"
EXAMPLE = clusters._read(ROOT / "slurm" / "clusters" / "example.yaml")
JOB = Job("lab", "7", 2, 1, 10, "here")


@pytest.fixture
def tiny(recipe: Path) -> Config:
    return configure.read(recipe)


def test_the_batch_script(tmp_path: Path) -> None:
    """One task for each GPU; the ranks end with one that is lost; the supervisor comes last."""
    request = Request(EXAMPLE, nodes=2, gpus_per_node=8, minutes=24 * 60)
    text = submit.sbatch_text(request, [tmp_path / "run"], tmp_path / "run")
    text = text.replace(str(tmp_path.resolve()), "FOLDER")
    text = text.replace(shlex.quote(sys.executable), "PYTHON")
    assert text == GOLDEN.read_text()


REFUSED = {
    "nodes of one machine": (Profile(name="local"), 2, 1, 10, {}, "--cluster with a cluster's"),
    "more GPUs than there are": (Profile(name="x", gpus_per_node=4), 1, 8, 10, {}, "of x has 4"),
    "time": (Profile(name="x", gpus_per_node=1), 1, 1, 3, {}, "--time 4m or more"),
    "batch": (Profile(name="x", gpus_per_node=3), 1, 3, 10, {}, "3"),
    "not shared": (
        Profile(name="x", gpus_per_node=1, shared=Path("/shared")), 1, 1, 10, {},
        "is not below /shared",
    ),
    "shards": (Profile(name="x", gpus_per_node=1), 1, 1, 10, {"data.path": "lost"}, "lost"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_found_before_anything_is_made(
    tiny: Config, tmp_path: Path, case: str
) -> None:
    profile, nodes, gpus, minutes, changes, words = REFUSED[case]
    values = tiny.model_dump(mode="json")
    config = configure.build(values, [f"{key}={text}" for key, text in changes.items()])
    with pytest.raises((ValueError, OSError), match=words):
        submit.submit(config, tmp_path / "run", Request(profile, nodes, gpus, minutes))
    assert_untouched(tmp_path)


def test_a_full_disk_and_a_swapped_index_are_found_too(
    tiny: Config, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(Profile(name="x", gpus_per_node=1), 1, 1, 10)
    copy = tmp_path / "set"
    shutil.copytree(shards, copy)
    (copy / "train-000000.idx").write_bytes((copy / "train-000001.idx").read_bytes())
    broken = configure.build(tiny.model_dump(mode="json"), [f"data.path={copy}"])
    with pytest.raises(ValueError, match=r"train-000000\.idx is the index of train-000001"):
        submit.check(broken, tmp_path / "run", request)
    monkeypatch.setattr(submit, "CHECKPOINT_BYTES", 10**12)
    with pytest.raises(ConfigError, match=r"checkpoints need about .* GB: free disk space"):
        submit.check_all({tmp_path / "run": tiny}, request)


def test_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = clusters.own_folder() / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("partition: long\ngpus_per_node: 4\n")
    assert clusters.load("mine").partition == "long"
    own.write_text("partion: long\n")
    with pytest.raises(ConfigError, match="unknown key 'partion': did you mean 'partition'"):
        clusters.load("mine")
    with pytest.raises(ConfigError, match="did you mean 'example'"):
        clusters.load("exampel")
    assert clusters.minutes("24h") == 24 * 60
    with pytest.raises(ConfigError, match="90m, 24h or 2d"):
        clusters.minutes("1:00")


@pytest.mark.parametrize(
    ("status", "again", "stopped"),
    [
        (0, False, None),
        (Exit.INTERRUPTED, True, None),
        (128 + 10, True, None),
        (128 + 9, True, None),
        (Exit.RANK_LOST, True, None),
        (Exit.FILES_AWAY, True, None),
        (Exit.NON_FINITE, False, "status 4: the loss is not finite"),
        (Exit.USER_ERROR, False, "status 2: "),
    ],
)
def test_which_job_is_queued_again(
    tmp_path: Path, status: int, again: bool, stopped: str | None
) -> None:
    JOB.save(tmp_path)
    assert supervise.supervise(int(status), tmp_path) == again
    job = Job.load(tmp_path)
    assert job is not None
    assert (job.stopped or "").startswith(stopped or "")
    assert (job.stopped is None) == (stopped is None)


STATUSES = {
    "a rank ended by srun has the highest": (
        137, {1: (2, "shards are cut")}, 2,
        "status 2: the configuration, its data or the disk must be mended (rank 1: shards are cut)",
    ),
    "before it listened": (
        143, {1: (2, "x")}, 2, "status 2: the configuration, its data or the disk must be mended"
    ),
    "the cause, not what follows": (
        137, {0: (75, "lost"), 1: (4, "nan")}, 4, "status 4: the loss is not finite (rank 1: nan)"
    ),
    "a bug beside one that was not there yet": (143, {1: (70, "KeyError: 1")}, 70, None),
    "a bug, and one that lost it": (137, {0: (75, "lost"), 1: (70, "KeyError: 1")}, 70, None),
    "killed": (137, {0: (75, "lost")}, 137, None),
    "lost, and the other one told to end": (143, {0: (75, "lost")}, 75, None),
    "neither began": (1, {}, 1, None),
}  # fmt: skip


def left(ends: dict[int, tuple[int, str]]) -> dict[int, Ending]:
    return {rank: Ending("7.0", rank, status, said) for rank, (status, said) in ends.items()}


@pytest.mark.parametrize("case", STATUSES)
def test_what_one_rank_left_goes_before_the_highest_status(tmp_path: Path, case: str) -> None:
    status, ends, recorded, stopped = STATUSES[case]
    JOB.save(tmp_path)
    assert supervise.supervise(status, tmp_path, left(ends)) == (stopped is None)
    job = Job.load(tmp_path)
    assert job is not None
    assert [failure.status for failure in job.failures] == [recorded] * (stopped is None)
    assert job.stops == ()
    assert (job.stopped or "").startswith(stopped or "")


def test_a_job_is_given_up_only_where_nothing_moves(tmp_path: Path) -> None:
    JOB.save(tmp_path)
    steps = [0, 0, 5, 5, 5]
    for number, step in enumerate(steps):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True, exist_ok=True)
        again = supervise.supervise(137, tmp_path, left({0: (75, "lost")}))
        assert again == (number < len(steps) - 1)
    job = Job.load(tmp_path)
    assert job is not None
    assert job.stopped == "failed 3 times at step 5, last with status 137 (rank 1 left no word)"


@pytest.mark.parametrize("status", [Exit.INTERRUPTED, 128 + 15])
def test_a_job_that_is_always_stopped_before_a_step_is_given_up(
    tmp_path: Path, status: int
) -> None:
    """Later than one that fails: another job's preemption is not its fault."""
    JOB.save(tmp_path)
    steps = [0] * (SAME_STOP - 1) + list(range(1, 9)) + [8] * (SAME_STOP - 1)
    for number, step in enumerate(steps):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True, exist_ok=True)
        again = supervise.supervise(int(status), tmp_path)
        assert again == (number < len(steps) - 1)
    job = Job.load(tmp_path)
    assert job is not None
    assert job.failures == ()
    assert job.stops == (8,) * SAME_STOP
    assert "stopped 5 times at step 8 before a new checkpoint: see `reprise logs`" in str(
        job.stopped
    )


def test_a_rank_leaves_how_it_ended_for_this_start(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing where no scheduler started it, or beside files that are no run's."""
    run, started = tmp_path / "run", {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}
    task = Train(configure.read(recipe), run, quiet=True)
    monkeypatch.setattr(Train, "_train", fails)
    assert task() == Exit.USER_ERROR
    assert not run.exists()
    RunDirectory(run).claim(task.config)
    RunDirectory(run).release()
    assert task() == Exit.USER_ERROR
    assert not list(run.glob("logs/*"))
    for name, text in started.items():
        monkeypatch.setenv(name, text)
    assert task() == Exit.USER_ERROR
    assert endings.read(run, "7.0") == {1: Ending("7.0", 1, 2, "shards are cut: prepare again")}
    assert endings.read(run, "7.1") == {}
    assert endings.read(run, "8.0") == {}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(Train, "_train", lambda *_: {}[5])
    assert task() == Exit.BUG
    assert endings.read(run, "7.1") == {1: Ending("7.1", 1, 70, "KeyError: 5")}
    assert endings.read(run, "7.0") == {}
    (run / "logs" / "rank-0.end.json").write_text("{")
    assert list(endings.read(run, "7.1")) == [1]


def fails(*_: object) -> int:
    raise OSError("shards are cut:\n prepare again")


def test_the_last_line_of_a_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks what the ranks of this start have left, and not those of the one before."""
    JOB.save(tmp_path)
    asked: list[tuple[str, ...]] = []

    def insist(*words: str) -> str:
        asked.append(words)
        return "RUNNING\n"

    monkeypatch.setattr(scheduler, "insist", insist)
    monkeypatch.setattr(supervise, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", JOB.id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "logs").mkdir()
    endings.save(tmp_path, Ending("7.0", 1, 2, "of the start before"))
    assert supervise.main(137, [str(tmp_path)]) == 137
    assert asked.pop() == ("scontrol", "requeue", "7")
    endings.save(tmp_path, Ending("7.1", 0, 2, "no shards"))
    assert supervise.main(137, [str(tmp_path)]) == 137
    assert asked.pop()[0] == "squeue"
    job = Job.load(tmp_path)
    assert job is not None
    assert str(job.stopped).endswith("must be mended (rank 0: no shards)")


def test_the_members_of_a_sweep() -> None:
    found = sweep.expand(["model=a,b", "seed=0,1", "schedule.milestones=[1,2]"])
    assert list(found) == ["model=a,seed=0", "model=a,seed=1", "model=b,seed=0", "model=b,seed=1"]
    assert found["model=b,seed=1"] == ["schedule.milestones=[1,2]", "model=b", "seed=1"]
    with pytest.raises(ConfigError, match="several values"):
        sweep.expand(["seed=0"])


def test_members_have_a_folder_each() -> None:
    with pytest.raises(ConfigError) as refused:
        sweep.expand(["init_from.path=/a/b,-a-b", "seed=0,1"])
    for part in ("init_from.path=/a/b,seed=0 and init_from.path=-a-b,seed=0", "one folder"):
        assert part in str(refused.value)
    with pytest.raises(ConfigError, match="seed=1 is given twice: leave one of them away"):
        sweep.expand(["seed=0,1,1"])
    longest = submit.NAME_BYTES - len("data.path=,seed=0")
    assert len(sweep.expand([f"data.path={'é' * (longest // 2)}", "seed=0,1"])) == 2
    paths = ",".join(name + "é" * (longest // 2) for name in ("aa", "bb"))
    with pytest.raises(ConfigError, match=r"a name of \d+ bytes, .* 242: give shorter values"):
        sweep.expand([f"data.path={paths}", "seed=0,1"])


def test_a_disk_holds_the_checkpoints_of_all_members(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Path
) -> None:
    """And not only those of each."""
    parameters = submit.check(tiny, tmp_path / "run", CLUSTER).cost.parameters
    needed = (tiny.checkpoints.keep_last + 2) * submit.CHECKPOINT_BYTES * parameters
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = tmp_path / "sweep"
    wanted = {folder / f"seed={seed}": tiny for seed in range(3)}
    submit.check_all(dict(list(wanted.items())[:2]), CLUSTER)
    with pytest.raises(ConfigError, match=r"12 checkpoints of 3 runs need about .* GB: free disk"):
        sweep.start(wanted, folder, CLUSTER, None)
    assert not folder.exists()


def test_states_are_asked_of_the_queue_and_then_of_the_accounting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {
        "squeue": "7_1|PENDING||1:00|Priority\n8|RUNNING|node1|0:30|None\n",
        "sacct": "9|CANCELLED by 0|node2\n9_1|FAILED|node1\n",
    }
    monkeypatch.setattr(scheduler, "ask", lambda *words: answers[words[0]])
    monkeypatch.setattr(scheduler.shutil, "which", lambda name: name)
    found = scheduler.states(["7_1", "8", "9", "10"])
    assert found["7_1"].alive
    assert found["7_1"].reason == "Priority"
    assert found["8"].nodes == "node1"
    assert found["9"].name == "CANCELLED"
    assert found.keys() == {"7_1", "8", "9"}


RECORDS = {
    "empty": ("", "Expecting value"),
    "cut": ('{"cluster": "lab", "id"', "Expecting"),
    "of nothing": ("{}", "'cluster'"),
    "no table": ("[]", "cannot be read"),
    "a newer field": (json.dumps(dataclasses.asdict(JOB) | {"mood": "good"}), "'mood'"),
    "another kind": (json.dumps(dataclasses.asdict(JOB) | {"failures": [{"at": 1}]}), "'at'"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_one_record_that_cannot_be_read_hides_no_other_run(
    tiny: Config, tmp_path: Path, case: str
) -> None:
    text, words = RECORDS[case]
    for name in ("bad", "good"):
        run = RunDirectory(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.config_file.write_text(tiny.to_yaml())
    file = tmp_path / "runs" / "bad" / "job.json"
    file.write_text(text)
    bad, good = runs.table(tmp_path / "runs")
    assert bad.state.startswith("unreadable: job.json")
    assert good.state == "not started"
    with pytest.raises(ConfigError) as refused:
        Job.load(file.parent)
    for part in (str(file), words, "see `squeue --me`", "move the file away"):
        assert part in str(refused.value)


def test_a_job_is_queued_again_without_its_record_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be counted there SLURM counts; what no start can mend is not tried again."""
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    asked: list[str] = []
    monkeypatch.setattr(scheduler, "insist", lambda *words: asked.append(words[0]) or "RUNNING")
    monkeypatch.setattr(supervise, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", JOB.id)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    for restarts, again in ((None, True), ("4", True), ("5", False)):
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        asked.clear()
        assert supervise.main(130, [str(tmp_path)]) == 130
        assert ("scontrol" in asked) == again
        assert "job.json cannot be read" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    asked.clear()
    endings.save(tmp_path, Ending("7.0", 1, 2, "no shards"))
    assert supervise.main(137, [str(tmp_path)]) == 137
    assert asked == ["squeue"]
    assert "rank 1: no shards" in capsys.readouterr().out


@pytest.mark.parametrize(("restarts", "again"), [("1", True), ("5", False)])
def test_a_job_whose_record_cannot_be_written_is_queued_again_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restarts: str,
    again: bool,
) -> None:
    JOB.save(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Job, "save", full)
    assert supervise.supervise(130, tmp_path) == again
    assert "No space left on device" in capsys.readouterr().out


def test_a_consolidated_network_is_no_run_of_its_own(tiny: Config, tmp_path: Path) -> None:
    own = RunDirectory(tmp_path / "runs" / "relaxed")
    for directory in (own, own.consolidated):
        directory.path.mkdir(parents=True)
        directory.config_file.write_text(tiny.to_yaml())
    own.consolidated.consolidation.write_text("{}")
    assert [row.run for row in runs.table(tmp_path / "runs")] == [own.path]


def test_a_local_job_that_ended_before_it_trained_has_failed(tiny: Config, tmp_path: Path) -> None:
    own = RunDirectory(tmp_path / "runs" / "one")
    own.path.mkdir(parents=True)
    own.config_file.write_text(tiny.to_yaml())
    (row,) = runs.table(tmp_path / "runs")
    assert row.state == "not started"
    with subprocess.Popen(["true"]) as ended:
        pass
    Job("local", str(ended.pid), 1, 0, 10, socket.gethostname()).save(own.path)
    (row,) = runs.table(tmp_path / "runs")
    assert row.state == "failed at its start"


def command(*words: object, cwd: Path) -> tuple[int, str, str]:
    """Status and output of `reprise`, which may leave a job behind in the background."""
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=4 * PATIENCE)
    return process.returncode, out, err


def test_the_same_command_without_slurm(recipe: Path, tmp_path: Path) -> None:
    """Two ranks in the background of this machine; a second submission meets the first."""
    words = ("submit", recipe, "--cluster", "local", "--gpus-per-node", 2, "--run", "runs/a")
    status, out, err = command(*words, cwd=tmp_path)
    assert status == 0, err
    run = tmp_path / "runs" / "a"
    job = Job.load(run)
    assert job is not None
    assert f"job {job.id} on local" in out
    try:
        status, _, err = command(*words, cwd=tmp_path)
        assert status == 2
        assert f"has job {job.id} on local already" in err
        deadline = time.monotonic() + 4 * PATIENCE
        while submit.is_alive(job) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for process in submit.controllers(job):
            process.kill()
    assert runs.progress(run).status == "FINISHED"
    assert len(list(run.glob("checkpoints/step-*/rank-*"))) == 2
    assert (run / "logs" / "rank-1.log").is_file()
    assert "finished" in command("runs", cwd=tmp_path)[1]


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a command of SLURM say one line at each call, the last one ever after.

    A line for an error begins with an exclamation mark.
    """
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(scheduler, "AGAIN_SECONDS", 0.01)

    def say(command: str, *lines: str) -> None:
        (tmp_path / f"{command}.lines").write_text("\n".join(lines) + "\n")
        script = tmp_path / command
        script.write_text(
            f'#!/bin/sh\ncd "{tmp_path}"; lines={command}.lines; line=$(head -n 1 $lines)\n'
            "[ $(wc -l < $lines) = 1 ] || sed -i 1d $lines\n"
            'case $line in !*) echo "${line#!}" >&2; exit 1;; *) echo "$line";; esac\n'
        )
        script.chmod(0o755)

    return say


# As SLURM 22.05 says it: without a controller, and with one that is stopped.
SILENT = (
    "!slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "!slurm_load_jobs error: Socket timed out on send/recv operation",
)


def test_a_controller_that_is_away_is_asked_again(controller: Callable[..., None]) -> None:
    controller("squeue", *SILENT, "RUNNING")
    assert scheduler.insist("squeue") == "RUNNING\n"
    controller("squeue", *SILENT, "!slurm_load_jobs error: Invalid job id specified")
    with pytest.raises(ValueError, match="Invalid job id") as refused:
        scheduler.insist("squeue")
    assert not isinstance(refused.value, scheduler.Unreachable)


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (130, 9, True), (137, 2, True), (143, 2, True), (143, 3, False)],
)
def test_the_script_for_those_without_submitit_is_as_patient(
    tmp_path: Path,
    controller: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    restarts: int,
    again: bool,
) -> None:
    controller("squeue", *SILENT, "RUNNING")
    others = {"srun": f"exit {status}", "sleep": "", "scontrol": f'echo "$@" >> "{tmp_path}/asked"'}
    for name, text in others.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    done = subprocess.run(["bash", ROOT / "slurm" / "train.sbatch", "recipe"], check=False)
    assert done.returncode == status
    assert (tmp_path / "asked").exists() == again
    if again:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_controller_that_stays_away_is_given_up(
    controller: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "INSIST_SECONDS", 0.1)
    controller("squeue", SILENT[0])
    with pytest.raises(scheduler.Unreachable, match="Unable to contact"):
        scheduler.insist("squeue")


def test_a_site_without_accounting(
    tiny: Config,
    tmp_path: Path,
    controller: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What became of a job that has left the queue is unknown there, and no reason to break."""
    run = RunDirectory(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    run.config_file.write_text(tiny.to_yaml())
    JOB.save(run.path)
    controller("squeue", "9|RUNNING|node1|0:30|None")
    # As SLURM 22.05 says it.
    controller("sacct", "!Slurm accounting storage is disabled")
    assert list(scheduler.states([JOB.id, "9"])) == ["9"]
    assert [row.state for row in runs.table(tmp_path / "runs")] == ["not started"]
    submit.refuse_second(run.path)
    with pytest.raises(ConfigError, match="has no job that is queued or running"):
        runs.cancel(run.path)
    controller("sacct", "!sacct: error: Invalid user id: x")
    with pytest.raises(ValueError, match=r"sacct refuses: .* Invalid user"):
        scheduler.states([JOB.id])
    monkeypatch.setattr(scheduler.shutil, "which", lambda name: None if name == "sacct" else name)
    assert list(scheduler.states([JOB.id, "9"])) == ["9"]


@pytest.fixture
def full(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scheduler that finds nothing wrong with a job, and refuses it when it is to be queued.

    The folder has a file with what the working folder's runs knew of MLflow at that moment.
    """
    folder = tmp_path_factory.mktemp("slurm")
    scripts = {
        "sbatch": 'case "$*" in *--test-only*) exit 0;; esac\n'
        f'find . -name tracking.json -exec cat {{}} + > "{folder}/known"\n'
        'echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1',
        "scontrol": "echo MaxArraySize = 1000",
        "srun": "exit 1",
        "squeue": "",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tracked(store: Path) -> list[tuple[str, str]]:
    """Name and status of the runs that MLflow shows."""
    with contextlib.closing(sqlite3.connect(store)) as rows:
        shown = "select name, status from runs where lifecycle_stage = 'active'"
        return sorted(rows.execute(shown).fetchall())


CLUSTER = Request(Profile(name="x", gpus_per_node=1), 1, 1, 10)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_a_job_that_the_queue_refuses_leaves_nothing(
    tiny: Config,
    tmp_path: Path,
    full: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: int,
    earlier: bool,
) -> None:
    """Also in a folder in which there was something before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if earlier:
        (tmp_path / "sweep").mkdir()
        (tmp_path / "sweep" / "notes").touch()
    before = sorted(tmp_path.rglob("*"))
    wanted = {tmp_path / "sweep" / f"seed={seed}": tiny for seed in range(members)}

    def ask() -> object:
        if members == 1:
            return submit.submit(tiny, *wanted, CLUSTER)
        return sweep.start(wanted, tmp_path / "sweep", CLUSTER, None)

    with pytest.raises(ValueError, match=r"sbatch refuses: .*QOSMaxSubmitJobPerUserLimit"):
        ask()
    known = re.findall(r'"run_id": "\w+"', (full / "known").read_text())
    assert len(known) == members + (members > 1)  # the jobs would have found their MLflow runs
    left = set(tmp_path.rglob("*")) - set(before)
    assert left <= {tmp_path / "sweep"}  # empty
    assert tracked(tmp_path / "mlflow.db") == []


def test_a_run_that_is_refused_when_resumed_is_as_it_was(
    tiny: Config, tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    directory = RunDirectory(run)
    directory.claim(tiny)
    directory.release()
    Tracker(run, run_name="run", experiment=tiny.experiment).close("KILLED")
    assert replay(run)
    with pytest.raises(ValueError, match="sbatch refuses"):
        submit.submit(tiny, run, CLUSTER)
    assert tracked(tmp_path / "mlflow.db") == [("run", "KILLED")]
    assert not (tmp_path / ".run.submit.lock").exists()


def test_nodes_that_do_not_find_each_other_are_one_line(
    tmp_path: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank says the same, and srun beside them how they ended."""
    step = {"SLURM_STEP_NODELIST": "no-such-host-[3-4]", "SLURM_STEP_NUM_NODES": "2",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}  # fmt: skip
    kept = {name: text for name, text in os.environ.items() if name not in scheduler.LAUNCHERS}
    rank = subprocess.run(
        [sys.executable, "-m", "jobs.reach", tmp_path], cwd=ROOT, env=kept | step,
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert rank.returncode == Exit.USER_ERROR
    assert rank.stdout == ""
    (line,) = rank.stderr.splitlines()
    assert line.startswith("error: no-such-host-3, the first node of this job step, has no address")
    (tmp_path / "said").write_text(
        f"{line}\nsrun: error: node2: task 1: Exited with exit code 2\n{line}\n"
    )
    (full / "srun").write_text(f'#!/bin/sh\ncat "{tmp_path}/said" >&2\nexit 2\n')
    (found,) = doctor._reach(CLUSTER.profile)
    cure = line.removeprefix("error: ")
    assert str(found) == f"bad  two nodes: not all right: {cure}"
    (tmp_path / "said").write_text("srun: error: Unable to allocate resources: no such account\n")
    with pytest.raises(ValueError, match=r"srun refuses: .* no such account"):
        list(doctor._reach(CLUSTER.profile))


def test_a_machine_without_a_scheduler_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no squeue on this machine"):
        scheduler.ask("squeue")
