"""Shards and their indices, held to the tools that others read them with."""

import hashlib
import os
import tarfile
import zlib

import pytest
import webdataset
from pictures import contents, encoded, jpeg, picture

from data_prep.writer import ShardWriter

SAMPLES = [
    ("train-00000000", jpeg(0), "jpg", 3),
    ("train-00000001", encoded(picture(1), "PNG"), "png", 12),
    ("train-00000003", jpeg(2, 33, 47), "jpg", 0),
]


def write(folder):
    folder.mkdir()
    writer = ShardWriter(folder, "train-000000")
    for sample in SAMPLES:
        writer.add(*sample)
    return writer.close()


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "set")


def test_the_record_describes_the_files(shard, tmp_path):
    files = contents(tmp_path / "set")
    assert sorted(files) == [shard.index, shard.name] == ["train-000000.idx", "train-000000.tar"]
    assert shard.samples == 3
    assert shard.bytes == len(files[shard.name])
    assert shard.sha256 == hashlib.sha256(files[shard.name]).hexdigest()
    assert shard.index_sha256 == hashlib.sha256(files[shard.index]).hexdigest()


def test_equal_samples_give_equal_bytes(shard, tmp_path):
    write(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "set")


def test_a_system_that_writes_less_than_it_is_asked_to_is_asked_again(shard, tmp_path, monkeypatch):
    write_pieces = os.writev

    def write_a_little(descriptor, pieces):
        return write_pieces(descriptor, [b"".join(pieces)[:700]])

    monkeypatch.setattr("data_prep.writer.os.writev", write_a_little)
    assert write(tmp_path / "again") == shard
    assert contents(tmp_path / "again") == contents(tmp_path / "set")


def test_it_is_a_plain_tar_without_times_and_owners(shard, tmp_path):
    with tarfile.open(tmp_path / "set" / shard.name) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            f"{key}.{ext}" for key, _, image, _ in SAMPLES for ext in (image, "cls")
        ]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.gname) for m in members} == {(0, 0, 0, 0o644, "")}
        for key, image, extension, label in SAMPLES:
            assert tar.extractfile(f"{key}.{extension}").read() == image
            assert tar.extractfile(f"{key}.cls").read() == str(label).encode()
    assert (tmp_path / "set" / shard.name).stat().st_size % tarfile.RECORDSIZE == 0


def test_the_headers_are_those_of_tarfile(shard, tmp_path):
    data = (tmp_path / "set" / shard.name).read_bytes()
    with tarfile.open(tmp_path / "set" / shard.name) as tar:
        for member in tar:
            assert member.uname == f"{zlib.crc32(tar.extractfile(member).read()):08x}"
            header = data[member.offset : member.offset + tarfile.BLOCKSIZE]
            assert header == member.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("with_tar", [True, False])
def test_the_index_is_that_of_dali(shard, tmp_path, monkeypatch, with_tar):
    from wds2idx import IndexCreator

    if not with_tar:
        monkeypatch.setattr("wds2idx.which", lambda name: None)
    theirs = tmp_path / "theirs.idx"
    with IndexCreator(str(tmp_path / "set" / shard.name), str(theirs), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "set" / shard.index).read_bytes() == theirs.read_bytes()


def test_webdataset_reads_it(shard, tmp_path):
    url = str(tmp_path / "set" / shard.name)
    samples = list(webdataset.WebDataset([url], shardshuffle=False))
    read = [
        (s["__key__"], s[ext], ext, int(s["cls"]))
        for s in samples
        for ext in ("jpg", "png")
        if ext in s
    ]
    assert read == SAMPLES


def test_dali_reads_it(shard, tmp_path):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read(extension):
        image, label = fn.readers.webdataset(
            paths=[str(tmp_path / "set" / shard.name)],
            index_paths=[str(tmp_path / "set" / shard.index)],
            ext=[extension, "cls"],
            missing_component_behavior="skip",
        )
        return image, label

    seen = []
    for extension, count in (("jpg", 2), ("png", 1)):
        pipe = read(extension)
        pipe.build()
        for _ in range(count):
            image, label = (output.at(0) for output in pipe.run())
            seen.append((bytes(image), extension, int(bytes(label))))
    assert sorted(seen) == sorted(sample[1:] for sample in SAMPLES)


def test_a_shard_without_samples_leaves_no_file(tmp_path):
    assert ShardWriter(tmp_path, "train-000000").close() is None
    assert not contents(tmp_path)
