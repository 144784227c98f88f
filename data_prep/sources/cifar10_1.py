"""CIFAR-10.1: a second test set for CIFAR-10 (Recht et al., 2018), version 6, as published."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.items import Item
from data_prep.listing import Listing, PixelReader
from data_prep.sources.cifar import PIXELS, SIDE, check_labels

DATA, LABELS = "cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy"
# Those of CIFAR-10, in its order: a label means the same in both.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_TEST = "test"


@dataclass(frozen=True)
class Cifar101Source:
    """The folder that holds the two published arrays. The set has no images to train on."""

    path: Path

    def open(self, scratch: Path) -> Listing:
        """List the images; their pixels are written to ``scratch``."""
        images, labels = _array(self.path / DATA), _array(self.path / LABELS)
        if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"{self.path / DATA} holds {images.dtype} of shape {images.shape} and not bytes of "
                f"(n, {SIDE}, {SIDE}, 3): fetch it again"
            )
        names = check_labels(labels.reshape(-1), LABELS, len(images), len(CLASSES))
        target = scratch / "pixels.bin"
        target.write_bytes(images.tobytes())
        return Listing(
            name="cifar10.1",
            classes=CLASSES,
            items=[
                Item(_TEST, label, f"image {row}", row * PIXELS, PIXELS)
                for row, label in enumerate(names)
            ],
            rejected=[],
            reader=PixelReader(target, "RGB", SIDE, SIDE),
            settings={
                "source": "cifar10.1",
                "pixels_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
            },
            evaluation_split=_TEST,
        )


def _array(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give the folder that holds {DATA} and {LABELS}"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} ({error}): fetch it again") from None
    return found
