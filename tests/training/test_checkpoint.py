"""A checkpoint that can be seen is whole; a damaged one is named and never used."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import World
from pipeline.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    find,
    inspect,
    read_state,
    write_state,
)

ROOM = torch.zeros(200)


def states(value: float) -> dict[str, dict[str, Any]]:
    return {"model": {"weight": torch.full((64, 64), value)}, "data": {"epoch": int(value)}}


def saved(folder: Path, *steps: int, keep_last: int = 3) -> CheckpointStore:
    store = CheckpointStore(folder, World(), keep_last)
    for step in steps:
        store.save(step, states(step), {"progress": {"step": step}, "random": {"a": ROOM}})
    return store


def newest(store: CheckpointStore) -> Checkpoint:
    found = store.newest()
    assert found is not None
    return found


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "tensors": {"a": shared[:3], "b": shared, "half": torch.ones(2, dtype=torch.bfloat16)},
        "transposed": torch.arange(6).view(2, 3).t(),
        "bytes": torch.get_rng_state(),
        "numbers": [1, 2.5, None, True, "text"],
        "empty": {},
        "scalar": torch.tensor(3),
    }
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert back.keys() == state.keys()
    assert back["numbers"] == state["numbers"]
    assert back["empty"] == {}
    for name in ("transposed", "bytes", "scalar"):
        torch.testing.assert_close(back[name], state[name], rtol=0, atol=0)
    for name, tensor in state["tensors"].items():
        torch.testing.assert_close(back["tensors"][name], tensor, rtol=0, atol=0)


def test_none_before_the_first(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", World(), 2).newest() is None


def test_a_score_comes_later(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep_last=1)
    for step, score in ((1, 0.5), (2, 0.4), (3, 0.6)):
        store.save(step, states(step), {"progress": {}}, evaluated=False)
        waiting = find(tmp_path)
        assert (waiting.step, waiting.score, waiting.evaluated) == (step, None, False)
        store.grade(step, score)
        graded = newest(store)
        assert (graded.step, graded.score, graded.evaluated) == (step, score, True)
        best = store.best()
        assert best is not None
        assert best.step == (3 if step == 3 else 1)
        assert len(list(tmp_path.glob("step-*"))) == (2 if step == 2 else 1)


def test_a_score_that_cannot_be_written_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 5)
    before = find(tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.write_atomically", full)
    with pytest.raises(CheckpointError, match=r"cannot write the score of .*No space left"):
        store.grade(5, 0.5)
    assert newest(store) == before


def recorded(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", World(), 2, folder / "saved.json")


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, states(step), {"progress": {"step": step}})


def test_an_emptied_folder_is_refused_where_something_was_saved(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    assert store.newest() is None
    save(store, 5)
    assert newest(store).step == 5
    shutil.rmtree(store.folder)
    with pytest.raises(CheckpointError, match=r"is empty, though this run had saved step 5: "):
        store.newest()


def test_a_kill_before_the_record_leaves_a_good_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record may say less than there is, and learns of it at the next start."""
    store = recorded(tmp_path)

    def killed(self: CheckpointStore, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, 5)
    assert newest(store).step == 5
    shutil.rmtree(store.folder)
    with pytest.raises(CheckpointError, match="had saved step 5"):
        store.newest()


def test_a_record_that_cannot_be_written_costs_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = recorded(tmp_path)
    (tmp_path / "saved.json").mkdir()
    save(store, 5)
    assert newest(store).step == 5
    assert "cannot record that step 5 is saved" in caplog.text


def test_a_newest_checkpoint_that_is_gone_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = recorded(tmp_path)
    save(store, 5)
    save(store, 10)
    shutil.rmtree(store.folder / "step-000000010")
    assert newest(store).step == 5
    assert "step 10 was saved and is gone: going on from step 5" in caplog.text


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, 10)
    for path in (tmp_path / "step-000000005").rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert newest(store).step == 10
    assert newest(store).load("data") == {"epoch": 10}


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep_last=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.9), (5, 0.8), (6, 0.7)):
        store.save(step, states(step), {}, score)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000002",
        "step-000000005",
        "step-000000006",
    ]
    best = store.best()
    assert best is not None
    assert (best.step, best.score) == (2, 0.9)


