"""Every kind of damage is found, and named where it lies."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from pictures import encoded, jpeg, picture

from data_prep import images
from data_prep.images import Treatment
from data_prep.manifest import MANIFEST_NAME, REJECTED_NAME
from data_prep.prepare import prepare
from data_prep.sources import open_source
from data_prep.verify import verify, verify_quickly
from data_prep.writer import ShardWriter


def members(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def problems(root):
    return [str(finding) for finding in verify(root, workers=1)]


def test_a_good_set_has_no_findings(manifest):
    seen = []
    assert verify(manifest.root, workers=2, progress=lambda *now: seen.append(now)) == []
    assert seen[-1] == (27, 27)
    assert len(seen) == 5


@pytest.mark.parametrize(
    "treatment", [Treatment(), Treatment(trust=True), Treatment(resize_short=64)]
)
def test_the_images_that_count_are_the_same_in_packing_and_in_verifying(
    treatment, tmp_path, monkeypatch
):
    """Whatever is among them: refused, stored again, PNG, grey, small."""
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    found = [jpeg(seed, 150, 120 + seed) for seed in range(12)]
    found[3:3] = [
        b"no image",
        encoded(picture(20, 150, 130).convert("CMYK")),
        encoded(picture(21, 150, 130), "PNG"),
        encoded(picture(22, 150, 130).convert("L")),
        jpeg(23, 20, 20),
    ]
    for number, data in enumerate(found):
        (folder / f"{number:02}.jpg").write_bytes(data)

    def means(name, count):
        for limit in ("COUNTED_IMAGES", "COUNTED_TREATED"):
            monkeypatch.setattr(images, limit, count)
        root = tmp_path / name
        source = open_source("folder", folder.parents[1])
        made = prepare(source, root, samples_per_shard=10, treatment=treatment, workers=1)
        assert made.rejected == 1
        assert verify(root, workers=1) == []
        return made.channel_mean

    assert len({means(f"set-{count}", count) for count in (1, 2, 5, 99)}) == 4


def test_no_set_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="reprise prep"):
        verify(tmp_path)


def test_any_flipped_byte_is_found_and_placed(manifest):
    shard = manifest.root / "train-000001.tar"
    whole = shard.read_bytes()
    all_members = members(shard)
    end = all_members[-1].offset_data + 512
    reach = max(member.size for member in all_members) + 512
    random = np.random.default_rng(0)
    for offset in random.integers(0, end, 40).tolist():
        flip(shard, offset)
        findings = verify(manifest.root, workers=1)
        assert {finding.path for finding in findings} == {shard.name}, offset
        assert findings[0].problem == "sha256 differs from the manifest"
        places = [f.offset for f in findings if f.offset is not None]
        assert places, offset
        assert min(abs(offset - place) for place in places) <= reach, offset
        shard.write_bytes(whole)
    flip(shard, len(whole) - 1)
    assert f"{shard.name}, offset {end}: the filling at its end is not empty" in problems(
        manifest.root
    )


def test_a_flipped_byte_in_an_image_names_its_sample(manifest):
    shard = manifest.root / "train-000001.tar"
    target = members(shard)[4]
    flip(shard, target.offset_data + target.size // 2)
    key = target.name.removesuffix(".jpg")
    assert problems(manifest.root) == [
        f"{shard.name}: sha256 differs from the manifest",
        f"{shard.name}, sample {key}, offset {target.offset_data}: "
        f"{target.name} does not match its checksum",
    ]


@pytest.mark.parametrize("place", ["header", "body", "boundary", "before the end", "empty"])
def test_a_cut_shard_is_found(manifest, place):
    shard = manifest.root / "train-000002.tar"
    whole = shard.read_bytes()
    third, last = members(shard)[4], members(shard)[-1]
    cut = {
        "header": third.offset + 100,
        "body": third.offset_data + 10,
        "boundary": third.offset,
        "before the end": last.offset_data + 512,
        "empty": 0,
    }[place]
    shard.write_bytes(whole[:cut])
    found = problems(manifest.root)
    assert f"{shard.name}: has {cut} bytes, the manifest says {len(whole)}" in found
    assert any("cut" in problem or "header" in problem for problem in found)
    if place != "before the end":
        assert any("the manifest says 6" in problem for problem in found)


def test_exchanged_files_are_named(manifest):
    first, second = (manifest.root / f"train-00000{n}" for n in (0, 1))
    for suffix in (".idx", ".tar"):
        kept = manifest.root.parent / "kept"
        shutil.move(first.with_suffix(suffix), kept)
        shutil.move(second.with_suffix(suffix), first.with_suffix(suffix))
        shutil.move(kept, second.with_suffix(suffix))
        found = problems(manifest.root)
        if suffix == ".idx":
            assert found == [
                "train-000000.idx: is the index of shard train-000001.tar",
                "train-000001.idx: is the index of shard train-000000.tar",
            ]
    assert "train-000000.tar: is shard train-000001.tar" in found
    assert "train-000001.tar: is shard train-000000.tar" in found


def test_missing_and_foreign_files_are_named(manifest):
    (manifest.root / "train-000000.tar").unlink()
    (manifest.root / "test-000001.idx").unlink()
    (manifest.root / "notes.txt").write_text("mine")
    assert problems(manifest.root) == [
        "test-000001.idx: cannot be read (No such file or directory)",
        "train-000000.tar: cannot be read (No such file or directory)",
        "notes.txt: is not part of the set",
    ]


def test_a_damaged_index_is_found(manifest):
    flip(manifest.root / "train-000000.idx", 20)
    assert problems(manifest.root) == ["train-000000.idx: sha256 differs from the manifest"]


def test_a_damaged_manifest_or_list_of_rejects_is_found(manifest):
    (manifest.root / REJECTED_NAME).write_text("{}\n{")
    assert problems(manifest.root) == [
        f"{REJECTED_NAME}: line 2 is damaged",
        f"{REJECTED_NAME}: has 2 lines, the manifest says 0",
    ]
    (manifest.root / MANIFEST_NAME).write_text("{")
    (finding,) = verify(manifest.root)
    assert finding.path == MANIFEST_NAME
    assert "damaged" in finding.problem


@pytest.mark.parametrize(
    ("key", "value"),
    [("channel_mean", [0.5, 0.5, 0.5]), ("channel_std", [0.1, 0.1, 0.1]), ("image_size", [8] * 4)],
)
def test_numbers_that_are_not_those_of_the_images_are_found(manifest, key, value):
    path = manifest.root / MANIFEST_NAME
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))
    (finding,) = verify(manifest.root, workers=1)
    assert finding.path == MANIFEST_NAME
    assert finding.problem.startswith(f"says {key} ")


def test_counts_that_are_not_those_of_the_labels_are_found(manifest):
    path = manifest.root / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["splits"]["train"]["counts"] = [7, 5, 6]
    path.write_text(json.dumps(content))
    (problem,) = problems(manifest.root)
    assert problem == f"{MANIFEST_NAME}: says counts of train (7, 5, 6), the images have (6, 6, 6)"


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (("train-00000000", jpeg(1), "jpg", 1000), "label '1000' is not one of 0 to 2"),
        (("train-00000000", jpeg(1), "jpg", -1), "label '-1' is not one of 0 to 2"),
        (("train-00000000", jpeg(1)[:-90], "jpg", 1), "cannot be decoded"),
        (("train-00000000", encoded(picture(1), "PNG"), "jpg", 1), "holds a png image"),
        (("train-00000000", jpeg(1), "webp", 1), "holds webp, cls and not"),
    ],
)
def test_a_shard_that_was_written_wrong_is_found(manifest, sample, problem):
    """Hashes that agree do not make a sample good."""
    writer = ShardWriter(manifest.root, "train-000000")
    writer.add(*sample)
    shard = writer.close()
    path = manifest.root / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"][0] = vars(shard)
    content["splits"]["train"]["counts"] = [1, 6, 6]
    content["accepted"] = content["found"] = 22
    path.write_text(json.dumps(content))
    (finding,) = verify(manifest.root, workers=1)
    assert (finding.path, finding.sample) == (shard.name, "train-00000000")
    assert finding.offset >= 512
    assert problem in finding.problem


def test_a_dropped_label_is_found(manifest):
    shard = manifest.root / "train-000000.tar"
    label = members(shard)[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: label.offset] + data[label.offset_data + 512 :])
    assert any(
        "holds jpg and not one of jpg or png, then cls" in p for p in problems(manifest.root)
    )


def quick_problems(root):
    return [str(finding) for finding in verify_quickly(root)]


def test_the_quick_check_finds_what_is_missing_cut_exchanged_or_foreign(manifest):
    assert verify_quickly(manifest.root) == []
    first, second = (manifest.root / f"train-00000{n}.idx" for n in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    shard = manifest.root / "train-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (manifest.root / "test-000000.tar").unlink()
    (manifest.root / "notes.txt").write_text("mine")
    size = shard.stat().st_size
    assert quick_problems(manifest.root) == [
        "test-000000.tar: cannot be read (No such file or directory)",
        "train-000000.idx: is the index of shard train-000001.tar",
        "train-000001.idx: is the index of shard train-000000.tar",
        f"train-000002.tar: has {size} bytes, the manifest says {size + 512}",
        "notes.txt: is not part of the set",
    ]


def test_the_quick_check_reads_no_shard(manifest):
    flip(manifest.root / "train-000001.tar", 700)
    assert verify_quickly(manifest.root) == []
    (manifest.root / MANIFEST_NAME).write_text("{")
    (finding,) = verify_quickly(manifest.root)
    assert finding.path == MANIFEST_NAME
