from pathlib import Path

import pytest
from pictures import class_folders

from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.sources import open_source


@pytest.fixture
def source_folder(tmp_path: Path) -> Path:
    """18 training and 9 test images of three classes."""
    return class_folders(tmp_path / "insects")


@pytest.fixture
def manifest(source_folder: Path, tmp_path: Path) -> Manifest:
    """Those images as a set of three and two shards."""
    return prepare(
        open_source("folder", source_folder), tmp_path / "set", samples_per_shard=7, workers=1
    )
