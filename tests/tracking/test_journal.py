"""The journal alone: no MLflow, no server, no sender."""

import json
import logging
import subprocess
import sys
import textwrap

import pytest

from pipeline.tracking import Tracker, history, store_uri, ui_command
from pipeline.tracking.journal import Identity, Journal, Sent, read


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def open_tracker(**options):
        return Tracker(tmp_path / "run", run_name="first", experiment="digits", **options)

    return open_tracker


def records(tmp_path):
    return [record for record, _ in read(tmp_path / "run" / "journal.jsonl")]


def test_a_resumed_run_does_not_repeat_points(tracker, tmp_path):
    first = tracker()
    for step in range(10):
        first.metrics({"loss": step / 10}, step)
    again = tracker()
    for step in range(5, 12):
        again.metrics({"loss": -1.0, "rate": step}, step)
    points = history(tmp_path / "run")
    assert points["loss"] == [(s, s / 10) for s in range(10)] + [(10, -1.0), (11, -1.0)]
    assert points["rate"] == [(s, float(s)) for s in range(5, 12)]


def test_two_names_at_one_step_are_two_points(tracker, tmp_path):
    one = tracker()
    one.metrics({"loss": 1.0}, 3)
    one.metrics({"accuracy": 0.5}, 3)
    one.metrics({"loss": 2.0, "accuracy": 0.6}, 3)
    assert history(tmp_path / "run") == {"loss": [(3, 1.0)], "accuracy": [(3, 0.5)]}


def test_a_torn_last_line_is_cut_off_and_its_point_can_come_again(tracker, tmp_path):
    one = tracker()
    one.metrics({"loss": 1.0}, 0)
    one.metrics({"loss": 2.0}, 1)
    path = tmp_path / "run" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert history(tmp_path / "run") == {"loss": [(0, 1.0)]}
    again = tracker()
    again.metrics({"loss": 2.5}, 1)
    assert history(tmp_path / "run") == {"loss": [(0, 1.0), (1, 2.5)]}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_in_the_middle_costs_only_itself(tracker, tmp_path):
    one = tracker()
    for step in range(3):
        one.metrics({"loss": 1.0}, step)
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * (len(lines[1]) - 1) + b"\n" + lines[2])
    assert history(tmp_path / "run") == {"loss": [(0, 1.0), (2, 1.0)]}
    tracker().metrics({"loss": 1.0}, 1)
    assert len(records(tmp_path)) == 4


def test_parameters_keep_their_first_value(tracker, tmp_path, caplog):
    tracker().params({"lr": 0.1, "ema": None})
    again = tracker()
    with caplog.at_level(logging.WARNING):
        again.params({"lr": 0.1, "ema": None})
        assert not caplog.records
        again.params({"lr": 0.2, "seed": 1})
    assert "lr is 0.2 now; tracked stays 0.1" in caplog.text
    assert [r["params"] for r in records(tmp_path)] == [
        {"lr": "0.1", "ema": "None"},
        {"seed": "1"},
    ]


def test_a_full_disk_loses_a_line_and_not_the_training(tmp_path):
    # The limit on a file's size refuses writes as a full disk does, and needs no privileges.
    code = f"""
        import logging, pathlib, resource
        from pipeline.tracking import Tracker, history
        logging.basicConfig()
        run = pathlib.Path({str(tmp_path / "run")!r})
        tracker = Tracker(run, run_name="r", experiment="e", uri="sqlite:///x.db")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        for step in range(4):
            tracker.metrics({{"loss": 1.0}}, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        tracker.metrics({{"loss": 1.0}}, 3)
        print([step for step, _ in history(run)["loss"]])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[0, 3]"
    assert done.stderr.count("not tracked") == 3


def test_nothing_is_written_after_the_end(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.close()
    with (tmp_path / "other").open("wb"), pytest.raises(OSError, match="descriptor"):
        journal.append({"status": "FINISHED"})
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"offsets": {}}', '{"offsets": {"journal.jsonl": 99}, "closed": true}']
)
def test_an_unusable_position_means_the_beginning(tmp_path, text):
    (tmp_path / "journal.jsonl").write_text("x" * 98)
    (tmp_path / "sent.json").write_text(text)
    assert Sent.load(tmp_path).offsets == {"journal.jsonl": 0, "system.jsonl": 0}


def test_a_position_is_read_as_it_was_saved(tmp_path):
    (tmp_path / "journal.jsonl").write_text("x" * 98)
    sent = Sent({"journal.jsonl": 98, "system.jsonl": 0}, closed=True)
    sent.save(tmp_path)
    assert Sent.load(tmp_path) == sent


def test_an_artifact_must_be_a_file(tracker, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml is not a file"):
        tracker().artifact(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("folder", ["../outside", "/outside", "a/../../b"])
def test_an_artifact_stays_in_its_run(tracker, tmp_path, folder):
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="leads out of the run"):
        tracker().artifact(tmp_path / "a", folder)


def test_the_store_is_the_working_folder_unless_the_environment_names_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert store_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert store_uri() == "http://host:5000"


def test_the_recorded_store_wins_over_another_folder_and_environment(
    tracker, tmp_path, monkeypatch
):
    tracker(uri="sqlite:///sub/m.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    uid = tracker().state_dict()["uid"]
    identity = Identity.load(tmp_path / "run")
    assert identity.uri == f"sqlite:///{tmp_path}/sub/m.db"
    assert identity.uid == uid


@pytest.mark.parametrize(
    "uri", ["mlruns", "file:///tmp/mlruns", "sqlite:///", "http://", "databricks", "sqlite://m.db"]
)
def test_an_unusable_address_is_refused_with_the_cure(tracker, uri):
    with pytest.raises(ValueError, match=r"give sqlite:///FILE or http\(s\)://HOST:PORT"):
        tracker(uri=uri)


def test_a_password_is_not_written_to_disk(tracker, tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        tracker(uri="https://me:secret@host")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "run" / "tracking.json").exists()


def test_an_unreadable_identity_is_named(tracker, tmp_path):
    tracker()
    (tmp_path / "run" / "tracking.json").write_text('{"uri": ')
    with pytest.raises(ValueError, match=r"tracking.json is not readable .* delete it"):
        tracker()


def test_the_checkpoint_of_another_run_is_told(tracker, caplog):
    one = tracker()
    one.load_state_dict(one.state_dict())
    assert not caplog.records
    one.load_state_dict({"uid": "other", "mlflow_run_id": "abc"})
    assert "MLflow run abc" in caplog.text


def test_a_server_needs_no_page_of_its_own():
    assert ui_command("http://host:5000", 5000) is None
    command = ui_command("sqlite:////data/mlflow.db", 5001)
    assert command[command.index("--artifacts-destination") + 1] == "file:///data/mlartifacts"
    assert command[command.index("--port") + 1] == "5001"
