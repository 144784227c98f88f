"""From a source to a set: the same bytes always, all or nothing, and every image accounted for."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from pictures import class_folders, contents, encoded, jpeg, pack, picture
from PIL import Image

from data_prep import estimate
from data_prep.images import AS_FOUND
from data_prep.manifest import (
    CARD_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    OWNER_NAME,
    REJECTED_NAME,
    Manifest,
)
from data_prep.prepare import Progress, prepare
from data_prep.sources import open_source
from data_prep.verify import verify

BAD = {
    "train/ant/cut.jpg": jpeg(90)[:-90],
    "train/bee/.hidden.jpg": jpeg(91),
    "train/bee/words.jpg": b"no image",
    "test/cow/frames.gif": encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
}


@pytest.fixture
def mixed_folder(source_folder):
    """The class folders, some of whose files cannot be used."""
    for name, data in BAD.items():
        (source_folder / name).write_bytes(data)
    (source_folder / "train" / "cow" / "picture.JPEG").write_bytes(encoded(picture(93), "PNG"))
    return source_folder


def run(folder, out, **options):
    options = {"samples_per_shard": 5, "workers": 1, **options}
    return prepare(open_source("folder", folder), out, **options)


def test_every_image_is_stored_once_with_its_label_and_its_bytes(mixed_folder, tmp_path):
    manifest = run(mixed_folder, tmp_path / "set")
    expected = sorted(
        (path.relative_to(mixed_folder).parts[0], path.parent.name, path.read_bytes())
        for path in mixed_folder.rglob("*")
        if path.is_file() and path.relative_to(mixed_folder).as_posix() not in BAD
    )
    stored = []
    for split in manifest.splits.values():
        for shard in split.shards:
            with tarfile.open(manifest.root / shard.name) as tar:
                data = [tar.extractfile(member).read() for member in tar]
            stored += [
                (split.name, manifest.classes[int(label)], image)
                for image, label in zip(data[::2], data[1::2], strict=True)
            ]
    assert sorted(stored) == expected
    assert verify(manifest.root, workers=1) == []


def test_accepted_and_rejected_are_all_that_was_found(mixed_folder, tmp_path):
    manifest = run(mixed_folder, tmp_path / "set")
    assert (manifest.found, manifest.accepted, manifest.rejected) == (32, 28, 4)
    lines = (manifest.root / REJECTED_NAME).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["origin"] for entry in entries] == sorted(BAD)
    assert all(entry["split"] == entry["origin"].split("/")[0] for entry in entries)
    reasons = {entry["origin"]: entry["reason"] for entry in entries}
    assert "cannot be decoded" in reasons["train/ant/cut.jpg"]
    assert reasons["train/bee/.hidden.jpg"] == "hidden file"
    assert reasons["test/cow/frames.gif"].startswith("GIF with 2 frames")


def test_statistics_are_those_of_the_training_pixels(mixed_folder, tmp_path):
    manifest = run(mixed_folder, tmp_path / "set")
    images = [
        np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) / 255
        for path in (mixed_folder / "train").rglob("*")
        if path.is_file() and path.relative_to(mixed_folder).as_posix() not in BAD
    ]
    pixels = np.concatenate(images)
    np.testing.assert_allclose(manifest.channel_mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest.channel_std, pixels.std(0), rtol=1e-12)


def test_the_card_counts_images_by_their_shorter_side(source_folder, tmp_path):
    (source_folder / "train" / "ant" / "below.jpg").write_bytes(jpeg(50, 90, 31))
    (source_folder / "train" / "ant" / "edge.jpg").write_bytes(jpeg(51, 32, 40))
    card = (run(source_folder, tmp_path / "set").root / CARD_NAME).read_text()
    assert "| 1 to 31 | 28 |" in card
    assert "| 32 to 63 | 1 |" in card


def test_an_estimate_infers_the_whole_from_a_sample(source_folder, monkeypatch):
    source = open_source("folder", source_folder)
    sizes = [path.stat().st_size for path in source_folder.rglob("*.jpg")]
    every = estimate.estimate(source, AS_FOUND, workers=1)
    assert (every.images, every.sampled, every.rejected) == (27, 27, 0)
    assert every.error == pytest.approx(np.std(sizes) / np.mean(sizes) / 27**0.5)
    monkeypatch.setattr(estimate, "SAMPLED", 9)
    some = estimate.estimate(source, AS_FOUND, workers=1)
    assert (some.images, some.sampled) == (27, 9)
    assert some.bytes == pytest.approx(every.bytes, rel=0.5)  # a tar ends with a whole record


@pytest.mark.parametrize("change", [{"workers": 2}, {"workers": 3}, {"progress": lambda *_: None}])
def test_bytes_do_not_depend_on_how_it_is_run(mixed_folder, tmp_path, change):
    run(mixed_folder, tmp_path / "one")
    run(mixed_folder, tmp_path / "two", **change)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples_per_shard": 9}])
def test_bytes_depend_on_the_settings(mixed_folder, tmp_path, change):
    first = run(mixed_folder, tmp_path / "one")
    second = run(mixed_folder, tmp_path / "two", **change)
    assert first.train.shards[0].sha256 != second.train.shards[0].sha256
    assert first.channel_mean == second.channel_mean
    assert first.train.counts == second.train.counts


def test_an_archive_gives_the_samples_of_its_folder(source_folder, tmp_path):
    archive = pack(source_folder, tmp_path / "insects.tar.gz")
    from_folder = run(source_folder, tmp_path / "one")
    from_archive = run(archive, tmp_path / "two", workers=2)
    assert from_archive == from_folder


def test_progress_counts_every_image(source_folder, tmp_path):
    seen = []
    run(source_folder, tmp_path / "set", workers=2, progress=seen.append)
    assert seen[0] == Progress(0, 27, 0, 0)
    size = sum(path.stat().st_size for path in source_folder.rglob("*.jpg"))
    assert seen[-1] == Progress(27, 27, size, 0)
    assert [now.images for now in seen] == sorted(now.images for now in seen)


def test_progress_and_summary_reject_the_same(mixed_folder, tmp_path):
    seen = []
    with pytest.raises(InterruptedError):
        run(mixed_folder, tmp_path / "set", progress=interrupted_after(seen, 20))
    manifest = run(mixed_folder, tmp_path / "set", progress=seen.append)
    first, again = (now for now in seen if not now.bytes)
    assert first.rejected == 1  # the hidden file, which is no image to be packed
    assert again.images > 0
    assert again.rejected >= 2
    assert seen[-1].rejected == manifest.rejected == 4


def interrupted_after(seen, images):
    def progress(now):
        seen.append(now)
        if now.images >= images:
            raise InterruptedError

    return progress


def test_a_repeat_changes_nothing_and_says_so(source_folder, tmp_path, caplog):
    first = run(source_folder, tmp_path / "set")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()}
    with caplog.at_level(logging.INFO):
        assert run(source_folder, tmp_path / "set", workers=2) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()} == before
    assert "already prepared: nothing to do" in caplog.text


def test_a_repeat_with_other_settings_or_images_is_refused(source_folder, tmp_path):
    run(source_folder, tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="prepared with seed=0, now it is 1: give another folder"):
        run(source_folder, tmp_path / "set", seed=1)
    (source_folder / "train" / "ant" / "more.jpg").write_bytes(jpeg(99))
    told = (
        r"set holds a set prepared from other images, insects with 27 files, and now it is insects "
        r"with 28: another source, or files .* changed since: give another folder, or delete"
    )
    with pytest.raises(ValueError, match=told):
        run(source_folder, tmp_path / "set")
    other = class_folders(tmp_path / "birds", train=2, test=1)
    with pytest.raises(ValueError, match="insects with 27 files, and now it is birds with 9"):
        run(other, tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_a_repeat_over_a_set_that_lost_a_shard_is_refused(source_folder, tmp_path):
    run(source_folder, tmp_path / "set")
    (tmp_path / "set" / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar is missing or cut: delete"):
        run(source_folder, tmp_path / "set")


def test_foreign_files_are_left_alone(source_folder, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds 'train-000000\.tar' and no shard set"):
        run(source_folder, out)
    assert contents(out) == {"train-000000.tar": b"mine"}
    with pytest.raises(ValueError, match="is a file: give a folder"):
        run(source_folder, out / "train-000000.tar")


def test_writing_into_the_source_is_refused(source_folder, tmp_path):
    before = contents(source_folder)
    (tmp_path / "link").symlink_to(source_folder)
    for out in (source_folder / "shards", tmp_path / "link" / "train" / "shards"):
        with pytest.raises(ValueError, match="lies within the source"):
            run(source_folder, out)
    assert contents(source_folder) == before


def test_a_source_without_evaluation_images_makes_a_set(source_folder, tmp_path):
    shutil.rmtree(source_folder / "test")
    assert list(run(source_folder, tmp_path / "set").splits) == ["train"]


def test_a_refused_source_leaves_nothing(source_folder, tmp_path):
    archive = pack(source_folder, tmp_path / "insects.tar")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo("../escaped.jpg"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="leads out of the archive"):
        run(archive, tmp_path / "set")
    assert contents(tmp_path) == before
    assert not (tmp_path / "set").exists()


def test_a_split_without_a_usable_image_is_refused(source_folder, tmp_path):
    for path in (source_folder / "test").rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"no image for 'test' .*9 rejected.*first reason is 'not a"
    ):
        run(source_folder, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_class_folders_without_files_are_refused(source_folder, tmp_path, splits):
    for split in splits:
        for path in (source_folder / split).rglob("*.jpg"):
            path.unlink()
    problem = r"insects has no image for 'train' .*\(its folders hold no files\): correct the"
    with pytest.raises(ValueError, match=problem):
        run(source_folder, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_shard_of_nothing_but_rejects_is_left_out(source_folder, tmp_path):
    for path in (source_folder / "train" / "ant").iterdir():
        path.write_bytes(b"x")
    manifest = run(source_folder, tmp_path / "set", samples_per_shard=1)
    assert manifest.train.samples == len(manifest.train.shards) == 12
    assert manifest.train.counts == (0, 6, 6)
    assert verify(manifest.root, workers=1) == []


def test_an_empty_class_warns_and_keeps_the_ids(source_folder, tmp_path, caplog):
    (source_folder / "train" / "bat").mkdir()
    manifest = run(source_folder, tmp_path / "set")
    assert manifest.classes == ("ant", "bat", "bee", "cow")
    assert manifest.train.counts == (6, 0, 6, 6)
    assert "1 of 4 classes have no image in train and keep their ids: bat" in caplog.text


def test_names_that_are_no_text_are_kept_apart(source_folder, tmp_path):
    folder = os.fsencode(source_folder / "train" / "ant")
    for name, data in ((b"\xff.jpg", jpeg(95)), (b"\xfe.jpg", b"no image")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(data)
    manifest = run(source_folder, tmp_path / "set", workers=2)
    assert (manifest.accepted, manifest.rejected) == (28, 1)
    (line,) = (manifest.root / REJECTED_NAME).read_text().splitlines()
    assert os.fsencode(json.loads(line)["origin"]) == b"train/ant/\xfe.jpg"


@pytest.mark.parametrize("options", [{"workers": 0}, {"samples_per_shard": 0}])
def test_senseless_numbers_are_refused(source_folder, tmp_path, options):
    with pytest.raises(ValueError, match="give 1 or more"):
        run(source_folder, tmp_path / "set", **options)


def test_a_second_preparation_of_the_same_folder_is_refused(source_folder, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / OWNER_NAME).write_text("host node7, pid 42")
    with (
        FileLock(out / LOCK_NAME),
        pytest.raises(ValueError, match=r"preparation \(host node7, pid 42\) is writing to"),
    ):
        run(source_folder, out)


PROGRAM = """
import os, signal, sys
from pathlib import Path
from data_prep.prepare import prepare
from data_prep.sources import open_source

