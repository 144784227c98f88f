"""What each source lists and reads."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from pictures import class_folders, jpeg, pack
from PIL import Image

from data_prep.sources import open_source


def listed(source, scratch):
    scratch.mkdir(exist_ok=True)
    return source.open(scratch)


def labelled(listing):
    return sorted((item.split, item.label, item.origin) for item in listing.items)


def read_all(listing):
    return {item.origin: listing.reader.read(item) for item in listing.items}


@pytest.mark.parametrize(
    ("kind", "path", "problem"),
    [
        ("coco", "x", "unknown source 'coco': choose one of digits, folder, cifar"),
        ("folder", None, "needs the path"),
        ("digits", "x", "reads no x"),
    ],
)
def test_a_wrong_kind_or_path_is_refused(kind, path, problem):
    with pytest.raises(ValueError, match=problem):
        open_source(kind, path)


def test_digits_are_split_alike_in_every_class(tmp_path):
    listing = listed(open_source("digits"), tmp_path)
    assert listing.classes == tuple("0123456789")
    train = np.bincount([i.label for i in listing.items if i.split == "train"])
    test = np.bincount([i.label for i in listing.items if i.split == "test"])
    assert (train.sum(), test.sum()) == (1437, 360)
    assert np.abs(test - (train + test) / 5).max() < 1


def test_digits_are_the_scans_enlarged(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    listing = listed(open_source("digits"), tmp_path)
    for number in (0, 5, 1796):
        item = next(i for i in listing.items if i.origin == f"digit {number}")
        assert item.label == digits.target[number]
        image = Image.open(io.BytesIO(listing.reader.read(item)))
        assert (image.mode, image.size, image.format) == ("L", (32, 32), "PNG")
        # The mean of each 4x4 block comes close to the scan's 0..16, scaled to 0..255.
        blocks = np.asarray(image, dtype=float).reshape(8, 4, 8, 4).mean((1, 3))
        scan = digits.images[number] * 255 / 16
        assert np.corrcoef(blocks.ravel(), scan.ravel())[0, 1] > 0.98
        assert abs(blocks.mean() - scan.mean()) < 4


@pytest.mark.parametrize(
    ("archive", "leading"),
    [
        (None, ""),
        ("insects.tar", ""),
        ("insects.tar", "insects/"),
        ("insects.tar.gz", "./"),
        ("insects.tgz", "a/"),
    ],
)
def test_a_folder_and_its_archives_list_the_same(source_folder, tmp_path, archive, leading):
    path = pack(source_folder, tmp_path / archive, leading) if archive else source_folder
    listing = listed(open_source("folder", path), tmp_path / "scratch")
    base = "" if leading == "./" else leading
    assert listing.name == "insects"
    assert listing.classes == ("ant", "bee", "cow")
    expected = [
        (split, label, f"{base}{split}/{name}/{n:03d}.jpg")
        for split, count in (("test", 3), ("train", 6))
        for label, name in enumerate(listing.classes)
        for n in range(count)
    ]
    assert labelled(listing) == expected
    assert not listing.rejected
    for origin, data in read_all(listing).items():
        assert data == (source_folder / origin.removeprefix(base)).read_bytes()


def test_what_is_no_image_of_a_class_is_listed_as_rejected(source_folder, tmp_path):
    (source_folder / "README.md").write_text("about")
    (source_folder / "train" / "loose.jpg").write_bytes(jpeg(1))
    (source_folder / "train" / "ant" / "._000.jpg").write_bytes(jpeg(1))
    (source_folder / "train" / ".cache").mkdir()
    (source_folder / "train" / ".cache" / "x.jpg").write_bytes(jpeg(1))
    (source_folder / "train" / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    with (source_folder / "train" / "ant" / "huge.jpg").open("wb") as file:
        file.truncate(2**29)
    (source_folder / "train" / "ant" / "young").mkdir()
    (source_folder / "train" / "ant" / "young" / "1.jpg").write_bytes(jpeg(1))
    listing = listed(open_source("folder", source_folder), tmp_path / "scratch")
    assert {entry.origin: (entry.split, entry.reason) for entry in listing.rejected} == {
        "README.md": ("", "outside of train, val, test"),
        "train/loose.jpg": ("train", "outside of a class folder"),
        "train/ant/._000.jpg": ("train", "hidden file"),
        "train/.cache/x.jpg": ("train", "hidden file"),
        "train/ant/gone.jpg": ("train", "a link that leads nowhere"),
        "train/ant/huge.jpg": ("train", "file of 536870912 bytes, over the limit of 268435456"),
    }
    assert ("train", 0, "train/ant/young/1.jpg") in labelled(listing)
    assert listing.classes == ("ant", "bee", "cow")


def test_an_empty_class_folder_keeps_its_id(source_folder, tmp_path):
    (source_folder / "train" / "bat").mkdir()
    for path in (source_folder, pack(source_folder, tmp_path / "insects.tar")):
        listing = listed(open_source("folder", path), tmp_path / "scratch")
        assert listing.classes == ("ant", "bat", "bee", "cow")
        assert {item.label for item in listing.items} == {0, 2, 3}


def test_a_linked_class_folder_is_followed_and_a_circle_refused(source_folder, tmp_path):
    elsewhere = class_folders(tmp_path / "more") / "train" / "ant"
    (source_folder / "train" / "dog").symlink_to(elsewhere)
    listing = listed(open_source("folder", source_folder), tmp_path / "scratch")
    assert sum(item.label == listing.classes.index("dog") for item in listing.items) == 6
    (source_folder / "train" / "eel").symlink_to(source_folder)
    with pytest.raises(ValueError, match="are one folder: remove one of the links"):
        listed(open_source("folder", source_folder), tmp_path / "scratch")


def test_folders_that_make_no_set_are_refused(source_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders train/<class>: arrange"):
        listed(open_source("folder", tmp_path / "empty"), tmp_path / "scratch")
    with pytest.raises(FileNotFoundError, match="does not exist: give a folder"):
        listed(open_source("folder", tmp_path / "none"), tmp_path / "scratch")
    (source_folder / "test" / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=r"cannot list .*loop.jpg"):
        listed(open_source("folder", source_folder), tmp_path / "scratch")
    (source_folder / "test" / "loop.jpg").unlink()
    (source_folder / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="'dog' in test and not in train"):
        listed(open_source("folder", source_folder), tmp_path / "scratch")


def member(name, kind=tarfile.REGTYPE, link="", data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("name", "kind", "link", "problem"),
    [
        ("train/ant/x.jpg", tarfile.SYMTYPE, "/etc/passwd", "is a link to '/etc/passwd'"),
        ("train/ant/x.jpg", tarfile.LNKTYPE, "train/ant/000.jpg", "is a link to"),
        ("train/ant/x.jpg", tarfile.CHRTYPE, "", "neither a plain file nor a folder"),
        ("train/ant/x.jpg", tarfile.FIFOTYPE, "", "neither a plain file nor a folder"),
        ("train/../../x.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("/train/ant/x.jpg", tarfile.REGTYPE, "", "leads out of the archive"),
        ("./train/ant/000.jpg", tarfile.REGTYPE, "", "twice"),
    ],
)
def test_an_unsafe_archive_is_refused_as_a_whole(
    source_folder, tmp_path, name, kind, link, problem
):
    archive = pack(source_folder, tmp_path / "insects.tar")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(*member(name, kind, link))
    with pytest.raises(ValueError, match=problem):
        listed(open_source("folder", archive), tmp_path / "scratch")


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_archive_is_refused_wherever_it_is_cut(source_folder, tmp_path, packed):
    archive = pack(source_folder, tmp_path / ("a.tar.gz" if packed else "a.tar"))
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile()]
    middle = members[len(members) // 2]
    boundary, last = middle.offset, members[-1].offset_data + 1
    cuts = (len(whole) // 2, len(whole) - 9) if packed else (boundary, boundary + 100, last)
    for cut in cuts:
        archive.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut short|damaged"):
            listed(open_source("folder", archive), tmp_path / "scratch")
    archive.write_bytes(b"no archive at all" * 99)
    with pytest.raises(ValueError, match=r"is not a folder, a tar or a tar\.gz"):
        listed(open_source("folder", archive), tmp_path / "scratch")


class _Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2's str, as in the published batches."""

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + len(obj).to_bytes(4, "little") + obj)
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012

    def reducer_override(self, obj):
        """Arrays carry their values as str, with numpy's module name of that time."""
        if isinstance(obj, np.ndarray):
            state = (1, obj.shape, obj.dtype, False, obj.tobytes())
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state
        return NotImplemented


