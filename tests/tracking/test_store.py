"""From the journal into a real sqlite store, with the sender's real process."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from stores import Store, assert_steps_once, free_port, log_has, senders, wait_for

from pipeline.tracking import Tracker, announcer, history, replay
from pipeline.tracking.journal import Identity, Journal
from pipeline.tracking.outlet import Outlet
from pipeline.tracking.sender import DRAINED, LEFT, Sender

CONNECTED = "sending to run"
CORES = len(os.sched_getaffinity(0))
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def priority(thread):
    return os.getpriority(os.PRIO_PROCESS, thread)


def carry(run_dir):
    """Sends what the journal holds, in this process: where the process is not what is tested."""
    return Sender(run_dir, os.getppid(), follow=False).run()


def python(code, *arguments):
    """Runs code in a process of its own, which may die in it."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_new_store_holds_all_that_a_run_told(run_dir, tracker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()  # its presence makes MLflow choose another store by itself
    one = tracker()
    one.start()
    one.params({"lr": 0.1, "model.name": "dr_resnet16"})
    one.tags({"data": "digits"})
    values = [0.5, math.nan, math.inf]
    for step, value in enumerate(values):
        one.metrics({"loss/total": value}, step)
    (run_dir / "weights.bin").write_bytes(bytes(range(256)))
    one.artifact(run_dir / "weights.bin", "weights")
    wait_for(lambda: log_has(run_dir, CONNECTED))
    (sender,) = senders(run_dir)
    wait_for(lambda: {priority(thread.id) for thread in sender.threads()} == {19})
    # Linux may share the cores between sessions first: in one of its own, the lowest priority would
    # get as much as the training.
    assert os.getsid(sender.pid) == os.getsid(0)
    assert os.getpgid(sender.pid) != os.getpgid(0)  # which a terminal's Ctrl-C goes to
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        sender.send_signal(name)  # a terminal's and a scheduler's signals must not end it
    (run_dir / "weights.bin").write_bytes(b"better")
    one.artifact(run_dir / "weights.bin", "weights")
    assert one.finish("FINISHED", 60)

    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = store.runs()
    assert run.info.run_id == one.run_id == one.state_dict()["mlflow_run_id"]
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {"lr": "0.1", "model.name": "dr_resnet16"}
    assert run.data.tags["data"] == "digits"
    points = [value for _, value in store.points(run.info.run_id, "loss/total")]
    assert points[0] == 0.5
    assert math.isnan(points[1])
    assert points[2] > 1e300
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert "system/cpu_utilization_percentage" in history(run_dir)
    got = store.client.download_artifacts(run.info.run_id, "weights/weights.bin", str(tmp_path))
    assert Path(got).read_bytes() == b"better"
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert list((tmp_path / "mlruns").iterdir()) == []