kill_at, workers, source, out = sys.argv[1:]
count = 0

def audit(event, args):
    # Every file that is opened for writing, renamed or removed below the set counts as a moment.
    global count
    if event == "open" and args[1] in ("r", "rb"):
        return
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(out):
        count += 1
        if count == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    sys.addaudithook(audit)
    prepare(open_source("folder", Path(source)), Path(out), samples_per_shard=5,
            workers=int(workers))
    print(count)
"""


def start(program, kill_at, workers, source, out):
    command = [sys.executable, program, str(kill_at), str(workers), str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_killed_at_any_moment_and_repeated_it_ends_in_the_same_bytes(
    mixed_folder, tmp_path, program
):
    reference = run(mixed_folder, tmp_path / "reference").root
    whole = start(program, 0, 1, mixed_folder, tmp_path / "count")
    moments = int(whole.stdout)
    assert moments > 30
    for moment in range(1, moments + 1, 7):
        out = tmp_path / f"killed-{moment}"
        killed = start(program, moment, 1, mixed_folder, out)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        try:
            assert contents(Manifest.load(out).root).keys() >= contents(reference).keys()
        except FileNotFoundError:
            assert not (out / MANIFEST_NAME).exists()
        run(mixed_folder, out)
        assert contents(out) == contents(reference), moment


def test_workers_end_with_a_killed_parent(tmp_path, program):
    source = class_folders(tmp_path / "many", train=120, test=1)
    out = tmp_path / "set"
    command = [sys.executable, program, "0", "2", source, out]
    process = subprocess.Popen([str(part) for part in command], start_new_session=True)
    while not list(out.glob(".partial/records/train-00000*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    for _ in range(400):
        if not _session_members(process.pid):
            break
        time.sleep(0.05)
    assert not _session_members(process.pid)
    assert run(source, out) == run(source, tmp_path / "reference")


def test_ctrl_c_leaves_what_is_finished_to_the_next_call(tmp_path, program):
    source = class_folders(tmp_path / "many", train=120, test=1)
    out = tmp_path / "set"
    command = [sys.executable, program, "0", "2", source, out]
    process = subprocess.Popen(
        [str(part) for part in command], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not list(out.glob(".partial/records/train-00000*.json")):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    _until_gone(process.pid)  # multiprocessing's tracker of resources ends after its parent
    assert [path.name for path in out.iterdir()] == [".partial"]
    finished = {path: path.stat().st_mtime_ns for path in out.glob(".partial/set/*.tar")}
    assert finished
    assert run(source, out) == run(source, tmp_path / "reference")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert all(times[path.name] == time for path, time in finished.items())


def _until_gone(session):
    deadline = time.monotonic() + 30
    while members := _session_members(session):
        assert time.monotonic() < deadline, members
        time.sleep(0.05)


def _session_members(session):
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(entry.name)
    return members


def test_an_image_bomb_costs_no_memory(source_folder, tmp_path):
    Image.new("L", (12000, 12000)).save(source_folder / "train" / "ant" / "bomb.png")
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (400 * 2**20, 400 * 2**20))\n"
        "import sys; from pathlib import Path\n"
        "from data_prep.prepare import prepare; from data_prep.sources import open_source\n"
        "prepare(open_source('folder', Path(sys.argv[1])), Path(sys.argv[2]), workers=1)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", limit, str(source_folder), str(tmp_path / "set")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "set" / REJECTED_NAME).read_text().splitlines()
    reason = "12000x12000 pixels over the limit of 50 megapixels"
    assert json.loads(line) == {"origin": "train/ant/bomb.png", "split": "train", "reason": reason}


def test_digits(tmp_path):
    manifest = prepare(open_source("digits"), tmp_path / "set", workers=1)
    assert (manifest.train.samples, manifest.evaluation.samples) == (1437, 360)
    assert manifest.image_size == (32, 32, 32, 32)
    again = prepare(open_source("digits"), tmp_path / "again", workers=1, seed=1)
    assert again.evaluation.counts == manifest.evaluation.counts
    assert again.evaluation.shards[0].sha256 != manifest.evaluation.shards[0].sha256
    assert verify(manifest.root, workers=1) == []


def test_cifar10_from_its_archive(shared_data, tmp_path):
    archive = shared_data / "cifar10-jpeg.tar.gz"
    manifest = prepare(open_source("cifar", archive), tmp_path / "set")
    assert manifest.name == "cifar10"
    assert manifest.classes[:3] == ("airplane", "automobile", "bird")
    assert manifest.train.counts == (5000,) * 10
    assert manifest.evaluation.counts == (1000,) * 10
    assert (manifest.found, manifest.rejected) == (60000, 0)
    np.testing.assert_allclose(manifest.channel_mean, (0.4914, 0.4822, 0.4465), atol=5e-4)
    np.testing.assert_allclose(manifest.channel_std, (0.247, 0.2435, 0.2616), atol=4e-3)