def old_pickle(content):
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_batches(root, coarse):
    """The published layout with few images per batch; returns folder, pixels and labels."""
    folder = root / ("cifar-100-python" if coarse else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = (
        ["train", "test"] if coarse else [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    )
    classes = 100 if coarse else 10
    labels_key = b"fine_labels" if coarse else b"labels"
    names_key = b"fine_label_names" if coarse else b"label_names"
    class_names = [b"class %d" % (classes - n) for n in range(classes)]
    expected = {}
    for name in names:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = random.integers(0, classes, 4).tolist()
        batch = {b"data": data, labels_key: labels, b"coarse_labels": [0] * 4}
        (folder / name).write_bytes(old_pickle(batch))
        expected |= {f"{name} image {n}": (data[n], labels[n]) for n in range(4)}
    meta = old_pickle({names_key: class_names})
    (folder / ("meta" if coarse else "batches.meta")).write_bytes(meta)
    return folder, expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
def test_published_cifar_batches(tmp_path, coarse, packed):
    folder, expected = cifar_batches(tmp_path / "download", coarse)
    path = pack(folder.parent, tmp_path / "cifar.tar.gz") if packed else folder
    listing = listed(open_source("cifar", path), tmp_path / "scratch")
    assert listing.name == ("cifar100" if coarse else "cifar10")
    assert listing.classes[:2] == (("class 100", "class 99") if coarse else ("class 10", "class 9"))
    assert {item.origin for item in listing.items} == set(expected)
    for item in listing.items:
        values, label = expected[item.origin]
        assert item.label == label
        assert item.split == ("test" if "test" in item.origin else "train")
        pixels = np.asarray(Image.open(io.BytesIO(listing.reader.read(item))))
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1).ravel(), values)


