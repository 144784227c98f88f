"""ImageNet in small: every form gives the same set, and whatever is wrong is refused by name."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import imagenet_archives as small
import pytest
from pictures import contents, encoded, jpeg, picture, png_of_size

from data_prep.images import AS_FOUND, Treatment
from data_prep.manifest import DUPLICATES_NAME, REJECTED_NAME, Manifest
from data_prep.pack import PackShard, PackShards, Work
from data_prep.prepare import prepare
from data_prep.samples import read_samples
from data_prep.sources import imagenet
from data_prep.sources.imagenet import ImageNetSource
from data_prep.verify import verify

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
IMAGES = {"train": len(small.WNIDS) * small.TRAIN, "val": small.VALIDATION}


@pytest.fixture(autouse=True)
def expected_images(monkeypatch):
    """The whole of ImageNet is these few images here."""
    monkeypatch.setattr(imagenet, "IMAGES", IMAGES)


@pytest.fixture
def archives(tmp_path):
    return small.write(tmp_path / "imagenet")


def listed(root, tmp_path, **options):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return ImageNetSource(root, **options).open(scratch)


def run(root, out, **options):
    return prepare(ImageNetSource(root), out, **{"samples_per_shard": 5, "workers": 1, **options})


def stored(manifest, split):
    shards = manifest.splits[split].shards
    return [sample for shard in shards for sample in read_samples(manifest.root / shard.name)]


def repack(root, change):
    """Write the training archive again with other classes."""
    classes = small.images()
    change(classes)
    inner = {f"{wnid}.tar": small.tar(files) for wnid, files in classes.items()}
    (root / TRAIN_TAR).write_bytes(small.tar(inner))


def test_every_image_has_its_bytes_and_its_label(archives, tmp_path):
    manifest = run(archives, tmp_path / "set")
    assert manifest.classes == small.WNIDS
    assert manifest.names == small.WORDS
    assert manifest.train.counts == (8, 8, 8)
    images = {
        data: label
        for label, wnid in enumerate(small.WNIDS)
        for data in small.images()[wnid].values()
    }
    assert {sample.image: sample.label for sample in stored(manifest, "train")} == images
    assert verify(manifest.root, workers=1) == []


def test_validation_is_in_order_with_the_labels_of_the_ground_truth(archives, tmp_path):
    manifest = run(archives, tmp_path / "set", seed=7)
    by_id = dict(zip(small.IDS, range(len(small.WNIDS)), strict=True))
    assert [(sample.image, sample.label) for sample in stored(manifest, "val")] == [
        (data, by_id[number])
        for data, number in zip(small.validation().values(), small.TRUTH, strict=True)
    ]


def class_archives_in_a_folder(root):
    with tarfile.open(root / TRAIN_TAR) as tar:
        tar.extractall(root / "train")
    (root / TRAIN_TAR).unlink()


def class_folders(root):
    class_archives_in_a_folder(root)
    for archive in sorted((root / "train").iterdir()):
        with tarfile.open(archive) as tar:
            tar.extractall(archive.with_suffix(""))
        archive.unlink()


def validation_files(root):
    with tarfile.open(root / VAL_TAR) as tar:
        tar.extractall(root / "val")
    (root / VAL_TAR).unlink()


def validation_by_class(root):
    validation_files(root)
    by_id = dict(zip(small.IDS, small.WNIDS, strict=True))
    for path, number in zip(sorted((root / "val").iterdir()), small.TRUTH, strict=True):
        (root / "val" / by_id[number]).mkdir(exist_ok=True)
        path.rename(root / "val" / by_id[number] / path.name)


def unpacked_devkit(root):
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()


FORMS = (class_archives_in_a_folder, class_folders, validation_files, validation_by_class)


def test_every_form_gives_the_same_bytes_with_any_number_of_workers(archives, tmp_path):
    run(archives, tmp_path / "archives", workers=2)
    for form in (*FORMS, unpacked_devkit):
        root = tmp_path / form.__name__
        shutil.copytree(archives, root)
        form(root)
        run(root, tmp_path / "set")
        assert contents(tmp_path / "set") == contents(tmp_path / "archives"), form.__name__
        shutil.rmtree(tmp_path / "set")


def test_jobs_pack_their_shares_and_a_last_call_makes_the_set(archives, tmp_path):
    """As an array of jobs: each in any order, some twice, one not at all."""
    run(archives, tmp_path / "reference")
    out = tmp_path / "set"
    with pytest.raises(InterruptedError):
        run(archives, out, progress=interrupt)
    reader = listed(archives, tmp_path).reader
    pack = PackShard(Work(out / ".partial"), reader, len(small.WNIDS), AS_FOUND)
    for first, stop in ((4, 6), (1, 3), (1, 3)):
        PackShards(pack, first, stop, workers=1)()
    records = sorted(path.stem for path in (out / ".partial/records").iterdir())
    assert records == ["train-000001", "train-000002", "train-000004", "val-000000"]
    run(archives, out)
    assert contents(out) == contents(tmp_path / "reference")


def interrupt(_):
    raise InterruptedError


def test_a_class_folder_without_the_kit_needs_allow_partial(archives, tmp_path):
    class_folders(archives)
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"no development kit: put .* there, or give --allow-par"):
        listed(archives, tmp_path)
    flat = listed(archives, tmp_path, allow_partial=True)
    assert (flat.classes, flat.names) == (small.WNIDS, ())
    assert {entry.reason for entry in flat.rejected} == {"no label is known"}
    assert {item.split for item in flat.items} == {"train"}


def test_without_the_kit_folders_tell_the_validation_labels(archives, tmp_path):
    validation_by_class(archives)
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    partial = listed(archives, tmp_path, allow_partial=True)
    labels = [item.label for item in partial.items if item.split == "val"]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert not partial.rejected


def missing_class(root):
    repack(root, lambda classes: classes.pop("n01443537"))


def empty_class(root):
    repack(root, lambda classes: classes["n01443537"].clear())


def empty_class_archive(root):
    def names(wnid):
        return b"" if wnid == "n01443537" else small.tar(small.images()[wnid])

    (root / TRAIN_TAR).write_bytes(small.tar({f"{wnid}.tar": names(wnid) for wnid in small.WNIDS}))


def missing_image(root):
    repack(root, lambda classes: classes["n01443537"].popitem())


def no_validation(root):
    (root / VAL_TAR).unlink()


def too_long_truth(root):
    small.write_devkit(root, (*small.TRUTH, 1))


@pytest.mark.parametrize(
    ("change", "problem", "counts"),
    [
        (missing_class, r"lacks 1 of 3 classes \(n01443537\): add", (8, 0, 8)),
        (empty_class, "has 16 images for train and not 24: fetch", (8, 0, 8)),
        (empty_class_archive, "has 16 images for train and not 24: fetch", (8, 0, 8)),
        (missing_image, "has 23 images for train and not 24: fetch", (8, 7, 8)),
        (no_validation, "has 0 images for val and not 6: fetch", (8, 8, 8)),
        (too_long_truth, "ground truth has 7 lines and not 6: fetch", (8, 8, 8)),
    ],
)
def test_what_is_not_whole_needs_allow_partial(archives, tmp_path, change, problem, counts):
    change(archives)
    out = tmp_path / "set"
    with pytest.raises(ValueError, match=f"{problem} .*, or give --allow-partial$"):
        run(archives, out)
    assert not out.exists()
    manifest = prepare(ImageNetSource(archives, allow_partial=True), out, workers=1)
    assert manifest.classes == small.WNIDS
    assert manifest.train.counts == counts


def cut_train(at):
    def cut(root):
        data = (root / TRAIN_TAR).read_bytes()
        with tarfile.open(root / TRAIN_TAR) as tar:
            second = tar.getmembers()[1]
        place = {
            "header": second.offset + 100,
            "body": second.offset_data + 700,
            "boundary": second.offset,
        }[at]
        (root / TRAIN_TAR).write_bytes(data[:place])

    return cut


def cut_class(at):
    def cut(root):
        whole = small.tar(small.images()["n01443537"])
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            third = tar.getmembers()[2]
        place = {
            "header": third.offset + 100,
            "body": third.offset_data + 7,
            "boundary": third.offset,
        }[at]
        inner = {f"{wnid}.tar": small.tar(files) for wnid, files in small.images().items()}
        inner["n01443537.tar"] = whole[:place]
        (root / TRAIN_TAR).write_bytes(small.tar(inner))

    return cut


def class_twice(root):
    inner = [(f"{wnid}.tar", small.tar(small.images()[wnid])) for wnid in small.WNIDS]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in [*inner, inner[0]]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (root / TRAIN_TAR).write_bytes(buffer.getvalue())


def image_twice(root):
    name, data = next(iter(small.images()["n01443537"].items()))
    repack(root, lambda classes: classes["n01443537"].update({f"more/{name}": data}))


def member(name, **values):
    def add(root):
        inner = {f"{wnid}.tar": small.tar(files) for wnid, files in small.images().items()}
        buffer = io.BytesIO(inner["n01443537.tar"])
        with tarfile.open(fileobj=buffer, mode="a") as archive:
            info = tarfile.TarInfo(name)
            for key, value in values.items():
                setattr(info, key, value)
            archive.addfile(info)
        inner["n01443537.tar"] = buffer.getvalue()
        (root / TRAIN_TAR).write_bytes(small.tar(inner))

    return add


def compressed(root):
    import gzip

    (root / VAL_TAR).write_bytes(gzip.compress((root / VAL_TAR).read_bytes()))


def unknown_class(root):
    repack(root, lambda classes: classes.update(n99999999=classes.pop("n01443537")))


def too_short_truth(root):
    small.write_devkit(root, small.TRUTH[:-1])


def wrong_label(root):
    small.write_devkit(root, (*small.TRUTH[:-1], 9))


def empty_devkit(root):
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz"):
        pass


def moved_validation_image(root):
    validation_by_class(root)
    name = "ILSVRC2012_val_00000001.JPEG"
    (root / "val/n01443537" / name).rename(root / "val/n01440764" / name)


def both_forms(root):
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *(
            (cut_train(at), rf"{TRAIN_TAR}.* is (cut|not a folder)")
            for at in ("header", "body", "boundary")
        ),
        *(
            (cut_class(at), r"archive n01443537.tar is (cut|not a folder)")
            for at in ("header", "body", "boundary")
        ),
        (class_twice, "has the class n01440764 twice in train"),
        (image_twice, r"holds train/n01443537/n01443537_7.JPEG twice"),
        (member("../../out.JPEG"), r"archive n01443537.tar: member '../../out.JPEG' leads out"),
        (member("/out.JPEG"), r"member '/out.JPEG' leads out"),
        (member("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link to '/etc/passwd'"),
        (member("a", type=tarfile.LNKTYPE, linkname="b"), "is a link to 'b'"),
        (member("a", type=tarfile.CHRTYPE), "is neither a plain file nor a folder"),
        (compressed, f"{VAL_TAR} is compressed: unpack it"),
        (unknown_class, "n99999999 is no class of the development kit"),
        (too_short_truth, r"val/ILSVRC2012_val_00000006.JPEG has no line in the ground truth"),
        (wrong_label, r"ground_truth.txt, line 6: '9' is not one of 1 to 3"),
        (empty_devkit, "has no meta.mat: fetch"),
        (moved_validation_image, "lies in the folder n01440764 and is n01443537 in the ground"),
        (both_forms, f"has {TRAIN_TAR} and train/: take one of them out"),
    ],
)
def test_what_is_wrong_is_refused_even_in_part(archives, tmp_path, change, problem):
    change(archives)
    with pytest.raises(ValueError, match=problem) as caught:
        prepare(ImageNetSource(archives, allow_partial=True), tmp_path / "set", workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_odd_images_are_taken_stored_again_or_rejected_by_name(archives, tmp_path):
    odd = {
        "bomb.JPEG": png_of_size(12000, 12000),
        "empty.JPEG": b"",
        "words.JPEG": b"no image",
        "cut.JPEG": jpeg(5)[:-50],
        "cmyk.JPEG": encoded(picture(6).convert("CMYK")),
        "png.JPEG": encoded(picture(7), "PNG"),
        "grey.JPEG": encoded(picture(8).convert("L")),
        "._n01443537_7.JPEG": b"left by a desktop",
    }
    repack(archives, lambda classes: classes["n01443537"].update(odd))
    manifest = prepare(ImageNetSource(archives, allow_partial=True), tmp_path / "set", workers=1)
    assert (manifest.rejected, manifest.reencoded) == (5, 1)
    lines = (manifest.root / REJECTED_NAME).read_text().splitlines()
    reasons = {Path(entry["origin"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons["bomb.JPEG"].startswith("12000x12000 pixels over the limit")
    assert reasons["empty.JPEG"] == "empty file"
    assert reasons["words.JPEG"].startswith("not a JPEG")
    assert reasons["cut.JPEG"].startswith("cannot be decoded")
    assert reasons["._n01443537_7.JPEG"] == "hidden file"
    samples = stored(manifest, "train")
    assert odd["png.JPEG"] in [sample.image for sample in samples if sample.extension == "png"]
    assert odd["grey.JPEG"] in [sample.image for sample in samples]
    assert verify(manifest.root, workers=1) == []


def test_images_of_validation_that_are_in_train_are_reported(archives, tmp_path):
    twin = small.validation()["ILSVRC2012_val_00000004.JPEG"]
    repack(archives, lambda classes: classes["n02012849"].update({"n02012849_7.JPEG": twin}))
    manifest = run(archives, tmp_path / "set")
    assert manifest.duplicates == 1
    assert Manifest.load(manifest.root) == manifest
    assert json.loads((manifest.root / DUPLICATES_NAME).read_text()) == {
        "origin": "val/ILSVRC2012_val_00000004.JPEG",
        "split": "val",
        "same_as": ["train/n02012849/n02012849_7.JPEG"],
    }
    assert verify(manifest.root, workers=1) == []
    (manifest.root / DUPLICATES_NAME).unlink()
    assert [finding.path for finding in verify(manifest.root, workers=1)] == [DUPLICATES_NAME]


def test_a_source_that_changed_in_between_is_refused(archives, tmp_path):
    out = tmp_path / "set"
    with pytest.raises(InterruptedError):
        run(archives, out, progress=interrupt)
    before = contents(out)
    archive = archives / TRAIN_TAR
    status = archive.stat()
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match=r"source was modified since the unfinished preparation"):
        run(archives, out)
    repack(archives, lambda classes: classes["n01443537"].update(more=jpeg(3)))
    with pytest.raises(ValueError, match=r"unfinished preparation from other images: another"):
        prepare(ImageNetSource(archives, allow_partial=True), out, samples_per_shard=5)
    assert contents(out) == before


def test_another_preparation_is_not_gone_on_with(archives, tmp_path):
    out = tmp_path / "set"
    with pytest.raises(InterruptedError):
        run(archives, out, progress=interrupt)
    with pytest.raises(ValueError, match=r"unfinished preparation with seed=0, now it is 1: give"):
        run(archives, out, seed=1)


def test_a_resumed_preparation_packs_only_what_is_left(archives, tmp_path):
    out = tmp_path / "set"

    def after_three(now):
        if now.images == 14:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(archives, out, progress=after_three)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".partial/set/*.tar")}
    assert len(kept) == 3
    (out / ".partial/set/train-000001.tar").write_bytes(b"lost its end when the power failed")
    seen = []
    run(archives, out, progress=seen.append)
    assert seen[0].images == 9
    again = {name for name, time in kept.items() if (out / name).stat().st_mtime_ns != time}
    assert again == {"train-000001.tar"}
    run(archives, tmp_path / "reference")
    assert contents(out) == contents(tmp_path / "reference")


@pytest.mark.parametrize("change", ["unreadable", "vanished"])
def test_a_file_that_cannot_be_read_stops_and_loses_nothing(archives, tmp_path, change):
    class_folders(archives)
    out = tmp_path / "set"
    last = Work(out / ".partial")
    victim = archives / "train/n01443537/n01443537_7.JPEG"
    if change == "unreadable":
        victim.unlink()
        victim.symlink_to("/proc/self/mem")  # reading its start fails whoever asks

    def vanish(now):
        if change == "vanished" and victim.exists():
            victim.unlink()

    with pytest.raises(ValueError, match=r"cannot read .*n01443537_7.JPEG \(.*\): make it"):
        run(archives, out, progress=vanish, samples_per_shard=2)
    assert list(last.records.iterdir())
    assert not list(last.set.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_keeps_the_finished_shards(archives, tmp_path, small_disk):
    out = small_disk / "set"

    def fill(now):
        if now.images == 9:
            with pytest.raises(OSError, match="space"), (small_disk / "other").open("wb") as file:
                file.write(bytes(2**20))

    with pytest.raises(ValueError, match=r"disk of .* is full, and 0.\d+ GB more are needed at"):
        run(archives, out, progress=fill)
    finished = sorted(path.name for path in out.glob(".partial/set/*"))
    assert len(finished) == 4
    assert not any("partial" in name for name in finished)
    (small_disk / "other").unlink()
    run(archives, out)
    run(archives, tmp_path / "reference")
    assert contents(out) == contents(tmp_path / "reference")


def test_what_does_not_fit_on_the_disk_is_not_begun(archives, small_disk):
    (small_disk / "other").write_bytes(bytes(2**20 - 100_000))
    with pytest.raises(ValueError, match=r"GB free and 0.\d+ GB are needed: make room"):
        run(archives, small_disk / "set")
    assert not list(small_disk.glob("set/.partial/set/*"))


def test_resized_and_trusted_sets_are_verified_too(archives, tmp_path):
    for treatment in (Treatment(trust=True), Treatment(resize_short=22, quality=80)):
        out = tmp_path / "-".join(treatment.settings)
        manifest = run(archives, out, treatment=treatment)
        assert manifest.settings.items() >= treatment.settings.items()
        assert verify(out, workers=1) == []
        assert (manifest.reencoded > 0) == (treatment.resize_short is not None)
        assert run(archives, out, treatment=treatment) == manifest
        with pytest.raises(ValueError, match="holds a set prepared with"):
            run(archives, out)