TRAIN = """
    import os, pathlib, sys, time
    from pipeline.tracking import Tracker
    from pipeline.tracking.journal import Sent
    run = pathlib.Path(sys.argv[1])
    tracker = Tracker(run, run_name="first", experiment="digits")
    tracker.start()
    tracker.params({"lr": 0.1})
    for step in range(10):
        tracker.metrics({"loss": float(step)}, step)
    if os.fork() == 0:  # a reader's worker, which holds a copy of the pipe to the sender
        until = time.monotonic() + 60
        while not Sent.load(run).closed and time.monotonic() < until:
            time.sleep(0.1)
        os._exit(0)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_goes_on_as_the_same_run_without_repeating_points(store, run_dir, tracker):
    command = [sys.executable, "-c", textwrap.dedent(TRAIN), str(run_dir)]
    # Not through a pipe: the worker would keep it open.
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    wait_for(lambda: not senders(run_dir))
    (killed,) = store.runs()
    assert killed.info.status == "KILLED"
    assert_steps_once(store, killed.info.run_id, "loss", range(10))

    again = tracker()
    again.start()
    again.params({"lr": 0.1})
    for step in range(5, 15):
        again.metrics({"loss": -1.0}, step)
    wait_for(lambda: store.runs()[0].info.status == "RUNNING")
    assert again.finish("FINISHED", 60)
    (run,) = store.runs()
    assert run.info.run_id == killed.info.run_id
    assert run.info.status == "FINISHED"
    expected = [(s, float(s)) for s in range(10)] + [(s, -1.0) for s in range(10, 15)]
    assert store.points(run.info.run_id, "loss") == expected


CRASH = """
    import os, pathlib, sys
    from pipeline.tracking import journal, sender
    whole = getattr(journal, sys.argv[2]).save
    def save(self, run_dir):
        if sys.argv[2] == "Sent" and not any(self.offsets.values()):
            return whole(self, run_dir)
        os._exit(9)
    getattr(journal, sys.argv[2]).save = save
    sender.main("drain", os.getppid(), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("unsaved", ["Sent", "Identity"])
def test_a_sender_that_dies_before_it_notes_what_it_did_does_nothing_twice(
    store, run_dir, tracker, unsaved
):
    one = tracker()
    for step in range(5):
        one.metrics({"loss": float(step), "broken": math.nan}, step)
    assert python(CRASH, run_dir, unsaved).returncode == 9
    (crashed,) = store.runs()
    points = store.points(crashed.info.run_id, "loss")
    assert len(points) == (5 if unsaved == "Sent" else 0)
    assert carry(run_dir) == DRAINED
    (run,) = store.runs()
    assert run.info.run_id == crashed.info.run_id
    assert run.info.status == "KILLED"
    assert_steps_once(store, run.info.run_id, "loss", range(5))
    assert_steps_once(store, run.info.run_id, "broken", range(5))


def test_a_locked_database_loses_nothing(store, run_dir, tracker, tmp_path):
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    one = tracker()
    one.start()
    for step in range(20):
        one.metrics({"loss": 1.0}, step)
    wait_for(lambda: log_has(run_dir, "cannot be sent now"))
    lock.execute("COMMIT")
    assert one.finish("FINISHED", 60)
    (run,) = store.runs()
    assert_steps_once(store, run.info.run_id, "loss", range(20))
    assert run.info.status == "FINISHED"


def test_what_mlflow_refuses_is_named_and_the_rest_arrives(store, run_dir, tracker, caplog):
    one = tracker()
    one.metrics({"good": 1.0, "bad!": 2.0, "better": 3.0}, 0)
    one.params({"fine": 1, "w?rse": 2})
    one.metrics({f"cell{i}": float(i) for i in range(1100)}, 1)
    (run_dir / "b.txt").write_text("b")
    one.artifact(run_dir / "b.txt")
    (run_dir / "b.txt").unlink()
    assert not one.finish("FAILED", 0.0)
    assert carry(run_dir) == DRAINED
    (run,) = store.runs()
    assert run.info.status == "FAILED"
    assert {"good", "better", "cell0", "cell1099"} <= run.data.metrics.keys()
    assert run.data.params == {"fine": "1"}
    assert "MLflow refuses metrics bad!" in caplog.text
    assert "MLflow refuses params w?rse" in caplog.text
    assert f"file {run_dir / 'b.txt'} is not sent" in caplog.text
    assert not list(store.client.list_artifacts(run.info.run_id))


def test_a_deleted_run_is_not_waited_for_and_its_journal_is_kept(store, run_dir, tracker, caplog):
    one = tracker()
    one.metrics({"loss": 1.0}, 0)
    assert carry(run_dir) == DRAINED
    store.client.delete_run(one.run_id)
    again = tracker()
    again.metrics({"loss": 1.0}, 1)
    assert carry(run_dir) == LEFT
    assert "cannot be sent now and is kept" in caplog.text
    store.client.restore_run(one.run_id)
    assert carry(run_dir) == DRAINED
    assert_steps_once(store, one.run_id, "loss", range(2))


def test_a_store_without_the_run_gets_all_of_it(store, run_dir, tracker, database, tmp_path):
    one = tracker()
    one.metrics({"loss": 1.0}, 0)
    assert carry(run_dir) == DRAINED
    for name in ("other.db", "mlflow.db"):  # moved to another store, and that one then lost
        (tmp_path / name).write_bytes(database.read_bytes())
        address = f"sqlite:///{tmp_path / name}"
        again = tracker(uri=address)
        again.metrics({"loss": 1.0}, 1)
        assert carry(run_dir) == DRAINED
        (run,) = Store(address).runs()
        assert run.info.run_id == again.run_id
        assert_steps_once(Store(address), again.run_id, "loss", range(2))


def test_twice_created_becomes_one(store, run_dir, tracker):
    one = tracker()
    experiment = store.client.create_experiment("digits")
    for name in ("late", "later"):
        tags = {"reprise.uid": one.state_dict()["uid"]}
        store.client.create_run(experiment, run_name=name, tags=tags)
    one.metrics({"loss": 1.0}, 0)
    assert carry(run_dir) == DRAINED
    (run,) = store.runs()
    assert run.info.run_name == "late"
    assert_steps_once(store, run.info.run_id, "loss", range(1))


@pytest.mark.parametrize(("status", "waits"), [(413, False), (503, True)])
def test_a_file_too_large_for_the_server_does_not_hold_up_the_rest(
    run_dir, caplog, monkeypatch, status, waits
):
    from requests import HTTPError, Response

    class Proxy:
        """What stands before a server that one cannot start here."""

        def log_artifact(self, *_):
            response = Response()
            response.status_code = status
            raise HTTPError(response=response)

    outlet = Outlet(run_dir, training=False)
    monkeypatch.setattr(outlet, "connected", Proxy)
    record = {"time": 0, "artifact": "weights.bin", "folder": None}
    if waits:
        with pytest.raises(HTTPError):
            outlet.send([record])
    else:
        outlet.send([record])
        assert "weights.bin" in caplog.text


def test_a_sender_at_work_is_left_alone(store, run_dir, tracker):
    one = tracker()
    one.start()
    one.metrics({"loss": 1.0}, 0)
    wait_for(lambda: log_has(run_dir, CONNECTED))
    (sender,) = senders(run_dir)
    assert replay(run_dir, 60)
    assert store.runs()[0].info.status == "RUNNING"
    assert [process.pid for process in senders(run_dir)] == [sender.pid]

    # A sender that was killed is replaced at the end.
    sender.kill()
    one.metrics({"loss": 1.0}, 1)
    assert one.finish("FINISHED", 60)
    (run,) = store.runs()
    assert_steps_once(store, run.info.run_id, "loss", range(2))


def test_a_run_can_be_looked_at_while_other_work_has_all_cores(store, run_dir, tracker):
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(CORES)]
    try:
        one = tracker()
        one.start()
        for step in range(2):
            one.metrics({"loss": 1.0}, step)
            wait_for(lambda step=step: one.run_id and len(store.points(one.run_id, "loss")) > step)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert one.finish("FINISHED", 30)


