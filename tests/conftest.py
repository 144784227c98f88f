"""What all tests share: where the real data is, and which tests this machine can run."""

import os
import signal
from pathlib import Path

import pytest

# One thread each: threads that wait for each other spin, and tests share the cores with much else.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests that a shell starts in the background ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data files (CIFAR-10 as JPEG, 500 ImageNet images, Berkeley images)."""
    folder = Path(os.environ.get("REPRISE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set REPRISE_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: 64 training images, 16 test images, four classes."""
    from tests.data import shard_set

    images = tmp_path_factory.mktemp("images")
    for split, count in (("train", 64), ("test", 16)):
        for number in range(count):
            file = images / split / f"class{number % 4}" / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(shard_set.encode(shard_set.picture(number), "png"))
    return images


@pytest.fixture(scope="session")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real shard set of `images`, the training images in uneven shards."""
    from data_prep.prepare import prepare
    from data_prep.sources import open_source

    root = tmp_path_factory.mktemp("sets") / "tiny"
    prepare(open_source("folder", images), root, samples_per_shard=40)
    return root


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables: to make them takes seconds, to copy them none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


BSD_SIZES = {
    "train400": [(48, 48)] * 16,
    "test68": [(40, 56), (56, 40), (44, 44), (40, 56), (48, 41)],
    "test12": [(64, 64), (40, 40)],
}


@pytest.fixture(scope="session")
def bsd_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of the form of the Berkeley images: 16 for training, 5 and 2 for test, grey."""
    import tarfile

    from tests.data import shard_set

    folder = tmp_path_factory.mktemp("bsd")
    for split, (name, sizes) in enumerate(BSD_SIZES.items()):
        (folder / "images" / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            grey = shard_set.picture(100 * split + number, *size)[..., 0]
            file = folder / "images" / name / f"{number:02d}.png"
            file.write_bytes(shard_set.encode(grey, "png"))
    with tarfile.open(folder / "bsd-denoise.tar", "w") as tar:
        tar.add(folder / "images", "bsd-denoise")
    return folder / "bsd-denoise.tar"


@pytest.fixture(scope="session")
def bsd_shards(bsd_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of `bsd_tar`; the five test images in shards of two and three."""
    from data_prep.prepare import prepare
    from data_prep.sources import open_source

    root = tmp_path_factory.mktemp("sets") / "bsd"
    prepare(open_source("bsd", bsd_tar), root, samples_per_shard=3)
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Where the lab must be up, a cluster test that is skipped has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("cluster") and "REPRISE_LAB" in os.environ:
        report.outcome = "failed"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say why, what needs a device that is not here."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible here"))
