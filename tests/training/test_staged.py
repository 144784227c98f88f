"""Where a run looks for the shards of its set."""

from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from data_prep.stage import stage
from pipeline.training.plan import STAGED, open_set


def test_copies_are_read_that_the_environment_names(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = tmp_path / "fast"
    stage(shards, fast, share=1, shares=2)
    monkeypatch.setenv(STAGED, f"{tmp_path / 'nowhere'}:{fast}")
    manifest = open_set(shards)
    assert manifest == Manifest.load(shards)
    held = [shard for split in manifest.splits.values() for shard in split.shards]
    assert [manifest.folder_of(shard) for shard in held][:2] == [shards, fast]
    monkeypatch.delenv(STAGED)
    assert {open_set(shards).folder_of(shard) for shard in held} == {shards}