def test_a_sender_that_has_no_cores_is_replaced_at_the_end(store, run_dir, tracker):
    one = tracker()
    one.start()
    wait_for(lambda: log_has(run_dir, CONNECTED))
    (sender,) = senders(run_dir)
    sender.suspend()
    one.metrics({"loss": 1.0}, 0)
    assert one.finish("FINISHED", 30)
    (run,) = store.runs()
    assert run.info.status == "FINISHED"
    assert_steps_once(store, run.info.run_id, "loss", range(1))


def test_system_metrics_count_on_after_a_restart(tmp_path, monkeypatch):
    from pipeline.tracking import system

    monkeypatch.setattr(system, "SAMPLE_SECONDS", 0.02)
    monkeypatch.setattr(system, "SAMPLES_PER_POINT", 2)
    path = tmp_path / "system.jsonl"
    for _ in range(2):
        points = len(history(tmp_path).get("system/system_memory_usage_percentage", []))
        metrics = system.SystemMetrics(Journal(path), first_step=points)
        metrics.start()
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= points + 2)  # noqa: B023
        metrics.stop()
    values = history(tmp_path)["system/system_memory_usage_percentage"]
    assert [step for step, _ in values] == list(range(len(values)))
    assert all(0 < value <= 100 for _, value in values)


@pytest.mark.gpu
def test_system_metrics_show_the_gpu(tmp_path, monkeypatch):
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: no GPU metrics")
    from pipeline.tracking import system

    monkeypatch.setattr(system, "SAMPLE_SECONDS", 0.02)
    metrics = system.SystemMetrics(Journal(tmp_path / "system.jsonl"), first_step=0)
    metrics.start()
    wait_for(lambda: os.path.getsize(tmp_path / "system.jsonl") > 0)  # noqa: PTH202
    metrics.stop()
    assert history(tmp_path)["system/gpu_0_memory_usage_megabytes"][0][1] > 0


