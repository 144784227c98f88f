"""A real MLflow server that is away, hangs, or goes before the run does."""

import logging
import os
import signal
import time

from stores import Store, assert_steps_once, log_has, senders, wait_for

from pipeline.tracking import history, replay

EXPERIMENT = "digits"


def test_a_server_that_comes_late_and_hangs_in_the_middle(server, gate, run_dir, tracker, tmp_path):
    process, port = server
    one = tracker(uri=f"http://127.0.0.1:{gate.port}")
    one.start()
    one.params({"lr": 0.1})
    one.metrics({"loss": 0.0, "broken": float("nan")}, 0)
    wait_for(lambda: log_has(run_dir, "cannot be sent now"))
    assert one.run_id is None
    (sender,) = senders(run_dir)
    wait_for(lambda: sender.nice() == 19)  # whoever is not answered does not disturb either
    gate.open()
    wait_for(lambda: one.run_id is not None)
    store = Store(f"http://127.0.0.1:{port}")
    wait_for(lambda: store.points(one.run_id, "loss"))

    os.killpg(process.pid, signal.SIGSTOP)
    for step in range(1, 50):
        one.metrics({"loss": float(step)}, step)
    (run_dir / "config.yaml").write_text("lr: 0.1\n")
    one.artifact(run_dir / "config.yaml")
    time.sleep(1.5)  # longer than the sender's pause: it is inside a call that hangs
    assert len(history(run_dir)["loss"]) == 50
    os.killpg(process.pid, signal.SIGCONT)
    assert one.finish("FINISHED", 60)

    (run,) = [run for run in store.runs() if run.info.run_id == one.run_id]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert store.points(one.run_id, "loss") == [(s, float(s)) for s in range(50)]
    assert_steps_once(store, one.run_id, "broken", [0])
    (tmp_path / "got").mkdir()
    store.client.download_artifacts(one.run_id, "config.yaml", str(tmp_path / "got"))
    assert (tmp_path / "got" / "config.yaml").read_text() == "lr: 0.1\n"


def test_a_server_that_hangs_at_the_end_gets_the_rest_later(server, run_dir, tracker, caplog):
    process, port = server
    store = Store(f"http://127.0.0.1:{port}")
    one = tracker(uri=store.uri)
    one.start()
    one.metrics({"loss": 0.0}, 0)
    wait_for(lambda: one.run_id is not None and store.points(one.run_id, "loss"))
    os.killpg(process.pid, signal.SIGSTOP)
    for step in range(1, 30):
        one.metrics({"loss": float(step)}, step)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert not one.finish("FINISHED", 2.0)
    assert time.monotonic() - begin < 20  # the bound, and no more: MLflow alone takes minutes
    assert "records and the end of run" in caplog.text
    os.killpg(process.pid, signal.SIGCONT)
    assert store.client.get_run(one.run_id).info.status == "RUNNING"

    assert replay(run_dir, 60)
    run = store.client.get_run(one.run_id)
    assert run.info.status == "FINISHED"
    assert store.points(one.run_id, "loss") == [(s, float(s)) for s in range(30)]
    assert replay(run_dir, 0.0)  # nothing left: no process is even started


def test_a_server_that_never_comes_bounds_the_end_and_a_later_start_sends_all(
    gate, run_dir, tracker
):
    uri = f"http://127.0.0.1:{gate.port}"
    one = tracker(uri=uri)
    one.start()
    one.metrics({"loss": 0.0}, 0)
    assert not one.finish("FINISHED", 4.0)
    assert not replay(run_dir, 4.0)
    gate.open()
    again = tracker()
    again.start()
    again.metrics({"loss": 0.0}, 0)
    again.metrics({"loss": 1.0}, 1)
    assert again.finish("FINISHED", 60)
    store = Store(uri)
    assert store.points(again.run_id, "loss") == [(0, 0.0), (1, 1.0)]
    assert store.client.get_run(again.run_id).info.status == "FINISHED"
