"""The manifest: exact round trip, and refusal of what is damaged or contradicts itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import MANIFEST_NAME, Manifest


def edit(manifest, change):
    path = manifest.root / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_loading_gives_what_was_saved(manifest):
    assert Manifest.load(manifest.root) == manifest
    before = (manifest.root / MANIFEST_NAME).read_bytes()
    manifest.save()
    assert (manifest.root / MANIFEST_NAME).read_bytes() == before


def test_it_holds_no_path_of_this_machine(manifest):
    assert str(manifest.root.parent) not in (manifest.root / MANIFEST_NAME).read_text()


def test_the_numbers_are_those_of_the_source(manifest):
    assert manifest.name == "insects"
    assert manifest.classes == ("ant", "bee", "cow")
    assert manifest.train.counts == (6, 6, 6)
    assert manifest.evaluation.name == "test"
    assert manifest.evaluation.counts == (3, 3, 3)
    assert [shard.samples for shard in manifest.train.shards] == [6, 6, 6]
    assert [shard.samples for shard in manifest.evaluation.shards] == [4, 5]
    assert manifest.image_size == (8, 13, 10, 20)
    assert (manifest.found, manifest.accepted, manifest.rejected) == (27, 27, 0)


def test_the_class_map_hash_depends_on_names_and_order(manifest):
    hashes = {
        dataclasses.replace(manifest, classes=classes).class_map_sha256
        for classes in (("ant", "bee"), ("bee", "ant"), ("ant", "be"), ("ant,bee",))
    }
    assert len(hashes) == 4


def test_no_set_names_the_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json.*reprise prep"):
        Manifest.load(tmp_path)


def test_no_set_at_a_relative_path_names_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as refused:
        Manifest.load(Path("data/photos"))
    assert str(refused.value) == (
        f"data/photos holds no manifest.json (a relative path starts at the current folder, here "
        f"{tmp_path}), so no finished shard set: make one with `reprise prep KIND --source IMAGES "
        "--out data/photos`"
    )


def test_no_set_is_to_be_made_where_other_files_are(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match="--out FOLDER"):
        Manifest.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="--out FOLDER"):
        Manifest.load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(schema_version=1), "schema version 1, this release reads 2"),
        (lambda c: c.pop("schema_version"), "damaged"),
        (lambda c: c.pop("splits"), "damaged"),
        (lambda c: c.update(image_size=[1, 2]), "damaged"),
        (lambda c: c["splits"]["train"]["shards"][0].update(owner="me"), "damaged"),
        (lambda c: c["classes"].reverse(), "class_map_sha256"),
        (lambda c: c.update(accepted=28), "accepted is 28"),
        (lambda c: c.update(found=28), "is not found 28"),
        (lambda c: c["splits"].pop("train"), "has no split 'train'"),
        (lambda c: c["splits"]["test"].update(shards=[]), "'test' holds no samples"),
        (lambda c: c["splits"]["train"].update(counts=[6, 6, 7]), "counts 19 samples by class"),
        (lambda c: c["splits"]["train"].update(counts=[9, 9]), "counts 2 classes of 3"),
        (lambda c: c["splits"]["train"].update(name="val"), "calls itself 'val'"),
        (lambda c: c["splits"]["train"]["shards"][0].update(name="../x.tar"), "not a plain name"),
        (lambda c: c["splits"]["train"]["shards"][0].update(name="test-000000.tar"), "share a"),
    ],
)
def test_a_bad_manifest_is_refused(manifest, change, problem):
    edit(manifest, change)
    with pytest.raises(ValueError, match=problem) as caught:
        Manifest.load(manifest.root)
    assert "reprise prep" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_damaged_json_is_refused(manifest, data):
    (manifest.root / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        Manifest.load(manifest.root)


def test_a_missing_or_ambiguous_split_is_named(manifest):
    train, test = manifest.train, manifest.evaluation
    only_test = dataclasses.replace(manifest, splits={"test": test})
    with pytest.raises(ValueError, match="no split 'train', only 'test'"):
        _ = only_test.train
    only_train = dataclasses.replace(manifest, splits={"train": train})
    with pytest.raises(ValueError, match=r"no split besides 'train'.*add val/ or test/.*another"):
        _ = only_train.evaluation
    others = dataclasses.replace(manifest, splits={"train": train, "a": test, "b": test})
    with pytest.raises(ValueError, match="'train', 'a', 'b', and does not say which"):
        _ = others.evaluation


def test_with_val_and_test_it_is_val_that_is_evaluated_on(manifest):
    train, test = manifest.train, manifest.evaluation
    val = dataclasses.replace(test, name="val")
    both = dataclasses.replace(manifest, splits={"train": train, "test": test, "val": val})
    assert both.evaluation is val
    assert dataclasses.replace(both, evaluation_split="test").evaluation is test


def test_importing_it_imports_no_heavy_library():
    code = "import sys, data_prep.manifest; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