def test_a_sweep_is_announced_before_its_members_start(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = tmp_path / "sweep"
    Tracker(sweep, run_name="sweep", experiment="digits", uri=uri).close("FINISHED")
    for name in ("a", "b"):
        Tracker(sweep / name, run_name=name, experiment="digits", uri=uri, parent=sweep)
    with announcer() as announce:
        assert announce(sweep, 60)
    runs = {run.info.run_name: run for run in Store(uri).runs()}
    states = {name: run.info.status for name, run in runs.items()}
    # The parent is over, its members are not.
    assert states == {"sweep": "FINISHED", "a": "SCHEDULED", "b": "SCHEDULED"}
    parent = runs.pop("sweep").info.run_id
    assert [run.data.tags["mlflow.parentRunId"] for run in runs.values()] == [parent, parent]
    assert Identity.load(sweep / "a").run_id == runs["a"].info.run_id


def test_what_is_not_announced_leaves_no_trace(store):
    with announcer():
        (process,) = (p for p in psutil.Process().children() if "announce" in p.cmdline())
    assert not process.is_running()
    assert store.runs() == []


def test_a_run_that_is_sent_after_its_end_began_before_it(tmp_path):
    run_dir = tmp_path / "run"
    one = Tracker(
        run_dir, run_name="short", experiment="digits", uri=f"sqlite:///{tmp_path / 'mlflow.db'}"
    )
    one.metrics({"train/loss": 1.0}, 1)
    one.close("KILLED")
    assert carry(run_dir) == DRAINED
    (run,) = Store(f"sqlite:///{tmp_path / 'mlflow.db'}").runs()
    assert run.info.start_time <= run.info.end_time


def test_an_announcement_is_withdrawn(tmp_path):
    """What it created is gone, what was there has its status, and all can be announced again."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = tmp_path / "sweep"
    Tracker(sweep, run_name="sweep", experiment="digits", uri=uri).close("FINISHED")
    Tracker(sweep / "a", run_name="a", experiment="digits", uri=uri, parent=sweep).close("FAILED")
    assert carry(sweep / "a") == carry(sweep) == DRAINED
    before = {run.info.run_name: run.info for run in Store(uri).runs()}
    Tracker(sweep / "b", run_name="b", experiment="digits", uri=uri, parent=sweep)
    with announcer() as announce:
        assert announce(sweep, 60)
        assert {run.info.run_name for run in Store(uri).runs()} == {"sweep", "a", "b"}
        assert announce.withdraw(60)
    after = {run.info.run_name: run.info for run in Store(uri).runs()}
    assert [after.pop(name).status for name in ("sweep", "a")] == ["FINISHED", "FAILED"]
    assert after == {}
    assert Identity.load(sweep / "a").run_id == before["a"].run_id
    assert Identity.load(sweep / "b").run_id is None
    with announcer() as announce:
        assert announce(sweep / "b", 60)
    assert {run.info.run_name: run.info.status for run in Store(uri).runs()} == {
        "sweep": "FINISHED",
        "a": "FAILED",
        "b": "SCHEDULED",
    }


def test_a_member_finds_or_makes_its_parent_where_nobody_was_told(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = tmp_path / "sweep"
    Tracker(sweep, run_name="sweep", experiment="digits", uri=uri).close("FINISHED")
    Tracker(sweep / "a", run_name="a", experiment="digits", uri=uri, parent=sweep).close("FINISHED")
    for folder in (sweep / "a", sweep):
        assert carry(folder) == DRAINED
    runs = {run.info.run_name: run for run in Store(uri).runs()}
    assert runs["a"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert [run.info.status for run in runs.values()] == ["FINISHED", "FINISHED"]


def test_a_store_that_cannot_be_reached_is_no_obstacle_to_an_announcement(tmp_path):
    Tracker(tmp_path / "a", run_name="a", experiment="x", uri=f"http://127.0.0.1:{free_port()}")
    with announcer() as announce:
        assert not announce(tmp_path / "a", 60)
    assert log_has(tmp_path / "a", "the run cannot be created now")
    assert Identity.load(tmp_path / "a").run_id is None