def truncate(keep: float) -> Any:
    def damage(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * keep))

    return damage


def cut_the_last_100_bytes(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "empty": truncate(0),
    "half": truncate(0.5),
    "last bytes": cut_the_last_100_bytes,
    "one bit": flip_one_bit,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "rank-00000.safetensors", "manifest.json"])
def test_a_damaged_newest_is_named_and_set_aside(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step-000000002" / file)
    assert newest(store).step == 1
    assert "step-000000002 is damaged" in caplog.text
    assert file in caplog.text
    assert (tmp_path / "damaged-step-000000002").is_dir()
    assert not (tmp_path / "step-000000002").exists()


def test_any_flipped_bit_of_the_manifest_is_seen(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step-000000001" / "manifest.json"
    whole = path.read_bytes()
    unseen = []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        if inspect(path.parent) is None and not whole[position : position + 1].isspace():
            unseen.append(position)
    assert unseen == []


def test_all_damaged_is_refused_every_time(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/model.safetensors"):
        flip_one_bit(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
            store.newest()


def test_a_repaired_checkpoint_is_used_again(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "damaged-step-000000001")
    with pytest.raises(CheckpointError):
        store.newest()
    (tmp_path / "damaged-step-000000001").rename(tmp_path / "step-000000001")
    assert newest(store).step == 1


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="free disk space"):
            store.save(2, states(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert newest(store).step == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        store = saved(disk / "checkpoints", 1)
        with pytest.raises(CheckpointError, match="No space left on device"):
            saved(disk / "checkpoints", *range(2, 30), keep_last=30)
        assert not list((disk / "checkpoints").glob(".*"))
        assert newest(store).step >= 1
    finally:
        subprocess.run(["umount", disk], check=True)


# A child that saves step 2 and kills itself at the nth call of one of the system calls that a save
# makes, with what must then be the newest step.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from tests.training.test_checkpoint import saved
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = saved(folder, 1)
where = {"fsync": os, "rename": Path, "save_file": sys.modules["pipeline.training.checkpoint"]}
original = getattr(where[name], name)
calls = 0
def deadly(*arguments, **options):
    global calls
    calls += 1
    if calls == abs(count):
        if count < 0:
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(where[name], name, deadly)
saved(folder, 2)
"""
AFTER_RENAME = ("rename", -1)


@pytest.mark.parametrize(
    ("call", "count"),
    [("save_file", 1), ("save_file", -2), ("fsync", 1), ("fsync", 3), ("rename", 1), AFTER_RENAME],
)
def test_a_kill_while_saving(tmp_path: Path, call: str, count: int) -> None:
    child = [sys.executable, "-c", KILLED, str(tmp_path), call, str(count)]
    assert subprocess.run(child, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path, World(), 3)
    expected = 2 if (call, count) == AFTER_RENAME else 1
    assert newest(store).step == expected
    assert not list(tmp_path.glob(".*"))
    store.save(3, states(3), {})
    assert newest(store).step == 3


def test_a_half_written_copy_is_seen_by_its_hashes(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-000000001", tmp_path / "step-000000009")
    truncate(0.3)(tmp_path / "step-000000009" / "model.safetensors")
    assert newest(store).step == 1


def test_a_reader_finds_the_newest_or_the_best_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    store = CheckpointStore(folder, World(), keep_last=9)
    for step, score in ((1, 0.9), (2, 0.8), (3, 0.9), (4, None)):
        store.save(step, states(step), {}, score)
    (folder / ".partial-step-000000005").mkdir()
    assert find(folder).step == 4
    assert find(folder, best=True).step == 1
    assert find(folder, at=2).step == 2
    flip_one_bit(folder / "step-000000004" / "model.safetensors")
    flip_one_bit(folder / "step-000000001" / "model.safetensors")
    before = sorted(path.name for path in folder.iterdir())
    assert find(folder).step == 3
    assert find(folder, best=True).step == 3
    assert sorted(path.name for path in folder.iterdir()) == before
    for step in (4, 7):
        with pytest.raises(CheckpointError, match=f"no whole checkpoint of step {step} yet"):
            find(folder, at=step)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint yet: reprise train"):
        find(tmp_path / "none" / "checkpoints")