class _Attack:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("data_batch_2", _Attack(), r"no CIFAR batch \(it asks for .*eval"),
        ("data_batch_2", [1, 2], "no CIFAR batch"),
        ("data_batch_2", {b"labels": [1]}, "data_batch_2 has no 'data'"),
        ("data_batch_2", {b"data": np.zeros((2, 3000), np.uint8)}, "rows of 3072 bytes"),
        ("data_batch_2", {b"data": np.zeros((2, 3072), np.int32)}, "rows of 3072 bytes"),
        (
            "test_batch",
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
            "1 labels for 2 images",
        ),
        (
            "test_batch",
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
            "the label 10, valid are 0 to 9",
        ),
    ],
)
def test_bad_cifar_batches_are_refused(tmp_path, name, content, problem):
    folder, _ = cifar_batches(tmp_path, coarse=False)
    (folder / name).write_bytes(old_pickle(content))
    with pytest.raises(ValueError, match=problem):
        listed(open_source("cifar", folder), tmp_path / "scratch")


def test_a_missing_or_cut_cifar_batch_is_refused(tmp_path):
    folder, _ = cifar_batches(tmp_path, coarse=False)
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="data_batch_3 is no CIFAR batch"):
        listed(open_source("cifar", folder), tmp_path / "scratch")
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="lacks data_batch_3 of cifar10"):
        listed(open_source("cifar", folder), tmp_path / "scratch")


def test_class_folders_as_cifar_need_its_number_of_classes(source_folder, tmp_path):
    with pytest.raises(ValueError, match="has 3 class folders and CIFAR 10 or 100"):
        listed(open_source("cifar", source_folder), tmp_path / "scratch")
    for name in ("dog", "eel", "fox", "gnu", "hen", "ibis", "jay"):
        (source_folder / "train" / name).mkdir()
    listing = listed(open_source("cifar", source_folder), tmp_path / "scratch")
    assert (listing.name, len(listing.classes), len(listing.items)) == ("cifar10", 10, 27)
